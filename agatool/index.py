"""The index of an image folder: its features in a file that is mapped into memory, kept up to date incrementally.

Shape suffixes: N images, E shared space.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from agatool import __version__, console
from agatool.checkpoint import load, read_model_config, save_tensors
from agatool.data.images import decode_image, image_size, to_tensor
from agatool.data.prepare import load_prepared
from agatool.encoding import encode_batch, finite, in_order, inference
from agatool.errors import AgatoolError, CheckpointError, DataError, DiskError, StoppedError
from agatool.files import atomic_file, atomic_folder, contained, read_json, recover_folder, write_json
from agatool.hint import Reference, made_up_reference
from agatool.model import PersonSearchModel
from agatool.report import write_csv
from agatool.runs import find_model
from agatool.train import StopFlag, memory_errors, pick_device, use_bf16

FORMAT = 1  # of index.json; another one is built anew
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
COLUMNS = {"path": str, "sha256": str, "size": np.int64, "mtime_ns": np.int64}
FILES = ("embeddings.safetensors", "images.csv", "skipped.csv", "index.json")
UNSETTLED = -1  # modification time of a file so fresh that the clock may not tell its next change from this one
_TICK = 2_000_000_000  # nanoseconds; the coarsest clock of a file system (FAT)
_FLUSH_SECONDS = 20.0  # work that a kill can cost
_WORKERS = 4  # threads that read and decode
_SHOWN = 5  # skipped images named on the console


# -- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Index:
    """An opened index: row n of everything is the same image."""

    folder: Path
    root: Path  # the gallery
    model: Path  # folder or file of the model that made the features
    fingerprint: str  # of that model
    reference: Reference  # how well made-up descriptions fit this gallery
    images: pd.DataFrame  # path (below root), sha256, size, mtime_ns
    embeddings: Tensor  # [N, E] float32, unit length; a private mapping of the file, read on demand

    def __len__(self) -> int:
        return len(self.images)

    def name(self, row: int) -> str:
        """The image's path below the gallery's root."""
        return str(self.images["path"].iat[row])

    def path(self, row: int) -> Path:
        """The image file of a row. Raises DataError where the index names something outside the gallery."""
        return contained(self.root, self.name(row))

    def is_current(self, row: int) -> bool:
        """Whether the image file is still what was encoded: by size and time, in doubt by content."""
        path, entry = self.path(row), self.images.iloc[row]
        try:
            status = _regular(path)
            same = status.st_size == entry["size"]
            return same and (status.st_mtime_ns == entry["mtime_ns"] or _sha256(path) == entry["sha256"])
        except DataError:
            return False

    @property
    def rebuild(self) -> str:
        """The command that brings the index up to date."""
        return f"aga index {self.root} --out {self.folder}"


def is_index(folder: Path) -> bool:
    """Whether `folder` holds an index (or did a kill ago)."""
    if not folder.exists() and folder.parent.is_dir():
        with ExitStack() as stack:
            try:  # a writer at work may be just between moving the old one out and the new one in
                stack.enter_context(_only_writer(folder))
                recover_folder(folder)
            except (AgatoolError, OSError):
                time.sleep(0.2)
    return (folder / "index.json").is_file() and (folder / "embeddings.safetensors").is_file()


def open_index(folder: Path) -> Index:
    """Open an index; DataError where it is none, damaged, of another version, or its gallery is gone."""
    try:
        return _open(folder)
    except DataError:
        time.sleep(0.2)  # a writer may have put a new index in its place between two files
        return _open(folder)


def _open(folder: Path) -> Index:
    if not is_index(folder):
        raise DataError(f"{folder} is not an index", f"aga index GALLERY --out {folder}")
    info = _read_info(folder)
    root, model = Path(info["root"]), Path(info["model"]["path"])
    rebuild = f"aga index {root} --out {folder}"
    if info["files"] != _described(folder):
        raise DataError(f"{folder} is damaged: its files are not those that index.json describes", rebuild)
    table = pd.read_csv(folder / "images.csv", dtype=COLUMNS, na_filter=False, encoding="utf-8")
    embeddings = _mapped(folder / "embeddings.safetensors")
    if list(table.columns) != list(COLUMNS) or len(table) != len(embeddings) or table.empty:
        raise DataError(f"{folder} is damaged: its files contradict each other", rebuild)
    if not root.is_dir():
        raise DataError(f"The gallery of {folder} is not at {root} any more", f"aga index GALLERY --out {folder}")
    return Index(folder, root, model, info["model"]["fingerprint"], Reference(*info["reference"]), table, embeddings)


def _read_info(folder: Path) -> dict[str, Any]:
    info = read_json(folder / "index.json")
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise DataError(f"{folder} was built by another version of agatool", f"Remove it and build it again: {folder}")
    kinds = {"root": str, "model": dict, "files": dict, "reference": list}
    wrong = [key for key, kind in kinds.items() if not isinstance(info.get(key), kind)]
    if not wrong and not all(isinstance(info["model"].get(key), str) for key in ("path", "fingerprint")):
        wrong = ["model"]
    if not wrong and not Reference.fits(info["reference"]):
        wrong = ["reference"]
    if wrong:
        raise DataError(f"{folder / 'index.json'} is damaged: {', '.join(wrong)}", "Remove the index, build it again.")
    return info


def _described(folder: Path) -> dict[str, Any]:
    """What index.json vouches for. A gigabyte of features is not read for it: its size has to do."""
    try:
        size = (folder / "embeddings.safetensors").stat().st_size
        return {"images.csv": _sha256(folder / "images.csv"), "embeddings.safetensors": size}
    except OSError as error:
        raise DataError(f"{folder} is damaged: {error}", "Remove the index and build it again.") from error


def _mapped(path: Path) -> Tensor:
    """The tensor [N, E] of a safetensors file, its pages read when they are used."""
    try:
        with safe_open(path, framework="pt") as file:  # checks header, sizes and bounds
            part = file.get_slice("embeddings")
            shape, dtype, names = part.get_shape(), part.get_dtype(), list(file.keys())
    except (OSError, SafetensorError) as error:
        raise DataError(f"Cannot read {path}: {error}", "Remove the index and build it again.") from error
    if names != ["embeddings"] or dtype != "F32" or len(shape) != 2 or 0 in shape:
        raise DataError(f"{path} does not hold features", "Remove the index and build it again.")
    with path.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    # Mode "c": a private mapping, because torch wants memory that could be written; nobody writes.
    return torch.from_numpy(np.memmap(path, dtype="<f4", mode="c", offset=8 + header, shape=tuple(shape)))


def fingerprint(model: Path) -> str:
    """sha256 that tells whether two models give the same features: of configuration and weights, or of the file."""
    if model.is_file():
        return _sha256(model)
    digest = hashlib.sha256(read_model_config(model).model_dump_json().encode())
    try:
        digest.update(_sha256(model / "model.safetensors").encode())
    except DataError as error:
        raise CheckpointError(error.message, "The model folder is damaged; copy it again.") from error
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    _regular(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}", "Check the path.") from error


def _regular(path: Path) -> os.stat_result:
    """The status of a regular file; DataError for anything else: reading a pipe would wait for ever."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}", "Check the path.") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"Cannot read {path}: not a regular file", "Check the path.")
    return status


