"""The sample data set: same bytes for the same spec, RSTPReid's layout, and a truth that holds."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agatool.data.captioning import MAX_WORDS, MIN_WORDS, PART_OF
from agatool.data.figure import PARTS
from agatool.data.synthetic import VALUES, SampleSpec, people, write_sample

SHIPPED = Path(__file__).parents[2] / "sample_data"
SMALL = SampleSpec(train=22, val=2, test=6, images=2, seed=3, caption_noise=0.2)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "one"
    write_sample(out, SMALL, workers=1)
    return out


def test_same_bytes_for_any_number_of_workers(sample: Path, tmp_path: Path) -> None:
    done: list[int] = []
    write_sample(tmp_path / "two", SMALL, workers=2, progress=done.append)
    assert contents(tmp_path / "two") == contents(sample)
    assert done[-1] == 60
    assert done == sorted(done)


def test_another_seed_gives_other_people() -> None:
    other = people(SampleSpec(train=22, val=2, test=6, seed=4))
    assert [person.attributes for person in other] != [person.attributes for person in people(SMALL)]


def test_more_images_keep_the_earlier_ones(sample: Path, tmp_path: Path) -> None:
    write_sample(tmp_path / "more", replace(SMALL, train=5, val=0, test=0, images=3), workers=1)
    before, after = contents(sample / "imgs"), contents(tmp_path / "more" / "imgs")
    assert len(set(before) & set(after)) == 10
    assert all(after[name] == before[name] for name in set(before) & set(after))


def test_layout_is_rstpreids(sample: Path) -> None:
    records = json.loads((sample / "data_captions.json").read_text())
    assert Counter(record["split"] for record in records) == {"train": 44, "val": 4, "test": 12}
    assert all(set(record) == {"id", "img_path", "captions", "split"} for record in records)
    assert all(isinstance(record["id"], int) and len(record["captions"]) == 2 for record in records)
    assert {record["img_path"] for record in records} == {path.name for path in (sample / "imgs").iterdir()}
    splits = {(record["id"], record["split"]) for record in records}
    assert len(splits) == len({number for number, _ in splits}) == 30


def test_captions_have_the_benchmarks_length(sample: Path) -> None:
    records = json.loads((sample / "data_captions.json").read_text())
    lengths = [len(caption.replace(" ,", ",").split()) for record in records for caption in record["captions"]]
    assert MIN_WORDS <= min(lengths) <= max(lengths) <= MAX_WORDS


def test_offsets_point_at_the_words(sample: Path) -> None:
    captions = {
        (record["img_path"], str(index)): caption
        for record in json.loads((sample / "data_captions.json").read_text())
        for index, caption in enumerate(record["captions"])
    }
    truth = rows(sample / "truth" / "captions.csv")
    assert {(row["img_path"], row["caption_index"]) for row in truth} == set(captions)
    for row in truth:
        caption, start, end = captions[row["img_path"], row["caption_index"]], int(row["start"]), int(row["end"])
        assert caption[start:end] == row["text"]
        assert " " not in row["text"]
        assert start == 0 or caption[start - 1] == " "
        assert end == len(caption) or caption[end] in " ,."


def test_every_word_is_right_or_recorded_as_wrong(sample: Path) -> None:
    identities = {row["id"]: row for row in rows(sample / "truth" / "identities.csv")}
    records = json.loads((sample / "data_captions.json").read_text())
    owner = {record["img_path"]: identities[str(record["id"])] for record in records}
    stated = [row for row in rows(sample / "truth" / "captions.csv") if row["attribute"]]
    for row in stated:
        true = owner[row["img_path"]][row["attribute"]]
        assert row["part"] == ("face" if row["value"] == "bald" else PART_OF[row["attribute"]])
        assert (row["wrong"] == "1") == (row["value"] != true)
        assert row["correct"] == (true if row["wrong"] == "1" else "")
    fallible = [row for row in stated if row["attribute"] in VALUES]
    assert 0.12 < sum(row["wrong"] == "1" for row in fallible) / len(fallible) < 0.28


def test_no_noise_means_no_wrong_word(tmp_path: Path) -> None:
    write_sample(tmp_path / "clean", SampleSpec(train=3, val=0, test=1, caption_noise=0.0), workers=1)
    assert all(row["wrong"] == "0" for row in rows(tmp_path / "clean" / "truth" / "captions.csv"))


def test_masks_fit_their_images_and_show_every_named_part(sample: Path) -> None:
    assert json.loads((sample / "truth" / "parts.json").read_text()) == {str(i): part for i, part in enumerate(PARTS)}
    named: dict[str, set[str]] = {}
    for row in rows(sample / "truth" / "captions.csv"):
        named.setdefault(row["img_path"], set()).add(row["part"])
    for name, parts in named.items():
        png = (sample / "truth" / "parts" / name).with_suffix(".png")
        with Image.open(sample / "imgs" / name) as image, Image.open(png) as mask:
            assert mask.size == image.size == (SMALL.width, SMALL.height)
            shown = {PARTS[value] for value in np.unique(np.asarray(mask))}
        assert parts - {"person"} <= shown


def test_twins_differ_by_one_attribute() -> None:
    persons = people(SampleSpec(seed=5))
    twins = [person for person in persons if person.twin_of]
    assert 0.09 < len(twins) / len(persons) < 0.15
    for twin in twins:
        model = persons[int(twin.twin_of)]
        differing = [name for name, value in twin.attributes.items() if value != model.attributes[name]]
        assert differing == [twin.twin_attribute]
        assert model.id < twin.id
        assert model.split == twin.split


def test_any_size(tmp_path: Path) -> None:
    write_sample(tmp_path / "large", SampleSpec(train=1, val=0, test=0, images=1, height=256, width=96), workers=1)
    with Image.open(next((tmp_path / "large" / "imgs").iterdir())) as image:
        assert image.size == (96, 256)


@pytest.mark.parametrize(
    "spec",
    [SampleSpec(train=0, val=0, test=0), SampleSpec(images=0), SampleSpec(caption_noise=1.5), SampleSpec(height=8)],
)
def test_impossible_specs_are_refused(spec: SampleSpec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"."):
        write_sample(tmp_path / "none", spec)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sample(tmp_path / "half", SMALL, workers=1, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_the_shipped_sample_can_be_made_again(tmp_path: Path) -> None:
    spec = json.loads((SHIPPED / "truth" / "spec.json").read_text())
    assert spec.pop("schema_version") == 1
    write_sample(tmp_path / "again", SampleSpec(**spec), workers=1)
    again, shipped = contents(tmp_path / "again"), contents(SHIPPED)
    assert set(again) == set(shipped) - {"README.md"}
    for name, data in again.items():
        if name.endswith((".json", ".csv")):
            assert data == shipped[name], name
        else:  # encoders differ between versions of Pillow, pictures hardly
            with Image.open(SHIPPED / name) as old, Image.open(tmp_path / "again" / name) as new:
                assert np.abs(np.asarray(old, np.int16) - np.asarray(new, np.int16)).mean() < 1.0, name
