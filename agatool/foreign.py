"""Weights files of other projects: reading them safely, and their names -> ours."""

from __future__ import annotations

import math
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from agatool.errors import CheckpointError

Grid = tuple[int, int]  # rows, columns of patches
POSITIONS = "image_encoder.vit.pos_embed"

# The reference's module -> ours. What follows the last dot, `weight` or `bias`, stays.
HEADS = {
    "vision_proj": "vision_proj",
    "text_proj": "text_proj",
    "itm_head": "itm_head",
}
BERT = {
    "embeddings.word_embeddings": "word_embeddings",
    "embeddings.position_embeddings": "position_embeddings",
    "embeddings.token_type_embeddings": "type_embeddings",
    "embeddings.LayerNorm": "embedding_norm",
    "cls.predictions.transform.dense": "mlm_transform",
    "cls.predictions.transform.LayerNorm": "mlm_norm",
}
BERT_LAYER = {  # after `encoder.layer.N.`
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "crossattention.self.query": "cross_attention.query",
    "crossattention.self.key": "cross_attention.key",
    "crossattention.self.value": "cross_attention.value",
    "crossattention.output.dense": "cross_attention.output",
    "crossattention.output.LayerNorm": "cross_attention_norm",
    "intermediate.dense": "expand",
    "output.dense": "contract",
    "output.LayerNorm": "mlp_norm",
}
# Not a module's parameters.
SINGLE = {"temp": "temperature", "text_encoder.cls.predictions.bias": "mlm_bias"}

_LAYER = re.compile(r"encoder\.layer\.(\d{1,3})\.(.+)")
MOMENTUM = re.compile(r"(visual_encoder|text_encoder|vision_proj|text_proj)_m\.")
# A second name of another tensor, so that nothing is lost by leaving it out; checked to be equal.
TIED = {
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` file, or of a PyTorch file with or without a `model` or `state_dict` wrapper.

    Floats come as float32. Code in a pickle is refused, never run. Raises CheckpointError.
    """
    try:
        found = load_file(path) if path.suffix == ".safetensors" else _unwrap(_load_pickle(path))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"Cannot read {path}: {reason}", "The file is missing or damaged; copy it again."
        ) from error
    if not isinstance(found, dict) or not found or not all(map(_is_named_tensor, found.items())):
        raise CheckpointError(f"{path} holds no named tensors", "Give a checkpoint such as ALBEF.pth.")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def _load_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # about the pickle's protocol: what matters raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it is no PyTorch file, or holds more than tensors and plain values",
            "If you trust its source, save its state_dict as .safetensors on another machine and convert that.",
        ) from error
    except Exception as error:  # damaged bytes surface as anything: EOFError, KeyError, RuntimeError, ...
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"Cannot read {path}: {first_line}", "The file is damaged or no PyTorch file; copy it again."
        ) from error


def _unwrap(document: Any) -> Any:
    """The state_dict inside what the reference saved: {"model": ..., "optimizer": ..., ...} or the thing itself."""
    for key in ("model", "state_dict"):
        if isinstance(document, dict) and isinstance(document.get(key), dict):
            return document[key]
    return document


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    name, tensor = item
    return isinstance(name, str) and isinstance(tensor, Tensor) and not tensor.is_sparse and not tensor.is_quantized


def plain_names(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under one spelling, and for each name how the file spells it.

    BERT's parts come with and without `bert.`, and old LayerNorms call their weight gamma and their bias beta.
    Raises CheckpointError where two names become one.
    """
    spelling: dict[str, str] = {}
    for name in tensors:
        plain = re.sub(r"^((?:text_encoder(?:_m)?\.)?)bert\.", r"\1", name)
        plain = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", plain)
        plain = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", plain)
        if plain in spelling:
            raise CheckpointError(f"{spelling[plain]} and {name} are the same tensor", "Is it the right file?")
        spelling[plain] = name
    return {plain: tensors[name] for plain, name in spelling.items()}, spelling


def bert_name(name: str, text_layers: int) -> str | None:
    """Our name of a BERT tensor (without `bert.`), or None: layers past the first `text_layers` are fusion layers."""
    if f"text_encoder.{name}" in SINGLE:
        return SINGLE[f"text_encoder.{name}"]
    module, _, parameter = name.rpartition(".")
    if not (match := _LAYER.fullmatch(module)):
        return f"{BERT[module]}.{parameter}" if module in BERT else None
    number = int(match[1])
    stack = f"text_layers.{number}" if number < text_layers else f"fusion_layers.{number - text_layers}"
    return f"{stack}.{BERT_LAYER[match[2]]}.{parameter}" if match[2] in BERT_LAYER else None


def our_name(name: str, text_layers: int) -> str | None:
    """Our name of a reference tensor, or None."""
    if name in SINGLE:
        return SINGLE[name]
    module, _, parameter = name.rpartition(".")
    if module in HEADS:
        return f"{HEADS[module]}.{parameter}"
    part, _, rest = name.partition(".")
    if part == "visual_encoder":
        return f"image_encoder.vit.{rest}"
    return bert_name(rest, text_layers) if part == "text_encoder" else None


def check_bert(config: dict[str, Any], where: str) -> None:
    """CheckpointError for a BERT variety whose tensors would fit but whose numbers would not be the same."""
    wanted = {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "position_embedding_type": "absolute",
        "model_type": "bert",
    }
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise CheckpointError(
                f"{where}: {key} is {config[key]!r}, the text encoder has {value!r}", "Choose another BERT."
            )


def check_tied(tensors: dict[str, Tensor], prefix: str, source: Path) -> None:
    """CheckpointError where a BERT's MLM decoder is not, as ours is, tied to the word embeddings."""
    for decoder, original in TIED.items():
        tensor = tensors.get(prefix + decoder)
        if tensor is None:
            continue
        other = tensors.get(prefix + original)
        if other is None or not torch.equal(tensor, other):
            raise CheckpointError(
                f"{source}: {prefix}{decoder} differs from {prefix}{original}, to which it should be tied",
                "The file is damaged, or of another kind.",
            )


def square_grid(patches: int) -> Grid | None:
    """Rows and columns where so many patches can be a square."""
    side = math.isqrt(max(patches, 0))
    return (side, side) if side and side * side == patches else None
