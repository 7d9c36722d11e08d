"""From raw folders in the true layouts to prepared ones: drops, counts, val split, no-ops and what users are told."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from agatool.data.prepare import Prepared, find_data, load_prepared, prepare, prepare_sample
from agatool.data.synthetic import SampleSpec
from agatool.errors import CheckpointError, DataError, UsageError

WORDS = ("The man wears a red coat.", "A woman with a blue bag, NA.", "None", "他 is walking \\ away", '"quoted", text')


def write_image(path: Path, size: tuple[int, int] = (6, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 20, 10)).save(path, "PNG")


def icfg(root: Path, train: int = 20, test: int = 3) -> Path:
    """An ICFG-PEDES folder (no val split): two images a train person, one a test person."""
    records: list[dict[str, Any]] = []
    for split, persons, images in (("train", train, 2), ("test", test, 1)):
        for person in range(persons):
            for image in range(images):
                path = f"{split}/{person:04d}/{image}.jpg"
                write_image(root / "imgs" / path, (6 + person % 3, 12))
                caption = WORDS[(person + image) % len(WORDS)]
                records.append(
                    {"split": split, "captions": [caption], "file_path": path, "processed_tokens": [], "id": person}
                )
    (root / "ICFG-PEDES.json").write_text(json.dumps(records), encoding="utf-8")
    return root


def edit(root: Path, name: str, change: Any) -> None:
    records = json.loads((root / name).read_text())
    change(records)
    (root / name).write_text(json.dumps(records))


def test_prepared_folder_holds_what_the_raw_one_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = prepare("ICFG_PEDES", icfg(tmp_path / "raw"), tmp_path / "data")
    said = capsys.readouterr().err
    assert "held out 2 of 20 train persons (seed 0)" in said
    assert "34,674 published" in said
    assert prepared.info["counts"] == {
        "train": {"persons": 18, "images": 36, "captions": 36},
        "val": {"persons": 2, "images": 4, "captions": 4},
        "test": {"persons": 3, "images": 3, "captions": 3},
    }
    assert list(prepared.images.columns) == ["image_id", "path", "person_id", "split", "width", "height"]
    assert list(prepared.captions.columns) == ["caption_id", "image_id", "caption"]
    assert set(prepared.captions["caption"]) == set(WORDS)  # "None" and "NA" stay words
    assert set(prepared.images["width"]) == {6, 7, 8}
    for split in ("train", "val", "test"):
        images, captions = prepared.split(split)
        assert sorted(images["person_id"].unique()) == list(range(images["person_id"].nunique()))
        assert set(captions["image_id"]) == set(images["image_id"])
    people = prepared.images["path"].str.split("/").str[:2].str.join("/")
    assert (prepared.images["split"].groupby(people).nunique() == 1).all()  # a person is in one split only
    assert json.loads(prepared.tokenizer.read_text())["model"]["vocab"]["[CLS]"] == 2


def test_the_same_input_gives_the_same_bytes_and_another_seed_another_val(tmp_path: Path) -> None:
    raw = icfg(tmp_path / "raw")
    first, second = prepare("icfg-pedes", raw, tmp_path / "a"), prepare("icfg-pedes", raw, tmp_path / "b")
    for name in ("images.csv", "captions.csv", "tokenizer.json", "dataset.json"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    other = prepare("icfg-pedes", raw, tmp_path / "c", seed=1)
    assert list(other.split("val")[0]["path"]) != list(first.split("val")[0]["path"])
    assert "val" not in prepare("icfg-pedes", raw, tmp_path / "d", val_fraction=0.0).info["counts"]


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_unchanged_input_is_a_no_op_that_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, out = icfg(tmp_path / "raw"), tmp_path / "data"
    prepare("icfg-pedes", raw, out)
    before = stamps(out)
    prepare("icfg-pedes", raw, out)
    assert "nothing to do" in capsys.readouterr().err
    assert stamps(out) == before


@pytest.mark.parametrize("change", ["image", "gone", "caption", "option", "damage", "half"])
def test_changed_input_is_prepared_again(tmp_path: Path, change: str) -> None:
    raw, out = icfg(tmp_path / "raw"), tmp_path / "data"
    old = prepare("icfg-pedes", raw, out)
    options: dict[str, Any] = {}
    if change == "image":
        write_image(raw / "imgs/test/0000/0.jpg", (40, 50))
    elif change == "gone":
        (raw / "imgs/test/0000/0.jpg").unlink()
    elif change == "caption":
        edit(raw, "ICFG-PEDES.json", lambda records: records[0].update(captions=["Something new"]))
    elif change == "option":
        options["seed"] = 7
    elif change == "damage":
        (out / "captions.csv").write_text("caption_id,image_id,caption\n0,0,forged\n")
    else:
        (out / "tokenizer.json").unlink()  # as after a crash
    new = prepare("icfg-pedes", raw, out, **options)
    assert load_prepared(out).images.equals(new.images)
    if change in ("damage", "half"):
        assert new.captions.equals(old.captions)
    else:
        assert new.info["fingerprint"] != old.info["fingerprint"]


def test_missing_and_broken_images_are_dropped_with_their_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = icfg(tmp_path / "raw")
    shutil.rmtree(raw / "imgs/train/0003")
    (raw / "imgs/train/0004/1.jpg").write_bytes((raw / "imgs/train/0004/0.jpg").read_bytes()[:40])
    edit(raw, "ICFG-PEDES.json", lambda records: records[0].update(captions=[" "]))
    prepared = prepare("icfg-pedes", raw, tmp_path / "data")
    assert len(prepared.images) == len(prepared.captions) == 43 - 4
    assert prepared.captions["image_id"].isin(prepared.images["image_id"]).all()
    said = capsys.readouterr().err
    assert "train/0003: 2 of 2 missing" in said
    dropped = pd.read_csv(prepared.folder / "dropped.csv")
    assert list(dropped["record"]) == ["ICFG-PEDES.json[0]", "train/0003/0.jpg", "train/0003/1.jpg", "train/0004/1.jpg"]
    assert dropped["reason"].str.contains("caption is empty").sum() == 1
    assert dropped["reason"].str.contains("cannot be decoded").sum() == 1
    assert prepared.info["dropped"]["total"] == 4
    assert prepared.info["dropped"]["reasons"]["image file missing"] == 2


def test_strict_makes_a_drop_fatal_also_when_it_was_prepared_before(tmp_path: Path) -> None:
    raw, out = icfg(tmp_path / "raw"), tmp_path / "data"
    (raw / "imgs/train/0000/0.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="image cannot be decoded"):
        prepare("icfg-pedes", raw, out, strict=True)
    assert not out.exists()
    prepare("icfg-pedes", raw, out)
    with pytest.raises(DataError, match="--strict"):
        prepare("icfg-pedes", raw, out, strict=True)


def test_a_split_without_images_and_a_set_without_images_are_errors(tmp_path: Path) -> None:
    raw = icfg(tmp_path / "raw")
    shutil.rmtree(raw / "imgs/test")
    with pytest.raises(DataError, match="test split"):
        prepare("icfg-pedes", raw, tmp_path / "data")
    shutil.rmtree(raw / "imgs")
    with pytest.raises(DataError, match="None of the 43 images") as error:
        prepare("icfg-pedes", raw, tmp_path / "data")
    assert "imgs/" in error.value.hint
    assert not (tmp_path / "data").exists()


def test_published_counts_met_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from dataclasses import replace

    from agatool.data.annotations import DATASETS

    form = replace(DATASETS["icfg-pedes"], published={"train": (20, 40, 40), "test": (3, 3, 3)})
    monkeypatch.setitem(DATASETS, "icfg-pedes", form)
    assert prepare("icfg-pedes", icfg(tmp_path / "raw"), tmp_path / "data").info["differs_from_published"] == []
    assert "all counts are the published ones" in capsys.readouterr().err


def test_tokenizer_from_a_folder_and_a_test_only_set(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_image(raw / "a.png")
    (raw / "list.csv").write_text("image,caption,id\na.png,a red coat a red coat,1\n")
    trained = prepare("custom", raw, tmp_path / "a")
    assert list(trained.info["counts"]) == ["test"]
    with pytest.raises(DataError, match="no split 'train'") as error:
        trained.split("train")
    assert error.value.hint == "It has: test."
    taken = prepare("custom", raw, tmp_path / "b", tokenizer=str(trained.folder))
    tables = [json.loads(one.tokenizer.read_text())["model"]["vocab"] for one in (trained, taken)]
    assert tables[0] == tables[1]
    with pytest.raises(CheckpointError):
        prepare("custom", raw, tmp_path / "c", tokenizer=str(tmp_path))
    assert not (tmp_path / "c").exists()


def test_options_that_cannot_be_meant(tmp_path: Path) -> None:
    raw = icfg(tmp_path / "raw", 2, 1)
    for options in ({"val_fraction": 1.0}, {"seed": -1}, {"vocab_size": 3}):
        with pytest.raises(UsageError):
            prepare("icfg-pedes", raw, tmp_path / "data", **options)
    (raw / "captions.csv").write_text("image,caption,id\nimgs/train/0000/0.jpg,x,1\n")
    with pytest.raises(UsageError, match="overwrite the annotations"):
        prepare("custom", raw, raw, annotations=raw / "captions.csv")


def test_raw_inside_the_prepared_folder_moves_with_it(tmp_path: Path) -> None:
    out = tmp_path / "data"
    icfg(out / "raw")
    prepare("icfg-pedes", out / "raw", out)
    out.rename(tmp_path / "moved")
    moved = load_prepared(tmp_path / "moved")
    assert (moved.image_root / moved.images["path"][0]).is_file()
    shutil.rmtree(tmp_path / "moved/raw")
    with pytest.raises(DataError, match="any more"):
        load_prepared(tmp_path / "moved")


def forge(prepared: Prepared, name: str, text: str) -> None:
    """Replace a table and its hash: what an attacker would hand over."""
    import hashlib

    (prepared.folder / name).write_text(text)
    info = {**prepared.info, "files": {**prepared.info["files"], name: hashlib.sha256(text.encode()).hexdigest()}}
    (prepared.folder / "dataset.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("images.csv", "image_id,path,person_id,split,width,height\n0,/etc/passwd,0,test,5,5\n"),
        ("images.csv", "image_id,path,person_id,split,width,height\n0,a/../../b,0,test,5,5\n"),
        ("images.csv", "image_id,path,person_id,split,width,height\n0,a,0,tset,5,5\n"),
        ("images.csv", "image_id,path,person_id,split,width,height\n7,a,0,test,5,5\n"),
        ("images.csv", "image_id,path,person_id,split,width,height\nx,a,0,test,5,5\n"),
        ("images.csv", "image_id,path\n0,a\n"),
        ("images.csv", ""),
        ("captions.csv", "caption_id,image_id,caption\n0,99,x\n"),
        ("captions.csv", "caption_id,image_id,caption\n"),
        ("captions.csv", 'caption_id,image_id,caption\n0,0,"x\n'),
    ],
)
def test_forged_tables_are_refused(tmp_path: Path, name: str, text: str) -> None:
    prepared = prepare("icfg-pedes", icfg(tmp_path / "raw", 2, 1), tmp_path / "data")
    forge(prepared, name, text)
    with pytest.raises(DataError):
        load_prepared(tmp_path / "data")


@pytest.mark.parametrize("text", ["{}", "[]", "nonsense", '{"schema_version": 99}', '{"schema_version": 1}'])
def test_a_broken_dataset_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError):
        load_prepared(tmp_path)


def test_find_data_prefers_the_prepared_folder_then_root_then_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGATOOL_DATA", raising=False)
    with pytest.raises(DataError) as error:
        find_data("icfg_pedes")
    assert "github.com" in error.value.hint
    assert "imgs/" in error.value.hint
    assert "aga prepare --dataset icfg-pedes --root RAW" in error.value.hint
    icfg(tmp_path / "store" / "ICFG_PEDES")
    monkeypatch.setenv("AGATOOL_DATA", str(tmp_path / "store"))
    found = find_data("icfg-pedes")
    assert found.folder == Path("data/icfg-pedes")
    before = stamps(found.folder)
    other = icfg(tmp_path / "other", 4, 1)
    assert find_data("icfg-pedes", root=other).images.equals(found.images)  # prepared: left as it is
    assert stamps(found.folder) == before
    assert len(find_data("icfg-pedes", tmp_path / "elsewhere", other).images) == 9


def test_the_sample_is_rendered_once_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = SampleSpec(train=3, val=1, test=2, images=2, captions=1)
    prepared = prepare_sample(tmp_path / "sample", spec)
    assert prepared.info["counts"]["test"] == {"persons": 2, "images": 4, "captions": 4}
    before = stamps(tmp_path / "sample" / "raw" / "imgs")
    prepare_sample(tmp_path / "sample", spec)
    assert "nothing to do" in capsys.readouterr().err
    assert stamps(tmp_path / "sample" / "raw" / "imgs") == before
    # A damaged prepared folder is made again from the same rendering, not from the default size.
    (tmp_path / "sample" / "images.csv").unlink()
    assert len(find_data("sample", tmp_path / "sample").images) == 12
    bigger = prepare_sample(tmp_path / "sample", SampleSpec(train=4, val=1, test=2, images=2, captions=1))
    assert bigger.info["counts"]["train"]["persons"] == 4


def test_the_sample_never_replaces_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine" / "raw").mkdir(parents=True)
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    (tmp_path / "mine" / "raw" / "notes.txt").write_text("keep")
    spec = SampleSpec(train=1, val=1, test=1, images=1)
    with pytest.raises(DataError):
        prepare_sample(tmp_path / "mine", spec)
    assert (tmp_path / "mine" / "raw" / "notes.txt").read_text() == "keep"
    shutil.rmtree(tmp_path / "mine" / "raw")
    with pytest.raises(DataError):
        find_data("sample", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep"
    with pytest.raises(UsageError):
        prepare_sample(tmp_path / "out", SampleSpec(train=-1))


def test_ctrl_c_stops_decoding_promptly_and_leaves_nothing(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_image(raw / "0.png", (4000, 4000))  # slow to decode, so that all of them take half a minute
    for number in range(1, 400):
        (raw / f"{number}.png").hardlink_to(raw / "0.png")
    rows = [f"{number}.png,a red coat,{number}" for number in range(400)]
    (raw / "list.csv").write_text("\n".join(["image,caption,id", *rows]))
    code = "import sys; from agatool.data.prepare import prepare; prepare('custom', sys.argv[1], sys.argv[2])"
    out = tmp_path / "data"
    with subprocess.Popen(
        [sys.executable, "-c", code, raw, out],
        stderr=subprocess.PIPE,
        text=True,
        # a job in a shell's background ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        assert "no split" in process.stderr.readline()  # the annotations are read; decoding comes next
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        assert "KeyboardInterrupt" in process.stderr.read()
    assert time.monotonic() - begun < 5
    assert not out.exists()
