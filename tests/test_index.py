"""Building, updating, resuming, locking and opening an index; hostile galleries and damaged files."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from agatool import indexing
from agatool.checkpoint import load
from agatool.data.prepare import Prepared
from agatool.encoding import encode_images
from agatool.errors import TERMINATED, CheckpointError, DataError, StoppedError
from agatool.index import fingerprint_of, open_index, sha256
from agatool.indexing import build_index, default_index
from agatool.retrieval import top_k

OLD = 1_600_000_000_000_000_000  # nanoseconds; long ago


def picture(path: Path, seed: int, mtime_ns: int = OLD) -> Path:
    """A small image of noise with a settled modification time; BMP, so that all have the same size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "BMP")
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """Ten images, some in a folder below."""
    for number in range(10):
        picture(tmp_path / "gallery" / ("sub/" if number % 3 == 0 else "") / f"{number}.bmp", number)
    return tmp_path / "gallery"


@pytest.fixture
def build(gallery: Path, tiny_run: Path, tmp_path: Path) -> Callable[..., indexing.Outcome]:
    """`build()` indexes `gallery` into tmp_path/index."""

    def run(**options: Any) -> indexing.Outcome:
        given = {
            "gallery": gallery,
            "out": tmp_path / "index",
            "checkpoint": tiny_run,
            "batch_size": 3,
            "device": "cpu",
        }
        return build_index(**{**given, **options})

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- building ---


def test_an_index_holds_the_features_of_every_image(
    build: Callable[..., indexing.Outcome], gallery: Path, tiny_run: Path
) -> None:
    outcome = build()
    index = open_index(outcome.folder)
    names = sorted(str(path.relative_to(gallery)) for path in gallery.rglob("*.bmp"))
    assert sorted(index.images["path"]) == names
    assert (outcome.images, outcome.encoded, outcome.removed, outcome.skipped) == (10, 10, 0, {})
    model = load(tiny_run / "best")
    wanted = encode_images(model, [index.path(row) for row in range(10)], 10).features
    torch.testing.assert_close(index.embeddings, wanted)
    torch.testing.assert_close(index.embeddings.norm(dim=1), torch.ones(10))
    assert index.images["sha256"].tolist() == [sha256(index.path(row)) for row in range(10)]
    assert index.fingerprint == fingerprint_of(tiny_run / "best")
    assert (np.diff(index.made_up) >= 0).all()
    assert len(index.made_up) == 200


def test_the_same_gallery_gives_the_same_bytes(build: Callable[..., indexing.Outcome], tmp_path: Path) -> None:
    assert files(build().folder) == files(build(out=tmp_path / "second").folder)


def test_a_prepared_data_set_is_indexed_in_its_order(build: Callable[..., indexing.Outcome], sample: Prepared) -> None:
    index = open_index(build(gallery=sample.folder).folder)
    assert index.images["path"].tolist() == sample.images["path"].tolist()
    assert index.root == sample.image_root.resolve()


def test_what_is_no_image_is_left_out_and_listed(
    build: Callable[..., indexing.Outcome], gallery: Path, tmp_path: Path
) -> None:
    picture(tmp_path / "outside.bmp", 99)
    picture(gallery / "no_suffix", 20)
    picture(gallery / ".hidden.bmp", 21)
    picture(gallery / ".cache" / "x.bmp", 22)
    picture(gallery / "two\nlines.bmp", 23)
    (gallery / "notes.txt").write_text("no image")
    (gallery / "notes").write_text("no image either")
    (gallery / "broken.jpg").write_bytes(b"\xff\xd8\xff" + b"x" * 50)
    (gallery / "empty.png").touch()
    (gallery / "out.bmp").symlink_to(tmp_path / "outside.bmp")
    (gallery / "in.bmp").symlink_to(gallery / "1.bmp")
    (gallery / "circle").symlink_to(gallery)
    (gallery / "dangling.bmp").symlink_to(gallery / "nowhere")
    os.mkfifo(gallery / "pipe.jpg")
    outcome = build()
    index = open_index(outcome.folder)
    assert set(index.images["path"]) - {str(path.relative_to(gallery)) for path in gallery.rglob("[0-9].bmp")} == {
        "no_suffix", "in.bmp"
    }  # fmt: skip
    wanted = {"broken.jpg", "empty.png", "out.bmp", "circle", "dangling.bmp", "pipe.jpg", "'two\\nlines.bmp'"}
    assert set(outcome.skipped) == wanted
    listed = pd.read_csv(outcome.folder / "skipped.csv")
    assert set(listed["path"]) == wanted
    assert "link" in outcome.skipped["out.bmp"]
    assert str(gallery) not in "".join(outcome.skipped.values())


