"""Builds the index of a gallery and keeps it up to date: what is new is encoded, what is gone leaves.

Shape suffixes: N images, E shared space.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from agatool import __version__, console
from agatool.checkpoint import load, save_tensors
from agatool.data.images import decode_image, image_size, to_tensor
from agatool.data.prepare import load_prepared
from agatool.encoding import encode_batch, finite, in_order, inference
from agatool.errors import CheckpointError, DataError, DiskError, StoppedError
from agatool.files import atomic_file, atomic_folder, contained, recover_folder, write_json
from agatool.hint import made_up_scores
from agatool.index import (
    COLUMNS,
    FILES,
    FORMAT,
    Index,
    described,
    fingerprint_of,
    is_index,
    read_index,
    regular,
    sha256,
)
from agatool.machine import StopFlag, memory_errors, pick_device, use_bf16
from agatool.model import PersonSearchModel
from agatool.report import write_csv
from agatool.runs import find_model

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
FLUSH_SECONDS = 20.0  # work that a kill can cost
_UNSETTLED = -1  # modification time of a file so fresh that its next change may get the same one
_TICK = 2_000_000_000  # nanoseconds; the coarsest clock of a file system, FAT's
_WORKERS = 4  # threads that read and decode
_NAMED = 5  # images left out that are named on the console


@dataclass(frozen=True)
class Outcome:
    """What `build_index` did."""

    folder: Path
    images: int  # in the index now
    encoded: int  # of them encoded by this call
    removed: int  # paths of the former index that are gone
    skipped: dict[str, str]  # path -> why it was left out
    seconds: float


def default_index(gallery: Path) -> Path:
    """Where a gallery's index is unless the user says otherwise: beside the folder, as NAME.index."""
    folder = gallery.resolve()
    if not folder.name:
        raise DataError(f"There is no place beside {gallery} for its index", "Choose one with --out.")
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

    Only content that the index has not seen is encoded, and a stop or a kill costs seconds of work. An index keeps
    its model until another `checkpoint` is given. Raises DataError for a gallery without a readable image and for an
    `out` that holds something else or is being written, and StoppedError when asked to stop.
    """
    started = time.monotonic()
    found = find_gallery(gallery)
    folder = (out or default_index(gallery)).resolve()
    if folder.is_relative_to(found.root) or found.root.is_relative_to(folder):
        raise DataError(
            f"The index {folder} and its gallery {found.root} lie inside each other", "Choose another --out."
        )
    with _only_writer(folder) as work, memory_errors("Lower --batch-size."):
        former = _former(folder)
        model = _choose_model(checkpoint, former)
        job = _Job(found, work, former, model, fingerprint_of(model), pick_device(device), precision, batch_size)
        outcome = job.run(folder, started)
    _tell(outcome)
    return outcome


def _tell(outcome: Outcome) -> None:
    for name, reason in list(outcome.skipped.items())[:_NAMED]:
        console.warn(f"left out {name}: {reason}")
    if (more := len(outcome.skipped) - _NAMED) > 0:
        console.warn(f"and {more} more; {outcome.folder / 'skipped.csv'} lists them all")


# -- the gallery --------------------------------------------------------------------------------------------------


@dataclass
class Gallery:
    """What there is to index, in order, and what is left out."""

    root: Path
    files: dict[str, os.stat_result] = field(default_factory=dict)  # path below root -> its status
    skipped: dict[str, str] = field(default_factory=dict)  # path -> reason


def find_gallery(folder: Path) -> Gallery:
    """The images of a prepared data set in its order, or of any other folder, recursively and sorted.

    Hidden files and links that lead out of the folder are left out. Raises DataError where there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}", "Give a folder of images or a prepared data set.")
    if (folder / "dataset.json").is_file() and (folder / "images.csv").is_file():
        prepared = load_prepared(folder)
        gallery = Gallery(prepared.image_root.resolve())
        names: Iterable[str] = prepared.images["path"]
    else:
        gallery = Gallery(folder.resolve())
        names = _walk(gallery)
    for name in names:
        try:
            gallery.files[name] = _checked(gallery.root, name)
        except DataError as error:
            gallery.skipped[_printable(name)] = _reason(error, gallery.root / name)
    return gallery


