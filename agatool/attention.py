"""Where words look in an image: cross-attention and Grad-CAM maps, and `aga visualize-attention` made of them.

Shape suffixes: N texts given to the fusion layers, W words of a text (padded), L tokens, S fusion layers, h heads,
P image tokens without [CLS], R rows and C columns of the patch grid (P = R * C), V vocabulary.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from agatool import console
from agatool.config import MaskingConfig
from agatool.data.annotations import clean_caption, parse_record, read_records
from agatool.data.images import decode_image, eval_transform, to_tensor
from agatool.data.prepare import Prepared
from agatool.data.word_classes import NamedWord
from agatool.encoding import finite, model_device
from agatool.errors import DataError, UsageError
from agatool.files import contained
from agatool.heatmaps import PAIRS_A_SHEET, Panel, Picture, draw_pair, draw_sheet
from agatool.localisation import Scores, Truth, read_masks, upsample, word_kind
from agatool.masking import word_scores
from agatool.model import AttentionMaps, PersonSearchModel
from agatool.objective import class_attention, fillable_ids
from agatool.report import write_csv
from agatool.tokenization import CONTINUATION, Batch, Encoding, Span, Tokenizer

Mode = Literal["words", "masked"]
Method = Literal["attention", "gradcam"]
Format = Literal["png", "pdf", "svg"]
MODES: tuple[Mode, ...] = ("words", "masked")
METHODS: tuple[Method, ...] = ("attention", "gradcam")

SHOWN_WORDS = 6  # of a caption, where --words is left out
PAIRS, MEASURED = 4, 500  # pairs drawn, captions measured, where --count is left out
GUESSES = 5
TEXTS = 64  # given to the fusion layers at once
_MARKS = ("maps.csv", "localisation.csv")  # a folder that holds one of them is an earlier output of ours

# What looks best on the sample data by `--measure` with the shipped weights (docs/attention.md): for each mode its
# method and heads, and for each mode and method the layer, as a share of the fusion layers, since models differ in
# how many they have.
_BEST: dict[Mode, tuple[Method, str]] = {"words": ("attention", "mean"), "masked": ("attention", "mean")}
_DEPTH: dict[tuple[Mode, Method], float] = {
    ("words", "attention"): 1.0,
    ("words", "gradcam"): 0.5,
    ("masked", "attention"): 1.0,
    ("masked", "gradcam"): 1.0,
}


@dataclass(frozen=True)
class Look:
    """How to look: `layer` counts fusion layers from 1, `head` is mean, max or a head's number from 1.

    What is None is chosen by `settled`.
    """

    mode: Mode = "words"
    method: Method | None = None
    layer: int | None = None
    head: str | None = None

    def settled(self, model: PersonSearchModel) -> Look:
        """With every choice made and checked against the model. Raises UsageError."""
        layers, heads = model.config.fusion_layers, model.config.text_heads
        method, head = self.method or _BEST[self.mode][0], self.head or _BEST[self.mode][1]
        layer = self.layer or max(1, round(_DEPTH[self.mode, method] * layers))
        if not 1 <= layer <= layers:
            raise UsageError(f"--layer {layer}, but the model has {layers} fusion layers", f"Give 1 to {layers}.")
        if head not in ("mean", "max") and not (head.isdecimal() and 1 <= int(head) <= heads):
            raise UsageError(f"--head {head}, but the model has {heads} heads", f"Give mean, max or 1 to {heads}.")
        if (self.mode, method, layer) == ("words", "gradcam", layers):
            raise UsageError(
                f"Grad-CAM of the match is zero in the last fusion layer ({layer}): only [CLS] is read there",
                "Give an earlier --layer, --mode masked, or --method attention.",
            )
        return replace(self, method=method, layer=layer, head=head)


# -- maps ---------------------------------------------------------------------------------------------------------


class Views(NamedTuple):
    """What words looked at in every fusion layer and head, both [S, N, W, h, P]."""

    attention: Tensor  # cross-attention weights
    gradcam: Tensor  # those weights times the positive part of the target's gradient with respect to them

    def heat(self, look: Look, grid: tuple[int, int]) -> Tensor:
        """[N, W, R, C] of one settled way to look."""
        assert look.layer is not None
        assert look.head is not None
        weights_NWhP = (self.gradcam if look.method == "gradcam" else self.attention)[look.layer - 1]
        if look.head == "mean":
            heat_NWP = weights_NWhP.mean(2)
        elif look.head == "max":
            heat_NWP = weights_NWhP.amax(2)
        else:
            heat_NWP = weights_NWhP[:, :, int(look.head) - 1]
        return heat_NWP.unflatten(-1, grid)


def views(cross: list[Tensor], target: Tensor, words_NWL: Tensor) -> Views:
    """Read each word's maps off the cross-attention weights `cross`, S times [N, h, L, 1 + P].

    `target` is the scalar whose gradient Grad-CAM takes (Selvaraju et al. 2017; on cross-attention: Li et al. 2021,
    ALBEF); `words_NWL` says which tokens a word has. A word's map is the mean over its tokens; the image's [CLS], the
    first column, is left out.
    """
    weight_NWL = words_NWL / words_NWL.sum(-1, keepdim=True).clamp(min=1)
    gradients = torch.autograd.grad(target, cross)

    def of_words(maps_NhLP: Tensor) -> Tensor:
        return (weight_NWL[:, None] @ maps_NhLP[..., 1:]).transpose(1, 2)

    with torch.no_grad():
        attention = [of_words(weights) for weights in cross]
        gradcam = [of_words(weights * grad.clamp(min=0)) for weights, grad in zip(cross, gradients, strict=True)]
        return Views(torch.stack(attention), torch.stack(gradcam))


def look_words(
    model: PersonSearchModel, text_tokens: Tensor, mask: Tensor, image_tokens: Tensor, words_NWL: Tensor
) -> tuple[Views, Tensor]:
    """Words of whole captions, [N, L, D] with mask [N, L], looking at one image each, [N, 1 + P, H].

    -> (views, probability of a match [N]). Grad-CAM's target is the ITM logit of "match".
    """
    with torch.enable_grad():
        maps = AttentionMaps()
        logits = model.itm(model.fuse(text_tokens.requires_grad_(), mask, image_tokens, maps=maps))
        seen = views(maps.cross, logits[:, 1].sum(), words_NWL)
    return seen, finite(logits.detach().float()).softmax(-1)[:, 1]


def look_masked(
    model: PersonSearchModel, batch: Batch, image_tokens: Tensor, words_NL: Tensor, mask_id: int
) -> tuple[Views, Tensor]:
    """One word of each text, its tokens `words_NL`, masked and filled in while looking at an image each.

    -> (views with W = 1, MLM logits of its positions end to end [positions, V]). Grad-CAM's target is the logit of
    the word that was there.
    """
    with torch.no_grad():
        encoded = model.encode_text(batch.ids.masked_fill(words_NL, mask_id), batch.mask)
    with torch.enable_grad():
        maps = AttentionMaps()
        fused = model.fuse(encoded.tokens.requires_grad_(), batch.mask, image_tokens, maps=maps)
        logits = model.mlm(fused[words_NL])
        target = logits.gather(1, batch.ids[words_NL][:, None]).sum()
        seen = views(maps.cross, target, words_NL[:, None].float())
    return seen, finite(logits.detach().float())


def guesses(logits_TV: Tensor, tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """The best words for T masked pieces of one word, with their probabilities, best first.

    The first piece must start a word and the others continue it; the pieces are filled in independently, as the MLM
    does, so a word's probability is their product.
    """
    size = logits_TV.shape[1]
    starts = fillable_ids(tokenizer, size).to(logits_TV.device)
    found: list[tuple[list[int], float]] = [([], 1.0)]
    for position, logits_V in enumerate(logits_TV):
        allowed = starts if position == 0 else _continuing(tokenizer, size).to(logits_V.device)
        top = logits_V.masked_fill(~allowed, float("-inf")).softmax(-1).topk(min(GUESSES, int(allowed.sum())))
        pieces = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        longer = [([*ids, piece], chance * p) for ids, chance in found for piece, p in pieces]
        found = sorted(longer, key=lambda word: -word[1])[:GUESSES]
    return [(tokenizer.decode_word(ids), chance) for ids, chance in found]


def _continuing(tokenizer: Tokenizer, size: int) -> Tensor:
    """[V] bool: pieces that continue a word."""
    return torch.tensor([tokenizer.piece(piece).startswith(CONTINUATION) for piece in range(size)])


def patch_grid(model: PersonSearchModel, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of patches that the image encoder makes of images [B, 3, height, width]."""
    rows, columns = model.image_encoder.vit.patch_embed(pixels[:1]).shape[1:3]
    return rows, columns


