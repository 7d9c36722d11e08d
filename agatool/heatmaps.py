"""Drawing: heat over an image for each word, the caption shaded by class attention, contact sheets.

Sees plain data only, no torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from agatool.report import save_figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

PANELS_A_ROW = 8  # pictures side by side, the image included
PAIRS_A_SHEET = 10
_PANEL, _LEAST = (2.3, 2.6), 0.8  # inches: width and height that an image is fitted into, and the least of either
_GAP, _MARGIN, _TITLE = 0.12, 0.1, 0.3  # inches between panels, at the edge, and for a panel's title
_LINE, _NOTE, _TEXT = 0.27, 0.16, 10  # inches a line of the caption and of notes; the font's size in points
_HEAT, _SHADE = "inferno", (0.98, 0.62, 0.15)  # colour map of the heat; colour of a word's attention


@dataclass(frozen=True)
class Panel:
    """One word's heat."""

    title: str
    heat: np.ndarray  # [height, width] of the image, not negative, in any unit
    notes: Sequence[str] = ()  # lines below: the guesses of masked mode


@dataclass(frozen=True)
class Picture:
    """A pair and what its words look at."""

    image: np.ndarray  # [height, width, 3] uint8
    caption: str
    shades: Sequence[tuple[int, int, float]]  # (start, end, 0 to 1) of each word in the caption
    score: str
    panels: Sequence[Panel]


