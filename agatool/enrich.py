"""`aga enrich`: a caption file in, the same file with enriched captions out; killed, it continues where it was."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from agatool import __version__, console
from agatool.captions import CaptionFile, csv_line, open_captions
from agatool.checkpoint import load
from agatool.data.annotations import DATASETS, Record, parse_record
from agatool.data.images import decode_image, to_tensor
from agatool.encoding import in_order
from agatool.enriching import EnrichConfig, Enricher, Version, usual_words, whole_words
from agatool.errors import CheckpointError, DataError, StoppedError, UsageError
from agatool.files import atomic_file, contained, read_json, write_json
from agatool.machine import memory_errors, pick_device, use_bf16
from agatool.model import PersonSearchModel
from agatool.report import write_csv
from agatool.truth import Truth

CHUNK = 256  # records done at a time: what a kill loses, and what memory holds
JOB, PARTS, EDITS, KEPT, SUMMARY = RESERVED = "job.json", "parts", "edits.csv", "kept.csv", "summary.csv"
EDIT_COLUMNS = (
    "caption_id", "variant", "position", "word", "replacement", "probability", "attention", "image"
)  # fmt: skip
KEPT_COLUMNS = ("record", "caption_id", "image", "reason")
NO_IMAGE = "-"
NOBODY = ""  # the person of a record that does not say whom it shows
_DECODERS = 4  # threads
_LOOK = 200  # records tried when finding out which folder the image paths start from


@dataclass(frozen=True)
class Survey:
    """What has to be known of a file before its first caption is enriched."""

    records: int
    captions: int
    words: list[int]  # ids that stand in it as whole words, ascending
    image_root: str


@dataclass
class Item:
    """A record on its way."""

    number: int
    raw: Any
    record: Record | None = None  # None where it cannot be used
    first: int = 0  # number of its first caption
    seen: list[int] = field(default_factory=list)  # places of the images it is checked against, its own first
    versions: list[list[Version]] = field(default_factory=list)  # of each of its captions; empty: kept as they are
    kept: list[tuple[int | None, str]] = field(default_factory=list)  # caption number and why it stays as it is


@dataclass(frozen=True)
class Enriched:
    """What `enrich` wrote."""

    folder: Path
    summary: dict[str, float]  # what summary.csv holds
    kept: int  # captions and records left as they were


def enrich(
    checkpoint: Path,
    file: Path,
    out: Path,
    config: EnrichConfig,
    image_root: Path | None = None,
    truth: Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    strict: bool = False,
) -> Enriched:
    """Enrich the captions of `file` into the folder `out`, or continue an interrupted run of the same job there.

    `image_root` is where the image paths start; left out, it is found beside the file. `truth` is the
    truth/captions.csv of a rendered data set. Raises DataError for a file that cannot be read and, when all is
    written, for captions that had to stay as they were if `strict`; UsageError where `out` holds something else;
    CheckpointError for a model that cannot predict words.
    """
    source = open_captions(file)
    if image_root and not image_root.is_dir():
        raise DataError(f"{image_root} is not a folder", "Check --image-root.")
    place = pick_device(device)
    answers = Truth(truth) if truth else None
    model = load(checkpoint).to(place)
    if any(name.startswith("mlm") for name in model.config.untrained):
        raise CheckpointError(f"{checkpoint} cannot predict words: its MLM head is not trained", "Train it first.")
    job = _job(checkpoint, file, config, image_root, truth, place)
    survey = _claim(out, job, file, overwrite)
    if survey and (out / SUMMARY).is_file():
        console.info(f"{out} is finished already.")
        return _finished(out, strict)
    with memory_errors("Use a smaller --batch-size."):
        if survey is None:
            survey = _survey(source, model, config, image_root)
            write_json(out / JOB, {"job": job, "survey": vars(survey)})
        words = usual_words(model.tokenizer) | set(survey.words)
        enricher = Enricher(model, config, words, use_bf16(place, "auto"))
        _Run(source, enricher, Path(survey.image_root), answers, out / PARTS).finish(survey)
    _assemble(source, out, config.text_only)
    return _finished(out, strict)


def default_out(file: Path) -> Path:
    """enriched/NAME for NAME.json."""
    return Path("enriched") / file.stem


# -- the job and its folder -------------------------------------------------------------------------------------


def _job(
    checkpoint: Path, file: Path, config: EnrichConfig, image_root: Path | None, truth: Path | None, place: torch.device
) -> dict[str, Any]:
    """All that the output's bytes depend on."""
    names = ("config.json", "model.safetensors", "tokenizer.json")
    weights = (
        [checkpoint / name for name in names if (checkpoint / name).is_file()] if checkpoint.is_dir() else [checkpoint]
    )
    return {
        "file": [file.name, _digest(file)],
        "checkpoint": [_digest(path) for path in weights],
        "truth": _digest(truth) if truth else None,
        "image-root": str(image_root.resolve()) if image_root else None,
        "device": place.type,
        "version": __version__,
        **config.model_dump(),
    }


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _claim(out: Path, job: dict[str, Any], file: Path, overwrite: bool) -> Survey | None:
    """Make sure that `out` is free, or the same job's, whose survey is returned. Raises UsageError."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", "Choose another --out.")
    if file.name in RESERVED:
        raise UsageError(f"A caption file cannot be called {file.name}: the result has one of that name", "Rename it.")
    if file.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{file} lies in {out}, where the result would go", "Choose another --out.")
    if not out.is_dir() or not any(out.iterdir()):
        return None
    if not (out / JOB).is_file():
        raise UsageError(f"{out} holds something else; it is left alone", "Choose another --out.")
    if overwrite:
        shutil.rmtree(out)
        return None
    try:
        stored = read_json(out / JOB)
        before, survey = dict(stored["job"]), Survey(**stored["survey"])
    except (DataError, TypeError, KeyError, ValueError) as error:
        raise UsageError(f"{out / JOB} is damaged", "Add --overwrite, or choose another --out.") from error
    if differs := [key.replace("_", "-") for key in job if before.get(key) != job[key]]:
        raise UsageError(
            f"{out} holds another job (other {', '.join(differs)})", "Add --overwrite, or choose another --out."
        )
    return survey


def _survey(source: CaptionFile, model: PersonSearchModel, config: EnrichConfig, image_root: Path | None) -> Survey:
    """Read the file once: what cannot be read, or written again, is known before hours of work."""
    records = captions = 0
    words: set[int] = set()
    images: list[str] = []
    with console.progress("Reading records") as task:
        for chunk in _chunks(source.records()):
            texts: list[str] = []
            for raw in chunk:
                source.text(raw)
                try:
                    record = _parse(source, raw, config.text_only)
                except DataError:
                    continue
                texts += record.captions
                images += [record.image] if len(images) < _LOOK else []
            words |= whole_words(model.tokenizer, texts)
            records, captions = records + len(chunk), captions + len(texts)
            task.advance(len(chunk))
    if not captions:
        raise DataError(f"{source.path} holds no usable caption", "See docs/datasets.md for the formats.")
    root = image_root or _find_image_root(source.path.parent, images)
    return Survey(records, captions, sorted(words), str(root))


def _find_image_root(folder: Path, images: list[str]) -> Path:
    """The folder beside the file, or itself, below which most of these images lie."""
    folders = [folder, *(folder / name for name in DATASETS["rasa"].folders)]
    hits = [sum(os.path.isfile(root / image) for image in images) for root in folders]
    return folders[hits.index(max(hits))]


def _parse(source: CaptionFile, raw: Any, text_only: bool) -> Record:
    """The record. Enriching text alone needs no image, and a wrong person or split makes the record nobody's."""
    fields = source.fields(raw)
    if not isinstance(fields, dict):
        return parse_record(fields)
    no_image = {"path": NO_IMAGE} if text_only else {}
    try:
        return parse_record({**no_image, **fields})
    except DataError:
        return replace(parse_record({**no_image, **fields, "id": 0, "split": ""}), person=NOBODY)


