"""Writing that survives a crash, reading that survives a hostile file name, and JSON that has bounds."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agatool.errors import DataError, DiskError

MAX_JSON_BYTES = 2 * 1024**3
MARK = "agatool-"  # a folder being written is called .NAME.agatool-XXXXXXXX, what it replaces .NAME.agatool-old
MANY_FILES = 100  # from so many on, one sync of the disk costs less than one of each file


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DiskError(f"Cannot write {path}: {reason}", "Free some space or choose another --out.") from error


def _lock(descriptor: int) -> bool:
    """Whether we have the lock of an open file now; it ends with the process, however that ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another one has it, or this file system has no locks
        return False
    return True


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, locked while in use and gone at the end."""
    _sweep(path.parent)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.{MARK}", dir=path.parent))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        folder.chmod(0o777 & ~_umask())
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove the folders that killed writers left in `parent`; living ones hold a lock on theirs."""
    for folder in parent.glob(f".*.{MARK}????????/"):
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                if _lock(descriptor):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed into place, on failure removed.

    Raises DiskError where the disk is full or not writable.
    """
    path = Path(path)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes `path`'s place whole, on failure it is removed.

    An older folder at `path` is moved aside first and removed last, so that a kill at any moment leaves the old
    or the new one complete (the old one possibly under another name, from which `recover_folder` brings it back).
    Raises DiskError where the disk is full or not writable.
    """
    path = Path(path)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(path)
        with _temporary_folder(path) as temporary:
            yield temporary
            _publish(temporary)
            try:
                if path.exists():
                    path.rename(_old(path))
                temporary.rename(path)
                _sync(path.parent)
            finally:
                recover_folder(path)


def _publish(folder: Path) -> None:
    """Give all files the user's permissions and force them to disk."""
    mode = 0o666 & ~_umask()
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in files:  # some writers, safetensors among them, make files that only the owner can read
        file.chmod(mode)
    if len(files) > MANY_FILES:
        os.sync()
        return
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _old(path: Path) -> Path:
    full = Path(os.path.abspath(path))  # "." has no name
    return full.parent / f".{full.name}.{MARK}old"


def recover_folder(path: Path) -> None:
    """Finish what a kill inside `atomic_folder` left: the old folder comes back if the new one never arrived."""
    old = _old(path)
    if old.exists() and not path.exists():
        old.rename(path)
    elif old.exists():
        shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document atomically (UTF-8, indented, keys in the given order)."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON document; DataError for a missing, oversized, too deep or broken one."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DataError(f"{path} is larger than {MAX_JSON_BYTES >> 30} GiB", "Split the file.")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}", "Check the path.") from error
    except RecursionError as error:
        raise DataError(f"{path} is nested too deeply to be an annotation file", "Check the file.") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON: {error}", "Download the file again.") from error


def contained(root: Path, relative: str) -> Path:
    """`root/relative`, guaranteed to stay inside `root` after following links; DataError otherwise."""
    if not relative or "\0" in relative:
        raise DataError(f"Path {relative!r} is empty or contains NUL", "Correct the record.")
    candidate = Path(relative.replace("\\", "/"))
    if candidate.is_absolute() or ".." in candidate.parts or candidate.drive:
        raise DataError(f"Path {relative!r} leaves the image folder", "Paths must be relative, without '..'.")
    full = root / candidate
    try:
        inside = full.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, or characters that no file name has
        raise DataError(f"Path {relative!r} cannot be followed: {error}", "Correct the record.") from error
    if not inside:
        raise DataError(f"Path {relative!r} leaves the image folder through a link", "Copy the file inside.")
    return full
