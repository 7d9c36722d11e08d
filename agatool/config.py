"""Run configuration: pydantic sections, presets, TOML files and `section.key=value` overrides."""

from __future__ import annotations

import reprlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from agatool.errors import UsageError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Bounds that no model reaches: a config.json from outside must not make the program run for ever.
Size = Annotated[int, Field(ge=1, le=2**20)]
Depth = Annotated[int, Field(ge=1, le=256)]
Scale = Annotated[FiniteFloat, Field(gt=0)]
# TOML has no null: "none" takes back what a preset sets.
Maybe = BeforeValidator(lambda value: None if value == "none" else value)


class Section(BaseModel):
    """A table of the configuration; an unknown key or a wrong type is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextConvention(Section):
    """How a caption becomes token ids; part of a model, because its weights were trained on it."""

    sep: bool = True  # end with [SEP]; ALBEF and RaSa emit `[CLS] X` alone
    cleanup: Literal["none", "albef"] = "none"  # albef: lowercase, drop ,.'!?"()*#:;~ and turn - / into spaces
    max_words: Annotated[int | None, Field(ge=1), Maybe] = None  # cut the caption to so many words first
    max_tokens: int = Field(64, ge=4)  # special tokens included


class ModelConfig(Section):
    """Sizes of the one core model; stored as config.json beside the weights."""

    image_model: Annotated[str | None, Maybe] = None  # a timm ViT by name; None: a plain ViT of the sizes below
    image_size: tuple[Size, Size] = (128, 64)  # height, width in pixels
    patch: Size = 16
    stem: Literal["patch", "conv"] = "patch"  # conv: stride-2 3x3 convolutions down to `patch` pixels a token
    image_width: Size = 96
    image_depth: Depth = 3
    image_heads: Size = 3
    image_mlp_ratio: Scale = 4.0
    image_mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = CLIP_MEAN
    image_std: tuple[Scale, Scale, Scale] = CLIP_STD
    vocab_size: int = Field(1000, ge=5, le=2**20)
    text_width: Size = 96
    text_heads: Size = 3
    text_mlp: Size = 384
    text_layers: Depth = 2
    fusion_layers: Depth = 2
    max_positions: Size = 64
    dropout: float = Field(0.1, ge=0, lt=1)
    embed_dim: Size = 96
    text: TextConvention = TextConvention()
    untrained: tuple[str, ...] = ()  # parameters that a converted checkpoint did not bring

    @model_validator(mode="after")
    def _fits_together(self) -> ModelConfig:
        for side in ("image", "text"):
            width, heads = getattr(self, f"{side}_width"), getattr(self, f"{side}_heads")
            if width % heads:
                raise ValueError(f"{side}_width {width} is no multiple of {side}_heads {heads}")
        if self.text.max_tokens > self.max_positions:
            raise ValueError(f"text.max_tokens {self.text.max_tokens} exceeds max_positions {self.max_positions}")
        return self


class DataConfig(Section):
    """Where the data comes from and how training images are varied."""

    dataset: str = "sample"
    dir: str = "data/sample"
    workers: int = Field(0, ge=0)  # decoding threads
    cache: bool = True  # keep decoded training images in memory where they fit in 2 GiB
    flip: float = Field(0.5, ge=0, le=1)
    pad: float = Field(0.05, ge=0, le=0.5)  # random shift, as a fraction of the height
    erase: float = Field(0.0, ge=0, le=1)  # random erasing probability
    half_size: float = Field(0.0, ge=0, le=1)  # first share of the steps on images of half the height and width


class MaskingConfig(Section):
    """Which words MLM and TEM mask (DESIGN: AGM)."""

    strategy: Literal["attention", "random", "content"] = "attention"
    ratio: float = Field(0.15, gt=0, lt=1)
    temperature: float = Field(1.0, ge=0)  # 0: the top-scored words, no draw
    unit: Literal["word", "piece"] = "word"
    aggregation: Literal["ema", "mean", "last", "rollout"] = "ema"
    tau: float = Field(0.5, gt=0, le=1)


class TemConfig(Section):
    """Text Enrichment Module: the MLM's words stand in for the masked ones (DESIGN: TEM)."""

    enabled: bool = True
    probability: float = Field(0.5, ge=0, le=1)  # of a caption being replaced in ITC and ITM
    warmup: float = Field(0.1, ge=0, le=1)  # share of the steps without TEM
    decode: Literal["argmax", "top-k", "sample"] = "top-k"
    top_k: int = Field(5, ge=1)
    temperature: float = Field(1.0, gt=0)


