"""Raw data set -> prepared folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agatool import console
from agatool.data.annotations import (
    DATASETS,
    SPLITS,
    Annotations,
    Dropped,
    dataset_key,
    number_persons,
    read_annotations,
    same_dataset,
)
from agatool.data.images import decode_image
from agatool.data.synthetic import SCHEMA_VERSION as RENDERER_VERSION
from agatool.data.synthetic import SampleSpec, write_sample
from agatool.errors import DataError, UsageError
from agatool.files import atomic_file, read_json, write_json
from agatool.tokenization import load_tokenizer_file, train_tokenizer

SCHEMA_VERSION = 1
IMAGE_COLUMNS = {"image_id": int, "path": str, "person_id": int, "split": str, "width": int, "height": int}
CAPTION_COLUMNS = {"caption_id": int, "image_id": int, "caption": str}
_TABLES = ("images.csv", "captions.csv", "tokenizer.json")  # what dataset.json vouches for by sha256
_OUTPUTS = ("dataset.json", "dropped.csv", *_TABLES)
_SHOWN = 20  # folders with missing images listed on the console
MIN_VOCABULARY = 16


@dataclass
class Prepared:
    """A prepared folder, checked and loaded."""

    name: str
    folder: Path
    images: pd.DataFrame  # image_id, path, person_id, split, width, height
    captions: pd.DataFrame  # caption_id, image_id, caption
    image_root: Path
    tokenizer: Path
    info: dict[str, Any]  # dataset.json

    def split(self, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Images and captions of one split, in order; DataError where there are none."""
        images = self.images[self.images["split"] == name].reset_index(drop=True)
        if images.empty:
            there = ", ".join(self.images["split"].unique())
            raise DataError(f"{self.folder} has no split {name!r}", f"It has: {there}.")
        captions = self.captions[self.captions["image_id"].isin(images["image_id"])]
        return images, captions.reset_index(drop=True)


# -- looking at the images ----------------------------------------------------------------------------------------


def _stat_all(raw: Annotations) -> list[tuple[int, int] | None]:
    """(size, modification time) of every image file, None where there is none."""
    found: list[tuple[int, int] | None] = []
    for path in raw.images["path"]:
        try:
            status = os.stat(raw.image_root / path)
            found.append((status.st_size, status.st_mtime_ns))
        except (OSError, ValueError):
            found.append(None)
    return found


def _report_missing(raw: Annotations, missing: list[bool]) -> None:
    """Say which folders lack how many images; DataError where not one image is there."""
    folders = raw.images["path"].map(lambda path: str(Path(path).parent))
    total = Counter(folders)
    lacking = Counter(folders[np.asarray(missing, dtype=bool)])
    if not lacking:
        return
    form = DATASETS[raw.name]
    if sum(lacking.values()) == len(missing):
        names = ", ".join(f"{folder} ({count})" for folder, count in lacking.most_common(_SHOWN))
        raise DataError(
            f"None of the {len(missing)} images is under {raw.image_root}; looked in {names}",
            f"Expected:\n{form.tree}",
        )
    console.warn(f"{sum(lacking.values())} of {len(missing)} images are missing under {raw.image_root}:")
    for folder, count in sorted(lacking.items())[:_SHOWN]:
        console.warn(f"  {folder}: {count} of {total[folder]} missing")
    if len(lacking) > _SHOWN:
        console.warn(f"  and {len(lacking) - _SHOWN} more folders; dropped.csv lists them all")


def _decode_all(root: Path, paths: list[str], workers: int | None) -> list[tuple[int, int] | str]:
    """(width, height) of every image after decoding it whole, or why it cannot be decoded."""

    def look(path: str) -> tuple[int, int] | str:
        try:
            return decode_image(root / path).size
        except DataError as error:
            return error.message.removeprefix(f"Cannot read image {root / path}: ")

    results = []
    # Threads: Pillow decodes without the interpreter's lock.
    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)))
    try:
        with console.progress("Decoding images", len(paths)) as task:
            for result in pool.map(look, paths):
                results.append(result)
                task.advance()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # Ctrl-C waits for the images at work, not for the rest
    return results


