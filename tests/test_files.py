"""Atomic writing under failures and kills, containment of hostile paths, bounded JSON."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agatool import files
from agatool.errors import DataError, DiskError
from agatool.files import atomic_file, atomic_folder, contained, read_json, recover_folder, write_json, write_text

ROOT = os.geteuid() == 0  # root may write into a read-only folder


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@contextmanager
def umask(mask: int) -> Iterator[None]:
    former = os.umask(mask)
    try:
        yield
    finally:
        os.umask(former)


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- files ---


def test_a_file_appears_whole_and_alone(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "a.csv"
    with atomic_file(target) as temporary:
        assert temporary.suffix == ".csv"  # writers choose their format by it
        temporary.write_text("first")
        assert not target.exists()
    assert target.read_text() == "first"
    write_text(target, "zweite Fassung, größer 猫")
    assert target.read_bytes() == "zweite Fassung, größer 猫".encode()
    assert everything(target.parent) == ["a.csv"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, DataError])
def test_a_failure_leaves_the_former_file(tmp_path: Path, error: type[BaseException]) -> None:
    write_text(tmp_path / "a.txt", "former")
    with pytest.raises(error), atomic_file(tmp_path / "a.txt") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error("stop")
    assert everything(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "former"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_is_the_users(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        write_text(tmp_path / "file", "text")
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "inside").touch(0o600)  # as safetensors does
            (folder / "deeper").mkdir()
        assert os.umask(mask) == mask  # untouched
    assert mode(tmp_path / "file") == mode(tmp_path / "folder" / "inside") == 0o666 & ~mask
    assert mode(tmp_path / "folder") == mode(tmp_path / "folder" / "deeper") == 0o777 & ~mask


def test_a_full_disk(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "former")
    with atomic_folder(tmp_path / "b") as folder:
        (folder / "inside").write_text("former")
    before = everything(tmp_path)
    with disk_of(1000):
        with pytest.raises(DiskError, match=r"Cannot write .*a\.txt: File too large") as caught:
            write_text(tmp_path / "a.txt", "x" * 2000)
        with pytest.raises(DiskError), atomic_folder(tmp_path / "b") as folder:
            (folder / "inside").write_text("x" * 2000)
    assert caught.value.exit_code == 6
    assert caught.value.hint
    assert everything(tmp_path) == before
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "b" / "inside").read_text() == "former"


def test_a_read_only_folder(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    locked = Path("/sys") if ROOT else tmp_path / "locked"  # where not even root may write
    for write in (lambda path: write_text(path, "text"), lambda path: atomic_folder(path).__enter__()):
        with pytest.raises(DiskError, match=r"Permission denied|not permitted|Read-only"):
            write(locked / "a")
    assert everything(tmp_path) == ["locked"]


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DiskError, match="Cannot write"):
        write_text(tmp_path / "file" / "a.txt", "text")
    with pytest.raises(DiskError, match="Cannot write"):
        write_text(tmp_path, "a folder is here")
    assert (tmp_path / "file").read_text() == "mine"
    assert everything(tmp_path) == ["file"]


# --- folders ---


def make(path: Path, text: str) -> None:
    with atomic_folder(path) as folder:
        (folder / "a.txt").write_text(text)


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_former_folder(tmp_path: Path, error: type[BaseException]) -> None:
    make(tmp_path / "model", "former")
    with pytest.raises((error, DiskError)), atomic_folder(tmp_path / "model") as folder:  # noqa: PT012
        (folder / "a.txt").write_text("half")
        raise error("stop")
    assert everything(tmp_path) == ["model", "model/a.txt"]
    assert (tmp_path / "model" / "a.txt").read_text() == "former"


def test_a_new_folder_replaces_all_of_the_old(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "old.txt").touch()
    make(tmp_path / "model", "new")
    assert everything(tmp_path) == ["model", "model/a.txt"]


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("model"), "text")
    monkeypatch.chdir(tmp_path / "model")
    for path in (Path("."), Path(".."), Path("/")):
        recover_folder(path)  # what `agatool.load(".")` does
    assert Path("a.txt").read_text() == "text"


KILLED = """
import os, signal, sys
from pathlib import Path
from agatool.files import atomic_folder
writes, target = {}, Path(sys.argv[1])
def hook(event, arguments):
    if event in ("os.rename", "shutil.rmtree", "os.rmdir"):
        writes[event] = writes.get(event, 0) + 1
        if f"{event} {writes[event]}" == sys.argv[2]:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
