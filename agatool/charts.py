"""Charts as inline SVG that takes its colours from the page, light or dark: lines over steps, score histograms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from agatool.page import Markup, join, tag
from agatool.report import LARGEST_DRAWN, Panel, smoothed

COLOURS = 8  # classes k0 to k7 of the style sheet
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 360, 220, 46, 8, 36
_POINTS = 300  # of a line: more cannot be seen, and every one costs bytes
_BINS = 32


class _Axes:
    """Data coordinates to those of the drawing, with round ticks."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        if y[1] - y[0] <= 1e-9 * abs(y[1]):  # a constant still wants ticks around it
            around = 0.1 * abs(y[1]) or 1.0
            y = (y[0] - around, y[1] + around)
        self.x_ticks = MaxNLocator(5).tick_values(*x)
        self.y_ticks = MaxNLocator(5).tick_values(*y)
        self._x = (x[0], max(x[1], x[0] + 1e-12))
        self._y = (self.y_ticks[0], self.y_ticks[-1])
        self.x_ticks = [tick for tick in self.x_ticks if self._x[0] <= tick <= self._x[1]]

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self._x[0]) / (self._x[1] - self._x[0])
        up = (y - self._y[0]) / (self._y[1] - self._y[0])
        height = _HEIGHT - _TOP - _BOTTOM
        return round(_LEFT + across * (_WIDTH - _LEFT - 8), 1), round(_TOP + (1 - up) * height, 1)

    def points(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        return " ".join("{},{}".format(*self.place(x, y)) for x, y in zip(xs, ys, strict=True))

    def draw(self, x_label: str) -> Markup:
        floor = _HEIGHT - _BOTTOM
        parts = []
        for tick in self.y_ticks:
            y = self.place(self._x[0], tick)[1]
            parts.append(tag("line", x1=_LEFT, x2=_WIDTH - 8, y1=y, y2=y, class_="grid"))
            parts.append(tag("text", _figure(tick), x=_LEFT - 7, y=y + 4, text_anchor="end"))
        for tick in self.x_ticks:
            x = self.place(tick, self._y[0])[0]
            parts.append(tag("text", _figure(tick), x=x, y=floor + 15, text_anchor="middle"))
        parts.append(tag("text", x_label, x=(_WIDTH + _LEFT) / 2, y=_HEIGHT - 3, text_anchor="middle"))
        return join(*parts)


def _figure(value: float) -> str:
    return f"{0.0 if abs(value) < 1e-12 else value:.6g}"


def _chart(title: str, told: str, drawing: Markup, legend: Sequence[str], note: str = "") -> Markup:
    """`told` says in words what the drawing shows, for those who do not see it."""
    picture = tag("svg", drawing, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=f"{title}. {told}")
    keys = [tag("span", tag("i", class_=_colour(place)), text) for place, text in enumerate(legend)]
    if note:
        keys.append(tag("span", note, class_="muted"))
    return tag("figure", tag("h3", title), picture, tag("div", *keys, class_="legend"), class_="chart")


def _colour(place: int) -> str:
    return f"k{place % COLOURS}"


def line_chart(panel: Panel) -> Markup:
    """The lines of a panel over the training steps; noisy ones as their moving average, faint behind it the values."""
    steps = [step for line in panel.series for step in line.steps]
    values = [value for line in panel.series for value in line.values]
    axes = _Axes((0.0, max(steps)), (min(values), max(values)))
    parts, legend = [axes.draw("step")], []
    if panel.marked is not None:
        (x, top), (_, floor) = axes.place(panel.marked, axes.y_ticks[-1]), axes.place(panel.marked, axes.y_ticks[0])
        parts.append(tag("line", x1=x, x2=x, y1=top, y2=floor, class_="mark"))
    for place, line in enumerate(panel.series):
        colour = _colour(place)
        keep = np.unique(np.linspace(0, len(line.steps) - 1, _POINTS).astype(int))
        steps = [line.steps[i] for i in keep]
        if line.noisy:
            average = smoothed(line.values)
            raw = axes.points(steps, [line.values[i] for i in keep])
            parts.append(tag("polyline", points=raw, class_=f"raw {colour}"))
            shown = [average[i] for i in keep]
        else:
            shown = [line.values[i] for i in keep]
            for step, value in zip(steps, shown, strict=True):
                x, y = axes.place(step, value)
                parts.append(tag("circle", cx=x, cy=y, r=3, class_=colour))
        parts.append(tag("polyline", points=axes.points(steps, shown), class_=f"line {colour}"))
        legend.append(f"{line.label} {shown[-1]:.4g}")
    chosen = f"dotted: chosen, step {panel.marked}" if panel.marked is not None else ""
    return _chart(panel.title, f"Last values: {', '.join(legend)}. {chosen}", join(*parts), legend, chosen)


def histogram(title: str, groups: dict[str, np.ndarray]) -> Markup:
    """The distributions of a score in several groups, each scaled to its own size; empty groups are left out."""
    values = {name: group[np.abs(group) < LARGEST_DRAWN] for name, group in groups.items()}
    everything = np.concatenate(list(values.values()))
    low, high = float(everything.min()), float(everything.max())
    edges = np.linspace(low, high if high > low else low + 1e-3 * (abs(low) or 1.0), _BINS + 1)
    shares = {name: 100 * np.histogram(group, edges)[0] / max(1, len(group)) for name, group in values.items()}
    axes = _Axes((edges[0], edges[-1]), (0.0, max(float(share.max()) for share in shares.values())))
    parts, legend = [axes.draw("score; height: percent of the group")], []
    for place, (name, share) in enumerate(shares.items()):
        outline = axes.points(np.repeat(edges, 2).tolist(), [0.0, *np.repeat(share, 2), 0.0])
        parts.append(tag("path", d=f"M{outline.replace(' ', 'L')}Z", class_=f"area {_colour(place)}"))
        group = values[name]
        middle = f", median {np.median(group):.3g}" if len(group) else ""
        legend.append(f"{name}: {len(group):,}{middle}")
    return _chart(title, "; ".join(legend), join(*parts), legend)