def _keep_usable(raw: Annotations, bad: dict[int, str], sizes: dict[int, tuple[int, int]]) -> None:
    """Take images in `bad` (image_id -> reason) out with their captions, number the rest anew, add the sizes."""
    splits = set(raw.images["split"])
    raw.dropped += [Dropped(raw.images["path"][image_id], reason) for image_id, reason in bad.items()]
    images = raw.images[~raw.images["image_id"].isin(list(bad))].reset_index(drop=True)
    for split in SPLITS:
        if split in splits - set(images["split"]):
            raise DataError(
                f"Not one image of the {split} split of {raw.name} can be used: {_summary(raw.dropped)}",
                f"Expected:\n{DATASETS[raw.name].tree}",
            )
    images["width"] = [sizes[image_id][0] for image_id in images["image_id"]]
    images["height"] = [sizes[image_id][1] for image_id in images["image_id"]]
    renumber = {old: new for new, old in enumerate(images["image_id"])}
    captions = raw.captions[raw.captions["image_id"].isin(renumber)].reset_index(drop=True)
    captions["image_id"] = captions["image_id"].map(renumber)
    captions["caption_id"] = range(len(captions))
    images["image_id"] = range(len(images))
    images["person_id"] = number_persons(images["split"], images["person_id"])
    raw.images, raw.captions = images[list(IMAGE_COLUMNS)], captions[list(CAPTION_COLUMNS)]


def _summary(dropped: Iterable[Dropped]) -> str:
    kinds = Counter(drop.kind for drop in dropped)
    return "; ".join(f"{count} x {kind}" for kind, count in kinds.most_common())


# -- counts and splits --------------------------------------------------------------------------------------------


def _counts(images: pd.DataFrame, captions: pd.DataFrame) -> dict[str, dict[str, int]]:
    counts = {}
    for split in SPLITS:
        part = images[images["split"] == split]
        if len(part):
            of_split = int(captions["image_id"].isin(part["image_id"]).sum())
            counts[split] = {"persons": part["person_id"].nunique(), "images": len(part), "captions": of_split}
    return counts


def _compare_published(name: str, counts: dict[str, dict[str, int]]) -> list[str]:
    """Say where the counts differ from the published ones."""
    published = DATASETS[name].published
    here = counts
    if "all" in published:
        keys = ("persons", "images", "captions")
        here = {"all": {key: sum(split[key] for split in counts.values()) for key in keys}}
    differences = []
    for split, wanted in published.items():
        for (key, have), want in zip(here.get(split, {}).items(), wanted, strict=False):
            if have != want:
                differences.append(f"{split}: {have:,} {key} here, {want:,} published")
        if split not in here:
            differences.append(f"{split}: missing here, {wanted[1]:,} images published")
    if differences:
        console.warn(f"{DATASETS[name].title} differs from what was published:")
        for line in differences:
            console.warn(f"  {line}")
    elif published:
        console.info(f"{DATASETS[name].title}: all counts are the published ones")
    return differences


def _hold_out_val(raw: Annotations, fraction: float, seed: int) -> str | None:
    """Move some persons of train to val where there is no val split; returns what to tell about it."""
    images = raw.images
    train = images["split"] == "train"
    persons = images["person_id"][train].nunique()
    if fraction == 0 or not train.any() or (images["split"] == "val").any():
        return None
    if persons < 2:
        return f"no val split, and {persons} train person is too few to hold one out"
    count = min(persons - 1, max(1, round(fraction * persons)))
    chosen = np.random.default_rng(seed).choice(persons, count, replace=False)
    raw.images = images.assign(split=images["split"].mask(train & images["person_id"].isin(chosen), "val"))
    raw.images["person_id"] = number_persons(raw.images["split"], images["person_id"])
    return f"no val split: held out {count} of {persons} train persons (seed {seed}) for validation"


# -- what was prepared from what ----------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}", "Check the path.") from error


def _portable(path: Path, folder: Path) -> str:
    """`path` as dataset.json stores it: relative where it lies inside the prepared folder, so both can move."""
    full, base = path.resolve(), folder.resolve()
    return full.relative_to(base).as_posix() if full.is_relative_to(base) else str(full)


def _tokenizer_mark(source: str | None) -> str | list[str] | None:
    """What tells that a tokenizer changed: the hashes of its files, or its hub name."""
    path = Path(source) if source else None
    if path is None or not path.exists():
        return source
    files = [path] if path.is_file() else [path / name for name in ("tokenizer.json", "vocab.txt")]
    return [_sha256(file) for file in files if file.is_file()]


def _fingerprint(raw: Annotations, described: list[dict[str, Any]], stats: list[Any], *options: Any) -> str:
    digest = hashlib.sha256(json.dumps([SCHEMA_VERSION, raw.name, described, options]).encode())
    for path, stat in zip(raw.images["path"], stats, strict=True):
        digest.update(f"{path}\0{stat}\0".encode())
    return digest.hexdigest()


