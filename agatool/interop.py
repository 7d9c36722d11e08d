"""What a training starts from: nothing, a model folder, an ALBEF or RaSa checkpoint, or a BERT and a timm ViT."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from agatool import console
from agatool.checkpoint import check_tensors, load, load_teacher
from agatool.config import ModelConfig, RunConfig
from agatool.convert import new_model, open_reference, report
from agatool.errors import CheckpointError, DataError, UsageError
from agatool.files import read_json
from agatool.foreign import (
    POSITIONS,
    TIED,
    bert_name,
    check_bert,
    check_tied,
    plain_names,
    read_weights,
    square_grid,
)
from agatool.model import PersonSearchModel, resample_positions
from agatool.runs import SHIPPED, find_model
from agatool.tokenization import Tokenizer, load_tokenizer

BERT_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
IMAGE = "image_encoder.vit."
# Parts of published ViTs and BERTs that this model has no place for: classifiers, pre-training targets, constants.
VIT_LEFTOVERS = re.compile(r"(head|head_dist|pre_logits)\.|mask_token$|dist_token$")
BERT_LEFTOVERS = re.compile(r"(pooler|cls\.seq_relationship)\.|embeddings\.position_ids$")


@dataclass(frozen=True)
class Start:
    """A model to train."""

    model: PersonSearchModel  # its tokenizer with it; its config has the sizes that hold from here on
    new: set[str]  # names of the parameters that start from random values
    teacher: dict[str, Tensor] | None  # the momentum copy where one was brought; else it starts as a copy


def start_model(config: RunConfig, tokenizer: Path | None) -> Start:
    """The model that `config.train.init` names, with the image size and dropout of `config.model`.

    tokenizer  the prepared data's, for a model that starts without any text weights.

    Sizes, text convention and image normalisation come from the weights where there are some. What starts new is
    a function of `config.train.seed`. Raises CheckpointError where weights are missing, damaged or do not fit,
    UsageError for settings that contradict each other.
    """
    init = config.train.init
    if init == "scratch":
        return _from_parts(config, tokenizer)
    if config.train.text_model is not None or config.train.image_weights is not None:
        raise UsageError(
            f"--text-model and --image-weights start a new model, --init {init} an existing one", "Add --init scratch."
        )
    path = SHIPPED if init == "shipped" else Path(init)
    if not path.exists():
        raise CheckpointError(
            f"--init {init}: there is no such model folder or checkpoint",
            "Give a model folder, a run folder or a checkpoint such as ALBEF.pth (docs/interop.md says where to get "
            "it), or --init scratch.",
        )
    found = find_model(path)
    if found.is_file():
        return _fitted(_from_reference(found, tokenizer), None, config)
    model = load(found)
    return _fitted(model, load_teacher(found, model), config)


def _from_reference(path: Path, tokenizer: Path | None) -> PersonSearchModel:
    """An ALBEF or RaSa checkpoint; the prepared data's tokenizer serves where it is the checkpoint's."""
    converted = open_reference(path)
    model = converted.model
    prepared = load_tokenizer(tokenizer, model.config.text) if tokenizer else None
    if model.tokenizer.is_placeholder:
        if prepared is None or _layout(prepared) != _layout(model.tokenizer):
            raise CheckpointError(
                f"{path} brings no vocabulary, so captions cannot be read",
                f"Give it one: aga convert {path} OUT --tokenizer bert-base-uncased (or a vocab.txt), then --init OUT.",
            )
        model.tokenizer = prepared
    report(converted)
    return model


def _layout(tokenizer: Tokenizer) -> tuple[int, tuple[int, ...]]:
    """What two vocabularies must share for one to be the other's."""
    return tokenizer.vocab_size, tokenizer.special_ids