class ObjectiveConfig(Section):
    """ITC + ITM + MLM with a momentum teacher (ALBEF, Li et al. 2021, and the AGA description)."""

    itc_weight: float = Field(0.5, ge=0)
    itm_weight: float = Field(1.0, ge=0)
    mlm_weight: float = Field(1.0, ge=0)
    alpha: float = Field(0.4, ge=0, le=1)  # share of the teacher's soft targets
    alpha_ramp_epochs: float = Field(1.0, ge=0)
    momentum: float = Field(0.995, ge=0, le=1)
    queue_size: int = Field(65536, ge=0)
    itc_only: float = Field(0.0, ge=0, le=1)  # first share of the steps that trains ITC alone (cheap)


class TrainConfig(Section):
    """Optimisation, length and bookkeeping of a run."""

    epochs: int = Field(30, ge=1)
    max_steps: Annotated[int | None, Field(ge=1), Maybe] = None
    batch_size: int = Field(64, ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(1e-5, gt=0)
    head_lr: float = Field(1e-4, gt=0)  # heads and layers that start new
    min_lr: float = Field(1e-6, ge=0)
    weight_decay: float = Field(0.02, ge=0)
    warmup: float = Field(0.05, ge=0, le=1)  # share of the steps
    k_decay: float = Field(1.0, gt=0)  # of the cosine schedule: above 1 the rate stays high for longer
    clip: float = Field(1.0, gt=0)
    seed: int = Field(0, ge=0)
    checkpoint_every: int = Field(0, ge=0)  # steps; 0: at each epoch's end only
    keep: int = Field(2, ge=1)  # resumable checkpoints kept
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    init: str = "auto"  # scratch, shipped, a model folder, a checkpoint such as ALBEF.pth; auto: see `plan_run`
    image_weights: Annotated[str | None, Maybe] = None  # for init scratch: a file for model.image_model, or `hub`
    text_model: Annotated[str | None, Maybe] = None  # for init scratch: a BERT by hub name or folder, its tokenizer too


class EvalConfig(Section):
    """The two-stage protocol (docs/evaluation.md)."""

    rerank: int = Field(128, ge=0)  # 0: cosine only
    score: Literal["posterior", "itm"] = "posterior"  # what candidates are sorted by; itm: as published
    tail: Literal["itc", "reference"] = "itc"
    batch_size: int = Field(64, ge=1)
    every: int = Field(1, ge=1)  # validate each so many epochs
    bootstrap: int = Field(1000, ge=0)  # resamples for the intervals


class RunConfig(Section):
    """Everything a training run is made from; `config.toml` of a run folder holds it resolved."""

    preset: Literal["tiny", "small", "base"] = "tiny"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    tem: TemConfig = TemConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()


PRESETS: dict[str, dict[str, Any]] = {
    # The sample data set on two CPU cores; no downloads.
    "tiny": {
        "model": {
            "image_size": [128, 64], "stem": "conv", "patch": 8, "image_width": 96, "image_depth": 1,
            "image_heads": 3, "image_mlp_ratio": 2.0, "text_width": 96, "text_heads": 3, "text_mlp": 192,
            "text_layers": 2, "fusion_layers": 2, "embed_dim": 96, "max_positions": 80, "dropout": 0.0,
            "text": {"max_tokens": 72},
        },
        "objective": {"queue_size": 1024, "momentum": 0.99, "alpha": 0.2},
        "train": {"epochs": 2, "batch_size": 64, "lr": 1e-4, "head_lr": 1e-4, "min_lr": 1e-5},
        "eval": {"rerank": 16, "batch_size": 128},
    },
    # timm ViT-S with a 384-wide BERT split 3 + 3; one GPU, or patience.
    "small": {
        "model": {
            "image_model": "vit_small_patch14_dinov2", "image_size": [224, 112], "patch": 14,
            "image_width": 384, "image_depth": 12, "image_heads": 6, "text_width": 384, "text_heads": 12,
            "text_mlp": 1536, "text_layers": 3, "fusion_layers": 3, "embed_dim": 256, "max_positions": 512,
        },
        "objective": {"queue_size": 16384},
        "train": {"epochs": 30, "batch_size": 32, "lr": 5e-5, "head_lr": 2e-4},
    },
    # ViT-B/16 at 384 with BERT-base split 6 + 6: the paper's family, RaSa's training settings.
    "base": {
        "model": {
            "image_size": [384, 384], "patch": 16, "image_width": 768, "image_depth": 12, "image_heads": 12,
            "text_width": 768, "text_heads": 12, "text_mlp": 3072, "text_layers": 6, "fusion_layers": 6,
            "embed_dim": 256, "max_positions": 512, "vocab_size": 30522,
            "text": {"sep": False, "cleanup": "albef", "max_words": 50},
        },
        "train": {"epochs": 30, "batch_size": 13, "accumulate": 4},
    },
}  # fmt: skip


# What changes in a preset when nothing is pre-trained: longer, faster, and what is cheap at first.
FROM_SCRATCH: dict[str, dict[str, Any]] = {
    # ITM and MLM start from nothing at two thirds of the steps and need a learning rate that has not decayed by then.
    "tiny": {
        "data": {"half_size": 0.55},
        "objective": {"itc_only": 0.68},
        "masking": {"ratio": 0.25},
        "tem": {"warmup": 0.8},
        "train": {"epochs": 16, "lr": 2e-3, "head_lr": 2e-3, "min_lr": 1e-5, "k_decay": 2.5, "warmup": 0.1},
        "eval": {"every": 4},
    },
}


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; UsageError when it is missing or broken."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}", "Check --config.") from error
    except (ValueError, RecursionError) as error:  # tomllib raises plain ones too
        raise UsageError(f"{path} is not valid TOML: {error}", "aga train --print-config shows a valid one.") from error