def _unchanged(out: Path, fingerprint: str) -> Prepared | None:
    try:
        prepared = load_prepared(out)
    except DataError:
        return None
    return prepared if prepared.info.get("fingerprint") == fingerprint else None


def _write(out: Path, raw: Annotations, info: dict[str, Any], tokenizer: str | None, vocab_size: int) -> None:
    """Write all files beside their places, then rename them in one go, dataset.json (with their hashes) last."""
    with ExitStack() as stack:  # left in reverse order
        files = {name: stack.enter_context(atomic_file(out / name)) for name in _OUTPUTS}
        raw.images.to_csv(files["images.csv"], index=False, lineterminator="\n")
        raw.captions.to_csv(files["captions.csv"], index=False, lineterminator="\n")
        dropped = pd.DataFrame([asdict(drop) for drop in raw.dropped], columns=["record", "reason"])
        dropped.to_csv(files["dropped.csv"], index=False, lineterminator="\n", errors="backslashreplace")
        if tokenizer is not None:
            files["tokenizer.json"].write_text(tokenizer, encoding="utf-8")
        else:
            train = raw.images["image_id"][raw.images["split"] == "train"]
            learn = raw.captions[raw.captions["image_id"].isin(train)] if len(train) else raw.captions
            train_tokenizer(learn["caption"], files["tokenizer.json"], vocab_size)
        info["files"] = {name: _sha256(files[name]) for name in _TABLES}
        write_json(files["dataset.json"], info)


# -- commands -----------------------------------------------------------------------------------------------------


def prepare(
    dataset: str,
    root: Path,
    out: Path,
    *,
    tokenizer: str | None = None,
    vocab_size: int = 8000,
    annotations: Path | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    strict: bool = False,
    workers: int | None = None,
) -> Prepared:
    """Check, decode and tabulate a raw data set; unchanged input is left as it was prepared before.

    `tokenizer` is a hub name, folder or file; None trains a WordPiece of `vocab_size` on the train captions.
    `strict` makes anything that had to be dropped a DataError.
    """
    if not 0 <= val_fraction < 1 or seed < 0 or vocab_size < MIN_VOCABULARY:
        raise UsageError(
            f"Cannot prepare with val fraction {val_fraction}, seed {seed}, vocabulary {vocab_size}",
            f"The fraction is in 0..1, the seed at least 0, the vocabulary at least {MIN_VOCABULARY}.",
        )
    out = Path(out)
    raw = read_annotations(dataset, Path(root), annotations)
    if {source.resolve() for source in raw.sources} & {(out / name).resolve() for name in _OUTPUTS}:
        raise UsageError(f"Preparing into {out} would overwrite the annotations", "Choose another --out.")
    sources = [
        {"path": _portable(path, out), "size": path.stat().st_size, "sha256": _sha256(path)} for path in raw.sources
    ]
    image_root = _portable(raw.image_root, out)
    options = {"vocab_size": vocab_size, "val_fraction": val_fraction, "seed": seed}
    stats = _stat_all(raw)
    fingerprint = _fingerprint(raw, sources, stats, image_root, options, _tokenizer_mark(tokenizer))
    previous = _unchanged(out, fingerprint)
    if previous is not None:
        _refuse_drops(strict, previous.info["dropped"]["total"], previous.info["dropped"]["reasons"])
        console.info(f"{out} is prepared already and its input unchanged: nothing to do")
        return previous
    # Before the long work: a tokenizer that cannot be had is known at once.
    backend = load_tokenizer_file(tokenizer).to_str(pretty=True) if tokenizer else None
    _check_images(raw, stats, workers)
    kinds = dict(Counter(drop.kind for drop in raw.dropped).most_common())
    _refuse_drops(strict, len(raw.dropped), kinds, raw.dropped)
    if raw.dropped:
        console.warn(f"dropped {len(raw.dropped)} ({_summary(raw.dropped)}); see {out / 'dropped.csv'}")
    differences = _compare_published(raw.name, _counts(raw.images, raw.captions))
    note = _hold_out_val(raw, val_fraction, seed)
    if note:
        console.info(f"{DATASETS[raw.name].title}: {note}")
    info: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": raw.name,
        "image_root": image_root,
        "counts": _counts(raw.images, raw.captions),
        "tokenizer": tokenizer or f"WordPiece trained on this data set's captions, at most {vocab_size} pieces",
        "notes": [note] if note else [],
        "differs_from_published": differences,
        "dropped": {"total": len(raw.dropped), "reasons": kinds},
        "options": options,
        "sources": sources,
        "fingerprint": fingerprint,
    }
    _write(out, raw, info, backend, vocab_size)
    for split, count in info["counts"].items():
        parts = ", ".join(f"{number:,} {what}" for what, number in count.items())
        console.info(f"{split}: {parts}")
    return load_prepared(out)


