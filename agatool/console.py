"""The only user of rich: results go to stdout, progress and messages to stderr."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as BarTask
from rich.table import Table
from rich.text import Text

LOG_EVERY_SECONDS = 10.0
PIPE_WIDTH = 240  # columns where there is no terminal


def configure(quiet: bool = False) -> None:
    """Set for the whole process whether messages and progress are shown."""
    global _out, _err, _quiet
    _out, _err, _quiet = _on(stderr=False), _on(stderr=True), quiet


def _on(stderr: bool) -> Console:
    """A console on whatever the stream is when it writes; a file or pipe is as wide as its tables are."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=None if terminal else PIPE_WIDTH)


_out, _err, _quiet = _on(stderr=False), _on(stderr=True), False  # until `configure`


def info(message: str) -> None:
    """A line about what is happening (stderr)."""
    if not _quiet:
        _err.print(escape(message))


def warn(message: str) -> None:
    """Something the user should know, without stopping (stderr)."""
    if not _quiet:
        _err.print(f"[yellow]warning:[/] {escape(message)}")


def error(message: str, hint: str = "") -> None:
    """What went wrong and what to do next (stderr, also when quiet)."""
    _err.print(f"[bold red]error:[/] {escape(message)}")
    if hint:
        _err.print(f"[bold]hint:[/]  {escape(hint)}")


def result(text: str) -> None:
    """A line of the command's result (stdout)."""
    if not _quiet:
        _out.print(escape(text))


def result_json(document: Any) -> None:
    """The command's result as one JSON document (stdout, also when quiet)."""
    sys.stdout.write(json.dumps(_strict(document), ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def _strict(value: Any) -> Any:
    """The document with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """The command's result as a table (stdout); columns after the first are right-aligned."""
    if _quiet:
        return
    grid = Table(title=title, title_justify="left", header_style="bold")
    for position, column in enumerate(columns):
        grid.add_column(column, justify="left" if position == 0 else "right")
    for row in rows:
        grid.add_row(*[escape(str(cell)) for cell in row])
    _out.print(grid)


class Task:
    """One piece of long work: `advance` moves its bar, or logs a plain line now and then without a terminal."""

    def __init__(self, description: str, total: int | None, bar: Progress | None, done: int = 0) -> None:
        self.description, self.total, self.done = description, total, done
        self._before = done
        self._bar = bar
        self._id = bar.add_task(description, total=total, completed=done) if bar else None
        self._started = self._logged = time.monotonic()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """`count` more units are done; `note` replaces the description's tail."""
        self.done += count
        label = f"{self.description} {note}" if note else self.description
        if self._bar is not None and self._id is not None:
            self._bar.update(self._id, advance=count, description=escape(label))
        elif time.monotonic() - self._logged >= LOG_EVERY_SECONDS and not _quiet:
            self._logged = time.monotonic()
            rate = (self.done - self._before) / (self._logged - self._started)
            of = f"/{self.total}" if self.total else ""
            left = f", {(self.total - self.done) / rate:.0f} s left" if self.total and rate else ""
            info(f"{label}: {self.done}{of} ({rate:.1f}/s{left})")


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: BarTask) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


@contextmanager
def progress(description: str, total: int | None = None, done: int = 0) -> Iterator[Task]:
    """Show progress on stderr while the block runs: a bar on a terminal, plain lines otherwise.

    `done` units were done before, by a run that is now continued.
    """
    if _quiet or not _err.is_terminal:
        yield Task(description, total, None, done)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_err, transient=True) as bar:
        yield Task(description, total, bar, done)
