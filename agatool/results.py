"""Search results for people and programs: JSON, a CSV table, one HTML page, a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agatool import page
from agatool.data.images import decode_image
from agatool.errors import UsageError
from agatool.files import write_text
from agatool.index import Index
from agatool.report import plt, save_figure, write_csv
from agatool.search import Answer, Hit

ABSENT_NOTE = "Probably not in this gallery"
SHEET_QUERIES = 50  # a picture of more is longer than viewers open
_ACROSS, _TILE = 10, (0.95, 1.9)  # images in a row of the sheet; inches of one
_NOTE_COLOUR, _MUTED = "#b3261e", "#57606a"


def explained(answer: Answer) -> str:
    """The hint in one sentence, empty where there is no reason for one."""
    if not answer.probably_absent or answer.as_good is None:
        return ""
    return f"{ABSENT_NOTE}: {answer.as_good:.0%} of made-up descriptions fit somebody in it at least as well."


def as_document(index: Index, answers: Sequence[Answer]) -> dict[str, Any]:
    """Everything as plain data for JSON."""
    return {
        "index": str(index.folder), "gallery": str(index.root), "images": len(index), "model": str(index.model),
        "queries": [as_record(answer) for answer in answers],
    }  # fmt: skip


def as_record(answer: Answer) -> dict[str, Any]:
    """One answer as plain data."""
    return {
        "text": answer.query.text,
        "image": str(answer.query.image) if answer.query.image else None,
        "probably_absent": answer.probably_absent,
        "made_up_as_good": answer.as_good,
        "hits": [
            {"rank": hit.rank, "row": hit.row, "path": hit.name, "cosine": hit.cosine, "match": hit.match}
            for hit in answer.hits
        ],
    }


def rows(answer: Answer) -> list[list[str]]:
    """The hits for a terminal: rank, cosine, match, path."""
    return [[f"{hit.rank}", f"{hit.cosine:.3f}", _match(hit), hit.name] for hit in answer.hits]


def _match(hit: Hit) -> str:
    return "" if hit.match is None else f"{hit.match:.2f}"


def write_table(path: Path, answers: Sequence[Answer]) -> None:
    """A CSV file with a row for each query and hit."""
    columns = ["query", "text", "image", "probably_absent", "rank", "path", "cosine", "match"]
    lines = [
        (number, answer.query.text, answer.query.image, int(answer.probably_absent), hit.rank, hit.name, hit.cosine,
         hit.match)
        for number, answer in enumerate(answers, 1) for hit in answer.hits
    ]  # fmt: skip
    write_csv(path, pd.DataFrame(lines, columns=columns), decimals=6)


def write_page(path: Path, index: Index, answers: Sequence[Answer]) -> None:
    """One self-contained HTML page with every query and its images."""
    intro = page.tag("p", f"{len(index):,} images in {index.root}", class_="muted")
    body = [page.tag("h1", "Search results"), intro, *(_sheet(index, answer) for answer in answers)]
    write_text(path, page.document("Search results", *body))


def _sheet(index: Index, answer: Answer) -> page.Markup:
    note = explained(answer)
    tiles = [_tile(index, hit) for hit in answer.hits]
    return page.tag(
        "section",
        page.tag("h3", str(answer.query)),
        page.tag("p", note, class_="note") if note else "",
        page.tag("ol", *tiles, class_="tiles"),
        class_="sheet",
    )


def _tile(index: Index, hit: Hit) -> page.Markup:
    image = page.tag("img", src=page.thumbnail(index.path(hit.row)), alt=hit.name, title=hit.name)
    return page.tag(
        "li",
        page.tag("div", image, class_="frame"),
        page.tag("b", f"{hit.rank}"),
        page.tag("div", f"cosine {hit.cosine:.3f}"),
        page.tag("div", f"match {_match(hit)}") if hit.match is not None else "",
        class_="tile",
    )


def write_sheet(path: Path, index: Index, answers: Sequence[Answer]) -> None:
    """A contact sheet as PNG (or PDF, SVG: by the suffix): each query above its images with their scores."""
    if len(answers) > SHEET_QUERIES:
        raise UsageError(f"A sheet of {len(answers)} queries is too long to look at", "Use --html or --csv.")
    wide, tall = _TILE[0], _TILE[1] + 0.32
    heads = [0.55 if explained(answer) else 0.36 for answer in answers]
    heights = [head + tall * -(-len(answer.hits) // _ACROSS) for head, answer in zip(heads, answers, strict=True)]
    width, height = _ACROSS * wide + 0.3, sum(heights) + 0.1
    figure = plt.figure(figsize=(width, height), facecolor="white")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / width, y / height, text, **style)

    top = height - 0.05
    for answer, head, block in zip(answers, heads, heights, strict=True):
        write(0.15, top - 0.22, _shortened(str(answer.query)), fontsize=10, weight="bold")
        write(0.15, top - 0.42, explained(answer), fontsize=8, color=_NOTE_COLOUR)
        for number, hit in enumerate(answer.hits):
            row, column = divmod(number, _ACROSS)
            left, bottom = 0.15 + column * wide, top - head - row * tall - _TILE[1]
            axis = figure.add_axes(((left + 0.03) / width, bottom / height, (wide - 0.06) / width, _TILE[1] / height))
            axis.imshow(np.asarray(decode_image(index.path(hit.row))))
            axis.set_anchor("S")
            axis.axis("off")
            label = f"{hit.rank}   {hit.cosine:.3f}" + (f"\nmatch {_match(hit)}" if hit.match is not None else "")
            write(left + wide / 2, bottom - 0.03, label, fontsize=7, color=_MUTED, ha="center", va="top")
        top -= block
    save_figure(path, figure)


def _shortened(text: str, length: int = 118) -> str:
    """As much of a text as fits into the sheet's width."""
    plain = text.replace("$", r"\$")  # matplotlib takes what stands between two for a formula
    return plain if len(plain) <= length else f"{plain[: length - 1]}…"
