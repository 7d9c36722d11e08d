"""HTML that is escaped by construction: tags, tables, thumbnails, and the page with its style sheet around them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from agatool.data.images import decode_image

THUMBNAIL = (96, 192)  # pixels, the largest width and height
_VOID = {"img", "meta", "br"}
# Scripts and requests are forbidden even where something should slip through the escaping.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class Markup(str):
    """Text that is HTML already; `tag` escapes every other text."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """`<name ...>children</name>`: children and values are escaped; an attribute that is None is left out.

    A trailing underscore of an attribute is dropped and others become hyphens: class_, aria_label.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: object) -> Markup:
    """Children one after the other, escaped where they are not markup."""
    return Markup("".join(child if isinstance(child, Markup) else html.escape(str(child)) for child in children))


def table(header: Sequence[object], rows: Sequence[Sequence[object]], label: str) -> Markup:
    """A table whose first column names the rows; it scrolls on its own where the screen is narrow."""
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    body = [
        tag("tr", *(tag("th", cell, scope="row") if place == 0 else tag("td", cell) for place, cell in enumerate(row)))
        for row in rows
    ]
    grid = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", grid, class_="scroll", role="region", aria_label=label, tabindex="0")


def section(title: str, *children: object) -> Markup:
    """A part of the page under a heading that the contents can link to."""
    anchor = anchor_of(title)
    heading = tag("h2", title, id=f"{anchor}-title")
    return tag("section", heading, *children, id=anchor, aria_labelledby=f"{anchor}-title")


def anchor_of(title: str) -> str:
    """The fragment of a section's address."""
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


def contents(titles: Sequence[str]) -> Markup:
    """Links to the sections."""
    return tag("nav", *(tag("a", title, href=f"#{anchor_of(title)}") for title in titles), aria_label="Contents")