def _chunks(records: Iterable[Any]) -> Iterator[list[Any]]:
    """All records, CHUNK at a time: always the same, so that a continued run computes what the whole one would."""
    left = iter(records)
    while chunk := list(islice(left, CHUNK)):
        yield chunk


# -- the work ---------------------------------------------------------------------------------------------------


class _Run:
    """Goes through the file chunk by chunk; each chunk done is one file in `parts`, written atomically."""

    def __init__(
        self, source: CaptionFile, enricher: Enricher, image_root: Path, truth: Truth | None, parts: Path
    ) -> None:
        self.source, self.enricher, self.image_root, self.truth, self.parts = source, enricher, image_root, truth, parts
        self.blank = enricher.blank()

    def finish(self, survey: Survey) -> None:
        """Do the chunks that are not done yet. Raises StoppedError on Ctrl-C."""
        done = len(list(_parts(self.parts)))
        caption = read_json(_part(self.parts, done - 1))["next"] if done else 0
        if done:
            console.info(f"Continuing: {caption:,} of {survey.captions:,} captions are done.")
        try:
            with console.progress("Enriching captions", survey.captions, caption) as task:
                for number, chunk in enumerate(_chunks(self.source.records())):
                    if number >= done:
                        part = self._chunk(number * CHUNK, chunk, caption)
                        write_json(_part(self.parts, number), part)
                        task.advance(part["next"] - caption)
                        caption = part["next"]
        except KeyboardInterrupt as error:
            raise StoppedError(
                f"Stopped; {caption:,} of {survey.captions:,} captions are done", "Type the same command to continue."
            ) from error

    def _chunk(self, first_record: int, chunk: list[Any], caption: int) -> dict[str, Any]:
        """Enrich the chunk's records; its share of every file, as text, and of the summary."""
        items = [Item(first_record + place, raw) for place, raw in enumerate(chunk)]
        for item in items:
            item.first = caption
            try:
                item.record = _parse(self.source, item.raw, self.enricher.config.text_only)
            except DataError as error:
                item.kept.append((None, error.message))
                continue
            item.kept += [(None, reason) for reason in item.record.dropped]
            caption += len(item.record.captions)
        self._enrich(items, self._images(items))
        tally: dict[str, float] = {}
        for item in items:
            _add(tally, _tally(item, self.truth))
        return {
            "next": caption,
            "captions": self.source.separator.join(self.source.text(self._rewritten(item)) for item in items),
            "edits": "".join(_edit_lines(item) for item in items),
            "kept": "".join(_kept_lines(item) for item in items),
            "tally": tally,
        }

    def _images(self, items: list[Item]) -> Tensor:
        """Tokens [M, P, H] of what the items show, each image once; an image that cannot be read is noted."""
        used = [item for item in items if item.record]
        if self.enricher.config.text_only:
            for item in used:
                item.seen = [0]
            return self.blank
        paths = list(dict.fromkeys(item.record.image for item in used if item.record))
        place: dict[str, int] = {}
        decoded: list[Tensor] = []
        reasons: dict[str, str] = {}
        for path, image in zip(paths, in_order(self._decode, paths, _DECODERS, 4 * _DECODERS), strict=True):
            if isinstance(image, str):
                reasons[path] = image
            else:
                place[path] = len(decoded)
                decoded.append(image)
        for item in used:
            assert item.record is not None
            if (reason := reasons.get(item.record.image)) is not None:
                item.kept += [(item.first + at, reason) for at in range(len(item.record.captions))]
        alone = _see(used, place, self.enricher.config.views)
        decoded += [decoded[at].flip(2) for at in alone]
        return self.enricher.look(torch.stack(decoded)) if decoded else self.blank[:0]

    def _decode(self, path: str) -> Tensor | str:
        """uint8 [3, height, width], or why not."""
        try:
            image = decode_image(contained(self.image_root, path))
            return to_tensor(image, self.enricher.model.config.image_size)
        except DataError as error:
            return error.message

    def _enrich(self, items: list[Item], image_tokens: Tensor) -> None:
        """Give every item that has an image its versions."""
        texts: list[str] = []
        numbers: list[int] = []
        seen: list[list[int]] = []
        for item in items:
            if item.record and item.seen:
                own = _own_captions(item.raw, item.record, self.source)
                texts += own
                numbers += range(item.first, item.first + len(own))
                seen += [item.seen] * len(own)
        versions = dict(zip(numbers, self.enricher.enrich(texts, numbers, image_tokens, seen), strict=True))
        for item in items:
            if item.record and item.seen:
                item.versions = [versions[item.first + place] for place in range(len(item.record.captions))]

    def _rewritten(self, item: Item) -> Any:
        """The record with enriched captions; what could not be enriched stays as it is."""
        if item.record is None:
            return item.raw
        key = item.record.caption_key
        own = self.source.fields(item.raw)[key]
        enriched = dict(zip(item.record.positions, item.versions, strict=bool(item.versions)))
        if isinstance(own, str):
            texts = [version.text for version in enriched.get(0, [])] or [own]
            return self.source.with_captions(item.raw, key, texts[0] if len(texts) == 1 else texts)
        lists = (
            [version.text for version in enriched[at]] if at in enriched else [text] for at, text in enumerate(own)
        )
        return self.source.with_captions(item.raw, key, [text for texts in lists for text in texts])


