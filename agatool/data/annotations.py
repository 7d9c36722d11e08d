"""The benchmark JSON schemas -> one table; validation, path containment."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from agatool import console
from agatool.errors import DataError, UsageError
from agatool.files import MAX_JSON_BYTES, contained, read_json

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
_SPLIT_NAMES |= {name: name for name in SPLITS}
# First key present wins. `image_id` comes last: some lists use it for the person, COCO-like ones for the image.
_IMAGE_KEYS = ("file_path", "img_path", "image_path", "image", "path")
CAPTION_KEYS = ("captions", "caption")
_PERSON_KEYS = ("id", "person_id", "label", "image_id")
MAX_CAPTION, MAX_PATH = 10_000, 1024  # characters; the longest real caption has a few hundred
_LOOK = 200  # records tried when finding out which folder the image paths start from


@dataclass(frozen=True)
class Dropped:
    """One thing left out: where it stood, and `kind: detail` why."""

    record: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without its detail, for counting."""
        return self.reason.split(":")[0]


@dataclass(frozen=True)
class Record:
    """One validated annotation record, whichever schema it came in."""

    image: str  # posix, relative to the image folder
    person: str
    split: str  # train, val or test; empty where neither the record nor its file says
    captions: list[str]
    positions: list[int]  # where each caption stood in the record's own list
    caption_key: str  # the record's own key for them
    dropped: list[str]  # reasons of the captions left out


@dataclass
class Annotations:
    """A raw data set as tables; every path is inside `image_root`, but nobody has looked for the files yet."""

    name: str
    image_root: Path
    sources: list[Path]
    images: pd.DataFrame  # image_id (0..), path, person_id (from 0 in each split, by first appearance), split
    captions: pd.DataFrame  # caption_id (0.. in file order), image_id, caption
    dropped: list[Dropped]


@dataclass(frozen=True)
class DatasetFormat:
    """What is known about a data set before seeing it."""

    title: str
    source: str
    files: tuple[str, ...]  # accepted annotation files, best first; {split} stands for one file a split
    folders: tuple[str, ...]  # where image paths may start, most usual first
    tree: str
    published: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)  # persons, images, captions
    global_ids: bool = False  # one id means one person in the whole data set, so two splits must not share it
    split_required: bool = True
    repeats: bool = False  # an image may come on several records, one caption each


