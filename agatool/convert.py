"""Checkpoints of the reference implementations (ALBEF, RaSa) -> our model, its teacher and a model folder."""

from __future__ import annotations

import copy
import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agatool import console
from agatool.checkpoint import TEACHER_FILE, save_tensors, told, warn_untrained, write_model
from agatool.config import ModelConfig
from agatool.errors import CheckpointError, DataError, UsageError
from agatool.files import atomic_folder, read_json
from agatool.foreign import (
    MOMENTUM,
    POSITIONS,
    Grid,
    check_bert,
    check_tied,
    our_name,
    plain_names,
    read_weights,
    square_grid,
)
from agatool.model import PersonSearchModel, resample_positions
from agatool.runs import is_model
from agatool.tokenization import Tokenizer, cached_tokenizer, load_tokenizer_file, placeholder_tokenizer

BERT_VOCABULARY = "bert-base-uncased"  # of every published ALBEF and RaSa checkpoint
BERT_VOCABULARY_SIZE = 30522
HEAD_WIDTH = 64  # of every published ViT and BERT
MAX_WORDS = 50  # RaSa's cut


@dataclass(frozen=True)
class Converted:
    """A reference checkpoint as our model, and what became of its parts."""

    model: PersonSearchModel  # in eval mode, its tokenizer with it
    teacher: dict[str, Tensor] | None  # the momentum copy under our names, where asked for
    left_out: dict[str, tuple[str, ...]]  # why -> the checkpoint's names
    assumed: tuple[str, ...]  # what was assumed or changed, in sentences

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know: `assumed`, and whether the model can read text."""
        if not self.model.tokenizer.is_placeholder:
            return self.assumed
        bert = self.model.config.vocab_size == BERT_VOCABULARY_SIZE
        return (
            *self.assumed,
            "The checkpoint brings no vocabulary and none was given: the model takes token ids but cannot read text. "
            f"Convert it again with --tokenizer {BERT_VOCABULARY if bert else 'FILE'}.",
        )


def convert(
    source: Path,
    out: Path,
    config: Path | None = None,
    with_teacher: bool = False,
    tokenizer: str | None = None,
    overwrite: bool = False,
) -> Converted:
    """Turn an ALBEF or RaSa checkpoint into the model folder `out`; arguments as in `open_reference`.

    Raises CheckpointError for a file that is damaged or does not fit, UsageError where `out` is in use, DiskError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not is_model(out):
            raise UsageError(f"{out} is in use and no model folder; it is left alone", "Choose another folder.")
        if not overwrite:
            raise UsageError(f"{out} is not empty", "Choose another folder, or add --overwrite.")
    converted = open_reference(source, config, with_teacher, tokenizer)
    with atomic_folder(out) as temporary:
        write_model(temporary, converted.model, _card(source, converted))
        if converted.teacher is not None:
            save_tensors(temporary / TEACHER_FILE, converted.teacher)
    return converted


def open_reference(
    source: Path, config: Path | None = None, with_teacher: bool = False, tokenizer: str | None = None
) -> Converted:
    """Read an ALBEF (pre-training or retrieval) or RaSa checkpoint, `.pth` or `.safetensors`.

    config        JSON with the numbers of heads (`bert.num_attention_heads`), which the tensors do not tell, and
                  optionally `image_res`, an integer or [height, width]. Without it a `config.json` beside the
                  source is read where it has the `bert` part; without that, heads are 64 wide.
    with_teacher  also give the momentum copy.
    tokenizer     its vocabulary: a file, folder or hub name. Without it BERT's from the local hub cache where the
                  sizes agree, else one without words, which takes ids but no text.

    Raises CheckpointError for a file that is missing, damaged, unsafe, or has a tensor too few, too many or of
    another shape.
    """
    tensors, spelling = plain_names(read_weights(source))
    settings = _settings(source, config)
    try:
        sizes, grid, notes = _sizes(tensors, settings, source)
        with torch.device("meta"):  # so that nothing is allocated for a file that does not fit
            wanted = {name: tensor.shape for name, tensor in new_model(sizes).state_dict().items()}
    except ValueError as error:
        raise CheckpointError(f"{source} has sizes that no model has: {error}", "Is it the right file?") from error
    parts = _Parts(sizes, wanted, source)
    for name, tensor in tensors.items():
        parts.place(name, tensor, spelling[name], grid)
    parts.check(tensors, with_teacher)
    for prefix in ("text_encoder.", "text_encoder_m."):
        check_tied(tensors, prefix, source)
    words = _tokenizer(tokenizer, sizes)
    model = new_model(sizes.model_copy(update={"untrained": parts.new})).eval()
    model.load_state_dict({**model.state_dict(), **parts.student})
    model.tokenizer = words
    teacher = None
    if with_teacher:
        teacher = {**copy.deepcopy(model.state_dict()), **parts.momentum}
        del parts.left_out[MOMENTUM_LEFT_OUT]
    left_out = {why: tuple(names) for why, names in parts.left_out.items()}
    return Converted(model, teacher, left_out, tuple(notes))


