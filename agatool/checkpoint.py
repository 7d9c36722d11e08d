"""Model folders and resumable checkpoints: atomic save, load and prune; safetensors and JSON only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agatool import __version__, console
from agatool.config import ModelConfig, explain
from agatool.errors import CheckpointError, DiskError
from agatool.files import atomic_folder, recover_folder, write_json
from agatool.model import PersonSearchModel
from agatool.tokenization import load_tokenizer

FORMAT = 1  # of config.json; a newer one is refused
STATE_FILE = "state.json"  # of a resumable checkpoint
TEACHER_FILE = "teacher.safetensors"  # beside model.safetensors: a momentum copy to continue training with
NAMES_TOLD = 12  # names of tensors in an error


def write_model(folder: Path, model: PersonSearchModel, card: str) -> None:
    """Write config.json, model.safetensors, tokenizer.json and README.md into an existing folder."""
    write_json(folder / "config.json", {"format": FORMAT, "agatool": __version__, **model.config.model_dump()})
    save_tensors(folder / "model.safetensors", model.state_dict())
    model.tokenizer.save(folder / "tokenizer.json")
    (folder / "README.md").write_text(card, encoding="utf-8")


def save_model(folder: Path, model: PersonSearchModel, card: str) -> None:
    """Write a whole model folder, atomically replacing an older one. Raises DiskError."""
    with atomic_folder(folder) as temporary:
        write_model(temporary, model, card)


def load(path: str | Path) -> PersonSearchModel:
    """Open a model folder, or a checkpoint file of ALBEF or RaSa: the model in eval mode on CPU, with its `tokenizer`.

    A file is converted on the way, as `aga convert` does without options. Raises CheckpointError for whatever is
    missing, damaged or does not fit.
    """
    folder = Path(path)
    if folder.is_file():
        from agatool.convert import open_reference, report

        converted = open_reference(folder)
        report(converted)
        return converted.model
    recover_folder(folder)
    config = read_model_config(folder)
    try:
        with torch.device("meta"):  # no random values that the weights replace
            model = PersonSearchModel(config)
    except Exception as error:  # timm raises what it likes
        raise CheckpointError(f"{folder / 'config.json'}: {error}", "The folder is damaged; copy it again.") from error
    tensors = read_tensors(folder / "model.safetensors")
    check_state(model, tensors, folder)  # before memory is taken for what a broken config.json asks
    model.to_empty(device="cpu").load_state_dict(tensors)
    model.tokenizer = load_tokenizer(folder / "tokenizer.json", config.text)
    if model.tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {model.tokenizer.vocab_size} entries, the model {config.vocab_size}",
            "Tokenizer and weights come from different models; copy the folder again.",
        )
    warn_untrained(model)
    return model.eval()


def warn_untrained(model: PersonSearchModel) -> None:
    """Say which parameters a converted checkpoint did not bring."""
    if names := model.config.untrained:
        console.warn(
            f"{', '.join(names)} are not trained: the checkpoint had no such weights. Train before using them."
        )


def load_teacher(folder: Path, model: PersonSearchModel) -> dict[str, Tensor] | None:
    """The momentum copy in a model folder, or None where it has none. Raises CheckpointError if it does not fit."""
    file = folder / TEACHER_FILE
    if not file.exists():
        return None
    tensors = read_tensors(file)
    check_state(model, tensors, file)
    return tensors


def read_model_config(folder: Path) -> ModelConfig:
    """The model configuration of a model folder. Raises CheckpointError."""
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise CheckpointError(f"{file} is not the configuration of an agatool model", "Use `aga convert` first.")
        values.pop("agatool", None)
        return ModelConfig.model_validate(values)
    except OSError as error:
        raise CheckpointError(
            f"{folder} is not a model folder: config.json cannot be read ({error.strerror})",
            "Give a folder such as runs/NAME/best, or a run folder.",
        ) from error
    except ValidationError as error:
        raise CheckpointError(f"{file} is broken: {explain(error)}", "Copy the folder again.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is broken: {error}", "Copy the folder again.") from error


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors; the caller's folder is the atomic unit. Raises DiskError."""
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # how it reports a full or read-only disk
        raise DiskError(f"Cannot write {path}: {error}", "Free some space or choose another --out.") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises CheckpointError for a missing, truncated or foreign one."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Cannot read {path}: {error}", "The file is missing or damaged; copy it again."
        ) from error


def load_state(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Strict load: every tensor must be there, fit, and be used. Raises CheckpointError naming what does not."""
    check_state(module, tensors, source)
    module.load_state_dict(tensors)


def check_state(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """CheckpointError unless the tensors are the module's, by name and shape."""
    check_tensors(tensors, {name: tensor.shape for name, tensor in module.state_dict().items()}, source)


def check_tensors(tensors: dict[str, Tensor], wanted: dict[str, torch.Size], source: Path) -> None:
    """CheckpointError unless exactly the wanted tensors are there, each of its shape."""
    shared = wanted.keys() & tensors.keys()
    problems = told(
        {
            "missing": wanted.keys() - tensors.keys(),
            "unknown": tensors.keys() - wanted.keys(),
            "of another shape": {name for name in shared if wanted[name] != tensors[name].shape},
        }
    )
    if problems:
        raise CheckpointError(f"{source} does not fit the model: {problems}", "Is it the right checkpoint?")


def told(problems: dict[str, Set[str]]) -> str:
    """What is wrong -> names, as one line: all names where they are few, else the first."""
    return "; ".join(
        f"{len(names)} {what} ({', '.join(sorted(names)[:NAMES_TOLD])}{', ...' if len(names) > NAMES_TOLD else ''})"
        for what, names in problems.items()
        if names
    )


def save_checkpoint(
    folder: Path,
    step: int,
    model: dict[str, Tensor],
    trainer: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
) -> None:
    """Write `folder`/step-N atomically, then drop all but the newest `keep`."""
    with atomic_folder(folder / f"step-{step}") as temporary:
        save_tensors(temporary / "model.safetensors", model)
        save_tensors(temporary / "trainer.safetensors", trainer)
        write_json(temporary / STATE_FILE, {"step": step, **state})
    kept = checkpoints(folder)[-keep:]
    for old in _step_folders(folder):
        if old not in kept:
            (old / STATE_FILE).unlink(missing_ok=True)  # first: half of it must not pass for a checkpoint
            shutil.rmtree(old, ignore_errors=True)


def _step_folders(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("step-*") if p.name[5:].isdecimal()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    return [p for p in _step_folders(folder) if (p / STATE_FILE).exists()]


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's per-parameter state as flat tensors, `optimizer.INDEX.NAME`."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `pack_optimizer`, into an optimiser over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