_IMGS = ("imgs", "images", ".")
DATASETS: dict[str, DatasetFormat] = {
    "cuhk-pedes": DatasetFormat(
        title="CUHK-PEDES",
        source="Li et al., Person Search with Natural Language Description, CVPR 2017; ask the authors for access: "
        "https://github.com/ShuangLI59/Person-Search-with-Natural-Language-Description",
        files=("reid_raw.json", "caption_all.json"),
        folders=_IMGS,
        tree="CUHK-PEDES/\n  reid_raw.json\n  imgs/\n    cam_a/ cam_b/ CUHK01/ CUHK03/ Market/ "
        "test_query/ train_query/",
        published={
            "train": (11_003, 34_054, 68_126),
            "val": (1_000, 3_078, 6_158),
            "test": (1_000, 3_074, 6_156),
        },
        global_ids=True,
    ),
    "icfg-pedes": DatasetFormat(
        title="ICFG-PEDES",
        source="Ding et al., Semantically Self-Aligned Network, 2021; ask the authors for access: "
        "https://github.com/zifyloo/SSAN",
        files=("ICFG-PEDES.json", "ICFG_PEDES.json"),
        folders=_IMGS,
        tree="ICFG-PEDES/\n  ICFG-PEDES.json\n  imgs/\n    train/ test/",
        published={"train": (3_102, 34_674, 34_674), "test": (1_000, 19_848, 19_848)},
    ),
    "rstpreid": DatasetFormat(
        title="RSTPReid",
        source="Zhu et al., DSSL: Deep Surroundings-person Separation Learning, ACM MM 2021; ask the authors for "
        "access: https://github.com/NjtechCVLab/RSTPReid-Dataset",
        files=("data_captions.json",),
        folders=_IMGS,
        tree="RSTPReid/\n  data_captions.json\n  imgs/\n    0000_c14_0031.jpg ...",
        published={
            "train": (3_701, 18_505, 37_010),
            "val": (200, 1_000, 2_000),
            "test": (200, 1_000, 2_000),
        },
        global_ids=True,
    ),
    "rasa": DatasetFormat(
        title="RaSa's processed lists",
        source="one of the benchmarks after the data_process.py of https://github.com/Flame-Chasers/RaSa",
        files=("processed_data/{split}.json", "{split}.json"),
        folders=(*_IMGS, "../imgs", "../images"),
        tree="ROOT/\n  processed_data/\n    train.json val.json test.json\n  imgs/",
    ),
    "ufine6926": DatasetFormat(
        title="UFine6926",
        source="Zuo et al., UFineBench, CVPR 2024; ask the authors for access: "
        "https://github.com/Zplusdragon/UFineBench",
        files=("UFine6926.json", "ufine6926.json", "reid_raw.json", "*.json"),
        folders=_IMGS,
        tree="UFine6926/\n  UFine6926.json\n  images/\n    1.jpg ...",
        published={"all": (6_926, 26_206, 52_412)},
    ),
    "custom": DatasetFormat(
        title="your own data",
        source="your own images and descriptions",
        files=("{split}.json", "{split}.jsonl", "{split}.csv", "*.json", "*.jsonl", "*.csv"),
        folders=(".", "imgs", "images"),
        tree="ROOT/\n  annotations.csv     image,caption,person_id,split (or the same keys as a JSON list)\n"
        "  images/\n    anything.jpg ...",
        global_ids=True,
        split_required=False,
        repeats=True,
    ),
    "sample": DatasetFormat(
        title="the sample data set",
        source="rendered by agatool itself",
        files=("data_captions.json",),
        folders=_IMGS,
        tree="sample/\n  data_captions.json\n  imgs/",
        global_ids=True,
    ),
}