def _see(items: list[Item], place: dict[str, int], views: int) -> list[int]:
    """Choose which images each item is checked against: its own and those of the same person that follow it, round
    and round, `views` in all. One that would see its own alone sees its mirror image too; what is to be mirrored, in
    the order in which it follows the images of `place`, is returned.
    """
    people: dict[tuple[str, str], dict[int, None]] = {}
    for item in items:
        if item.record and item.record.image in place:
            people.setdefault(_whose(item.record), {})[place[item.record.image]] = None
    mirrored: dict[int, int] = {}
    for item in items:
        if item.record and item.record.image in place:
            own, images = place[item.record.image], list(people[_whose(item.record)])
            at = images.index(own)
            item.seen = (images[at:] + images[:at])[:views]
            if len(item.seen) == 1:
                item.seen.append(mirrored.setdefault(own, len(place) + len(mirrored)))
    return list(mirrored)


def _whose(record: Record) -> tuple[str, str]:
    """Whom a record shows; some data sets count their people anew in each split."""
    return (record.split, record.person) if record.person != NOBODY else (NOBODY, record.image)


def _own_captions(raw: Any, record: Record, source: CaptionFile) -> list[str]:
    """The usable captions to the letter; `record.captions` has lost stray white space."""
    own = source.fields(raw)[record.caption_key]
    return [own] if isinstance(own, str) else [own[position] for position in record.positions]


