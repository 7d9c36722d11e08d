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
import signal
import threading
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agatool.data.captioning import describe
from agatool.data.figure import COLORS, HAIR_COLORS, PARTS, SKIN_TONES
from agatool.data.rendering import Render, render, wardrobe
from agatool.files import atomic_folder

SCHEMA_VERSION = 1
TWIN_SHARE = 0.12
CAMERAS = 15
JPEG_QUALITY = 90
CHUNK = 10  # identities a worker does in one go
SPLITS = ("train", "val", "test")

Weights = dict[str, float]

# Values and how common they are; in the order in which identities.csv shows them.
CLOTH: Weights = {"black": 14, "white": 11, "gray": 8, "red": 9, "blue": 9, "green": 8, "yellow": 6, "orange": 5,
                  "purple": 6, "pink": 6, "brown": 6, "beige": 5, "navy": 6, "teal": 5, "khaki": 5}  # fmt: skip
DENIM: Weights = {"blue": 5, "navy": 3, "black": 3, "gray": 2, "white": 1}
LEATHER: Weights = {"black": 5, "white": 5, "brown": 4, "gray": 2, "red": 2, "blue": 1, "navy": 1, "beige": 1,
                    "pink": 1, "yellow": 1, "green": 1}  # fmt: skip
HAIR_COLOR: Weights = {"black": 4, "brown": 3, "blond": 3, "gray": 2, "red": 2}
HAIR_LENGTH: dict[str, Weights] = {
    "man": {"bald": 1, "short": 7, "shoulder-length": 1, "ponytail": 0.5},
    "woman": {"short": 2, "shoulder-length": 3, "long": 3, "ponytail": 3, "bun": 2},
}
TOP: Weights = {"t-shirt": 5, "shirt": 4, "sweater": 3, "hoodie": 4, "jacket": 5, "coat": 3, "vest": 2}
TOP_TYPE = {"man": TOP, "woman": {**TOP, "dress": 4}}
BOTTOM: Weights = {"trousers": 5, "jeans": 5, "shorts": 3}
BOTTOM_TYPE = {"man": BOTTOM, "woman": {**BOTTOM, "skirt": 4}}
PATTERN: Weights = {"plain": 10, "striped": 3, "checked": 3, "logo": 2}
SHOE_TYPE: Weights = {"sneakers": 5, "loafers": 3, "boots": 3, "sandals": 2}
BAG_TYPE: Weights = {"none": 4, "backpack": 3, "handbag": 2, "shoulder-bag": 3, "suitcase": 1}
HAT_TYPE: Weights = {"none": 7, "cap": 1.5, "beanie": 1, "hat": 1}
GLASSES: Weights = {"none": 7, "glasses": 2, "sunglasses": 1.5}
IN_HAND: Weights = {"nothing": 8, "umbrella": 1, "phone": 1.2}
SCARF_SHARE, OPEN_SHARE = 0.12, 0.6  # of people wear a scarf; of jackets and coats are open

