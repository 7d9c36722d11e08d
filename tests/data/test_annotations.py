"""The annotation readers on small files with the benchmarks' own keys, and on what should never come in."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agatool.data.annotations import (
    DATASETS,
    SPLITS,
    Dropped,
    Record,
    dataset_key,
    parse_record,
    read_annotations,
    read_records,
)
from agatool.errors import DataError, UsageError


def cuhk(split: str, person: int, path: str, *captions: str) -> dict[str, Any]:
    return {"split": split, "captions": list(captions), "file_path": path, "processed_tokens": [["a"]], "id": person}


CUHK = [
    cuhk("train", 1, "cam_a/1.png", "A man.", "He walks."),
    cuhk("Train", 1, "CUHK01/2.png", "A man in red."),
    cuhk("VAL", 12004, "Market/3.png", "a", "b", "c"),
    cuhk("test", 13003, "test_query/4.png", "A man.", "x"),
    cuhk("test", 1369, "cam_b/5.png", "y", "z"),
]


def lay_out(root: Path, name: str, records: Any, images: list[str] | None = None, folder: str = "imgs") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / folder).mkdir(exist_ok=True)
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), encoding="utf-8")
    for image in images or []:
        file = root / folder / image
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    return root


def test_cuhk_ids_are_renumbered_per_split_and_split_case_does_not_matter(tmp_path: Path) -> None:
    raw = read_annotations("CUHK_PEDES", lay_out(tmp_path, "reid_raw.json", CUHK))
    assert raw.name == "cuhk-pedes"
    assert raw.image_root == tmp_path / "imgs"
    assert list(raw.images["split"]) == ["train", "train", "val", "test", "test"]
    assert list(raw.images["person_id"]) == [0, 0, 0, 0, 1]
    assert list(raw.images["image_id"]) == [0, 1, 2, 3, 4]
    assert list(raw.captions["image_id"]) == [0, 0, 1, 2, 2, 2, 3, 3, 4, 4]  # one and three captions are fine
    assert list(raw.captions["caption_id"]) == list(range(10))
    assert raw.dropped == []


def test_image_paths_may_or_may_not_carry_the_imgs_prefix(tmp_path: Path) -> None:
    plain = lay_out(tmp_path / "a", "reid_raw.json", CUHK, [record["file_path"] for record in CUHK])
    prefixed = [{**record, "file_path": f"imgs/{record['file_path']}"} for record in CUHK]
    carrying = lay_out(tmp_path / "b", "reid_raw.json", prefixed, [record["file_path"] for record in CUHK])
    for root in (plain, carrying):
        raw = read_annotations("cuhk-pedes", root)
        assert all((raw.image_root / path).is_file() for path in raw.images["path"])


def test_caption_all_without_split_asks_for_the_other_file(tmp_path: Path) -> None:
    records = [{key: value for key, value in record.items() if key != "split"} for record in CUHK]
    with pytest.raises(DataError, match=r"reid_raw\.json"):
        read_annotations("cuhk-pedes", lay_out(tmp_path, "caption_all.json", records))


@pytest.mark.parametrize("name", ["ICFG-PEDES.json", "ICFG_PEDES.json"])
def test_icfg_source_folders_are_not_the_split(tmp_path: Path, name: str) -> None:
    records = [
        {"split": "train", "captions": ["p"], "file_path": "test/0627/1.jpg", "processed_tokens": [], "id": 0},
        {"split": "test", "captions": ["q"], "file_path": "train/0001/2.jpg", "processed_tokens": [], "id": 0},
    ]
    raw = read_annotations("icfg-pedes", lay_out(tmp_path, name, records))
    assert list(raw.images["split"]) == ["train", "test"]
    assert raw.dropped == []  # its ids are numbered per split, so 0 and 0 are two persons


def test_rstpreid_keys_cjk_and_the_same_sentence_on_two_persons(tmp_path: Path) -> None:
    records = [
        {"id": 0, "img_path": "0000_c1.jpg", "captions": ["The man,他穿着 a coat;", "x = [0]  \n y"], "split": "train"},
        {"id": "1", "img_path": "0001_c1.jpg", "captions": ["same", "same"], "split": "train"},
        {"id": 2, "img_path": "0002_c1.jpg", "captions": ["same", "NA"], "split": "val"},
    ]
    raw = read_annotations("RSTPReid", lay_out(tmp_path, "data_captions.json", records))
    assert list(raw.captions["caption"]) == ["The man,他穿着 a coat;", "x = [0] y", "same", "same", "same", "NA"]
    assert list(raw.images["person_id"]) == [0, 1, 0]


def test_rasa_lists_take_the_split_from_their_file(tmp_path: Path) -> None:
    for split, person in (("train", 5), ("test", 5)):
        records = [{"captions": ["c"], "file_path": f"{split}.jpg", "id": person}]
        lay_out(tmp_path, f"processed_data/{split}.json", records, [f"{split}.jpg"])
    lay_out(tmp_path, "processed_data/val.json", [])
    raw = read_annotations("rasa", tmp_path)
    assert list(raw.images["split"]) == ["train", "test"]
    inner = read_annotations("rasa", tmp_path / "processed_data")  # one level too deep: images are beside it
    assert inner.images.equals(raw.images)
    assert inner.image_root.resolve() == tmp_path / "imgs"


def test_ufine_under_any_one_json_name(tmp_path: Path) -> None:
    records = [{"split": "train", "id": 1, "file_path": "images/1.jpg", "captions": ["A woman.", "She."]}]
    root = lay_out(tmp_path, "anything.json", records, ["1.jpg"], folder="images")
    raw = read_annotations("ufine6926", root)
    assert raw.image_root == root
    lay_out(tmp_path, "second.json", records)
    with pytest.raises(DataError, match="several annotation files"):
        read_annotations("ufine6926", root)


def test_custom_csv_one_caption_a_row(tmp_path: Path) -> None:
    with (tmp_path / "mine.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["Image", "caption", "person_id", "split"])
        writer.writerow(["a.jpg", 'A "red", coat', "p1", "train"])
        writer.writerow(["a.jpg", "Again", "p1", "train"])
        writer.writerow(["a.jpg", "Someone else", "p2", "train"])
        writer.writerow(["b.jpg", '["one", "two"]', "p2", "valid"])
        writer.writerow(["c.jpg", "", "p3", "test"])
    raw = read_annotations("custom", tmp_path)
    assert list(raw.captions["caption"]) == ['A "red", coat', "Again", "one", "two"]
    assert list(raw.captions["image_id"]) == [0, 0, 1, 1]
    assert [drop.kind for drop in raw.dropped] == [
        "no caption",
        "duplicate image path with another person or split",
    ]


def test_custom_without_split_is_a_test_set_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.jsonl").write_text('{"image": "a.jpg", "caption": "x", "label": 3}\n\n', encoding="utf-8")
    raw = read_annotations("custom", tmp_path)
    assert list(raw.images["split"]) == ["test"]
    assert "no split" in capsys.readouterr().err


def test_aptm_lists_are_read_as_custom(tmp_path: Path) -> None:
    train = [{"image": "a.jpg", "caption": f"c{i}", "image_id": 7} for i in range(2)]
    test = [{"image": "b.jpg", "caption": ["d", "e"], "image_id": 8}]
    lay_out(tmp_path, "train.json", train)
    raw = read_annotations("custom", lay_out(tmp_path, "test.json", test))
    assert list(raw.images["split"]) == ["train", "test"]
    assert list(raw.captions["caption"]) == ["c0", "c1", "d", "e"]


def test_root_one_level_too_shallow_or_too_deep_is_found_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = lay_out(tmp_path / "all" / "CUHK-PEDES", "reid_raw.json", CUHK)
    for root in (tmp_path / "all", inner / "imgs"):
        assert len(read_annotations("cuhk-pedes", root).images) == 5
        assert "using" in capsys.readouterr().err
    lay_out(tmp_path / "all" / "copy", "reid_raw.json", CUHK)
    with pytest.raises(DataError, match="no annotation file"):  # two candidates: no guessing
        read_annotations("cuhk-pedes", tmp_path / "all")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"captions": []}, "no usable caption"),
        ({"captions": ["", " \t", "​"]}, "no usable caption"),
        ({"captions": {"a": 1}}, "captions are neither text nor a list"),
        ({"captions": ["a\0b"]}, "no usable caption"),
        ({"captions": ["a" * 10_001]}, "no usable caption"),
        ({"captions": ["\ud800"]}, "no usable caption"),
        ({"file_path": "/etc/passwd"}, "image path leaves the image folder"),
        ({"file_path": "../../secret.jpg"}, "image path leaves the image folder"),
        ({"file_path": "..\\secret.jpg"}, "image path leaves the image folder"),
        ({"file_path": "a\0.jpg"}, "image path holds control characters"),
        ({"file_path": "a" * 2000}, "image path too long"),
        ({"file_path": 5}, "image path is not text"),
        ({"file_path": None}, "no image path"),
        ({"id": True}, "person id is neither number nor text"),
        ({"id": [1]}, "person id is neither number nor text"),
        ({"id": " "}, "person id is empty, too long or holds control characters"),
        ({"split": "holdout"}, "unknown split"),
        ({"split": 3}, "unknown split"),
        ({"split": ""}, "no split"),
        ({"file_path": "cam_a/1.png"}, "duplicate image path"),
        ({"file_path": "cam_a/./1.png"}, "duplicate image path"),
        ({"split": "test", "id": 1}, "person id in two splits"),
    ],
)
def test_a_broken_record_is_dropped_with_file_number_and_reason(
    tmp_path: Path, change: dict[str, Any], kind: str
) -> None:
    broken = {"split": "train", "captions": ["ok"], "file_path": "cam_a/9.png", "id": 9, **change}
    raw = read_annotations("cuhk-pedes", lay_out(tmp_path, "reid_raw.json", [*CUHK, broken]))
    assert len(raw.images) == len(CUHK)
    records = [drop for drop in raw.dropped if drop.kind == kind]
    assert [drop.record for drop in records] == ["reid_raw.json[5]"]


def test_one_empty_caption_does_not_take_its_record_along(tmp_path: Path) -> None:
    records = [{**CUHK[0], "captions": ["good", " ", 7]}]
    raw = read_annotations("cuhk-pedes", lay_out(tmp_path, "reid_raw.json", records))
    assert list(raw.captions["caption"]) == ["good"]
    assert raw.dropped == [
        Dropped("reid_raw.json[0]", "caption is empty: caption 2"),
        Dropped("reid_raw.json[0]", "caption is not text: caption 3"),
    ]


def test_links_out_of_the_image_folder_are_dropped(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "data", "reid_raw.json", CUHK, ["test_query/4.png", "CUHK01/2.png"])
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "5.png").write_bytes(b"secret")
    (root / "imgs" / "cam_b").symlink_to(tmp_path / "outside")  # a folder
    (root / "imgs" / "cam_a").mkdir()
    (root / "imgs" / "cam_a" / "1.png").symlink_to(tmp_path / "outside" / "5.png")  # a file
    (root / "imgs" / "Market").mkdir()
    (root / "imgs" / "Market" / "3.png").symlink_to("3.png")  # a loop
    raw = read_annotations("cuhk-pedes", root)
    assert list(raw.images["path"]) == ["CUHK01/2.png", "test_query/4.png"]
    assert {drop.kind for drop in raw.dropped} == {"image path leaves the image folder"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "not a list"),
        ("[1, 2", "not valid JSON"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("[]", "no usable record"),
        ("[[[]]]", "no usable record"),
        ("\x00", "not valid JSON"),
    ],
)
def test_a_broken_file_is_one_data_error(tmp_path: Path, text: str, reason: str) -> None:
    lay_out(tmp_path, "reid_raw.json", [])
    (tmp_path / "reid_raw.json").write_text(text)
    with pytest.raises(DataError, match=reason):
        read_annotations("cuhk-pedes", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"image": "a"}\n{"image": \n', "line 2"),
        ("a.jsonl", b"[" * 100_000, "nested too deeply"),
        ("a.csv", b'image,caption\n"a,b', "not valid CSV"),
        ("a.csv", b"image,caption\n" + b"a" * 200_000, "not valid CSV"),
        ("a.csv", b"image\n\xff\xfe", "not UTF-8"),
        ("a.json", b"[\xff]", "not valid JSON"),
    ],
)
def test_broken_lists_of_ones_own(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        list(read_records(tmp_path / name))


def test_missing_things_name_the_tree(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_annotations("cuhk-pedes", tmp_path / "nowhere")
    assert "imgs/" in error.value.hint
    with pytest.raises(DataError) as error:
        read_annotations("cuhk-pedes", tmp_path)
    assert "reid_raw.json" in error.value.message
    assert "github.com" in error.value.hint
    with pytest.raises(DataError, match="is not a file"):
        read_annotations("cuhk-pedes", tmp_path, tmp_path / "nothing.json")
    with pytest.raises(UsageError, match="Unknown data set"):
        dataset_key("coco")


def test_annotations_elsewhere_than_the_images(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "data", "reid_raw.json", CUHK[:1], ["cam_a/1.png"])
    other = tmp_path / "enriched.json"
    other.write_text(json.dumps([{**CUHK[0], "captions": ["new words"]}]))
    raw = read_annotations("cuhk-pedes", root, other)
    assert raw.sources == [other]
    assert list(raw.captions["caption"]) == ["new words"]


def test_every_format_describes_itself() -> None:
    for form in DATASETS.values():
        assert form.files
        assert form.source
        assert form.tree
        assert set(form.published) <= {*SPLITS, "all"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
keys = st.sampled_from(["file_path", "img_path", "image", "captions", "caption", "id", "label", "image_id", "split"])
paths = st.lists(st.sampled_from(["..", ".", "a", "", "~", "C:", "a\\..", "\0", "b.jpg"]), max_size=5).map("/".join)
records = st.dictionaries(keys, json_values | paths | st.sampled_from(SPLITS) | st.lists(st.text(), max_size=3))


@given(json_values | records)
@settings(max_examples=300, deadline=None)
def test_any_json_value_is_a_record_or_a_data_error(value: Any) -> None:
    try:
        record = parse_record(value)
    except DataError:
        return
    assert isinstance(record, Record)
    assert record.split in {"", *SPLITS}
    assert record.captions
    assert len(record.captions) == len(record.positions)
    for caption in record.captions:
        assert caption == " ".join(caption.split())
        caption.encode("utf-8")
    assert not record.image.startswith("/")
    assert ".." not in record.image.split("/")


@given(st.lists(json_values | records, max_size=6))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_list_is_tables_or_a_data_error(tmp_path: Path, values: list[Any]) -> None:
    lay_out(tmp_path, "reid_raw.json", values)
    try:
        raw = read_annotations("cuhk-pedes", tmp_path)
    except DataError:
        return
    assert raw.captions["image_id"].isin(raw.images["image_id"]).all()
    root = raw.image_root.resolve()
    assert all((root / path).resolve().is_relative_to(root) for path in raw.images["path"])
    assert raw.images.groupby("split")["person_id"].min().eq(0).all()