def token_words(encodings: Sequence[Encoding], spans: Sequence[Sequence[Span]], length: int) -> Tensor:
    """[N, W, L] float: which tokens the words at these character spans have, padded with zeros to the most words.

    A span takes all words it touches; one behind the cut of the caption has no tokens.
    """
    words = torch.zeros(len(encodings), max(map(len, spans), default=0), length)
    for row, (encoding, wanted) in enumerate(zip(encodings, spans, strict=True)):
        for column, (start, end) in enumerate(wanted):
            touched = {n for n, (first, last) in enumerate(encoding.words) if first < end and last > start}
            for token, word in enumerate(encoding.word_of):
                words[row, column, token] = float(word in touched)
    return words


# -- pairs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A caption and the image it is shown on; `name` is unique and fit for a file name."""

    name: str
    image: Path
    caption: str


def single_pair(image: Path, text: str) -> Pair:
    """An image file and a text of the user's. Raises UsageError for a text that is none."""
    try:
        return Pair(_file_name(image.stem), image, clean_caption(text))
    except DataError as error:
        raise UsageError(f"--text: {error.message}", 'For example --text "a man in a red coat".') from error


def captions_pairs(file: Path, image_root: Path | None, count: int | None) -> list[Pair]:
    """The first `count` (None: all) captions of a file in any schema that `aga prepare` reads.

    Image paths start from `image_root`, by default the file's folder or an imgs/ or images/ in it. A record that
    cannot be used is told and left out. Raises DataError where none is left.
    """
    pairs = list(islice(_file_pairs(file, image_root), count))
    if not pairs:
        raise DataError(f"{file} holds no usable record", "See docs/datasets.md for the formats.")
    return pairs


