"""Run folders: a fresh name, claiming one safely, and finding the model that a command means."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agatool import console
from agatool.config import EvalConfig, build_config, read_toml
from agatool.data.annotations import dataset_key
from agatool.errors import CheckpointError, UsageError
from agatool.files import recover_folder

RUNS = Path("runs")
SHIPPED = Path(__file__).parent / "weights" / "tiny"  # pre-trained on the synthetic data set


def is_model(folder: Path) -> bool:
    """Whether `folder` is a model folder (or was one a kill ago)."""
    recover_folder(folder)
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def fresh_run(dataset: str) -> Path:
    """runs/NAME, or runs/NAME-2 and so on where that is taken."""
    number, folder = 1, RUNS / dataset
    while _occupied(folder):
        number += 1
        folder = RUNS / f"{dataset}-{number}"
    return folder


def _occupied(folder: Path) -> bool:
    """Whether a folder holds something; hidden files, such as a kill's leftovers, do not count."""
    return folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir())


def claim(folder: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is to be resumed or overwritten. Raises UsageError.

    Nothing is removed yet: `clear` does that when the new run is sure to start.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", "Choose another --out.")
    occupied = _occupied(folder)
    if resume and not (folder / "config.toml").is_file():
        raise UsageError(f"There is no run to resume in {folder}", "Leave out --resume, or give its --out.")
    if occupied and overwrite and not (folder / "config.toml").is_file():
        raise UsageError(f"{folder} is not a run folder; it is left alone", "Choose another --out.")
    if occupied and not (resume or overwrite):
        raise UsageError(f"{folder} is not empty", "Add --resume to continue it, --overwrite, or another --out.")


def clear(folder: Path) -> None:
    """Empty a run folder; config.toml goes last, so that after a kill on the way --overwrite still takes it."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == "config.toml"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def newest_run(name: str = "") -> Path | None:
    """The run below ./runs whose configuration was written last; with `name`, only runs of that data set."""
    found = [file for file in RUNS.glob("*/config.toml") if not name or _dataset_of(file) == name]
    return max(found, key=lambda file: file.stat().st_mtime).parent if found else None


def _dataset_of(config: Path) -> str | None:
    try:
        return build_config(read_toml(config)).data.dataset
    except UsageError:  # of another version, or damaged
        return None


def find_model(given: Path | None) -> Path:
    """The model folder that --checkpoint means: a model folder, a run (its best/, else last/), a weights file.

    Left out, it is the newest run's, or the shipped weights where there is no run. Raises CheckpointError.
    """
    if given is None:
        run = newest_run()
        if run is None or not (is_model(run / "best") or is_model(run / "last")):
            console.info("No run yet: using the weights that agatool ships (trained on synthetic people).")
            return SHIPPED
        given = run
    if is_model(given) or given.is_file():
        return given
    for name in ("best", "last"):
        if is_model(given / name):
            return given / name
    what = "has no saved model yet" if (given / "config.toml").is_file() else "is not a model folder or a run"
    raise CheckpointError(f"{given} {what}", "Give a folder such as runs/NAME or runs/NAME/best.")


@dataclass(frozen=True)
class EvaluationPlan:
    """What `aga eval` will do."""

    dataset: str
    data: Path
    config: EvalConfig
    out: Path  # folder for the CSVs


def evaluation_plan(
    model: Path, dataset: str | None, data: Path | None, split: str, given: dict[str, Any], out: Path | None
) -> EvaluationPlan:
    """Fill in what was left out from the run that the model belongs to.

    A run's own folder takes the CSVs of its own test split; any other evaluation gets a folder of its own below it.
    """
    stored = model.parent / "config.toml"
    in_run = model.is_dir() and stored.is_file()
    run = (
        build_config(read_toml(stored))
        if in_run
        else build_config(preset="tiny" if model.resolve() == SHIPPED.resolve() else "base")
    )
    name = dataset_key(dataset) if dataset else run.data.dataset
    own_data = in_run and name == run.data.dataset and data is None
    folder = Path(run.data.dir) if own_data else data or Path("data") / name
    settings = run.eval.model_copy(update={key: value for key, value in given.items() if value is not None})
    if out is None:
        base = model.parent if in_run else RUNS / f"eval-{model.stem}"
        out = base if in_run and own_data and split == "test" else base / f"eval-{name}-{split}"
    return EvaluationPlan(name, folder, settings, out)