def thumbnail(path: Path) -> str:
    """The image scaled down into THUMBNAIL, as a data: address (JPEG). Raises DataError for an unreadable image."""
    image = decode_image(path)
    image.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=75, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def document(title: str, *body: object) -> str:
    """A complete page: self-contained, no scripts, light or dark as the reader's system is."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', *body)), lang='en')}\n"


STYLE = """
:root { color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --text: #1b1f24; --muted: #57606a; --line: #d5dae0; --soft: #eceff3;
  --link: #0b5cad; --hit: #1a7f37; --miss: #b3261e;
  --c0: #0b62c4; --c1: #b8480b; --c2: #1a7f37; --c3: #8250df; --c4: #b0126b; --c5: #0e7490;
  --c6: #7a5c00; --c7: #57606a; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0e1116; --card: #171b22; --text: #e6edf3; --muted: #9fabb7; --line: #303742; --soft: #222933;
  --link: #79b8ff; --hit: #4cc764; --miss: #ff8a80;
  --c0: #6cb2ff; --c1: #ff9d5c; --c2: #56d364; --c3: #c4a1ff; --c4: #ff8ac4; --c5: #4dd4e6;
  --c6: #e3c04d; --c7: #aab4be; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "Noto Sans", sans-serif; overflow-wrap: anywhere; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 16px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.015em; }
h2 { font-size: 1.25rem; margin: 44px 0 10px; letter-spacing: -0.01em; }
h3 { font-size: 1rem; margin: 0 0 6px; }
p { margin: 0 0 12px; max-width: 76ch; }
a { color: var(--link); text-underline-offset: 2px; }
a:focus-visible, summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
code { font: 0.9em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.muted { color: var(--muted); }
.note { border-left: 4px solid var(--c1); background: var(--card); padding: 10px 14px; border-radius: 0 8px 8px 0; }
nav, .links { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 18px 0 0; font-size: 0.94rem; }
.links { margin: 0 0 8px; }

.card, .scroll, .sheet, .chart, details { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card, .bars, table, .tile { font-variant-numeric: tabular-nums; }

.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 22px 0 14px; }
.card { padding: 14px 16px; }
.card .name { color: var(--muted); font-size: 0.92rem; }
.card .big { font-size: 2.5rem; line-height: 1.2; font-weight: 680; letter-spacing: -0.03em; }
.card .big small { font-size: 1.1rem; font-weight: 500; color: var(--muted); letter-spacing: 0; }
.card .range { font-size: 0.92rem; color: var(--muted); }

.scroll { overflow-x: auto; margin: 0 0 14px; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; overflow-wrap: normal; }
th, td { padding: 8px 14px; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
th:first-child { position: sticky; left: 0; min-width: 7.5em; text-align: left; white-space: normal;
  background: var(--card); }
thead th, thead th:first-child { border-top: 0; font-weight: 600; background: var(--soft); }
tbody th { font-weight: 500; }
.plain td, .plain th { text-align: left; white-space: normal; }
.plain .scroll { border: 0; margin-bottom: 0; }
.better { color: var(--hit); font-weight: 600; }
.worse { color: var(--miss); font-weight: 600; }

.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 6px 12px; align-items: center;
  font-size: 0.92rem; margin: 0 0 20px; }
.bars .bar { background: var(--soft); border-radius: 4px; height: 14px; overflow: hidden; }
.bars .bar i { display: block; height: 100%; background: var(--miss); }
.bars .bar.first i { background: var(--hit); }

.sheet { padding: 14px 16px; margin: 0 0 14px; }
.sheet h3 { margin: 0 0 4px; font-size: 1rem; font-weight: 550; line-height: 1.45; }
.sheet .facts { margin: 0 0 10px; font-size: 0.9rem; color: var(--muted); }
.tiles { list-style: none; margin: 0; padding: 0; display: grid; gap: 10px 8px;
  grid-template-columns: repeat(auto-fill, minmax(72px, 1fr)); }
.tile { font-size: 0.78rem; line-height: 1.3; color: var(--muted); min-width: 0; }
.tile .frame { display: flex; align-items: center; justify-content: center; aspect-ratio: 1 / 2;
  background: var(--soft); border: 3px solid transparent; border-radius: 8px; overflow: hidden; text-align: center; }
.tile img { display: block; width: 100%; height: 100%; object-fit: contain; }
.tile b { color: var(--text); font-weight: 600; }
.tile.hit .frame { border-color: var(--hit); }
.tile.hit b { color: var(--hit); }
.tile.wanted .frame { border: 3px dashed var(--muted); }

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 14px; }
.chart { padding: 14px 16px; margin: 0; min-width: 0; }
.chart svg { display: block; width: 100%; height: auto; overflow: visible; }
.chart text { fill: var(--muted); font-size: 12px; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .mark { stroke: var(--muted); stroke-width: 1.5; stroke-dasharray: 2 4; }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chart .raw { fill: none; stroke-width: 1; opacity: 0.28; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin-top: 8px; font-size: 0.88rem; }
.legend i { display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
details { padding: 10px 16px; margin: 0 0 14px; }
details .scroll { margin-top: 10px; }
summary { cursor: pointer; font-weight: 600; }
.k0 { --k: var(--c0); } .k1 { --k: var(--c1); } .k2 { --k: var(--c2); } .k3 { --k: var(--c3); }
.k4 { --k: var(--c4); } .k5 { --k: var(--c5); } .k6 { --k: var(--c6); } .k7 { --k: var(--c7); }
polyline.line, polyline.raw { stroke: var(--k); } circle { fill: var(--k); } .legend i { background: var(--k); }
path.area { fill: var(--k); fill-opacity: 0.18; stroke: var(--k); stroke-width: 1.8; stroke-linejoin: round; }
@media (max-width: 560px) { main { padding-top: 18px; } h1 { font-size: 1.45rem; } h2 { margin-top: 34px; }
  .card .big { font-size: 2.1rem; } .tiles { grid-template-columns: repeat(4, 1fr); } th, td { padding: 8px 10px; } }
@media (min-width: 1000px) { .tiles { grid-template-columns: repeat(11, 1fr); } }
@media print { body { background: #fff; } .sheet, .chart, .card { break-inside: avoid; } }
"""