def _file_pairs(file: Path, image_root: Path | None) -> Iterator[Pair]:
    roots = [image_root] if image_root else [file.parent / folder for folder in (".", "imgs", "images")]
    number = 0
    for position, raw in enumerate(read_records(file)):
        try:  # whose picture it is does not matter here
            record = parse_record({"id": 0, **raw} if isinstance(raw, dict) else raw)
            candidates = [contained(root, record.image) for root in roots]
        except DataError as error:
            console.warn(f"{file.name}[{position}] is left out: {error.message}")
            continue
        image = next((path for path in candidates if path.is_file()), candidates[0])
        for caption in record.captions:
            yield Pair(f"{number:04d}-{_file_name(image.stem)}", image, caption)
            number += 1


def dataset_pairs(prepared: Prepared, split: str, count: int, query: int | None = None) -> list[Pair]:
    """`count` captions spread evenly over a split, or the one with caption_id `query`, with their own images."""
    captions = prepared.captions if query is not None else prepared.split(split)[1]
    if query is not None:
        captions = captions[captions["caption_id"] == query]
        if captions.empty:
            raise DataError(
                f"{prepared.folder} has no caption {query}", f"caption_id runs to {len(prepared.captions) - 1}."
            )
    if captions.empty:
        raise DataError(f"Split {split!r} of {prepared.folder} has no captions", "Choose another --split.")
    paths = prepared.images.set_index("image_id")["path"]
    chosen = captions.iloc[spread(len(captions), count)]
    return [
        Pair(f"caption-{row.caption_id}", contained(prepared.image_root, paths[row.image_id]), str(row.caption))
        for row in chosen.itertuples()
    ]


def spread(total: int, count: int) -> list[int]:
    """`count` indices below `total` (all, where it is not so many), evenly spread."""
    count = min(count, total)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def _file_name(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:60].strip("_") or "image"


# -- explaining -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """A word of a caption; `heat` where it was asked for."""

    number: int  # position in the caption, from 0
    span: Span
    text: str
    attention: float  # its share of the caption's class attention (AGM's score)
    heat: np.ndarray | None = None  # [R, C] float32
    guesses: Sequence[tuple[str, float]] = ()  # masked mode: words and probabilities