def parse_override(text: str) -> dict[str, Any]:
    """`section.key=value` as nested dicts; the value is TOML, or a plain string where it is not valid TOML."""
    dotted, separator, raw = text.partition("=")
    keys = dotted.strip().split(".")
    if not separator or len(keys) < 2 or not all(keys):
        raise UsageError(f"--set {text!r} is not section.key=value", "For example --set masking.ratio=0.25")
    try:
        value: Any = tomllib.loads(f"value = {raw.strip()}")["value"]
    except (ValueError, RecursionError):
        value = raw.strip()
    return _nested(dotted.strip(), value)


def build_config(*layers: dict[str, Any], preset: str | None = None) -> RunConfig:
    """Merge preset < layers (later wins) and validate. UsageError names the key and what is wrong with it."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    name = preset or merged.get("preset", "tiny")
    if not isinstance(name, str) or name not in PRESETS:
        raise UsageError(f"Unknown preset {name!r}", f"Choose one of: {', '.join(PRESETS)}.")
    merged = _merge(_merge(PRESETS[name], merged), {"preset": name})
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise UsageError(
            f"Configuration key {explain(error)}", "aga train --print-config shows every key with its value."
        ) from error


def explain(error: ValidationError) -> str:
    """The first thing that is wrong, in one line: the key, why, and the value."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":  # a section's keys that do not fit together
        return f"{where}: {first['ctx']['error']}".removeprefix(": ")
    why = "there is no such key" if first["type"] == "extra_forbidden" else first["msg"]
    return f"{where}: {why} (got {reprlib.repr(first['input'])})"


def plan_run(
    given: dict[str, Any], file: Path | None = None, overrides: Sequence[str] = (), stored: Path | None = None
) -> RunConfig:
    """The configuration of a run: preset < file (or the resumed run's `stored` one) < options < --set.

    `given` maps `section.key` to an option's value, None where it was left out. What depends on other keys is filled
    in: data.dir is data/NAME, train.init is `shipped` for the sample with the tiny preset's model, else `scratch`, and
    a model from scratch is trained as FROM_SCRATCH says.
    """
    layers = [read_toml(path) for path in (stored, file) if path is not None]
    layers += [_nested(key, value) for key, value in given.items() if value is not None]
    layers += [parse_override(text) for text in overrides]
    config = build_config(*layers)
    derived: dict[str, Any] = {"data": {"dir": f"data/{config.data.dataset}"}}
    init = config.train.init
    if init == "auto":
        as_shipped = config.preset == "tiny" and config.model == build_config(preset="tiny").model
        parts = config.train.text_model or config.train.image_weights
        init = "shipped" if config.data.dataset == "sample" and as_shipped and not parts else "scratch"
    if init == "scratch":
        derived = _merge(derived, FROM_SCRATCH.get(config.preset, {}))
    return build_config(derived, *layers, {"train": {"init": init}})


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


def to_toml(config: RunConfig) -> str:
    """The configuration as TOML, re-runnable with --config: every key, so that no preset fills one in."""
    return tomli_w.dumps(_without_null(config.model_dump(mode="json")))


def _without_null(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_null(value) if isinstance(value, dict) else "none" if value is None else value
        for key, value in values.items()
    }