def _fitted(model: PersonSearchModel, teacher: dict[str, Tensor] | None, config: RunConfig) -> Start:
    """The same weights at the run's image size and dropout; what was never trained gets new values."""
    new = set(model.config.untrained)
    if model.config.stem == "conv" and config.model.image_size != model.config.image_size:
        raise UsageError(
            f"The weights' convolutional stem knows images of {model.config.image_size} alone",
            "Leave model.image_size as it is, or add --init scratch.",
        )
    sizes = {"image_size": config.model.image_size, "dropout": config.model.dropout, "untrained": ()}
    fitted = _build(model.config.model_copy(update=sizes), config.train.seed)
    fitted.tokenizer = model.tokenizer
    grids = model.image_encoder.grid, fitted.image_encoder.grid
    if grids[0] != grids[1]:
        console.info(f"Position embeddings resampled from {grids[0]} to {grids[1]} patches.")

    def fit(state: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: tensor for name, tensor in state.items() if name not in new}
        kept[POSITIONS] = resample_positions(kept[POSITIONS], *grids)
        return {**fitted.state_dict(), **kept}

    fitted.load_state_dict(fit(model.state_dict()))
    return Start(fitted, new, fit(teacher) if teacher is not None else None)


def _build(config: ModelConfig, seed: int) -> PersonSearchModel:
    if any(side % config.patch for side in config.image_size):
        raise UsageError(
            f"model.image_size {list(config.image_size)} is no multiple of the model's patch size {config.patch}",
            f"Set model.image_size to multiples of {config.patch}.",
        )
    try:
        return new_model(config, seed)
    except ValueError as error:
        raise UsageError(f"The model's settings do not go together: {error}", "Check the [model] section.") from error


# --- a BERT and a ViT ---------------------------------------------------------------------------------------


def _from_parts(config: RunConfig, tokenizer: Path | None) -> Start:
    """A new model, its image encoder and text layers filled from `image_weights` and `text_model` where given."""
    sizes, train = config.model, config.train
    bert = _find_bert(train.text_model) if train.text_model else None
    source = bert or tokenizer
    if source is None:
        raise CheckpointError("A model from scratch needs a tokenizer", "Prepare a data set, or give --text-model.")
    if bert is not None:
        sizes = _bert_sizes(bert, sizes)
    if sizes.image_model is not None:
        sizes = _vit_sizes(sizes.image_model, sizes, with_weights=train.image_weights is not None)
    words = load_tokenizer(source, sizes.text)
    if bert is None:
        sizes = sizes.model_copy(update={"vocab_size": words.vocab_size})
    elif words.vocab_size > sizes.vocab_size:
        raise CheckpointError(
            f"{bert}: the tokenizer has {words.vocab_size} entries, the weights {sizes.vocab_size}",
            "They come from different models; copy the folder again.",
        )
    model = _build(sizes, train.seed)
    model.tokenizer = words
    loaded: dict[str, Tensor] = {}
    if bert is not None:
        loaded |= _bert_state(bert, model)
    if train.image_weights is not None:
        loaded |= _image_state(train.image_weights, model)
    model.load_state_dict({**model.state_dict(), **loaded})
    return Start(model, set(model.state_dict()) - set(loaded), None)


def _find_bert(name: str) -> Path:
    """The folder of a BERT: `name` itself, or a hub entry's local copy."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    return _hub_folder(name, ["config.json", BERT_WEIGHTS[0], "tokenizer.json", "vocab.txt"], "--text-model")


def _hub_folder(name: str, files: list[str], option: str) -> Path:
    """A hub entry's files: the local copy, downloaded first where that is possible. Raises CheckpointError."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as error:  # no such name, no network, no cache: each has its own exception
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{option}: {name} is no folder here, and not to be had from the Hugging Face hub ({first_line})",
            f"On a connected machine: `hf download {name} --local-dir FOLDER`; copy it here and give {option} FOLDER"
            + ("/model.safetensors." if files == ["model.safetensors"] else "."),
        ) from error