@dataclass(frozen=True)
class Explanation:
    """What the words of a pair look at."""

    pair: Pair
    match: float  # probability of a match, by the ITM head
    words: Sequence[Word]

    @property
    def shown(self) -> list[Word]:
        """The words that have a map."""
        return [word for word in self.words if word.heat is not None]


def explain(model: PersonSearchModel, pair: Pair, look: Look, wanted: Sequence[str] | None = None) -> Explanation:
    """Maps of a pair's words by a settled `look`: of those in `wanted` (lower case; ("all",): every one), or of the
    SHOWN_WORDS with the most class attention. Raises DataError for a broken image.

    `model` is in evaluation mode and has its tokenizer, as `agatool.load` gives it.
    """
    tokenizer, device = model.tokenizer, model_device(model)
    encoding = tokenizer.encode([pair.caption])[0]
    batch = tokenizer.pad([encoding]).to(device)
    pixels = _pixels(model, [pair.image])
    with torch.no_grad():
        image_tokens = model.encode_image(pixels).tokens
        encoded, attention_BL = class_attention(model, batch.ids, batch.mask, MaskingConfig())
        scores = word_scores(attention_BL, batch.word_of)[0].tolist()
    readable = 1 + max(encoding.word_of)
    words = [
        Word(number, span, pair.caption[slice(*span)], scores[number] if number < readable else 0.0)
        for number, span in enumerate(encoding.words)
    ]
    chosen = _choose(words[:readable], wanted)
    members_1WL = token_words([encoding], [[word.span for word in chosen]], batch.ids.shape[1]).to(device)
    seen, match = look_words(model, encoded.tokens, batch.mask, image_tokens, members_1WL)
    grid = patch_grid(model, pixels)
    filled: list[list[tuple[str, float]]] = [[] for _ in chosen]
    heat_WRC = seen.heat(look, grid)[0]
    if look.mode == "masked" and chosen:
        heat_WRC, filled = _explain_masked(model, batch, image_tokens, members_1WL[0].bool(), look, grid)
    for word, heat, words_in in zip(chosen, heat_WRC.cpu().numpy(), filled, strict=True):
        words[word.number] = replace(word, heat=heat, guesses=words_in)
    return Explanation(pair, float(match[0]), words)


def _explain_masked(
    model: PersonSearchModel,
    batch: Batch,
    image_tokens: Tensor,
    members_WL: Tensor,
    look: Look,
    grid: tuple[int, int],
) -> tuple[Tensor, list[list[tuple[str, float]]]]:
    """Heat [W, R, C] and guesses of each word of one caption, masked in turn."""
    heats = [torch.empty(0, *grid)]
    filled: list[list[tuple[str, float]]] = []
    for words_NL in members_WL.split(TEXTS):
        repeated = Batch(*(x.expand(len(words_NL), -1) for x in (batch.ids, batch.mask, batch.word_of)))
        images = image_tokens.expand(len(words_NL), -1, -1)
        seen, logits = look_masked(model, repeated, images, words_NL, model.tokenizer.mask_id)
        heats.append(seen.heat(look, grid)[:, 0].cpu())
        filled += [guesses(part, model.tokenizer) for part in logits.split(words_NL.sum(1).tolist())]
    return torch.cat(heats), filled


def _choose(words: Sequence[Word], wanted: Sequence[str] | None) -> list[Word]:
    """The words to look at, in the caption's order."""
    if wanted is None:
        wanted_numbers = {word.number for word in sorted(words, key=lambda word: -word.attention)[:SHOWN_WORDS]}
        return [word for word in words if word.number in wanted_numbers]
    return [word for word in words if "all" in wanted or word.text.lower() in wanted]


def _pixels(model: PersonSearchModel, images: Sequence[Path]) -> Tensor:
    """Normalised images [B, 3, height, width] on the model's device."""
    config = model.config
    squashed = torch.stack([to_tensor(decode_image(path), config.image_size) for path in images])
    return eval_transform(squashed.to(model_device(model)), config.image_mean, config.image_std)


# -- the command ----------------------------------------------------------------------------------------------------