# -- the gallery --------------------------------------------------------------------------------------------------


@dataclass
class _Gallery:
    """What there is to index, in order, and what is left out and why."""

    root: Path
    paths: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # path -> reason


def is_prepared(folder: Path) -> bool:
    """Whether `folder` is a prepared data set rather than a folder of images."""
    return (folder / "dataset.json").is_file() and (folder / "images.csv").is_file()


def _find_gallery(folder: Path) -> _Gallery:
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}", "Give a folder of images or a prepared data set.")
    if is_prepared(folder):
        prepared = load_prepared(folder)
        gallery = _Gallery(prepared.image_root.resolve())
        names = iter(prepared.images["path"])
    else:
        gallery = _Gallery(folder.resolve())
        names = _walk(gallery)
    for name in names:
        if reason := _unusable(gallery.root, name):
            gallery.skipped[_printable(name)] = reason
        else:
            gallery.paths.append(name)
    return gallery


def _walk(gallery: _Gallery) -> Iterator[str]:
    """Every image below the root, sorted, hidden ones left out; links to folders are not followed."""

    def unreadable(error: OSError) -> None:
        where = os.path.relpath(error.filename, gallery.root)
        gallery.skipped[_printable(where)] = error.strerror or str(error)

    for directory, folders, files in os.walk(gallery.root, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = os.path.relpath(directory, gallery.root)
        for name in folders:
            if os.path.islink(os.path.join(directory, name)):
                gallery.skipped[_printable(os.path.normpath(os.path.join(base, name)))] = "a link to a folder"
        for name in sorted(files):
            if not name.startswith(".") and _looks_like_image(Path(directory, name)):
                yield os.path.normpath(os.path.join(base, name))


def _looks_like_image(path: Path) -> bool:
    """By its suffix; a file without one is looked into."""
    if path.suffix:
        return path.suffix.lower() in SUFFIXES
    try:
        return min(image_size(path)) > 0
    except DataError:
        return False


def _unusable(root: Path, name: str) -> str | None:
    if not name.isprintable() or "\\" in name:
        return "its name has control characters or a backslash"
    try:
        if (root / name).is_symlink() or (root / name).parent.is_symlink():
            contained(root, name)
        _regular(root / name)
    except DataError as error:
        return _reason(error, root / name)
    return None


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def _reason(error: DataError, path: Path) -> str:
    for start in (f"Cannot read image {path}: ", f"Cannot read {path}: "):
        if error.message.startswith(start):
            return error.message.removeprefix(start)
    return error.message


# -- building -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What `build_index` did."""

    folder: Path
    images: int
    encoded: int  # of them encoded now; the others were known
    removed: int  # paths of the former index that are gone
    skipped: dict[str, str]  # path -> reason
    seconds: float


def default_index(gallery: Path) -> Path:
    """Where the index of a gallery is, unless --out says otherwise: beside the folder, as NAME.index."""
    folder = gallery.resolve()
    if not folder.name:
        raise DataError(f"{gallery} has no folder beside it for the index", "Give one with --out.")
    return folder.with_name(f"{folder.name}.index")


def build_index(
    gallery: Path,
    out: Path | None = None,
    checkpoint: Path | None = None,
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "auto",
) -> Outcome:
    """Index a folder of images or a prepared data set, or bring its index up to date.

    Only content that the index does not know yet is encoded; a stop or a kill loses at most some seconds of work. An
    index keeps its model until another `checkpoint` is given. Raises DataError for a gallery without a readable
    image, a folder that holds something else or is being written, StoppedError when asked to stop.
    """
    started = time.monotonic()
    found = _find_gallery(gallery)
    folder = (out or default_index(gallery)).resolve()
    _check_place(folder, found.root)
    with _only_writer(folder) as work, memory_errors("Lower --batch-size."):
        recover_folder(folder)
        _check_ours(folder)
        former = _former(folder)
        if former is not None and former.root != found.root:
            console.warn(f"{folder} was the index of {former.root}; from now on it is that of {found.root}")
        model_path = _choose_model(checkpoint, former)
        builder = _Builder(found, work, former, model_path, pick_device(device), precision, batch_size)
        outcome = builder.build(folder, started)
    for name, reason in list(found.skipped.items())[:_SHOWN]:
        console.warn(f"left out {name}: {reason}")
    if len(found.skipped) > _SHOWN:
        console.warn(f"and {len(found.skipped) - _SHOWN} more; {folder / 'skipped.csv'} lists them all")
    return outcome


def _check_place(folder: Path, root: Path) -> None:
    if folder.is_relative_to(root) or root.is_relative_to(folder):
        raise DataError(f"The index {folder} and its gallery {root} lie inside each other", "Choose another --out.")


def _check_ours(folder: Path) -> None:
    """An index is replaced as a whole, so nothing else may be in its folder."""
    if folder.is_dir() and (others := sorted(set(os.listdir(folder)) - set(FILES))):
        raise DataError(
            f"{folder} holds something else than an index: {', '.join(others[:3])}", "Move it, or choose another --out."
        )
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file", "Choose another --out.")


@contextmanager
def _only_writer(folder: Path) -> Iterator[Path]:
    """Hold the index's lock and give the work folder beside it, which goes when the block succeeds.

    Raises DataError where another process is writing. The lock ends with the process, however that ends.
    """
    work = folder.with_name(f".{folder.name}.work")
    with ExitStack() as stack:
        try:
            descriptor = _lock(work)
        except BlockingIOError as error:
            raise DataError(f"Another aga is writing {folder}", "Wait until it is done.") from error
        except OSError as error:
            raise DiskError(f"Cannot write {work}: {error.strerror}", "Choose another --out.") from error
        stack.callback(os.close, descriptor)
        yield work
        for shard in work.glob("shard-*"):
            shard.unlink()
        (work / "lock").unlink(missing_ok=True)  # last: from here on another writer may begin
        work.rmdir()


def _lock(work: Path) -> int:
    """An open, locked `work`/lock. One that its owner removed while we opened it counts for nothing: try again."""
    while True:
        try:
            work.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(work / "lock")):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _former(folder: Path) -> Index | None:
    """The index that is there already, if it can be used; its gallery may have moved."""
    if not is_index_folder(folder):
        return None
    try:
        return _open(folder)
    except DataError as error:
        console.warn(f"{error.message}; building it anew")
        return None