def _walk(gallery: Gallery) -> Iterator[str]:
    def unreadable(error: OSError) -> None:
        where = os.path.relpath(error.filename, gallery.root)
        gallery.skipped[_printable(where)] = error.strerror or str(error)

    for directory, folders, files in os.walk(gallery.root, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = os.path.relpath(directory, gallery.root)
        for name in folders:
            if os.path.islink(os.path.join(directory, name)):  # os.walk does not follow it
                gallery.skipped[_printable(os.path.normpath(os.path.join(base, name)))] = "a link to a folder"
        for name in sorted(files):
            if not name.startswith(".") and _looks_like_image(Path(directory, name)):
                yield os.path.normpath(os.path.join(base, name))


def _looks_like_image(path: Path) -> bool:
    """By its suffix; a file without one is looked into."""
    if path.suffix:
        return path.suffix.lower() in SUFFIXES
    try:
        return image_size(path) > (0, 0)
    except DataError:
        return False


def _checked(root: Path, name: str) -> os.stat_result:
    if not name.isprintable() or "\\" in name:  # images.csv and `contained` could not name it
        raise DataError("its name has control characters or a backslash")
    return regular(contained(root, name))


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def _reason(error: DataError, path: Path) -> str:
    for start in (f"Cannot read image {path}: ", f"Cannot read {path}: "):
        if error.message.startswith(start):
            return error.message.removeprefix(start)
    return error.message


# -- one writer ---------------------------------------------------------------------------------------------------


@contextmanager
def _only_writer(folder: Path) -> Iterator[Path]:
    """Hold the lock of the index and give the work folder beside it, which keeps finished work until all is done.

    Raises DataError where another process has the lock; it ends with the process, however that ends.
    """
    work = folder.with_name(f".{folder.name}.work")
    try:
        descriptor = _lock(work)
    except BlockingIOError as error:
        raise DataError(f"Another aga is writing {folder}", "Wait until it is done.") from error
    except OSError as error:
        raise DiskError(f"Cannot write {work}: {error.strerror}", "Choose another --out.") from error
    try:
        yield work
        for shard in work.glob("shard-*"):
            shard.unlink()
    finally:
        if not any(work.glob("shard-*")):
            (work / "lock").unlink(missing_ok=True)  # from here on another writer may begin
            with suppress(OSError):
                work.rmdir()
        os.close(descriptor)


def _lock(work: Path) -> int:
    """`work`/lock, open and locked. One that its owner removed while we opened it counts for nothing: try again."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack, suppress(FileNotFoundError):
            descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(work / "lock")):
                stack.pop_all()
                return descriptor


def _former(folder: Path) -> Index | None:
    """The index that is there already, if it can be used. Raises DataError where there is something else."""
    recover_folder(folder)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file", "Choose another --out.")
    others = sorted(set(os.listdir(folder)) - set(FILES)) if folder.is_dir() else []
    if others:  # an index is replaced as a whole
        raise DataError(f"{folder} holds something else than an index: {others[0]}", "Choose another --out.")
    if not is_index(folder):
        return None
    try:
        return read_index(folder)
    except DataError as error:
        console.warn(f"{error.message}. It is built anew.")
        return None


def _choose_model(checkpoint: Path | None, former: Index | None) -> Path:
    """The model of --checkpoint, else the one that made the index, else the newest run's."""
    if checkpoint is None and former is not None:
        with suppress(CheckpointError):
            if fingerprint_of(former.model) == former.fingerprint:
                return former.model
        console.warn(f"The model of {former.folder}, {former.model}, changed or is gone; all is encoded again")
    return find_model(checkpoint).resolve()


# -- building -----------------------------------------------------------------------------------------------------


class _Stock:
    """Features that need no encoding, by the sha256 of their image's content."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []  # [., E]
        self.place: dict[str, tuple[int, int]] = {}  # sha256 -> (part, row)

    def add(self, hashes: Iterable[str], features: Tensor) -> None:
        self.place.update((key, (len(self.parts), row)) for row, key in enumerate(hashes))
        self.parts.append(features)

    def take(self, hashes: Iterable[str]) -> Tensor:
        """[N, E] in this order."""
        places = np.array([self.place[key] for key in hashes])
        features = torch.empty(len(places), self.parts[0].shape[1])
        for number, part in enumerate(self.parts):
            here = np.flatnonzero(places[:, 0] == number)
            features[torch.from_numpy(here)] = part[torch.from_numpy(places[here, 1])]
        return features


@dataclass
class _Job:
    """One call of `build_index`, its lock held."""

    gallery: Gallery
    work: Path
    former: Index | None
    model_path: Path
    mark: str  # the model's fingerprint
    device: torch.device
    precision: str
    batch_size: int
    stock: _Stock = field(default_factory=_Stock)

    def run(self, folder: Path, started: float) -> Outcome:
        self._stock_up()
        table = self._table()
        unknown = {key: name for key, name in zip(table["sha256"], table["path"], strict=True)
                   if key not in self.stock.place}  # fmt: skip
        if unknown:
            broken = self._encode(unknown)
            reasons = table["sha256"].map(broken).dropna()
            self.gallery.skipped.update(zip(table["path"][reasons.index], reasons, strict=True))
            table = table.drop(reasons.index).reset_index(drop=True)
        if table.empty:
            raise DataError(f"There is no readable image in {self.gallery.root}", "Give another folder.")
        if not self._is_written(table):
            self._write(folder, table)
        before = set(self.former.images["path"]) if self.former else set()
        encoded = int(table["sha256"].isin(list(unknown)).sum())
        removed = len(before - set(table["path"]))
        return Outcome(folder, len(table), encoded, removed, self.gallery.skipped, time.monotonic() - started)

    def _stock_up(self) -> None:
        """Take over the features of the former index, and of work that was cut off, by the same model."""
        if self.former and self.former.fingerprint == self.mark:
            self.stock.add(self.former.images["sha256"], self.former.embeddings)
        for shard in sorted(self.work.glob("shard-*.safetensors")):
            try:
                with safe_open(shard, framework="pt") as file:
                    told = file.metadata() or {}
                    features, hashes = file.get_tensor("embeddings"), told.get("sha256", "").split()
            except (OSError, SafetensorError):
                told, features, hashes = {}, torch.empty(0), []
            if told.get("model") == self.mark and len(hashes) == len(features):
                self.stock.add(hashes, features)
            else:
                shard.unlink()

    def _table(self) -> pd.DataFrame:
        """images.csv of what is there now, before anything is decoded; contents are read only where they may be new."""
        now = time.time_ns()
        known: dict[str, tuple[str, int, int]] = {}  # path -> sha256, size, mtime_ns
        if self.former and self.former.root == self.gallery.root:
            columns = (self.former.images[key] for key in COLUMNS)
            known = {name: (key, size, mtime) for name, key, size, mtime in zip(*columns, strict=True)}
        looked = {name: (status.st_size, status.st_mtime_ns) for name, status in self.gallery.files.items()}
        hashes = {name: known[name][0] for name, seen in looked.items() if name in known and known[name][1:] == seen}
        fresh = [name for name in looked if name not in hashes]
        with console.progress("Reading images", len(fresh)) as task:
            for name, found in zip(fresh, in_order(self._read, fresh, _WORKERS, 4 * _WORKERS), strict=True):
                task.advance()
                if isinstance(found, DataError):
                    self.gallery.skipped[name] = _reason(found, self.gallery.root / name)
                else:
                    hashes[name] = found
        rows = [(name, hashes[name], *_settled(*seen, now)) for name, seen in looked.items() if name in hashes]
        return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)

    def _read(self, name: str) -> str | DataError:
        try:
            return sha256(self.gallery.root / name)
        except DataError as error:
            return error

    def _decode(self, name: str) -> Tensor | DataError:
        path = self.gallery.root / name
        try:
            return to_tensor(decode_image(path), self.model.config.image_size)
        except DataError as error:
            return DataError(_reason(error, path))

    def _encode(self, unknown: dict[str, str]) -> dict[str, str]:
        """Encode sha256 -> path into the stock; returns sha256 -> reason of what cannot be decoded."""
        broken: dict[str, str] = {}
        hashes: list[str] = []
        features: list[Tensor] = []

        def flush() -> None:
            if hashes:
                self._flush(hashes, torch.cat(features))
                hashes.clear()
                features.clear()

        bf16, flushed = use_bf16(self.device, self.precision), time.monotonic()
        with StopFlag() as stop, inference(self.model, bf16), console.progress("Encoding images", len(unknown)) as task:
            decoded = in_order(self._decode, unknown.values(), _WORKERS, 2 * self.batch_size)

            def readable() -> Iterator[tuple[str, Tensor]]:
                for key, image in zip(unknown, decoded, strict=True):
                    task.advance()
                    if isinstance(image, DataError):
                        broken[key] = image.message
                    else:
                        yield key, image

            images = readable()
            while batch := list(islice(images, self.batch_size)):
                keys, pixels = zip(*batch, strict=True)
                features.append(finite(encode_batch(self.model, torch.stack(pixels)).feature.float().cpu()))
                hashes += keys
                if stop.code is not None or time.monotonic() - flushed >= FLUSH_SECONDS:
                    flush()
                    flushed = time.monotonic()
                if stop.code is not None:
                    raise StoppedError(
                        f"Stopped; {len(self.stock.place)} images are encoded",
                        "The same command goes on there.",
                        stop.code,
                    )
            flush()
        return broken

    def _flush(self, hashes: Sequence[str], features: Tensor) -> None:
        """Put a shard of work aside."""
        taken = {shard.name for shard in self.work.glob("shard-*")}
        name = next(name for number in range(10**6) if (name := f"shard-{number:06}.safetensors") not in taken)
        with atomic_file(self.work / name) as temporary:
            save_file({"embeddings": features}, temporary, {"model": self.mark, "sha256": " ".join(hashes)})
        self.stock.add(hashes, features)

    @cached_property
    def model(self) -> PersonSearchModel:
        """Opened when it is first needed: nothing new, no waiting."""
        return load(self.model_path).to(self.device)

    def _is_written(self, table: pd.DataFrame) -> bool:
        former = self.former
        if former is None or (former.fingerprint, former.model) != (self.mark, self.model_path):
            return False
        try:
            skipped = pd.read_csv(former.folder / "skipped.csv", dtype=str, na_filter=False)
        except (OSError, ValueError):
            return False
        return former.root == self.gallery.root and former.images.equals(table) and skipped.equals(self._skipped())

    def _skipped(self) -> pd.DataFrame:
        return pd.DataFrame(sorted(self.gallery.skipped.items()), columns=["path", "reason"], dtype=str)

    def _write(self, folder: Path, table: pd.DataFrame) -> None:
        features = self.stock.take(table["sha256"])
        made_up = made_up_scores(self.model, features, use_bf16(self.device, self.precision))
        with atomic_folder(folder) as temporary:
            save_tensors(temporary / "embeddings.safetensors", {"embeddings": features})
            write_csv(temporary / "images.csv", table)
            write_csv(temporary / "skipped.csv", self._skipped())
            info = {
                "format": FORMAT, "agatool": __version__, "root": str(self.gallery.root),
                "model": str(self.model_path), "fingerprint": self.mark, "files": described(temporary),
                "made_up": [round(float(score), 6) for score in made_up],
            }  # fmt: skip
            write_json(temporary / "index.json", info)


def _settled(size: int, mtime_ns: int, now: int) -> tuple[int, int]:
    return size, mtime_ns if now - mtime_ns > _TICK else _UNSETTLED