def claim_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is ours and to be overwritten. Raises UsageError."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", "Choose another --out.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not any((folder / name).is_file() for name in _MARKS):
        raise UsageError(f"{folder} holds something else; it is left alone", "Choose another --out.")
    if not overwrite:
        raise UsageError(f"{folder} is not empty", "Add --overwrite, or choose another --out.")
    shutil.rmtree(folder)


def visualize(
    model: PersonSearchModel,
    pairs: Sequence[Pair],
    look: Look,
    words: str | None,
    out: Path,
    suffix: Format = "png",
) -> list[Explanation]:
    """Draw every pair into `out`: NAME.SUFFIX, contact sheets, maps.csv, words.csv, pairs.csv.

    `words` are separated by commas, or `all`. Raises UsageError where no caption has any of them, DataError for a
    broken image.
    """
    look = look.settled(model)
    wanted = [word.strip().lower() for word in words.split(",")] if words is not None else None
    explained: list[Explanation] = []
    with console.progress("Looking at pairs", len(pairs)) as task:
        for pair in pairs:
            explained.append(explain(model, pair, look, wanted))
            task.advance()
    if wanted and "all" not in wanted and not any(explanation.shown for explanation in explained):
        there = ", ".join(dict.fromkeys(word.text for word in explained[0].words))
        raise UsageError(f"--words {words}: no caption has any of them", f"The first caption's words: {there}")
    with console.progress("Drawing", len(explained)) as task:
        pictures = []
        for explanation in explained:
            pictures.append(_picture(explanation))
            draw_pair(out / f"{explanation.pair.name}.{suffix}", pictures[-1])
            task.advance()
    for start in range(0, len(pictures), PAIRS_A_SHEET):
        number = f"-{start // PAIRS_A_SHEET + 1}" if len(pictures) > PAIRS_A_SHEET else ""
        draw_sheet(out / f"contact_sheet{number}.{suffix}", pictures[start : start + PAIRS_A_SHEET])
    for name, table in _tables(explained, look).items():
        write_csv(out / name, table, decimals=7)
    return explained


def _picture(explanation: Explanation) -> Picture:
    image = np.asarray(decode_image(explanation.pair.image))
    most = max((word.attention for word in explanation.words), default=0.0) or 1.0
    panels = []
    for word in explanation.shown:
        assert word.heat is not None
        notes = [f"{guess} {100 * chance:.0f} %" for guess, chance in word.guesses]
        heat = upsample(word.heat[None], (image.shape[0], image.shape[1]))[0]
        panels.append(Panel(f"[{word.text}]" if notes else word.text, heat, notes))
    shades = [(*word.span, word.attention / most) for word in explanation.words]
    return Picture(image, explanation.pair.caption, shades, f"match {100 * explanation.match:.1f} %", panels)


def _tables(explained: Sequence[Explanation], look: Look) -> dict[str, pd.DataFrame]:
    """pairs.csv, words.csv and, one row a patch, maps.csv."""
    pairs, words, maps = [], [], []
    for explanation in explained:
        name = explanation.pair.name
        pairs.append((name, str(explanation.pair.image), explanation.pair.caption, explanation.match))
        for word in explanation.words:
            filled = " ".join(f"{guess}:{chance:.4f}" for guess, chance in word.guesses)
            words.append((name, word.number, word.text, *word.span, word.attention, filled))
        for word in explanation.shown:
            assert word.heat is not None
            cells = np.ndindex(word.heat.shape)
            maps += [(name, word.number, word.text, *cell, float(word.heat[cell])) for cell in cells]
    of_look = {"mode": look.mode, "method": look.method, "layer": look.layer, "head": look.head}
    return {
        "pairs.csv": pd.DataFrame(pairs, columns=["pair", "image", "caption", "match"]).assign(**of_look),
        "words.csv": pd.DataFrame(
            words, columns=["pair", "number", "word", "start", "end", "class_attention", "guesses"]
        ),
        "maps.csv": pd.DataFrame(maps, columns=["pair", "number", "word", "row", "column", "value"]),
    }


# -- measuring ------------------------------------------------------------------------------------------------------