def _edit_lines(item: Item) -> str:
    assert item.record or not item.versions
    return "".join(
        csv_line(
            [number, variant, word.position, word.word, word.replacement, f"{word.probability:.4f}",
             f"{word.attention:.4f}", item.record.image if item.record else ""]
        ) + "\n"
        for number, versions in enumerate(item.versions, item.first)
        for variant, version in enumerate(versions)
        for word in version.masked
        if word.replaced
    )  # fmt: skip


def _kept_lines(item: Item) -> str:
    image = item.record.image if item.record else ""
    lines = (
        csv_line([item.number, "" if caption is None else caption, image, reason]) for caption, reason in item.kept
    )
    return "".join(line + "\n" for line in lines)


def _tally(item: Item, truth: Truth | None) -> dict[str, float]:
    """The item's share of the summary's sums."""
    every = [version for versions in item.versions for version in versions]
    masked = [word for version in every for word in version.masked]
    edits = [word for word in masked if word.replaced]
    sums: dict[str, float] = {
        "records": 1,
        "captions": len(item.record.captions) if item.record else 0,
        "versions": len(every),
        "versions_changed": sum(any(word.replaced for word in version.masked) for version in every),
        "kept": len(item.kept),
        "masked": len(masked),
        "replaced": len(edits),
        "probability": sum(word.probability for word in edits),
        "itm_original": sum(version.itm_original for version in every),
        "itm_enriched": sum(version.itm_enriched for version in every),
    }
    if truth and item.record:
        for position, versions in zip(item.record.positions, item.versions, strict=bool(item.versions)):
            for version in versions:
                _add(sums, truth.judge(item.record.image, position, version.masked))
    return sums