# What an annotator may mistake one value of for another, and what a twin's value may become.
VALUES: dict[str, Sequence[str]] = {
    "build": ("slim", "heavy"),
    "stature": ("short", "tall"),
    "hair_length": ("short", "shoulder-length", "long", "ponytail", "bun"),
    "hair_color": tuple(HAIR_COLORS),
    "top_type": tuple(TOP),
    "top_color": tuple(COLORS),
    "top_pattern": ("striped", "checked"),
    "pattern_color": tuple(COLORS),
    "inner_color": tuple(COLORS),
    "bottom_type": tuple(BOTTOM),
    "bottom_color": tuple(COLORS),
    "shoe_type": tuple(SHOE_TYPE),
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


Written = tuple[list[dict[str, Any]], list[tuple[object, ...]]]  # records of the JSON, rows of captions.csv


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
    records: list[dict[str, Any]] = []
    rows: list[tuple[object, ...]] = []
    with atomic_folder(Path(out)) as folder:
        (folder / "imgs").mkdir()
        (folder / "truth" / "parts").mkdir(parents=True)
        with closing(_rendered(persons, spec, folder, workers)) as results:
            for some_records, some_rows in results:
                records += some_records
                rows += some_rows
                if progress:
                    progress(len(records))
        _write_tables(folder, spec, persons, records, rows)


def _rendered(
    persons: Sequence[Person], spec: SampleSpec, folder: Path, workers: int | None
) -> Generator[Written, None, None]:
    """Have the images written, chunk by chunk in order, by `workers` processes."""
    chunks = [persons[start : start + CHUNK] for start in range(0, len(persons), CHUNK)]
    workers = min(workers or len(os.sched_getaffinity(0)), len(chunks))
    job = partial(_write_people, spec=spec, folder=folder)
    if workers == 1:
        yield from map(job, chunks)
        return
    # Fresh processes: the fork of a process that runs torch's threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_follow_parent) as pool:
        try:
            yield from pool.map(job, chunks)
        finally:
            pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and never outlive it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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


def _draw(rng: np.random.Generator, weights: Weights) -> str:
    bounds = list(accumulate(weights.values()))
    return list(weights)[bisect_right(bounds, rng.random() * bounds[-1])]


def _invent(rng: np.random.Generator) -> dict[str, str]:
    """A random person whose things go together; "none" where there is nothing to speak of."""
    gender = _draw(rng, {"man": 1, "woman": 1})
    top, bottom = _draw(rng, TOP_TYPE[gender]), _draw(rng, BOTTOM_TYPE[gender])
    if top == "dress":
        bottom = "none"
    hair = _draw(rng, HAIR_LENGTH[gender])
    top_color, pattern = _draw(rng, CLOTH), _draw(rng, PATTERN)
    bag, hat, hands = _draw(rng, BAG_TYPE), _draw(rng, HAT_TYPE), _draw(rng, IN_HAND)
    opened = top in ("jacket", "coat") and rng.random() < OPEN_SHARE
    if hair in ("bun", "bald"):
        hat = "none"  # it would hide the bun, and nobody would know of the bald head

    def color(there: bool, weights: Weights, but: str = "") -> str:
        return _draw(rng, {name: share for name, share in weights.items() if name != but}) if there else "none"

    return {
        "gender": gender,
        "build": _draw(rng, {"slim": 1, "average": 2, "heavy": 1}),
        "stature": _draw(rng, {"short": 1, "average": 2, "tall": 1}),
        "skin": _draw(rng, dict.fromkeys(SKIN_TONES, 1)),
        "hair_length": hair,
        "hair_color": color(hair != "bald", HAIR_COLOR),
        "top_type": top,
        "top_color": top_color,
        "top_pattern": pattern,
        "pattern_color": color(pattern != "plain", CLOTH, top_color),
        "inner_color": color(opened, CLOTH, top_color),
        "bottom_type": bottom,
        "bottom_color": color(bottom != "none", DENIM if bottom == "jeans" else CLOTH),
        "shoe_type": _draw(rng, SHOE_TYPE),
        "shoe_color": color(True, LEATHER),
        "bag_type": bag,
        "bag_color": color(bag != "none", CLOTH),
        "hat_type": hat,
        "hat_color": color(hat != "none", CLOTH),
        "glasses": _draw(rng, GLASSES),
        "umbrella_color": color(hands == "umbrella", CLOTH),
        "phone": "phone" if hands == "phone" else "none",
        "scarf_color": color(rng.random() < SCARF_SHARE, CLOTH),
    }


def _twin(model: Person, number: int, rng: np.random.Generator) -> Person:
    """A copy of `model` with one attribute changed to another value that goes with the rest."""
    a = model.attributes
    kept = set()
    if a["top_type"] in ("dress", "jacket", "coat"):
        kept.add("top_type")
    if a["bottom_type"] == "skirt" or a["bottom_color"] not in DENIM:
        kept.add("bottom_type")
    if a["gender"] == "man" or a["hat_type"] != "none":
        kept.add("hair_length")
    free = [name for name in TWIN_ATTRIBUTES if a[name] in VALUES[name] and name not in kept]
    name = free[int(rng.integers(len(free)))]
    barred = {a[name]}
    if name == "top_color":
        barred |= {a["pattern_color"], a["inner_color"]}
    elif name == "top_type":
        barred |= {"jacket", "coat"}
    elif name == "bottom_color" and a["bottom_type"] == "jeans":
        barred |= set(COLORS) - set(DENIM)
    options = [value for value in VALUES[name] if value not in barred]
    changed = {**a, name: options[int(rng.integers(len(options)))]}
    return Person(number, model.split, changed, str(model.id), name)


def _write_people(persons: Sequence[Person], spec: SampleSpec, folder: Path) -> Written:
    """A worker's job: these people's images and masks; returns their records and truth rows."""
    records: list[dict[str, Any]] = []
    rows: list[tuple[object, ...]] = []
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