def _bert_sizes(folder: Path, config: ModelConfig) -> ModelConfig:
    """`config` with the text sizes of the BERT in `folder`; CheckpointError for one that is of another kind."""
    try:
        bert: Any = read_json(folder / "config.json")
    except DataError as error:
        raise CheckpointError(error.message, "A BERT's folder has config.json beside its weights.") from error
    if not isinstance(bert, dict):
        raise CheckpointError(f"{folder / 'config.json'} is no BERT's configuration", "Give another --text-model.")
    check_bert(bert, str(folder / "config.json"))
    layers = bert.get("num_hidden_layers")
    if layers != config.text_layers + config.fusion_layers:
        raise UsageError(
            f"{folder} has {layers} layers, the model {config.text_layers} text + {config.fusion_layers} fusion layers",
            "Set model.text_layers and model.fusion_layers so that they add up.",
        )
    positions, tokens = bert.get("max_position_embeddings"), config.text.max_tokens
    try:
        return ModelConfig.model_validate(
            {
                **config.model_dump(),
                "text_width": bert.get("hidden_size"),
                "text_heads": bert.get("num_attention_heads"),
                "text_mlp": bert.get("intermediate_size"),
                "vocab_size": bert.get("vocab_size"),
                "max_positions": positions,
                # BERT's own convention: [CLS] X [SEP]
                "text": {"max_tokens": min(tokens, positions) if isinstance(positions, int) else tokens},
            }
        )
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}", "Give another --text-model.") from error


def _bert_state(folder: Path, model: PersonSearchModel) -> dict[str, Tensor]:
    """Embeddings, layers and, if it is there, MLM head of a BERT under our names; all of it or CheckpointError."""
    file = next((folder / name for name in BERT_WEIGHTS if (folder / name).is_file()), folder / BERT_WEIGHTS[0])
    tensors, spelling = plain_names(read_weights(file))
    check_tied(tensors, "", file)
    wanted = {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if name.startswith(
            ("word_embeddings", "position_embeddings", "type_embeddings", "embedding_norm", "text_layers")
        )
        or (name.startswith("fusion_layers") and "cross_attention" not in name)
        or (name.startswith("mlm_") and "cls.predictions.bias" in tensors)
    }
    named = {
        bert_name(name, model.config.text_layers) or spelling[name]: tensor
        for name, tensor in tensors.items()
        if name not in TIED and not BERT_LEFTOVERS.match(name)
    }
    check_tensors(named, wanted, file)
    return named


def _vit_sizes(name: str, config: ModelConfig, with_weights: bool) -> ModelConfig:
    """`config` with the sizes of a timm ViT and, where its weights are used, the normalisation they know."""
    try:
        with torch.device("meta"):
            vit = timm.create_model(name, num_classes=0)
    except RuntimeError as error:
        raise UsageError(f"--image-model {name}: {error}", "timm.list_models('vit*') lists the names.") from error
    if not isinstance(vit, VisionTransformer):
        raise UsageError(f"--image-model {name} is a {type(vit).__name__}, not a plain ViT", "Choose a ViT.")
    sizes: dict[str, Any] = {
        "image_width": vit.embed_dim,
        "image_depth": len(vit.blocks),
        "image_heads": vit.blocks[0].attn.num_heads,
        "patch": vit.patch_embed.patch_size[0],
        "stem": "patch",
    }
    if with_weights:
        sizes |= {"image_mean": vit.pretrained_cfg["mean"], "image_std": vit.pretrained_cfg["std"]}
    return config.model_copy(update=sizes)


def _image_state(source: str, model: PersonSearchModel) -> dict[str, Tensor]:
    """The image encoder's weights from a file or the hub, position embeddings resampled; CheckpointError."""
    tensors = _hub_vit(model.config.image_model) if source == "hub" else read_weights(Path(source))
    named = {name: tensor for name, tensor in tensors.items() if not VIT_LEFTOVERS.match(name)}
    positions, grid = named.get("pos_embed"), model.image_encoder.grid
    if positions is not None and positions.dim() == 3:
        old = square_grid(positions.shape[1] - 1)
        named["pos_embed"] = resample_positions(positions, old, grid) if old else positions
    wanted = {name: tensor.shape for name, tensor in model.image_encoder.vit.state_dict().items()}
    check_tensors(named, wanted, Path(source))
    return {IMAGE + name: tensor for name, tensor in named.items()}


def _hub_vit(name: str | None) -> dict[str, Tensor]:
    if name is None:
        raise UsageError("--image-weights hub needs --image-model", "For example --image-model vit_base_patch16_224.")
    entry = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    if entry is None or not entry.hf_hub_id:
        raise UsageError(f"timm has no weights for a model named {name!r}", "Choose another --image-model.")
    return read_weights(_hub_folder(entry.hf_hub_id, ["model.safetensors"], "--image-weights") / "model.safetensors")