def report(converted: Converted) -> None:
    """Tell the user what a checkpoint lacked and what was assumed."""
    for note in converted.notes:
        console.warn(note)
    warn_untrained(converted.model)


def new_model(config: ModelConfig, seed: int = 0) -> PersonSearchModel:
    """A model whose initial values depend on `seed` alone, not on the caller's random state.

    Raises ValueError for sizes that do not go together.
    """
    if config.text_width % config.text_heads:
        raise ValueError(f"{config.text_heads} heads do not divide the text width of {config.text_width}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return PersonSearchModel(config)
        except (RuntimeError, AssertionError, TypeError) as error:  # what timm raises
            raise ValueError(str(error)) from error


def _settings(source: Path, config: Path | None) -> dict[str, Any]:
    """The reference's settings: `config`, or a config.json beside the source that has a `bert` part."""
    beside = source.with_name("config.json")
    try:
        if config is not None:
            found = read_json(config)
        elif beside.is_file():
            found = read_json(beside)
        else:
            return {}
    except DataError as error:
        raise CheckpointError(error.message, "Check --config.") from error
    if isinstance(found, dict) and isinstance(found.get("bert"), dict):
        return found
    if config is None:  # somebody else's file
        return {}
    raise CheckpointError(f"{config} has no `bert` part with num_attention_heads", "See docs/interop.md for its form.")


# --- sizes --------------------------------------------------------------------------------------------------


def _sizes(tensors: dict[str, Tensor], settings: dict[str, Any], source: Path) -> tuple[ModelConfig, Grid, list[str]]:
    """The model's configuration, the checkpoint's own grid of patches, and notes; CheckpointError."""

    def shape(name: str, dimensions: int) -> list[int]:
        tensor = tensors.get(name)
        if tensor is None or tensor.dim() != dimensions:
            what = "lacks" if tensor is None else "has a misshapen"
            raise CheckpointError(
                f"{source} {what} {name}: it is no ALBEF or RaSa checkpoint",
                "A model folder is opened as a folder; other weights start a training (docs/interop.md).",
            )
        return list(tensor.shape)

    image_width, _, patch, _ = shape("visual_encoder.patch_embed.proj.weight", 4)
    vocabulary, text_width = shape("text_encoder.embeddings.word_embeddings.weight", 2)
    positions = shape("text_encoder.embeddings.position_embeddings.weight", 2)[0]
    tokens = shape("visual_encoder.pos_embed", 3)[1]
    text_mlp = shape("text_encoder.encoder.layer.0.intermediate.dense.weight", 2)[0]
    embed_dim = shape("vision_proj.weight", 2)[0]
    text_layers, fusion_layers = _split(tensors, source)
    grid, size, notes = _image_size(tokens - 1, patch, settings, source)
    image_heads, text_heads, note = _heads(settings, image_width, text_width)
    config = ModelConfig.model_validate(
        {
            "image_size": size,
            "patch": patch,
            "image_width": image_width,
            "image_depth": _count(tensors, r"visual_encoder\.blocks\.(\d{1,3})\."),
            "image_heads": image_heads,
            "vocab_size": vocabulary,
            "text_width": text_width,
            "text_heads": text_heads,
            "text_mlp": text_mlp,
            "text_layers": text_layers,
            "fusion_layers": fusion_layers,
            "max_positions": positions,
            "embed_dim": embed_dim,
            "text": {"sep": False, "cleanup": "albef", "max_words": MAX_WORDS, "max_tokens": min(64, positions)},
        }
    )
    return config, grid, [*notes, *note]


def _count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers names have, which must be 0, 1, 2, ...; ValueError otherwise."""
    numbers = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if gaps := set(range(max(numbers, default=-1))) - numbers:
        raise ValueError(f"layer {min(gaps)} of {max(numbers) + 1} is missing")
    return len(numbers)


def _split(tensors: dict[str, Tensor], source: Path) -> tuple[int, int]:
    """How many text layers and how many fusion layers: the ones with cross-attention, which come last."""
    layer = r"text_encoder\.encoder\.layer\.(\d{1,3})\."
    total = _count(tensors, layer)
    crossed = {int(match[1]) for name in tensors if (match := re.match(layer + "crossattention", name))}
    first = min(crossed, default=total)
    if crossed != set(range(first, total)) or not 0 < first < total:
        raise CheckpointError(
            f"{source}: of {total} text layers these look at the image: {sorted(crossed)}",
            "The reference has text layers first and cross-modal layers after them; is it the right file?",
        )
    return first, total - first


def _image_size(
    patches: int, patch: int, settings: dict[str, Any], source: Path
) -> tuple[Grid, tuple[int, int], list[str]]:
    """The grid that the position embeddings were made for, the image size to use, and a note where they differ.

    The tensor tells only how many patches there are: a grid that is not square must be told by `image_res`.
    """
    square = square_grid(patches)
    wanted = settings.get("image_res")
    if wanted is None:
        if square is None:
            raise CheckpointError(
                f"{source} has position embeddings of {patches} patches, which is no square grid",
                'Say height and width with --config and {"image_res": [384, 192], "bert": {...}}.',
            )
        return square, (square[0] * patch, square[1] * patch), []
    size = _pair(wanted)
    if size is None or patch < 1 or any(side < patch or side % patch for side in size):
        raise CheckpointError(f"image_res {wanted!r} is no multiple of the patch size {patch}", "Check --config.")
    target = (size[0] // patch, size[1] // patch)
    if target[0] * target[1] == patches:
        return target, size, []
    if square is None:
        raise CheckpointError(
            f"{source} has position embeddings of {patches} patches, image_res {wanted!r} makes another number",
            "Give the image_res that the checkpoint was trained with.",
        )
    return square, size, [f"Position embeddings were resampled from {_by(square)} to {_by(target)} patches."]


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        value = [value, value]
    if isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) for side in value):
        return value[0], value[1]
    return None


def _by(grid: Grid) -> str:
    return f"{grid[0]} x {grid[1]}"


def _heads(settings: dict[str, Any], image_width: int, text_width: int) -> tuple[int, int, list[str]]:
    """Heads of the ViT and of BERT. The reference has one number for both: `vision_heads` only where they differ."""
    notes = []
    if settings:
        check_bert(settings["bert"], "--config")
        text = settings["bert"].get("num_attention_heads")
        image = settings.get("vision_heads", text)
    else:
        image, text = image_width // HEAD_WIDTH, text_width // HEAD_WIDTH
        notes.append(
            f"No configuration tells the number of heads: {image} in the image encoder and {text} in the text "
            f"encoder are assumed, {HEAD_WIDTH} wide each. If the checkpoint has others, convert it with --config."
        )
    for heads, width, what in ((image, image_width, "image"), (text, text_width, "text")):
        if not isinstance(heads, int) or heads < 1 or width % heads:
            raise CheckpointError(
                f"{heads!r} heads do not divide the {what} encoder's width of {width}",
                "Say bert.num_attention_heads (and vision_heads, where the ViT has another number) with --config.",
            )
    return image, text, notes


# --- parts --------------------------------------------------------------------------------------------------

MOMENTUM_LEFT_OUT = "momentum copy (--with-teacher keeps it)"
NOT_COPIED = ("itm_head.", "temperature")  # the reference has no momentum copy of these


def _leftovers(config: ModelConfig) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """What the reference has and we have not: name -> why it is left out, and its shape (None: any size)."""
    queue, rasa = "queue of past features: queues start empty", "head of a loss that only RaSa has"
    heads = {
        f"{head}.{parameter}": (rasa, shape)
        for head in ("prd_head", "mrtd_head")
        for parameter, shape in (("weight", (2, config.text_width)), ("bias", (2,)))
    }
    return {
        "image_queue": (queue, (config.embed_dim, None)),
        "text_queue": (queue, (config.embed_dim, None)),
        "idx_queue": (queue, (1, None)),
        "queue_ptr": (queue, (1,)),
        **heads,
        "text_encoder.embeddings.position_ids": ("the numbers 0, 1, 2, ...", (1, config.max_positions)),
        "text_encoder.cls.predictions.decoder.weight": ("tied: equal to the word embeddings", (None, None)),
        "text_encoder.cls.predictions.decoder.bias": ("tied: equal to the MLM bias", (None,)),
    }


class _Parts:
    """Every tensor of a checkpoint in its place; `check` tells what has none."""

    def __init__(self, config: ModelConfig, wanted: dict[str, torch.Size], source: Path) -> None:
        self.student: dict[str, Tensor] = {}
        self.momentum: dict[str, Tensor] = {}
        self.left_out: dict[str, list[str]] = {}
        self.new: tuple[str, ...] = ()
        self._config, self._wanted, self._source = config, wanted, source
        self._leftovers = _leftovers(config)
        self._unknown: set[str] = set()
        self._misshapen: set[str] = set()

    def place(self, name: str, tensor: Tensor, spelled: str, grid: Grid) -> None:
        """Sort one tensor in; `grid` is what the checkpoint's position embeddings were made for."""
        plain = MOMENTUM.sub(r"\1.", name)
        if plain in self._leftovers:
            why, shape = self._leftovers[plain]
            if not _fits(tensor, shape):
                self._misshapen.add(spelled)
            self.left_out.setdefault(why, []).append(spelled)
            return
        ours = our_name(plain, self._config.text_layers)
        if ours is None or ours not in self._wanted:
            self._unknown.add(spelled)
            return
        if ours == POSITIONS and tensor.dim() == 3 and tensor.shape[1] == grid[0] * grid[1] + 1:
            height, width = self._config.image_size
            tensor = resample_positions(tensor, grid, (height // self._config.patch, width // self._config.patch))
        if tensor.shape != self._wanted[ours] or not tensor.is_floating_point():
            self._misshapen.add(spelled)
        if plain == name:
            self.student[ours] = tensor
        else:
            self.momentum[ours] = tensor
            self.left_out.setdefault(MOMENTUM_LEFT_OUT, []).append(spelled)

    def check(self, names: Iterable[str], with_teacher: bool) -> None:
        """Raise CheckpointError for what is unknown, misshapen or missing among the checkpoint's `names`.

        A checkpoint without any part of the MLM head (ALBEF's retrieval) may lack all of it: it starts new.
        """
        missing = self._wanted.keys() - self.student.keys()
        if not any(name.startswith("text_encoder.cls.") for name in names):
            self.new = tuple(name for name in self._wanted if name.startswith("mlm_"))
            missing -= set(self.new)
        if with_teacher:
            if not self.momentum:
                raise CheckpointError(f"{self._source} has no momentum copy", "Leave out --with-teacher.")
            copied = {name for name in self._wanted if not name.startswith((*NOT_COPIED, *self.new))}
            missing |= {f"momentum copy of {name}" for name in copied - self.momentum.keys()}
        problems = told({"missing": missing, "unknown": self._unknown, "of another shape": self._misshapen})
        if problems:
            raise CheckpointError(f"{self._source} does not fit: {problems}", "Is it the right checkpoint?")


def _fits(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    same = (wanted is None or size == wanted for size, wanted in zip(tensor.shape, shape, strict=False))
    return tensor.dim() == len(shape) and all(same)


# --- tokenizer and card -------------------------------------------------------------------------------------


def _tokenizer(given: str | None, config: ModelConfig) -> Tokenizer:
    """The vocabulary for converted weights: the one given, BERT's where it is at hand and fits, or a placeholder."""
    if given is not None:
        tokenizer = Tokenizer(load_tokenizer_file(given), config.text)
        if tokenizer.vocab_size != config.vocab_size:
            raise CheckpointError(
                f"{given} has {tokenizer.vocab_size} entries, the checkpoint {config.vocab_size}",
                "Give the tokenizer that the checkpoint was trained with.",
            )
        return tokenizer
    bert = config.vocab_size == BERT_VOCABULARY_SIZE
    if bert and (cached := cached_tokenizer(BERT_VOCABULARY)) is not None:
        return Tokenizer(cached, config.text)
    return Tokenizer(placeholder_tokenizer(config.vocab_size, bert_ids=bert), config.text)


def _card(source: Path, converted: Converted) -> str:
    """README.md of a converted model: where it came from and what became of every part."""
    config = converted.model.config
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    left_out = [f"- {why}: {_abridged(names)}" for why, names in converted.left_out.items()]
    new = [f"- {name}" for name in converted.model.config.untrained]
    notes = [f"- {note}" for note in converted.notes]
    teacher = "kept in `teacher.safetensors`" if converted.teacher else "not kept"
    return "\n".join(
        [
            "# Converted model",
            "",
            f"From `{source.name}` ({source.stat().st_size:,} bytes, sha256 {digest}) by `aga convert`. The licence "
            "of the weights is that of their source.",
            "",
            f"- images {config.image_size[0]} x {config.image_size[1]}, patches of {config.patch}; image encoder "
            f"{config.image_depth} layers, {config.image_width} wide, {config.image_heads} heads",
            f"- {config.text_layers} text and {config.fusion_layers} fusion layers, {config.text_width} wide, "
            f"{config.text_heads} heads; shared space {config.embed_dim}",
            f"- captions as the weights were trained: `[CLS] X` without `[SEP]`, ALBEF's clean-up, {MAX_WORDS} words",
            f"- momentum copy: {teacher}",
            *_section("Starts new: the source has no such weights, train before use", new),
            *_section("Deliberately left out", left_out),
            *_section("Notes", notes),
            "",
        ]
    )


def _abridged(names: tuple[str, ...]) -> str:
    """All names, or how many there are of each part."""
    if len(names) <= 4:
        return ", ".join(f"`{name}`" for name in names)
    parts = Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"`{part}.*` ({count})" for part, count in parts.items())


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", f"## {title}", "", *lines] if lines else []
