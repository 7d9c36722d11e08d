"""The index of an image gallery: opening it, its features mapped into memory, and which model made them.

Shape suffixes: N images, E shared space.
"""

from __future__ import annotations

import csv
import hashlib
import os
import stat
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from agatool.checkpoint import read_model_config
from agatool.errors import CheckpointError, DataError
from agatool.files import contained, read_json, recover_folder

FORMAT = 1  # of index.json; another one is refused
COLUMNS = {"path": str, "sha256": str, "size": np.int64, "mtime_ns": np.int64}  # of images.csv
FILES = ("embeddings.safetensors", "images.csv", "skipped.csv", "index.json")
_KINDS = {"root": str, "model": str, "fingerprint": str, "files": dict, "made_up": list}  # of index.json
_PART = 1 << 24  # bytes of images.csv looked at together
_SWAP_SECONDS = 0.2  # a writer puts a new index in an old one's place in far less
_DAMAGED = "Remove it and build it again with aga index."


class Entry(NamedTuple):
    """A row of images.csv."""

    path: str
    sha256: str
    size: int
    mtime_ns: int


class _Lines:
    """The lines of a text file, found by their place: a million rows as strings would take a gigabyte.

    The file stays open, so that a server goes on reading the index it opened after another one took its place.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        ends, done = [np.array([-1])], 0
        while part := self._file.read(_PART):
            ends.append(np.flatnonzero(np.frombuffer(part, dtype=np.uint8) == ord("\n")) + done)
            done += len(part)
        self._ends = np.concatenate(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, line: int) -> str:
        """A line without its end. Raises UnicodeDecodeError, a ValueError."""
        start, end = int(self._ends[line]) + 1, int(self._ends[line + 1])
        return os.pread(self._file.fileno(), end - start, start).decode("utf-8")


@dataclass(frozen=True)
class Index:
    """An opened index: row n of everything is the same image."""

    folder: Path
    root: Path  # the gallery's images
    model: Path  # folder or file of the model that made the features
    fingerprint: str  # of that model
    made_up: np.ndarray  # best cosine of each made-up description in this gallery, ascending (agatool.search)
    lines: _Lines  # of images.csv
    embeddings: Tensor  # [N, E] float32, unit length; the file's pages, read when they are used

    def __len__(self) -> int:
        return len(self.embeddings)

    @cached_property
    def images(self) -> pd.DataFrame:
        """All of images.csv: path (below root), sha256, size, mtime_ns. A query needs only some rows of it."""
        return pd.read_csv(self.folder / "images.csv", dtype=COLUMNS, na_filter=False, encoding="utf-8")

    def entry(self, row: int) -> Entry:
        """What images.csv says of a row. Raises DataError where that is damaged."""
        try:
            name, key, size, mtime_ns = next(csv.reader([self.lines[1 + row]], strict=True))
            return Entry(name, key, int(size), int(mtime_ns))
        except (ValueError, csv.Error, StopIteration) as error:
            raise DataError(f"{self.folder / 'images.csv'} is damaged in row {row}", _DAMAGED) from error

    def name(self, row: int) -> str:
        """The image's path below the gallery's root."""
        return self.entry(row).path

    def path(self, row: int) -> Path:
        """The image file of a row. Raises DataError where the index names something outside the gallery."""
        return contained(self.root, self.name(row))

    def is_current(self, row: int) -> bool:
        """Whether the image file is still what was encoded: by its size and time, in doubt by its content."""
        try:
            known, path = self.entry(row), self.path(row)
            status = regular(path)
            if status.st_size != known.size:
                return False
            return status.st_mtime_ns == known.mtime_ns or sha256(path) == known.sha256
        except DataError:
            return False

    def update_command(self, model: Path | None = None) -> str:
        """What to type to bring the index up to date, with `model` if it is given."""
        checkpoint = f" --checkpoint {model}" if model else ""
        return f"aga index {self.root} --out {self.folder}{checkpoint}"


def is_index(folder: Path) -> bool:
    """Whether `folder` looks like an index."""
    return (folder / "index.json").is_file() and (folder / "embeddings.safetensors").is_file()


def open_index(folder: Path) -> Index:
    """Open an index. DataError where it is none, damaged, of another version, or its gallery is gone."""
    try:
        index = read_index(folder)
    except DataError:  # a writer may be putting a new index in its place, or was killed while doing so
        time.sleep(_SWAP_SECONDS)
        recover_folder(folder)
        index = read_index(folder)
    if not index.root.is_dir():
        raise DataError(
            f"The gallery of {folder} is not at {index.root} any more",
            f"Tell where it is, nothing is encoded again: aga index GALLERY --out {folder}",
        )
    return index


def read_index(folder: Path) -> Index:
    """As `open_index`, whether or not its gallery is there, and giving up at once."""
    if not is_index(folder):
        raise DataError(f"{folder} is not an index", f"Build it: aga index GALLERY --out {folder}")
    info = _read_info(folder)
    if info["files"] != described(folder):
        raise DataError(f"{folder} is damaged: its files are not those that index.json describes", _DAMAGED)
    lines, embeddings = _Lines(folder / "images.csv"), _mapped(folder / "embeddings.safetensors")
    made_up = np.asarray(info["made_up"], dtype=np.float64)
    if len(lines) != 1 + len(embeddings) or made_up.ndim != 1 or not np.isfinite(made_up).all():
        raise DataError(f"{folder} is damaged: its files contradict each other", _DAMAGED)
    root, model = Path(info["root"]), Path(info["model"])
    return Index(folder, root, model, info["fingerprint"], np.sort(made_up), lines, embeddings)


def _read_info(folder: Path) -> dict[str, Any]:
    file = folder / "index.json"
    info = read_json(file)
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise DataError(f"{folder} was built by another version of agatool", _DAMAGED)
    wrong = [key for key, kind in _KINDS.items() if not isinstance(info.get(key), kind)]
    if wrong or not all(isinstance(value, int | float) for value in info["made_up"]) or "\0" in info["root"]:
        raise DataError(f"{file} is damaged: {', '.join(wrong) or 'made_up, root'}", _DAMAGED)
    return info


def described(folder: Path) -> dict[str, Any]:
    """What index.json vouches for. Gigabytes of features are not read for it: their size has to do."""
    features = folder / "embeddings.safetensors"
    return {"images.csv": sha256(folder / "images.csv"), features.name: regular(features).st_size}


def _mapped(path: Path) -> Tensor:
    """The tensor [N, E] of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:  # checks the header, the sizes and that nothing is out of bounds
            names = list(file.keys())
            part = file.get_slice("embeddings")
            shape, dtype = part.get_shape(), part.get_dtype()
    except (OSError, SafetensorError) as error:
        raise DataError(f"Cannot read {path}: {error}", _DAMAGED) from error
    if names != ["embeddings"] or dtype != "F32" or len(shape) != 2 or 0 in shape:
        raise DataError(f"{path} does not hold features", _DAMAGED)
    with path.open("rb") as stream:  # the format: a length, a header of that length, the data
        header = int.from_bytes(stream.read(8), "little")
    # Mode "c", a private mapping, because torch warns of memory that cannot be written; nobody writes.
    return torch.from_numpy(np.memmap(path, dtype="<f4", mode="c", offset=8 + header, shape=tuple(shape)))


def fingerprint_of(model: Path) -> str:
    """sha256 by which a model is known: of its configuration and weights, or of the one file that it is.

    Raises CheckpointError for a folder that is no model.
    """
    try:
        if model.is_file():
            return sha256(model)
        weights = sha256(model / "model.safetensors")
    except DataError as error:
        raise CheckpointError(error.message, "Give a model folder such as runs/NAME/best.") from error
    return hashlib.sha256(f"{read_model_config(model).model_dump_json()}{weights}".encode()).hexdigest()


def sha256(path: Path) -> str:
    """sha256 of a regular file, in hexadecimal digits. Raises DataError."""
    regular(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}", "Check the path.") from error


def regular(path: Path) -> os.stat_result:
    """The status of a regular file; DataError for anything else: reading a pipe would wait for ever."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"Cannot read {path}: {reason}", "Check the path.") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"Cannot read {path}: not a regular file", "Check the path.")
    return status
