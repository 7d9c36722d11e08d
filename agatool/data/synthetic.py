"""The sample data set: invented people, their pictures and captions in RSTPReid's raw layout, and the truth.

`data_captions.json` and `imgs/` are what a real benchmark has. Beside them `truth/` tells what no benchmark can:

- `identities.csv`: a person's attributes; `twin_of` and `twin_attribute` where they copy an earlier one but for that.
- `captions.csv`: a row for every word of a caption that names a part of the picture (`part`, "person" being the
  whole figure) and, where it states an attribute's value, which (`attribute`, `value`), whether it is `wrong`
  and what would be `correct`; `start` and `end` are character offsets.
- `parts/*.png`: for every image which part each pixel shows; `parts.json` names the values.
- `spec.json`: the SampleSpec it was made from.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agatool.data.captioning import describe
from agatool.data.rendering import COLORS, HAIR_COLORS, PARTS, SKIN_TONES, Render, render, wardrobe
from agatool.files import atomic_folder

SCHEMA_VERSION = 1
TWIN_SHARE = 0.12
CAMERAS = 15
JPEG_QUALITY = 90
CHUNK = 10  # identities a worker does in one go
SPLITS = ("train", "val", "test")

# Values and how common they are; in the order in which identities.csv shows them.
CLOTH = {"black": 14, "white": 11, "gray": 8, "red": 9, "blue": 9, "green": 8, "yellow": 6, "orange": 5, "purple": 6,
         "pink": 6, "brown": 6, "beige": 5, "navy": 6, "teal": 5, "khaki": 5}  # fmt: skip
DENIM = {"blue": 5, "navy": 3, "black": 3, "gray": 2, "white": 1}
LEATHER = {"black": 5, "white": 5, "brown": 4, "gray": 2, "red": 2, "blue": 1, "navy": 1, "beige": 1, "pink": 1,
           "yellow": 1, "green": 1}  # fmt: skip
HAIR_LENGTHS = {
    "man": {"bald": 1, "short": 7, "shoulder-length": 1, "ponytail": 0.5},
    "woman": {"short": 2, "shoulder-length": 3, "long": 3, "ponytail": 3, "bun": 2},
}
TOP_TYPES = {"t-shirt": 5, "shirt": 4, "sweater": 3, "hoodie": 4, "jacket": 5, "coat": 3, "vest": 2}
BOTTOM_TYPES = {"trousers": 5, "jeans": 5, "shorts": 3}
FEMALE_GARMENTS = {"dress": 4, "skirt": 4}
PATTERNS = {"plain": 10, "striped": 3, "checked": 3, "logo": 2}
SHOE_TYPES = {"sneakers": 5, "loafers": 3, "boots": 3, "sandals": 2}
BAG_TYPES = {"none": 4, "backpack": 3, "handbag": 2, "shoulder-bag": 3, "suitcase": 1}
HAT_TYPES = {"none": 7, "cap": 1.5, "beanie": 1, "hat": 1}
GLASSES = {"none": 7, "glasses": 2, "sunglasses": 1.5}

# What a twin may differ in, and what an annotator may mistake one value of for another.
VALUES: dict[str, Sequence[str]] = {
    "hair_length": ("short", "shoulder-length", "long", "ponytail", "bun"),
    "hair_color": tuple(HAIR_COLORS),
    "top_type": tuple(TOP_TYPES),
    "top_color": tuple(COLORS),
    "top_pattern": ("striped", "checked"),  # a logo is a noun, and taken for nothing else
    "pattern_color": tuple(COLORS),
    "inner_color": tuple(COLORS),
    "bottom_type": tuple(BOTTOM_TYPES),
    "bottom_color": tuple(COLORS),
    "shoe_type": tuple(SHOE_TYPES),
    "shoe_color": tuple(LEATHER),
    "bag_type": ("backpack", "handbag", "shoulder-bag", "suitcase"),
    "bag_color": tuple(COLORS),
    "hat_type": ("cap", "beanie", "hat"),
    "hat_color": tuple(COLORS),
    "glasses": ("glasses", "sunglasses"),
    "umbrella_color": tuple(COLORS),
    "scarf_color": tuple(COLORS),
}
# A twin must stand out in every picture, so it differs in what no view hides.
TWIN_ATTRIBUTES = ("top_color", "bottom_color", "hair_color", "shoe_color", "bag_color", "bag_type", "hat_color",
                   "top_type", "bottom_type", "umbrella_color", "scarf_color", "hair_length")  # fmt: skip
CAPTION_COLUMNS = ("img_path", "caption_index", "start", "end", "text", "part", "attribute", "value", "wrong",
                   "correct")  # fmt: skip


@dataclass(frozen=True)
class SampleSpec:
    """What to render: identities per split, images per identity, captions per image; sizes in pixels.

    `caption_noise` is the probability that a word that states an attribute states a wrong one.
    """

    train: int = 1500
    val: int = 100
    test: int = 300
    images: int = 4
    captions: int = 2
    seed: int = 0
    caption_noise: float = 0.1
    height: int = 128
    width: int = 64


@dataclass(frozen=True)
class Person:
    """An identity: its number, split and attributes; `twin_of` and `twin_attribute` where it is a near copy."""

    id: int
    split: str
    attributes: Mapping[str, str]
    twin_of: str = ""
    twin_attribute: str = ""


def write_sample(
    out: Path, spec: SampleSpec, workers: int | None = None, progress: Callable[[int], None] | None = None
) -> None:
    """Render the data set that `spec` describes into the folder `out`, which appears when it is complete.

    The same spec gives the same bytes, whatever `workers` (processes; None: one per core) is. `progress` is
    called with the number of images done so far. Raises ValueError for a spec that cannot be rendered and
    DiskError where `out` cannot be written.
    """
    _check(spec)
    persons = people(spec)
    chunks = [persons[start : start + CHUNK] for start in range(0, len(persons), CHUNK)]
    workers = min(workers or len(os.sched_getaffinity(0)), len(chunks))
    records: list[dict[str, Any]] = []
    rows: list[tuple[object, ...]] = []
    with atomic_folder(Path(out)) as folder:
        (folder / "imgs").mkdir()
        (folder / "truth" / "parts").mkdir(parents=True)
        # Fresh processes: a fork of a process that runs torch's threads can hang.
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) if workers > 1 else nullcontext()
        with pool as executor:
            run = executor.map if executor else map
            results = run(_write_people, chunks, [spec] * len(chunks), [folder] * len(chunks))
            for chunk_records, chunk_rows in results:
                records += chunk_records
                rows += chunk_rows
                if progress:
                    progress(len(records))
        _write_tables(folder, spec, persons, records, rows)


def people(spec: SampleSpec) -> list[Person]:
    """All identities in order (train, val, test); some copy an earlier one of their split but for one attribute."""
    persons: list[Person] = []
    for split in SPLITS:
        first = len(persons)
        for number in range(first, first + getattr(spec, split)):
            rng = np.random.default_rng([spec.seed, number])
            if number > first and rng.random() < TWIN_SHARE:
                persons.append(_twin(persons[int(rng.integers(first, number))], number, rng))
            else:
                persons.append(Person(number, split, _invent(rng)))
    return persons


def _check(spec: SampleSpec) -> None:
    if min(spec.train, spec.val, spec.test) < 0 or spec.train + spec.val + spec.test < 1:
        raise ValueError("A sample needs at least one identity, and no split a negative number.")
    if spec.images < 1 or spec.captions < 1 or spec.seed < 0:
        raise ValueError("images and captions must be at least 1 and seed at least 0.")
    if not 0.0 <= spec.caption_noise <= 1.0:
        raise ValueError("caption_noise is a probability between 0 and 1.")
    if spec.height < 64 or spec.width < 32:
        raise ValueError("Crops below 64 x 32 pixels show no details.")


def _draw(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    total = np.cumsum(list(weights.values()))
    return list(weights)[int(np.searchsorted(total, rng.random() * total[-1], side="right"))]


def _invent(rng: np.random.Generator) -> dict[str, str]:
    """A random person whose things go together; "none" where there is nothing to speak of."""
    gender = _draw(rng, {"man": 1, "woman": 1})
    woman = gender == "woman"
    top = _draw(rng, TOP_TYPES | ({"dress": FEMALE_GARMENTS["dress"]} if woman else {}))
    bottom = _draw(rng, BOTTOM_TYPES | ({"skirt": FEMALE_GARMENTS["skirt"]} if woman else {}))
    if top == "dress":
        bottom = "none"
    hair = _draw(rng, HAIR_LENGTHS[gender])
    top_color = _draw(rng, CLOTH)
    pattern = _draw(rng, PATTERNS)
    bag, hat = _draw(rng, BAG_TYPES), _draw(rng, HAT_TYPES)
    opened = top in ("jacket", "coat") and rng.random() < 0.6
    hands = _draw(rng, {"none": 8, "umbrella": 1, "phone": 1.2})
    if hair in ("bun", "bald"):
        hat = "none"  # a hat would hide the bun, and nobody would know of the bald head

    def color(there: bool, weights: Mapping[str, float], but: str = "") -> str:
        return _draw(rng, {name: share for name, share in weights.items() if name != but}) if there else "none"

    return {
        "gender": gender,
        "build": _draw(rng, {"slim": 1, "average": 2, "heavy": 1}),
        "stature": _draw(rng, {"short": 1, "average": 2, "tall": 1}),
        "skin": _draw(rng, dict.fromkeys(SKIN_TONES, 1)),
        "hair_length": hair,
        "hair_color": color(hair != "bald", {"black": 4, "brown": 3, "blond": 3, "gray": 2, "red": 2}),
        "top_type": top,
        "top_color": top_color,
        "top_pattern": pattern,
        "pattern_color": color(pattern != "plain", CLOTH, top_color),
        "inner_color": color(opened, CLOTH, top_color),
        "bottom_type": bottom,
        "bottom_color": color(bottom != "none", DENIM if bottom == "jeans" else CLOTH),
        "shoe_type": _draw(rng, SHOE_TYPES),
        "shoe_color": color(True, LEATHER),
        "bag_type": bag,
        "bag_color": color(bag != "none", CLOTH),
        "hat_type": hat,
        "hat_color": color(hat != "none", CLOTH),
        "glasses": _draw(rng, GLASSES),
        "umbrella_color": color(hands == "umbrella", CLOTH),
        "phone": "phone" if hands == "phone" else "none",
        "scarf_color": color(rng.random() < 0.12, CLOTH),
    }


def _twin(model: Person, number: int, rng: np.random.Generator) -> Person:
    """A copy of `model` with one attribute changed to another value that it can have."""
    a = model.attributes
    fixed = {"top_type"} if a["top_type"] in ("dress", "jacket", "coat") else set()
    fixed |= {"bottom_type"} if a["bottom_type"] in ("skirt", "jeans") else set()
    fixed |= {"hair_length"} if a["gender"] == "man" or a["hat_type"] != "none" else set()
    free = [name for name in TWIN_ATTRIBUTES if a[name] in VALUES[name] and name not in fixed]
    name = free[int(rng.integers(len(free)))]
    taken = {a[name], a["pattern_color"], a["inner_color"]} if name == "top_color" else {a[name]}
    options = [value for value in VALUES[name] if value not in taken]
    if name == "bottom_type":
        options = [value for value in options if value != "jeans"]
    if name == "top_type":
        options = [value for value in options if value not in ("jacket", "coat")]
    if name == "bottom_color" and a["bottom_type"] == "jeans":
        options = [value for value in options if value in DENIM]
    changed = {**a, name: options[int(rng.integers(len(options)))]}
    return Person(number, model.split, changed, str(model.id), name)


def _write_people(
    persons: Sequence[Person], spec: SampleSpec, folder: Path
) -> tuple[list[dict[str, Any]], list[tuple[object, ...]]]:
    """A worker's job: these people's images and masks; returns their records and truth rows."""
    records, rows = [], []
    for person in persons:
        for name, picture in _pictures(person, spec):
            rng = np.random.default_rng([spec.seed, person.id, CAMERAS, int(name[-8:-4])])
            picture.image.save(folder / "imgs" / name, quality=JPEG_QUALITY)
            mask = Image.fromarray(picture.mask)
            mask.putpalette(_palette())
            mask.save((folder / "truth" / "parts" / name).with_suffix(".png"))
            captions = []
            for index in range(spec.captions):
                text, spans = describe(
                    person.attributes, picture.visible, picture.view, VALUES, spec.caption_noise, rng
                )
                captions.append(text)
                rows += [
                    (name, index, span.start, span.end, span.piece.text, span.piece.part, span.piece.attribute,
                     span.piece.value, int(bool(span.piece.correct)), span.piece.correct) for span in spans
                ]  # fmt: skip
            records.append({"id": person.id, "img_path": name, "captions": captions, "split": person.split})
    return records, rows


def _pictures(person: Person, spec: SampleSpec) -> Iterator[tuple[str, Render]]:
    """The person before different cameras; a camera keeps its place, light and colours for everybody."""
    rng = np.random.default_rng([spec.seed, person.id, 1])
    colours = wardrobe(person.attributes, rng)
    cameras = rng.permutation(max(CAMERAS, spec.images))
    for number in range(spec.images):
        camera = int(cameras[number])
        place = np.random.default_rng([spec.seed, 1_000_000_007, camera])
        shot = np.random.default_rng([spec.seed, person.id, 2, number])
        name = f"{person.id:04d}_c{camera + 1}_{number:04d}.jpg"
        yield name, render(person.attributes, colours, place, shot, spec.height, spec.width)


def _palette() -> list[int]:
    """Mask colours that can be told apart by eye."""
    levels = [(index * 97 % 256, index * 57 % 256, index * 161 % 256) for index in range(len(PARTS))]
    return [value for level in levels for value in level]


def _write_tables(
    folder: Path,
    spec: SampleSpec,
    persons: Sequence[Person],
    records: Sequence[dict[str, Any]],
    rows: Iterable[Sequence[object]],
) -> None:
    _write_json(folder / "data_captions.json", records)
    truth = folder / "truth"
    _write_json(truth / "parts.json", {str(index): name for index, name in enumerate(PARTS)})
    _write_json(truth / "spec.json", {"schema_version": SCHEMA_VERSION, **asdict(spec)})
    names = tuple(persons[0].attributes)
    identities = (
        (person.id, person.split, *person.attributes.values(), person.twin_of, person.twin_attribute)
        for person in persons
    )
    _write_csv(truth / "identities.csv", ("id", "split", *names, "twin_of", "twin_attribute"), identities)
    _write_csv(truth / "captions.csv", CAPTION_COLUMNS, rows)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
