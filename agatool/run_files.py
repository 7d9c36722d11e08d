"""Reads back what a run or an evaluation left in its folder; a broken or hostile file is a DataError."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agatool.config import read_toml
from agatool.data.prepare import Prepared, load_prepared
from agatool.errors import DataError
from agatool.files import read_json
from agatool.report import EVALUATION_FORMAT, METRIC_COLUMNS

_RECORD = {
    "dataset": str, "split": str, "data": str, "files": dict, "counts": dict, "model": str, "device": str,
    "environment": dict, "config": dict,
}  # fmt: skip
_QUERY_NUMBERS = ("query_id", "person_id", "relevant", "first_hit", "ap", "inp")
_QUERY_TEXTS = ("direction", "stage", "query", "top_ids", "top_paths", "top_hits", "top_cosine", "top_itm")
_VALIDATION_NUMBERS = ("step", "R@1", "mAP")


@dataclass(frozen=True)
class RunFiles:
    """A run folder as plain data; what is not there yet is empty."""

    folder: Path
    name: str
    record: dict[str, Any]  # evaluation.json; empty before the first evaluation
    config: dict[str, Any]  # `section.key` -> value
    metrics: pd.DataFrame
    queries: pd.DataFrame
    log: pd.DataFrame
    validation: pd.DataFrame

    def text_queries(self) -> pd.DataFrame:
        """The text-to-image rows of queries.csv."""
        return self.queries[self.queries["direction"] == "t2i"]

    def prepared(self) -> Prepared:
        """The data set that was evaluated. Raises DataError where it is gone or has other contents by now."""
        prepared = load_prepared(self.folder / self.record["data"])
        if any(prepared.info["files"].get(name) != mark for name, mark in self.record["files"].items()):
            raise DataError(f"{prepared.folder} has been prepared again since", "Evaluate again.")
        return prepared


def read_run(folder: Path) -> RunFiles:
    """Open the folder of a run or of an evaluation. Raises DataError where it is neither, or a file is broken."""
    folder = Path(folder)
    record = _read_record(folder / "evaluation.json")
    stored = folder / "config.toml"
    if not record and not stored.is_file():
        raise DataError(
            f"{folder} is neither a run nor an evaluation (no config.toml, no evaluation.json)",
            "Give a folder such as runs/NAME, or make one with aga train or aga eval.",
        )
    config = record["config"] if record else read_toml(stored)
    return RunFiles(
        folder,
        folder.resolve().name,
        record,
        dict(_flat(config)),
        _read_result(folder / "metrics.csv", METRIC_COLUMNS[:3], METRIC_COLUMNS[3:], ("value",), record),
        _read_result(folder / "queries.csv", _QUERY_TEXTS, _QUERY_NUMBERS, _QUERY_NUMBERS, record),
        _read_log(folder / "train_log.csv", (), ("step",)),
        _read_log(folder / "validation.csv", ("stage",), _VALIDATION_NUMBERS),
    )


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != EVALUATION_FORMAT:
        raise DataError(f"{path} is not of this version (format {EVALUATION_FORMAT})", "Run aga eval again.")
    for key, kind in _RECORD.items():
        if not isinstance(record.get(key), kind):
            raise DataError(f"{path} lacks {key!r}", "Run aga eval again.")
    for key, inner in {"counts": int, "environment": str, "files": str}.items():
        if not all(isinstance(value, inner) for value in record[key].values()):
            raise DataError(f"{path} has a broken {key!r}", "Run aga eval again.")
    return record


def _read_result(
    path: Path, texts: tuple[str, ...], numbers: tuple[str, ...], finite: tuple[str, ...], record: dict[str, Any]
) -> pd.DataFrame:
    """A table of the evaluation, with rows and without gaps in `finite`; empty where nothing was evaluated yet."""
    if not record:
        return pd.DataFrame(columns=[*texts, *numbers])
    table = _read_table(path, texts, numbers)
    if table.empty or not np.isfinite(table[list(finite)].astype(float)).all(axis=None):
        raise DataError(f"{path} is broken: it has no rows, or gaps", "Run aga eval again.")
    return table


def _read_log(path: Path, texts: tuple[str, ...], numbers: tuple[str, ...]) -> pd.DataFrame:
    """A log of the training, empty (with its columns) where there was none."""
    return _read_table(path, texts, numbers) if path.is_file() else pd.DataFrame(columns=[*texts, *numbers])


def _read_table(path: Path, texts: tuple[str, ...], numbers: tuple[str, ...]) -> pd.DataFrame:
    """A CSV whose columns `texts` stay as they are (a caption may read "None") and whose other columns are numbers."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
        missing = [column for column in (*texts, *numbers) if column not in table]
        if missing:
            raise ValueError(f"no column {missing[0]!r}")
        others = [column for column in table if column not in texts]
        return table.assign(**{column: pd.to_numeric(table[column].where(table[column] != "")) for column in others})
    except (OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} is broken: {error}", "Run aga eval again.") from error


def _flat(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Nested tables as `section.key` -> value, in order."""
    waiting = list(reversed(config.items()))
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{key}.{inner}", content) for inner, content in reversed(value.items())]
        elif isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
            raise DataError(f"Configuration key {key[:80]} holds lists of lists", "Run aga eval again.")
        else:
            yield key, value


def numbers(cell: str) -> list[float]:
    """A list of numbers out of a cell of queries.csv. Raises DataError."""
    try:
        return [float(value) if math.isfinite(value) else math.nan for value in _list(cell)]
    except (TypeError, OverflowError) as error:
        raise _broken(cell) from error


def texts(cell: str) -> list[str]:
    """A list of texts out of a cell of queries.csv. Raises DataError."""
    return [str(value) for value in _list(cell)]


def _list(cell: str) -> list[Any]:
    try:
        values = json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise _broken(cell) from error
    if not isinstance(values, list):
        raise _broken(cell)
    return values


def _broken(cell: str) -> DataError:
    return DataError(f"queries.csv is broken: {cell[:80]!r} is not such a list", "Run aga eval again.")


def scores(queries: pd.DataFrame, column: str) -> dict[str, np.ndarray]:
    """The scores of the listed gallery items, `match` and `other person`; an item without a score is left out."""
    groups: dict[str, list[float]] = {"match": [], "other person": []}
    for cell, hits in zip(queries[column], queries["top_hits"], strict=True):
        for score, hit in zip(numbers(cell), numbers(hits), strict=False):
            groups["match" if hit else "other person"].append(score)
    return {name: np.array(values) for name, values in groups.items()}
