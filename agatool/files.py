"""Writing that survives a crash, reading that survives a hostile file name, and JSON that has bounds."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agatool.errors import DataError, DiskError

MAX_JSON_BYTES = 2 * 1024**3


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
    or the new one complete (the old one possibly as `.NAME.old`, which `recover_folder` puts back).
    """
    path = Path(path)
    old = path.with_name(f".{path.name}.old")
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(path)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o777 & ~_umask())
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():  # some writers, safetensors among them, make files that only the owner can read
                    file.chmod(0o666 & ~_umask())
                _sync(file)
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            _sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Finish what a kill inside `atomic_folder` left: the old folder comes back if the new one never arrived."""
    old = path.with_name(f".{path.name}.old")
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
    if not full.resolve().is_relative_to(root.resolve()):
        raise DataError(f"Path {relative!r} leaves the image folder through a link", "Copy the file inside.")
    return full