def _check_images(raw: Annotations, stats: list[tuple[int, int] | None], workers: int | None) -> None:
    missing = [stat is None for stat in stats]
    _report_missing(raw, missing)
    present = raw.images[~np.asarray(missing)]
    bad = {int(image_id): "image file missing" for image_id in raw.images["image_id"][np.asarray(missing)]}
    sizes = {}
    results = _decode_all(raw.image_root, list(present["path"]), workers)
    for image_id, result in zip(present["image_id"], results, strict=True):
        if isinstance(result, str):
            bad[int(image_id)] = f"image cannot be decoded: {result}"
        else:
            sizes[int(image_id)] = result
    _keep_usable(raw, bad, sizes)


def _refuse_drops(strict: bool, total: int, kinds: dict[str, int], dropped: Iterable[Dropped] = ()) -> None:
    if strict and total:
        reasons = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
        first = "".join(f"\n  {drop.record}: {drop.reason}" for drop in list(dropped)[:5])
        raise DataError(
            f"{total} would be dropped, and --strict forbids it: {reasons}{first}",
            "Repair the data set, or prepare without --strict.",
        )


def sample_spec(identities: int | None, **others: Any) -> SampleSpec:
    """The default sample, or one of so many identities, split 15 : 1 : 3 like it."""
    if identities is None:
        return SampleSpec(**others)
    whole = SampleSpec()
    total = whole.train + whole.val + whole.test
    val, test = (max(1, round(identities * part / total)) for part in (whole.val, whole.test))
    return SampleSpec(train=identities - val - test, val=val, test=test, **others)


def prepare_sample(out: Path, spec: SampleSpec, **options: Any) -> Prepared:
    """Render the sample data set into `out`/raw, unless it is there already, and `prepare` it with `options`."""
    raw = Path(out) / "raw"
    if _rendered(raw) != spec:
        foreign = not (raw / "truth" / "spec.json").is_file()
        if raw.exists() and foreign and (not raw.is_dir() or any(raw.iterdir())):
            raise DataError(f"{raw} holds something else than the sample data set", "Choose another --out.")
        total = (spec.train + spec.val + spec.test) * spec.images
        try:
            with console.progress("Rendering the sample data set", total) as task:
                write_sample(raw, spec, progress=lambda done: task.advance(done - task.done))
        except ValueError as error:
            raise UsageError(str(error), "aga prepare --help lists the options of the sample data set.") from error
    return prepare("sample", raw, Path(out), **options)


def _rendered(raw: Path) -> SampleSpec | None:
    """The spec that a folder was rendered from by this version's renderer, None where it was not."""
    try:
        values = read_json(raw / "truth" / "spec.json")
        if values["schema_version"] != RENDERER_VERSION:
            return None
        return SampleSpec(**{name: values[name] for name in asdict(SampleSpec())})
    except (DataError, KeyError, TypeError):
        return None


# -- loading ------------------------------------------------------------------------------------------------------


def _read_table(path: Path, columns: dict[str, type]) -> pd.DataFrame:
    try:
        # na_filter: a caption may well read "None" or "NA".
        table = pd.read_csv(path, dtype=columns, na_filter=False, encoding="utf-8")
    except (OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} is broken: {error}", "Run aga prepare again.") from error
    if list(table.columns) != list(columns) or table.empty:
        raise DataError(f"{path} has not the columns {', '.join(columns)}, or no rows", "Run aga prepare again.")
    return table


def _check_tables(folder: Path, images: pd.DataFrame, captions: pd.DataFrame) -> None:
    rows = len(images)
    wrong = (
        (images["image_id"] != np.arange(rows)).any()
        or (captions["caption_id"] != np.arange(len(captions))).any()
        or not captions["image_id"].between(0, rows - 1).all()
        or not images["split"].isin(SPLITS).all()
        or (images[["width", "height"]] < 1).any(axis=None)
        or (images["person_id"] < 0).any()
        or images["path"].duplicated().any()
    )
    if wrong:
        raise DataError(f"The tables in {folder} contradict each other", "Run aga prepare again.")
    if any(not path or path.startswith("/") or ".." in path.split("/") or "\0" in path for path in images["path"]):
        raise DataError(f"{folder / 'images.csv'} names images outside its image folder", "Run aga prepare again.")