def test_equal_contents_are_encoded_once(
    build: Callable[..., indexing.Outcome], gallery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for copy in range(5):
        picture(gallery / f"copy{copy}.bmp", 1)
    sizes = counted(monkeypatch)
    index = open_index(build().folder)
    assert sum(sizes) == 10
    assert len(index) == 15
    rows = index.images.index[index.images["sha256"] == sha256(gallery / "1.bmp")]
    assert len(rows) == 6
    assert (index.embeddings[rows] == index.embeddings[rows[0]]).all()


def counted(monkeypatch: pytest.MonkeyPatch, at: int = 0, action: Callable[[], Any] | None = None) -> list[int]:
    """The sizes of the batches encoded from now on; `action` happens before batch number `at`."""
    sizes: list[int] = []
    original = indexing.encode_batch

    def encode_batch(model: Any, images: Any) -> Any:
        if action is not None and len(sizes) == at:
            action()
        sizes.append(len(images))
        return original(model, images)

    monkeypatch.setattr(indexing, "encode_batch", encode_batch)
    return sizes


# --- updating ---


def test_nothing_new_writes_nothing(build: Callable[..., indexing.Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build().folder
    before = folder.stat().st_ino
    sizes = counted(monkeypatch)
    assert build().encoded == 0
    assert sizes == []
    assert folder.stat().st_ino == before  # a new index would be a new folder


def test_only_new_and_changed_contents_are_encoded(
    build: Callable[..., indexing.Outcome], gallery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    picture(gallery / "new.bmp", 100)
    picture(gallery / "1.bmp", 101, OLD + 1)  # of the same size
    (gallery / "2.bmp").unlink()
    (gallery / "4.bmp").rename(gallery / "renamed.bmp")
    os.utime(gallery / "5.bmp", ns=(OLD + 7, OLD + 7))  # touched
    sizes = counted(monkeypatch)
    outcome = build()
    assert sum(sizes) == outcome.encoded == 2
    assert outcome.removed == 2  # 2.bmp, and the old name of 4.bmp
    index = open_index(outcome.folder)
    fresh = open_index(build(out=outcome.folder.with_name("fresh")).folder)
    assert index.images.equals(fresh.images)
    torch.testing.assert_close(index.embeddings, fresh.embeddings)


def test_a_file_changed_within_the_clocks_tick_is_seen(build: Callable[..., indexing.Outcome], gallery: Path) -> None:
    path = picture(gallery / "1.bmp", 50)
    os.utime(path)  # now
    fresh = path.stat().st_mtime_ns
    build()
    picture(path, 51, fresh)  # same size, same time
    assert build().encoded == 1


def test_size_and_time_are_a_quick_check(build: Callable[..., indexing.Outcome], gallery: Path) -> None:
    build()
    picture(gallery / "1.bmp", 77)  # same size, same settled time: whoever does that means it
    assert build().encoded == 0


def test_a_gallery_that_moved_is_not_encoded_again(
    build: Callable[..., indexing.Outcome], gallery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build().folder
    moved = gallery.rename(gallery.with_name("moved"))
    with pytest.raises(DataError, match="not at") as caught:
        open_index(folder)
    assert f"--out {folder}" in caught.value.hint
    assert build(gallery=moved).encoded == 0
    assert open_index(folder).root == moved


def test_an_index_keeps_its_model_until_another_is_given(
    build: Callable[..., indexing.Outcome], tiny_run: Path, tmp_path: Path, gallery: Path
) -> None:
    folder = build().folder
    assert build(checkpoint=None).encoded == 0
    other = another_model(tiny_run, tmp_path)
    assert build(checkpoint=other).encoded == 10
    assert open_index(folder).model == other
    picture(gallery / "new.bmp", 100)
    assert build(checkpoint=None).encoded == 1
    assert open_index(folder).model == other


def another_model(tiny_run: Path, tmp_path: Path) -> Path:
    from agatool.checkpoint import save_model

    model = load(tiny_run / "best")
    with torch.no_grad():
        model.vision_proj.bias.add_(0.5)
    save_model(tmp_path / "other", model, "another")
    return tmp_path / "other"


# --- stopping, resuming, two writers ---


def test_a_build_that_was_cut_off_goes_on_and_ends_in_the_same_bytes(
    build: Callable[..., indexing.Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gallery: Path
) -> None:
    (gallery / "broken.jpg").write_bytes(b"x")  # moves the others within the batches
    whole = files(build(out=tmp_path / "whole").folder)
    monkeypatch.setattr(indexing, "FLUSH_SECONDS", 0.0)

    def die() -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        counted(patch, 2, die)
        with pytest.raises(RuntimeError, match="power cut"):
            build()
    assert not (tmp_path / "index").exists()
    sizes = counted(monkeypatch)
    outcome = build()
    assert sum(sizes) == 10 - 6
    assert files(outcome.folder) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gallery", "index", "whole"]


def test_stopping_keeps_what_was_encoded(
    build: Callable[..., indexing.Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        counted(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(StoppedError, match="6 images") as caught:
            build()
    assert caught.value.exit_code == TERMINATED
    sizes = counted(monkeypatch)
    build()
    assert sum(sizes) == 4


def test_work_of_another_model_or_broken_work_is_not_taken_over(
    build: Callable[..., indexing.Outcome], tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = another_model(tiny_run, tmp_path)
    with monkeypatch.context() as patch:
        counted(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(StoppedError):
            build(checkpoint=other)
    (tmp_path / ".index.work" / "shard-000099.safetensors").write_bytes(b"junk")
    sizes = counted(monkeypatch)
    build()
    assert sum(sizes) == 10
    assert not (tmp_path / ".index.work").exists()


def test_a_second_writer_is_refused(build: Callable[..., indexing.Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile() -> None:
        with pytest.raises(DataError, match="Another aga is writing"):
            build()

    sizes = counted(monkeypatch, 1, meanwhile)
    build()
    assert sum(sizes) == 10


def test_a_lock_left_by_a_dead_process_does_no_harm(build: Callable[..., indexing.Outcome], tmp_path: Path) -> None:
    (tmp_path / ".index.work").mkdir()
    (tmp_path / ".index.work" / "lock").touch()
    build()
    assert not (tmp_path / ".index.work").exists()


# --- refusals ---


@pytest.mark.parametrize("out", ["gallery/index", "gallery", ".", "gallery/sub/deep"])
def test_an_index_never_lies_in_its_gallery(
    build: Callable[..., indexing.Outcome], tmp_path: Path, out: str, gallery: Path
) -> None:
    before = sorted(gallery.rglob("*"))
    with pytest.raises(DataError, match="inside each other"):
        build(out=tmp_path / out)
    assert sorted(gallery.rglob("*")) == before


def test_something_else_is_never_overwritten(build: Callable[..., indexing.Outcome], tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"thesis\.tex"):
        build()
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        build(out=tmp_path / "file")
    assert (tmp_path / "index" / "thesis.tex").read_text() == "years of work"


def test_a_gallery_without_images_is_an_error(build: Callable[..., indexing.Outcome], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no readable image"):
        build(gallery=tmp_path / "empty")
    with pytest.raises(DataError, match="no folder"):
        build(gallery=tmp_path / "nowhere")
    assert sorted(path.name for path in tmp_path.iterdir() if "index" in path.name) == []


def test_the_default_place_is_beside_the_gallery(gallery: Path) -> None:
    assert default_index(gallery) == gallery.with_name("gallery.index")
    with pytest.raises(DataError, match="no place"):
        default_index(Path("/"))


# --- opening ---


@pytest.fixture(scope="module")
def built(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    for number in range(10):
        picture(folder / "gallery" / f"{number}.bmp", number)
    return build_index(folder / "gallery", folder / "index", tiny_run, device="cpu").folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """An index to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "index"))


def test_features_are_mapped_and_ranked_as_by_a_full_sort(folder: Path) -> None:
    index = open_index(folder)
    queries = torch.nn.functional.normalize(torch.randn(3, index.embeddings.shape[1]), dim=1)
    scores, rows = top_k(queries, index.embeddings, 4)
    wanted = (queries @ index.embeddings.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(rows, wanted.indices[:, :4])
    assert torch.equal(scores, wanted.values[:, :4])
    assert str(index.folder / "embeddings.safetensors") in Path("/proc/self/maps").read_text()


def rewrite(folder: Path, **changes: Any) -> None:
    """Change index.json; what it says of images.csv stays true."""
    info = json.loads((folder / "index.json").read_text())
    info["files"]["images.csv"] = sha256(folder / "images.csv")
    (folder / "index.json").write_text(json.dumps({**info, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2}, {"root": 3}, {"root": "a\0b"}, {"model": None}, {"fingerprint": []}, {"files": {}},
        {"made_up": "x"}, {"made_up": [[1.0]]}, {"made_up": [float("nan")]}, {"made_up": ["1"]},
    ],
)  # fmt: skip
def test_a_damaged_description_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    rewrite(folder, **changes)
    with pytest.raises(DataError):
        open_index(folder)


def test_damaged_files_are_refused_and_built_anew(build: Callable[..., indexing.Outcome]) -> None:
    folder = build().folder
    whole = files(folder)
    for name, data in {
        "embeddings.safetensors": whole["embeddings.safetensors"][:-4],
        "images.csv": whole["images.csv"].replace(b"1.bmp", b"9.bmp"),
        "index.json": b"[" * 100_000,
    }.items():
        (folder / name).write_bytes(data)
        with pytest.raises(DataError):
            open_index(folder)
        build()
        assert files(folder) == whole
    (folder / "images.csv").unlink()
    with pytest.raises(DataError):
        open_index(folder)


@pytest.mark.parametrize("seed", range(8))
def test_hostile_features_never_crash(folder: Path, seed: int) -> None:
    data = bytearray((folder / "embeddings.safetensors").read_bytes())
    rng = np.random.default_rng(seed)
    for place in rng.integers(0, 90, 4):  # the header
        data[place] = rng.integers(0, 256)
    (folder / "embeddings.safetensors").write_bytes(data)
    try:
        index = open_index(folder)
    except DataError:
        return
    assert index.embeddings.shape[0] == 10


def test_paths_that_leave_the_gallery_are_refused(folder: Path, tmp_path: Path) -> None:
    picture(tmp_path / "secret.bmp", 99)
    table = pd.read_csv(folder / "images.csv")
    hostile = ["../secret.bmp", str(tmp_path / "secret.bmp"), "sub/../../secret.bmp", ""]
    table.loc[range(4), "path"] = hostile
    table.to_csv(folder / "images.csv", index=False)
    rewrite(folder)
    index = open_index(folder)
    for row in range(4):
        with pytest.raises(DataError):
            index.path(row)
        assert not index.is_current(row)


@pytest.mark.parametrize("line", [b"1.bmp", b"1.bmp,a,b,c", b'"1.bmp,a,1,2', b"\xff\xfe,a,1,2", b"", b"a,b,1,2,3"])
def test_a_damaged_row_is_an_error(folder: Path, line: bytes) -> None:
    lines = (folder / "images.csv").read_bytes().split(b"\n")
    (folder / "images.csv").write_bytes(b"\n".join([*lines[:3], line, *lines[4:]]))
    rewrite(folder)
    index = open_index(folder)
    assert index.name(1) == "1.bmp"
    with pytest.raises(DataError, match="row 2"):
        index.path(2)
    assert not index.is_current(2)


def test_an_open_index_outlives_its_replacement(build: Callable[..., indexing.Outcome], gallery: Path) -> None:
    index = open_index(build().folder)
    names, features = [index.name(row) for row in range(10)], index.embeddings.clone()
    for number in range(5):
        picture(gallery / f"a{number}.bmp", 200 + number)
    build()
    assert [index.name(row) for row in range(10)] == names
    assert torch.equal(index.embeddings, features)


def test_a_link_put_in_an_images_place_is_not_followed_out(
    build: Callable[..., indexing.Outcome], gallery: Path, tmp_path: Path
) -> None:
    index = open_index(build().folder)
    row = index.images.index[index.images["path"] == "1.bmp"][0]
    shutil.move(gallery / "1.bmp", tmp_path / "1.bmp")
    (gallery / "1.bmp").symlink_to(tmp_path / "1.bmp")
    assert not index.is_current(row)
    with pytest.raises(DataError, match="link"):
        index.path(row)


def test_no_index_is_said_so(tmp_path: Path, tiny_run: Path) -> None:
    with pytest.raises(DataError, match="not an index") as caught:
        open_index(tmp_path)
    assert "aga index" in caught.value.hint
    with pytest.raises(CheckpointError):
        fingerprint_of(tmp_path)


def test_an_index_that_a_kill_moved_aside_comes_back(folder: Path, tmp_path: Path) -> None:
    from agatool.files import MARK

    folder.rename(tmp_path / f".index.{MARK}old")
    assert len(open_index(folder)) == 10