def measure(model: PersonSearchModel, prepared: Prepared, split: str, count: int, out: Path) -> pd.DataFrame:
    """Every mode, method, layer and head reduction against the sample's part masks, over `count` captions.

    Writes `out`/localisation.csv and returns it (`Scores.table` has the columns). Raises DataError where the data set
    has no masks.
    """
    truth = read_masks(prepared)
    _, captions = prepared.split(split)
    paths = prepared.images.set_index("image_id")["path"]
    chosen = captions[captions["caption_id"].isin(truth.words)]
    if chosen.empty:
        raise DataError(f"No caption of split {split!r} names a part", "Choose another --split.")
    chosen = chosen.iloc[spread(len(chosen), count)]
    scores = Scores()
    with console.progress("Measuring captions", len(chosen)) as task:
        for start in range(0, len(chosen), TEXTS):
            part = chosen.iloc[start : start + TEXTS]
            jobs = [
                (str(row.caption), str(paths[row.image_id]), truth.words[row.caption_id]) for row in part.itertuples()
            ]
            _measure_batch(model, prepared.image_root, truth, jobs, scores)
            task.advance(len(part))
    table = scores.table()
    write_csv(out / "localisation.csv", table)
    return table


def _settings(model: PersonSearchModel) -> Iterator[Look]:
    """Every way to look but single heads, and but Grad-CAM where it is zero by construction."""
    last = model.config.fusion_layers
    for mode in MODES:
        for method in METHODS:
            for layer in range(1, last + 1):
                if (mode, method, layer) != ("words", "gradcam", last):
                    yield from (Look(mode, method, layer, head) for head in ("mean", "max"))


def _measure_batch(
    model: PersonSearchModel, root: Path, truth: Truth, jobs: Sequence[tuple[str, str, list[NamedWord]]], scores: Scores
) -> None:
    """Judge the named words of some (caption, image path, words) under every setting."""
    tokenizer, device = model.tokenizer, model_device(model)
    encodings = tokenizer.encode([caption for caption, _, _ in jobs])
    batch = tokenizer.pad(encodings).to(device)
    spans = [[(word.start, word.end) for word in named] for _, _, named in jobs]
    members_NWL = token_words(encodings, spans, batch.ids.shape[1]).to(device)
    pixels = _pixels(model, [contained(root, path) for _, path, _ in jobs])
    with torch.no_grad():
        image_tokens = model.encode_image(pixels).tokens
        text_tokens = model.encode_text(batch.ids, batch.mask).tokens
    grid = patch_grid(model, pixels)
    seen = {
        "words": look_words(model, text_tokens, batch.mask, image_tokens, members_NWL)[0],
        "masked": _masked_views(model, batch, image_tokens, members_NWL.bool()),
    }
    has_tokens = members_NWL.bool().any(-1).cpu().numpy()
    heats = {look: seen[look.mode].heat(look, grid).cpu().numpy() for look in _settings(model)}
    for row, (_, path, named) in enumerate(jobs):
        column = np.flatnonzero(has_tokens[row])  # the others lie behind the cut of the caption
        kinds = [str(word_kind(named[n])) for n in column]
        mask_WYX = truth.masks(path, [named[n] for n in column])
        for look, heat_NWRC in heats.items():
            setting = (look.mode, str(look.method), str(look.layer), str(look.head))
            scores.add(setting, kinds, upsample(heat_NWRC[row][column], mask_WYX.shape[1:]), mask_WYX)
        scores.add_baselines(kinds, mask_WYX, grid)


def _masked_views(model: PersonSearchModel, batch: Batch, image_tokens: Tensor, members_NWL: Tensor) -> Views:
    """`look_masked` of every word of every caption, in the shape of `look_words`: [S, N, W, h, P]."""
    text_K, word_K = members_NWL.any(-1).nonzero(as_tuple=True)
    parts = []
    for text, word in zip(text_K.split(TEXTS), word_K.split(TEXTS), strict=True):
        texts = Batch(batch.ids[text], batch.mask[text], batch.word_of[text])
        parts.append(look_masked(model, texts, image_tokens[text], members_NWL[text, word], model.tokenizer.mask_id)[0])
    whole = []
    for maps in zip(*parts, strict=True):
        joined = torch.cat(maps, dim=1)[:, :, 0]  # [S, K, h, P]
        filled = joined.new_zeros(len(joined), *members_NWL.shape[:2], *joined.shape[2:])
        filled[:, text_K, word_K] = joined
        whole.append(filled)
    return Views(*whole)