def _read_info(folder: Path) -> dict[str, Any]:
    info = read_json(folder / "dataset.json")
    if not isinstance(info, dict) or info.get("schema_version") != SCHEMA_VERSION:
        version = info.get("schema_version") if isinstance(info, dict) else None
        raise DataError(
            f"{folder} was prepared by another version (schema {version}, this one reads {SCHEMA_VERSION})",
            "Run aga prepare again.",
        )
    kinds = {"name": str, "image_root": str, "counts": dict, "dropped": dict, "files": dict}
    for key, kind in kinds.items():
        if not isinstance(info.get(key), kind):
            raise DataError(f"{folder / 'dataset.json'} lacks {key!r}", "Run aga prepare again.")
    return info


def prepared_name(folder: Path) -> str:
    """Of which data set `folder` was prepared. Raises DataError where its dataset.json is damaged."""
    return str(_read_info(folder)["name"])


def load_prepared(folder: Path) -> Prepared:
    """Open a prepared folder; DataError where it is none, incomplete, changed since, or without its images."""
    folder = Path(folder)
    if not (folder / "dataset.json").is_file():
        raise DataError(
            f"{folder} is not a prepared data set (it has no dataset.json)",
            f"aga prepare --dataset NAME --root RAW --out {folder}",
        )
    info = _read_info(folder)
    for name in _TABLES:
        if info["files"].get(name) != _sha256(folder / name):
            raise DataError(
                f"{folder / name} is not the file that dataset.json describes (changed, or preparing was cut off)",
                "Run aga prepare again.",
            )
    images = _read_table(folder / "images.csv", IMAGE_COLUMNS)
    captions = _read_table(folder / "captions.csv", CAPTION_COLUMNS)
    _check_tables(folder, images, captions)
    image_root = folder / info["image_root"]
    if not image_root.is_dir():
        raise DataError(
            f"The images of {folder} are not at {image_root} any more",
            f"Put them back, or: aga prepare --dataset {info['name']} --root RAW --out {folder}",
        )
    return Prepared(info["name"], folder, images, captions, image_root, folder / "tokenizer.json", info)


def raw_folder(name: str) -> Path | None:
    """The data set's folder in $AGATOOL_DATA, in any of its spellings."""
    base = os.environ.get("AGATOOL_DATA")
    if not base or not Path(base).is_dir():
        return None
    folders = sorted(path for path in Path(base).iterdir() if path.is_dir())
    return next((path for path in folders if same_dataset(path.name, name)), None)


def find_data(dataset: str, data: Path | None = None, root: Path | None = None) -> Prepared:
    """The prepared folder `data` (default data/NAME), made first from `root` or $AGATOOL_DATA where it is not there.

    The sample data set is rendered on first use. DataError says where to get the data set and what to type.
    """
    name = dataset_key(dataset)
    folder = Path(data) if data is not None else Path("data") / name
    raw = Path(root) if root is not None else raw_folder(name)
    if (folder / "dataset.json").is_file():
        try:
            return load_prepared(folder)
        except DataError:
            if raw is None and name != "sample":
                raise
    if raw is not None:
        console.info(f"Preparing {name} from {raw} into {folder}")
        return prepare(name, raw, folder)
    if name == "sample":
        there = set(os.listdir(folder)) if folder.is_dir() else set()
        if there and not there & {"raw", "dataset.json"}:
            raise DataError(f"{folder} is not a prepared data set", "Give an empty or a new folder for the sample.")
        return prepare_sample(folder, _rendered(folder / "raw") or SampleSpec())
    raise nowhere(name, folder)


def nowhere(name: str, folder: Path) -> DataError:
    """The error for a data set that is neither prepared in `folder` nor at hand: where to get it, what to type."""
    form = DATASETS[name]
    return DataError(
        f"No prepared data set at {folder}, and no --root (or AGATOOL_DATA) to prepare {form.title} from",
        f"Get it from: {form.source}\nExpected:\n{form.tree}\nThen: aga prepare --dataset {name} --root RAW"
        + (f" --out {folder}" if folder != Path("data") / name else ""),
    )