def _squash(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def dataset_key(name: str) -> str:
    """The key in DATASETS for a name in any case, with '_' or '-'; UsageError for an unknown one."""
    for key in DATASETS:
        if _squash(key) == _squash(name):
            return key
    raise UsageError(f"Unknown data set {name!r}", f"Choose one of: {', '.join(DATASETS)}.")


def same_dataset(first: str, second: str) -> bool:
    """Whether two spellings name one data set."""
    return _squash(first) == _squash(second)


# -- one record -------------------------------------------------------------------------------------------------


def _value(fields: Mapping[str, tuple[str, Any]], keys: tuple[str, ...], what: str) -> tuple[str, Any]:
    for key in keys:
        if key in fields and fields[key][1] is not None:
            return fields[key]
    raise DataError(f"no {what}: none of the keys {', '.join(keys)}")


def _has_control(text: str) -> bool:
    # Cc: control characters, Cs: half a surrogate pair, which no file can hold. White space is no harm.
    return any(unicodedata.category(c) in ("Cc", "Cs") and not c.isspace() for c in text)


def _image_path(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise DataError(f"image path is not text: {type(value).__name__}")
    if len(value) > MAX_PATH:
        raise DataError(f"image path too long: {len(value)} characters")
    if not value.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        raise DataError(f"image path holds control characters: {value!r}")
    path = PurePosixPath(value.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise DataError(f"image path leaves the image folder: {value!r}")
    return path.as_posix()


def _person(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(f"person id is neither number nor text: {type(value).__name__}")
    text = str(value).strip() if isinstance(value, str) or abs(value) < 10**100 else ""
    if not text or len(text) > MAX_PATH or _has_control(text):
        raise DataError("person id is empty, too long or holds control characters")
    return text


def _split(fields: Mapping[str, tuple[str, Any]]) -> str:
    value = fields.get("split", ("", None))[1]
    if value is None or value == "":
        return ""
    name = _SPLIT_NAMES.get(value.strip().lower()) if isinstance(value, str) else None
    if name is None:
        raise DataError(f"unknown split: {str(value)[:80]!r}")
    return name


def clean_caption(value: Any) -> str:
    """A caption on one line without stray white space; DataError with `kind: detail` where there is none."""
    if not isinstance(value, str):
        raise DataError("caption is not text")
    if len(value) > MAX_CAPTION:
        raise DataError("caption too long")
    if not value.isprintable():
        if _has_control(value):
            raise DataError("caption holds control characters")
        # Categories Z* and C* (zero-width space among them) leave nothing to see.
        if all(unicodedata.category(c)[0] in "ZC" for c in value):
            raise DataError("caption is empty")
    text = " ".join(value.split())
    if not text:
        raise DataError("caption is empty")
    return text


def parse_record(record: Any) -> Record:
    """Validate one record of any of the schemas. DataError says `kind: detail` why it cannot be used.

    Broken captions are left out (`Record.dropped`); a record without one usable caption is an error.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"record is not an object: {type(record).__name__}")
    fields = {str(key).strip().lower(): (key, value) for key, value in record.items()}
    image = _image_path(_value(fields, _IMAGE_KEYS, "image path")[1])
    caption_key, raw = _value(fields, CAPTION_KEYS, "caption")
    person = _person(_value(fields, _PERSON_KEYS, "person id")[1])
    split = _split(fields)
    if not isinstance(raw, str | list):
        raise DataError(f"captions are neither text nor a list: {type(raw).__name__}")
    captions, positions, dropped = [], [], []
    for position, value in enumerate([raw] if isinstance(raw, str) else raw):
        try:
            captions.append(clean_caption(value))
            positions.append(position)
        except DataError as error:
            dropped.append(f"{error.message}: caption {position + 1}")
    if not captions:
        raise DataError(f"no usable caption: {'; '.join(dropped[:3]) or 'the list is empty'}")
    return Record(image, person, split, captions, positions, str(caption_key), dropped)


# -- one file ---------------------------------------------------------------------------------------------------


def open_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file with their ends; DataError where it is missing, oversized or no such text."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DataError(f"{path} is larger than {MAX_JSON_BYTES >> 30} GiB", "Split the file.")
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}", "Check the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}", "Save the file as UTF-8.") from error


def read_jsonl(path: Path) -> Iterator[Any]:
    """The records of a JSON lines file, one at a time; DataError names the line that is broken."""
    for number, line in enumerate(open_lines(path), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                raise DataError(f"{path}, line {number}, is not valid JSON: {reason}", "Check the file.") from error


def csv_cell(value: Any) -> Any:
    """A CSV cell; a JSON list in it (captions) is read as one, never evaluated."""
    if isinstance(value, str) and value.startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _read_csv(path: Path) -> Iterator[Any]:
    try:
        for row in csv.DictReader(open_lines(path), strict=True):
            yield {key: csv_cell(value) if value != "" else None for key, value in row.items() if key is not None}
    except csv.Error as error:
        raise DataError(f"{path} is not valid CSV: {error}", "Quote captions that hold commas.") from error


def read_records(path: Path) -> Iterator[Any]:
    """The raw records of a JSON list, JSON lines or CSV file; DataError where the file as a whole is broken."""
    if not path.is_file():
        raise DataError(f"{path} is not a file", "Check --annotations.")
    if path.suffix.lower() == ".jsonl":
        yield from read_jsonl(path)
    elif path.suffix.lower() == ".csv":
        yield from _read_csv(path)
    else:
        records = read_json(path)
        if not isinstance(records, list):
            raise DataError(
                f"{path} holds {type(records).__name__}, not a list of records", "See docs/datasets.md for the formats."
            )
        yield from records


# -- one data set -----------------------------------------------------------------------------------------------


def _sources_in(form: DatasetFormat, folder: Path) -> list[Path]:
    for name in form.files:
        if "{split}" in name:
            found = [path for split in SPLITS if (path := folder / name.format(split=split)).is_file()]
        else:
            found = sorted(path for path in folder.glob(name) if path.is_file())
            if len(found) > 1:
                names = ", ".join(path.name for path in found[:5])
                raise DataError(f"{folder} holds several annotation files: {names}", "Choose with --annotations.")
        if found:
            return found
    return []


def _locate(form: DatasetFormat, root: Path) -> tuple[Path, list[Path]]:
    """The data set's folder and annotation files: `root`, or one level below or above if that is unambiguous."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder", f"Expected:\n{form.tree}")
    sources = _sources_in(form, root)
    if sources:
        return root, sources
    # Patterns match too much to go looking with them in folders that were not named.
    exact = DatasetFormat(form.title, form.source, tuple(n for n in form.files if "*" not in n), (), "")
    try:
        near = [path for path in sorted(root.iterdir()) if path.is_dir()] + [root.resolve().parent]
    except OSError as error:
        raise DataError(f"Cannot read {root}: {error.strerror}", "Check the permissions.") from error
    found = [(folder, sources) for folder in near if form.split_required and (sources := _sources_in(exact, folder))]
    if len(found) != 1:
        wanted = ", ".join(name.format(split="train") for name in form.files)
        raise DataError(
            f"{root} holds no annotation file of {form.title} ({wanted})",
            f"Get it from: {form.source}\nExpected:\n{form.tree}",
        )
    console.info(f"{form.title}: using {found[0][0]} (nothing in {root} itself)")
    return found[0]


def _image_root(form: DatasetFormat, root: Path, records: list[Record]) -> Path:
    """The folder from which most of the image paths exist (a sample of them); the usual one if none does."""
    folders = [root / name for name in form.folders if (root / name).is_dir()]
    sample = records[:: max(1, len(records) // _LOOK)]
    # os.path rather than pathlib: a name too long for the file system is just not there.
    hits = [sum(os.path.isfile(folder / record.image) for record in sample) for folder in folders]
    return folders[hits.index(max(hits))]  # the first folder on a tie; root itself always is one


@dataclass
class _Table:
    """Collects records into tables, refusing what contradicts an earlier record."""

    form: DatasetFormat
    inside: Callable[[str], None]
    images: dict[str, tuple[int, str, str]] = field(default_factory=dict)  # path -> image_id, person, split
    captions: list[tuple[int, str]] = field(default_factory=list)
    split_of: dict[str, str] = field(default_factory=dict)  # person -> split

    def add(self, record: Record) -> None:
        """DataError with `kind: detail` where the record cannot join the table."""
        if not record.split:
            raise DataError("no split")
        known = self.images.get(record.image)
        if known and not self.form.repeats:
            raise DataError(f"duplicate image path: {record.image}")
        if known and known[1:] != (record.person, record.split):
            raise DataError(f"duplicate image path with another person or split: {record.image}")
        first = self.split_of.get(record.person, record.split)
        if self.form.global_ids and first != record.split:
            raise DataError(f"person id in two splits: {record.person} in {record.split}, first seen in {first}")
        if not known:
            self.inside(record.image)
            self.split_of[record.person] = first
            self.images[record.image] = (len(self.images), record.person, record.split)
        image_id = self.images[record.image][0]
        self.captions += [(image_id, caption) for caption in record.captions]


def _containment(root: Path) -> Callable[[str], None]:
    """A check that a path stays inside `root`; each folder is resolved once, for there may be 50,000 images."""
    safe: set[PurePosixPath] = set()

    def check(path: str) -> None:
        parent = PurePosixPath(path).parent
        try:
            if parent not in safe and parent.parts:
                contained(root, parent.as_posix())
            safe.add(parent)
            if os.path.islink(root / path):
                contained(root, path)
        except (DataError, OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links
            raise DataError(f"image path leaves the image folder: {path!r}") from error

    return check


def number_persons(split: pd.Series, person: pd.Series) -> pd.Series:
    """Person ids from 0 in each split, by first appearance (CUHK's run 1-13003 across the splits)."""
    numbered = person.groupby(split, sort=False).transform(lambda ids: pd.factorize(ids)[0])
    return numbered.astype("int64")


def _parse_all(form: DatasetFormat, sources: list[Path], dropped: list[Dropped]) -> list[tuple[str, Record]]:
    parsed = []
    per_split = any("{split}" in name for name in form.files)  # then train.json says the split of its records
    for source in sources:
        default = source.stem.lower() if per_split else ""
        for number, raw in enumerate(read_records(source)):
            where = f"{source.name}[{number}]"
            try:
                record = parse_record(raw)
            except DataError as error:
                dropped.append(Dropped(where, error.message))
                continue
            dropped += [Dropped(where, reason) for reason in record.dropped]
            if not record.split and default in _SPLIT_NAMES:
                record = Record(**{**vars(record), "split": _SPLIT_NAMES[default]})
            parsed.append((where, record))
    if not parsed:
        reasons = "; ".join(f"{drop.record}: {drop.reason}" for drop in dropped[:3]) or "the list is empty"
        raise DataError(f"{sources[0]} holds no usable record ({reasons})", "See docs/datasets.md for the formats.")
    return parsed


def _settle_splits(form: DatasetFormat, source: Path, parsed: list[tuple[str, Record]]) -> list[tuple[str, Record]]:
    """Where no record at all says its split: an error for a benchmark, a test set for one's own data."""
    if any(record.split for _, record in parsed):
        return parsed
    if form.split_required:
        other = " Use reid_raw.json instead." if source.name == "caption_all.json" else ""
        raise DataError(f"{source} does not say which split its records belong to.{other}", f"Expected:\n{form.tree}")
    console.warn(f"{source.name} has no split: everything goes to 'test' (enough for aga eval, not for aga train)")
    return [(where, Record(**{**vars(record), "split": "test"})) for where, record in parsed]


def read_annotations(dataset: str, root: Path, annotations: Path | None = None) -> Annotations:
    """Read a raw data set's records into tables; broken records end in `dropped`, a broken file is a DataError.

    `annotations` names the file (or the folder of per-split files) where it is not in its usual place.
    """
    name = dataset_key(dataset)
    form = DATASETS[name]
    if annotations is None:
        root, sources = _locate(form, Path(root))
    elif not Path(root).is_dir():
        raise DataError(f"{root} is not a folder", f"Expected:\n{form.tree}")
    else:
        annotations = Path(annotations)
        sources = _sources_in(form, annotations) if annotations.is_dir() else [annotations]
        if not sources:
            raise DataError(f"{annotations} holds no annotation file of {form.title}", f"Expected:\n{form.tree}")
    dropped: list[Dropped] = []
    parsed = _settle_splits(form, sources[0], _parse_all(form, sources, dropped))
    image_root = _image_root(form, Path(root), [record for _, record in parsed])
    table = _Table(form, _containment(image_root))
    for where, record in parsed:
        try:
            table.add(record)
        except DataError as error:
            dropped.append(Dropped(where, error.message))
    images = pd.DataFrame(
        [(number, path, person, split) for path, (number, person, split) in table.images.items()],
        columns=["image_id", "path", "person", "split"],
    )
    images["person_id"] = number_persons(images["split"], images["person"])
    captions = pd.DataFrame(table.captions, columns=["image_id", "caption"])
    captions.insert(0, "caption_id", range(len(captions)))
    images = images[["image_id", "path", "person_id", "split"]]
    return Annotations(name, image_root, sources, images, captions, dropped)
