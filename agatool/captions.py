"""Caption files read and written record by record, in constant memory: JSON lists, JSON lines and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import ijson

from agatool.data.annotations import CAPTION_KEYS, csv_cell, open_lines, read_jsonl
from agatool.errors import DataError

_BOM = b"\xef\xbb\xbf"
_MAX_DEPTH = 100  # of nested JSON; annotation files have three levels


class CaptionFile:
    """A caption file: its records as they are, and the text of a record for a file of the same schema.

    A file is `head`, the records' texts with `separator` between them, and `tail`.
    """

    head, separator, tail = "", "\n", "\n"

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> Iterator[Any]:
        """The records in order; DataError where the file is broken."""
        raise NotImplementedError

    def fields(self, record: Any) -> Any:
        """The record as `parse_record` reads it."""
        return record

    def text(self, record: Any) -> str:
        """The record as the file's format writes it. DataError for what no file can hold."""
        try:
            text = json.dumps(record, ensure_ascii=False, default=_as_float)
            return text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair stays an escape
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path} holds a record that cannot be written: {error}", "Check the file.") from error

    def with_captions(self, record: Any, key: str, captions: str | list[Any]) -> Any:
        """The record with other captions under `key`, and its own beside them; an older original stays."""
        kept = original_key(key)
        return {**record, key: captions, kept: record.get(kept, record[key])}


class _JsonList(CaptionFile):
    """One JSON list, streamed."""

    head, separator, tail = "[\n", ",\n", "\n]\n"

    def records(self) -> Iterator[Any]:
        try:
            with self.path.open("rb") as file:
                if file.read(len(_BOM)) != _BOM:
                    file.seek(0)
                yield from self._items(file)
        except OSError as error:
            raise DataError(f"Cannot read {self.path}: {error.strerror}", "Check the path.") from error
        except (ijson.JSONError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.path} is not valid JSON: {reason}", "Download the file again.") from error

    def _items(self, file: Any) -> Iterator[Any]:
        """The items of the outermost list. Not `ijson.items`: its paths take a gigabyte at a hostile depth."""
        depth, builder = 0, None
        for event, value in ijson.basic_parse(file):
            opens, closes = event in ("start_array", "start_map"), event in ("end_array", "end_map")
            if depth == 0 and event != "start_array":
                raise DataError(f"{self.path} holds no list of records", "See docs/datasets.md for the formats.")
            depth += opens - closes
            if depth > _MAX_DEPTH:
                raise DataError(f"{self.path} is nested too deeply to be an annotation file", "Check the file.")
            if depth == 0 or (opens and depth == 1):
                continue
            builder = builder or ijson.ObjectBuilder()
            builder.event(event, value)
            if depth == 1:
                yield builder.value
                builder = None


class _JsonLines(CaptionFile):
    """One JSON record a line."""

    def records(self) -> Iterator[Any]:
        return read_jsonl(self.path)


class _Csv(CaptionFile):
    """Rows are dicts of text; a cell may hold a JSON list of captions."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.header = next(csv.reader(open_lines(path)), [])
        if len(set(self.header)) < len(self.header):
            raise DataError(f"{path} has two columns of one name: {', '.join(self.header)}", "Rename one of them.")
        originals = (original_key(name) for name in self.header if name.strip().lower() in CAPTION_KEYS)
        self.columns = list(dict.fromkeys((*self.header, *originals)))
        self.head = csv_line(self.columns) + "\n"

    def records(self) -> Iterator[Any]:
        try:
            for row in csv.DictReader(open_lines(self.path), strict=True, restval=""):
                yield {column: row.get(column, "") for column in self.columns}
        except csv.Error as error:
            raise DataError(f"{self.path} is not valid CSV: {error}", "Quote captions that hold commas.") from error

    def fields(self, record: Any) -> Any:
        return {key: csv_cell(record[key]) if record[key] != "" else None for key in self.header}

    def text(self, record: Any) -> str:
        return csv_line(record.values())

    def with_captions(self, record: Any, key: str, captions: str | list[Any]) -> Any:
        cell = captions if isinstance(captions, str) else json.dumps(captions, ensure_ascii=False)
        kept = original_key(key)
        return {**record, key: cell, kept: record[kept] or record[key]}


def open_captions(path: Path) -> CaptionFile:
    """The caption file at `path`, its format by its ending as in `prepare`; DataError where there is none."""
    if not path.is_file():
        raise DataError(f"{path} is not a file", "Give a JSON list, a JSON lines or a CSV file of captions.")
    kinds: dict[str, type[CaptionFile]] = {".jsonl": _JsonLines, ".csv": _Csv}
    return kinds.get(path.suffix.lower(), _JsonList)(path)


def original_key(key: str) -> str:
    """Where the captions as they were are kept: `captions_original` for `captions`."""
    return f"{key}_original"


def csv_line(cells: Iterable[Any]) -> str:
    """One CSV row without its end."""
    row = io.StringIO()
    csv.writer(row, lineterminator="\r\n").writerow(cells)  # with both, so that either is quoted in a cell
    return row.getvalue().removesuffix("\r\n")


def _as_float(value: Any) -> float:
    """ijson reads numbers with a point or an exponent as Decimal."""
    number = float(value)
    if not isinstance(value, Decimal) or not math.isfinite(number):
        raise ValueError(f"{value!r} is out of range")
    return number