def _add(sums: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0) + value


# -- the result -------------------------------------------------------------------------------------------------


def _part(parts: Path, number: int) -> Path:
    return parts / f"{number:07d}.json"


def _parts(parts: Path) -> Iterator[Path]:
    """The parts that are done, in order."""
    number = 0
    while (path := _part(parts, number)).is_file():
        yield path
        number += 1


def _assemble(source: CaptionFile, out: Path, text_only: bool) -> None:
    """Put the parts together; summary.csv comes last and says that all is there."""
    parts = out / PARTS
    _join(out / source.path.name, source.head, source.separator, source.tail, parts, "captions")
    _join(out / EDITS, csv_line(EDIT_COLUMNS) + "\n", "", "", parts, "edits")
    _join(out / KEPT, csv_line(KEPT_COLUMNS) + "\n", "", "", parts, "kept")
    sums: dict[str, float] = {}
    for path in _parts(parts):
        _add(sums, read_json(path)["tally"])
    summary = _summary(sums, text_only)
    table = pd.DataFrame({"figure": list(summary), "value": pd.Series(list(summary.values()), dtype=object)})
    write_csv(out / SUMMARY, table)
    shutil.rmtree(parts, ignore_errors=True)


def _join(path: Path, head: str, separator: str, tail: str, parts: Path, key: str) -> None:
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(head)
        for number, part in enumerate(_parts(parts)):
            file.write((separator if number else "") + read_json(part)[key])
        file.write(tail)


def _summary(sums: dict[str, float], text_only: bool) -> dict[str, float]:
    """Sums -> what summary.csv holds; a mean or share of nothing is left out."""
    counts = ["records", "captions", "kept", "versions", "versions_changed", "masked", "replaced"]
    shares = [("mean_probability", "probability", "replaced")]
    if not text_only:
        shares += [("mean_itm_original", "itm_original", "versions"), ("mean_itm_enriched", "itm_enriched", "versions")]
    if "wrong_words" in sums:
        counts += ["wrong_words", "wrong_masked", "wrong_made_right", "right_masked", "right_made_wrong"]
        shares += [
            ("made_right_share_of_wrong_masked", "wrong_made_right", "wrong_masked"),
            ("made_wrong_share_of_replaced", "right_made_wrong", "replaced"),
        ]
    found: dict[str, float] = {name: sums[name] for name in counts}
    return found | {name: sums[part] / sums[whole] for name, part, whole in shares if sums[whole]}


def _finished(out: Path, strict: bool) -> Enriched:
    """What stands in a finished folder; says what stayed as it was."""
    try:
        table = pd.read_csv(out / SUMMARY, dtype=str)
        values = dict(zip(table["figure"], table["value"], strict=True))
        summary = {name: float(text) if "." in text else int(text) for name, text in values.items()}
        kept = pd.read_csv(out / KEPT, dtype=str)
        first = "" if kept.empty else f"record {kept['record'][0]}: {kept['reason'][0]}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out / SUMMARY} or {KEPT} is damaged", "Add --overwrite to start again.") from error
    if len(kept):
        message = f"{len(kept):,} captions or records stay as they were ({first}); {out / KEPT} lists them"
        if strict:
            raise DataError(message, "Correct them, give --image-root or --text-only, or leave out --strict.")
        console.warn(message)
    return Enriched(out, summary, len(kept))


def summary_rows(summary: Mapping[str, float]) -> list[list[str]]:
    """The summary for a terminal."""
    return [
        [name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4f}"]
        for name, value in summary.items()
    ]