def draw_pair(path: Path, picture: Picture) -> None:
    """One picture: the image, the panels and the shaded caption. The file's suffix says the format."""
    across, high = _panel_size(picture.image)
    columns = min(PANELS_A_ROW, 1 + len(picture.panels))
    rows = -(-(1 + len(picture.panels)) // columns)
    width = max(columns * (across + _GAP) + 2 * _MARGIN, 5.0)
    figure = plt.figure(figsize=(width, 1), facecolor="white")
    lines = _wrapped(figure, picture.caption, picture.shades, width - 3 * _MARGIN)
    notes = _NOTE * max((len(panel.notes) for panel in picture.panels), default=0)
    row_height = _TITLE + high + notes
    text_height = 0.25 + _LINE * len(lines)
    height = rows * row_height + 0.2 + text_height
    figure.set_size_inches(width, height)
    for number, panel in enumerate([None, *picture.panels]):
        row, column = divmod(number, columns)
        bottom = height - row * row_height - _TITLE - high
        _draw_panel(figure, (_MARGIN + column * (across + _GAP), bottom, across, high), picture.image, panel)
    _text(figure, _MARGIN, text_height - 0.1, picture.score, size=_TEXT, weight="bold")
    _draw_caption(figure, lines, _MARGIN, text_height - 0.15)
    _save(path, figure)


def draw_sheet(path: Path, pictures: Sequence[Picture]) -> None:
    """A contact sheet: for each pair a row, its caption above it, without notes."""
    shown = [picture.panels[: PANELS_A_ROW - 1] for picture in pictures]
    sizes = [_panel_size(picture.image) for picture in pictures]
    widths = [(1 + len(panels)) * (size[0] + _GAP) for panels, size in zip(shown, sizes, strict=True)]
    width = max(*widths, 6.0) + 2 * _MARGIN
    figure = plt.figure(figsize=(width, 1), facecolor="white")
    wrapped = [_wrapped(figure, picture.caption, picture.shades, width - 3 * _MARGIN) for picture in pictures]
    heights = [0.7 + _LINE * len(lines) + _TITLE + size[1] for lines, size in zip(wrapped, sizes, strict=True)]
    top = sum(heights)
    figure.set_size_inches(width, top)
    for picture, panels, (across, high), lines, height in zip(pictures, shown, sizes, wrapped, heights, strict=True):
        _text(figure, _MARGIN, top - 0.3, picture.score, size=_TEXT, weight="bold")
        _draw_caption(figure, lines, _MARGIN, top - 0.37)
        bottom = top - 0.47 - _LINE * len(lines) - _TITLE - high
        for column, panel in enumerate([None, *panels]):
            place = (_MARGIN + column * (across + _GAP), bottom, across, high)
            _draw_panel(figure, place, picture.image, panel, with_notes=False)
        top -= height
    _save(path, figure)


def _panel_size(image: np.ndarray) -> tuple[float, float]:
    """Inches (width, height) of an image's panels; an extreme shape gets blank space around it."""
    height, width = image.shape[:2]
    scale = min(_PANEL[0] / width, _PANEL[1] / height)
    return max(_LEAST, width * scale), max(_LEAST, height * scale)


def _draw_panel(
    figure: Any, place: tuple[float, ...], image: np.ndarray, panel: Panel | None, with_notes: bool = True
) -> None:
    """The image, or one word's heat over it; `place` is (left, bottom, width, height) in inches."""
    wide, high = figure.get_size_inches()
    left, bottom, width, height = place
    axes = figure.add_axes((left / wide, bottom / high, width / wide, height / high))
    axes.set_axis_off()
    if panel is None:
        axes.imshow(image, interpolation="bilinear")
        return
    grey = image.astype(np.float32).mean(2, keepdims=True).repeat(3, 2)
    axes.imshow((0.25 * image + 0.35 * grey + 0.4 * 255).clip(0, 255).astype(np.uint8), interpolation="bilinear")
    top = float(panel.heat.max())
    relative = panel.heat / top if top > 0 else np.zeros_like(panel.heat)
    overlay = matplotlib.colormaps[_HEAT](relative)
    overlay[..., 3] = 0.85 * relative**0.7  # where there is no heat, the image shows
    axes.imshow(overlay, interpolation="bilinear")
    _text(figure, left + width / 2, bottom + height + 0.06, panel.title, size=_TEXT, weight="bold", ha="center",
          fit=width + 0.1)  # fmt: skip
    for number, note in enumerate(panel.notes if with_notes else ()):
        _text(figure, left + width / 2, bottom - _NOTE * (number + 1), note, size=8, ha="center", fit=width + 0.1)


def _text(figure: Any, x: float, y: float, text: str, size: float, fit: float | None = None, **style: Any) -> None:
    """Text at inches from the lower left, never read as mathematics; shrunk where it is wider than `fit` inches."""
    wide, high = figure.get_size_inches()
    if fit is not None:
        size = max(5.0, min(size, size * fit / max(fit, _width(figure, text, size))))
    figure.text(x / wide, y / high, text, size=size, parse_math=False, va="baseline", **style)


def _width(figure: Any, text: str, size: float) -> float:
    """Inches that `text` takes."""
    font = matplotlib.font_manager.FontProperties(size=size)
    renderer = figure.canvas.get_renderer()
    with _missing_glyphs_are_fine():
        return renderer.get_text_width_height_descent(text, font, ismath=False)[0] / figure.dpi


Piece = tuple[float, float, str, float]  # left and width in inches, text, shade


def _wrapped(figure: Any, caption: str, shades: Sequence[tuple[int, int, float]], width: float) -> list[list[Piece]]:
    """The caption in lines of shaded pieces; what stands between words keeps to the word before it."""
    space = _width(figure, "a a", _TEXT) - _width(figure, "aa", _TEXT)
    lines: list[list[Piece]] = [[]]
    left = 0.0
    for start, end in _tokens(caption):
        pieces = _split(caption, start, end, shades)
        widths = [_width(figure, text, _TEXT) for text, _ in pieces]
        if left > 0 and left + sum(widths) > width:
            lines.append([])
            left = 0.0
        for (text, shade), wide in zip(pieces, widths, strict=True):
            lines[-1].append((left, wide, text, shade))
            left += wide
        left += space
    return lines


def _tokens(caption: str) -> list[tuple[int, int]]:
    """(start, end) of what white space separates."""
    spans, end = [], 0
    for token in caption.split():
        start = caption.index(token, end)
        end = start + len(token)
        spans.append((start, end))
    return spans


def _split(caption: str, start: int, end: int, shades: Sequence[tuple[int, int, float]]) -> list[tuple[str, float]]:
    """caption[start:end] cut at the borders of words, each piece with its shade."""
    inside = [
        (max(start, first), min(end, last), shade) for first, last, shade in shades if first < end and last > start
    ]
    pieces, at = [], start
    for first, last, shade in inside:
        if first > at:
            pieces.append((caption[at:first], 0.0))
        pieces.append((caption[first:last], shade))
        at = last
    return [*pieces, (caption[at:end], 0.0)] if at < end else pieces


def _draw_caption(figure: Any, lines: Sequence[Sequence[Piece]], left: float, top: float) -> None:
    wide, high = figure.get_size_inches()
    for number, line in enumerate(lines):
        base = top - _LINE * (number + 1) + 0.07
        for offset, width, text, shade in line:
            if shade > 0:
                box = FancyBboxPatch(
                    ((left + offset) / wide, (base - 0.05) / high), width / wide, 0.2 / high,
                    boxstyle="square,pad=0", transform=figure.transFigure, linewidth=0,
                    facecolor=_SHADE, alpha=0.1 + 0.8 * shade,
                )  # fmt: skip
                figure.add_artist(box)
            _text(figure, left + offset, base, text, size=_TEXT)


def _missing_glyphs_are_fine() -> warnings.catch_warnings:
    """A caption may hold signs that the font lacks; a box in their place is all there is to say."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _save(path: Path, figure: Any) -> None:
    with _missing_glyphs_are_fine():
        save_figure(path, figure)