with atomic_folder(target) as folder:
    (folder / "a.txt").write_text("new")
    (folder / "b").mkdir()
    if sys.argv[2] == "body":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("moment", "survives"),
    [("body", "former"), ("os.rename 1", "former"), ("os.rename 2", "former"), ("shutil.rmtree 1", "new")],
)
def test_kill_at_any_moment(tmp_path: Path, moment: str, survives: str) -> None:
    make(tmp_path / "model", "former")
    code = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "model"), moment]).returncode
    assert code == -signal.SIGKILL
    recover_folder(tmp_path / "model")
    assert (tmp_path / "model" / "a.txt").read_text() == survives
    make(tmp_path / "model", "next")
    assert everything(tmp_path) == ["model", "model/a.txt"]  # the kill's leftovers are swept


def test_living_writers_are_not_swept(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a") as slow:
        (slow / "a.txt").write_text("slow")
        make(tmp_path / "b", "quick")
        make(tmp_path / "a", "quick")
    assert (tmp_path / "a" / "a.txt").read_text() == "slow"
    assert everything(tmp_path) == ["a", "a/a.txt", "b", "b/a.txt"]


def test_what_others_wrote_is_not_swept(tmp_path: Path) -> None:
    mine = [".model.old", ".model.backup12", "agatool-12345678", ".model.agatool-notes"]
    for name in mine:
        (tmp_path / name).mkdir()
    make(tmp_path / "model", "text")
    recover_folder(tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {*mine, "model"}


def test_many_files_are_complete(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "many") as folder:
        for number in range(files.MANY_FILES + 1):
            (folder / f"{number}.txt").write_text(str(number))
    assert len(everything(tmp_path / "many")) == files.MANY_FILES + 1
    assert mode(tmp_path / "many" / "7.txt") == mode(tmp_path / "many" / "100.txt")


# --- JSON ---


def test_json_round_trip(tmp_path: Path) -> None:
    document = {"größe": [1, 2.5, None, True], "b": {"c": "猫\n\"'"}}
    write_json(tmp_path / "a.json", document)
    assert read_json(tmp_path / "a.json") == document
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "bom.json") == [1]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"[" * 100_000, "too deep"),
        (b'{"a":' * 100_000, "too deep"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"{]", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"9" * 100_000, "not valid JSON"),
    ],
)
def test_broken_json(tmp_path: Path, raw: bytes, reason: str) -> None:
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(DataError, match=reason) as caught:
        read_json(tmp_path / "a.json")
    assert "a.json" in caught.value.message


def test_json_that_is_not_there_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(DataError, match="directory"):
        read_json(tmp_path)
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(files.MAX_JSON_BYTES + 1)  # a hole: takes no space
    with pytest.raises(DataError, match="larger than 2 GiB"):
        read_json(tmp_path / "large.json")


# --- containment ---

HOSTILE = st.one_of(
    st.text(max_size=12),
    st.lists(st.sampled_from(["..", ".", "a", "link", "loop", "", "\0", "~", "C:", "b\\..", "\ud800"])).map("/".join),
    st.lists(st.sampled_from(["..", "a", "link", "\\", "C:"])).map("\\".join),
)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("outside") / "gallery"
    (root / "a").mkdir(parents=True)
    (root / "a" / "link").symlink_to(root.parent)
    (root / "link").symlink_to("/etc")
    (root / "inside").symlink_to(root / "a")
    (root / "loop").symlink_to(root / "loop")
    return root


@given(relative=HOSTILE)
def test_no_path_leaves_the_root(gallery: Path, relative: str) -> None:
    try:
        full = contained(gallery, relative)
    except DataError:
        return
    assert Path(os.path.realpath(full)).is_relative_to(gallery.resolve())


@pytest.mark.parametrize(
    "relative",
    ["", "\0", "a\0b.jpg", "/etc/passwd", "..", "../x", "a/../../x", "..\\x", "a\\..\\..\\x", "\\etc\\passwd",
     "link/passwd", "a/link/x", "loop", "loop/x", "\ud800.jpg"],
)  # fmt: skip
def test_paths_that_leave(gallery: Path, relative: str) -> None:
    with pytest.raises(DataError):
        contained(gallery, relative)


@pytest.mark.parametrize("relative", ["x.jpg", "a/x.jpg", "a\\x.jpg", "inside/x.jpg", "./x.jpg", "..x/y", "a b/ü.png"])
def test_paths_that_stay(gallery: Path, relative: str) -> None:
    assert contained(gallery, relative) == gallery / relative.replace("\\", "/")
