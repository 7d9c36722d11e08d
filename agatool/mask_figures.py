"""What `aga compare-masks` shows: bar charts and a page of captions. Sees plain data only, no torch."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from agatool.files import write_text
from agatool.page import Markup, document, join, section, table, tag, thumbnail
from agatool.report import save_figure

COLOURS = {"random": "#8a8f98", "content": "#4c78a8", "attention": "#e4682a"}
Table = tuple[list[str], list[list[str]]]  # header, rows
_CLASS_COLOURS = ("#e4682a", "#f2a65a", "#4c78a8", "#8c6bb1", "#59a14f", "#76b7b2", "#c9c4b8", "#e9e7e1")


@dataclass(frozen=True)
class Word:
    """A word of a shown caption: where it stands and its share of the class attention."""

    start: int
    end: int
    attention: float


@dataclass(frozen=True)
class Guess:
    """What the model filled in for a masked word, looking at the right image."""

    text: str
    right: bool


@dataclass(frozen=True)
class ShownCaption:
    """A caption of the page: its image file, its words, and for each strategy what was guessed for masked ones."""

    image: Path
    caption: str
    words: Sequence[Word]
    masked: Mapping[str, Mapping[int, Guess]]


def masks_png(path: Path, masks: pd.DataFrame, classes: pd.DataFrame) -> None:
    """The rows of masks.csv and classes.csv as bars."""
    figure = plt.figure(figsize=(12, 7.4), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1.15, 1))
    top = [figure.add_subplot(grid[0, column]) for column in range(3)]
    shares = {"content words": "content_share"}
    if masks["visible_share"].notna().any():
        shares["name what is visible"] = "visible_share"
    _bars(top[0], masks, shares, "share of the masked words", "{:.0%}")
    _bars(top[1], masks, {"top-1": "mlm_top1", "top-5": "mlm_top5"}, "words filled in correctly", "{:.0%}")
    losses = {"own image": "ce_image", "another person's": "ce_other_image", "no image": "ce_no_image"}
    _bars(top[2], masks, losses, "cross-entropy, nats a masked word", "{:.2f}")
    _bars(figure.add_subplot(grid[1, 0]), masks, {"": "image_gain"}, "image gain, nats a masked word", "{:.3f}")
    _class_bars(figure.add_subplot(grid[1, 1:]), classes)
    ratio = f"{masks['realised_ratio'].iloc[0]:.1%}"
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in masks["strategy"]]
    figure.legend(
        handles, list(masks["strategy"]), loc="outside upper center", ncols=3, frameon=False,
        title=f"how {ratio} of the words were chosen",
    )  # fmt: skip
    save_figure(path, figure)


def _bars(axis: Any, masks: pd.DataFrame, groups: Mapping[str, str], title: str, form: str) -> None:
    """Groups of columns, one bar a strategy in each."""
    width = 0.8 / len(masks)
    for place, row in enumerate(masks.to_dict("records")):
        x = np.arange(len(groups)) + (place - (len(masks) - 1) / 2) * width
        bars = axis.bar(x, [row[column] for column in groups.values()], 0.92 * width, color=COLOURS[row["strategy"]])
        axis.bar_label(bars, [form.format(row[column]) for column in groups.values()], fontsize=8, padding=2)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_title(title, fontsize=10.5)
    axis.margins(y=0.12)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_yticks([])  # every bar says its value
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="x", length=0)


def _class_bars(axis: Any, classes: pd.DataFrame) -> None:
    """One bar a strategy, divided by the classes of its masked words; at the top all words there are."""
    table = classes.pivot(index="strategy", columns="class", values="share").fillna(0.0)
    rows = [name for name in ("all", *COLOURS) if name in table.index][::-1]
    left = np.zeros(len(rows))
    for kind, colour in zip(classes.attrs["order"], _CLASS_COLOURS, strict=True):
        if kind not in table:
            continue
        width = table.loc[rows, kind].to_numpy()
        bars = axis.barh(["all words" if row == "all" else row for row in rows], width, left=left, color=colour)
        axis.bar_label(bars, [f"{w:.0%}" if w > 0.035 else "" for w in width], label_type="center", fontsize=7.5)
        left += width
        bars.set_label(kind)
    axis.set_title("what the masked words are about", fontsize=10.5)
    axis.set_xlim(0, 1)
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=8, fontsize=8, frameon=False,
                columnspacing=1.0, handlelength=1.0)  # fmt: skip


_STYLE = """
.shown { display: flex; gap: 18px; align-items: flex-start; }
.shown img { border-radius: 8px; width: 76px; }
.shown h4 { color: var(--muted); font-size: 0.82rem; font-weight: 500; margin: 0; }
.shown p { line-height: 2.5; margin: 0 0 4px; max-width: none; }
.word { border-radius: 4px; padding: 1px 3px; background: rgba(228, 104, 42, var(--heat)); }
ruby { ruby-position: under; margin: 0 2px; }
.masked { outline: 2px solid var(--text); }
rt { font-size: 0.68em; padding-top: 3px; } rt.right { color: var(--hit); } rt.wrong { color: var(--miss); }
.charts-image { width: 100%; border-radius: 12px; }
"""


def captions_html(path: Path, title: str, chart: Path, masks: Table, captions: Sequence[ShownCaption]) -> None:
    """The page: the figures, the chart, and captions with words shaded by class attention and masked ones boxed."""
    about = (
        "Three ways of choosing the same number of words to mask, and how well the model fills them in. CE is its "
        "cross-entropy in nats a masked word while it looks at the person's own image, another person's, or none; "
        "CE other minus CE own is the image gain."
    )
    told = (
        "The stronger a word's shade, the more class attention it gets. Boxed words were masked; below each stands "
        "what the model filled in while it looked at the image, green where that is the word itself."
    )
    picture = base64.b64encode(chart.read_bytes()).decode("ascii")
    image = tag("img", src=f"data:image/png;base64,{picture}", alt="The same figures as bars", class_="charts-image")
    write_text(
        path,
        document(
            title,
            tag("style", Markup(_STYLE)),
            tag("h1", title),
            tag("p", about),
            table(*masks, "The strategies compared"),
            image,
            section("Captions", tag("p", told), *map(_sheet, captions)),
        ),
    )


def _sheet(shown: ShownCaption) -> Markup:
    lines = [join(tag("h4", strategy), tag("p", *_line(shown, guesses))) for strategy, guesses in shown.masked.items()]
    image = tag("img", src=thumbnail(shown.image), alt="", title=shown.image.name)
    return tag("div", image, tag("div", *lines), class_="sheet shown")


def _line(shown: ShownCaption, guesses: Mapping[int, Guess]) -> Iterator[str]:
    """The caption with every word shaded and the masked ones boxed over the model's guess."""
    strongest = max((word.attention for word in shown.words), default=0.0) or 1.0
    last = 0
    for number, word in enumerate(shown.words):
        yield shown.caption[last : word.start]
        guess = guesses.get(number)
        text = tag(
            "span",
            shown.caption[word.start : word.end],
            class_="word masked" if guess else "word",
            style=f"--heat: {0.75 * word.attention / strongest:.2f}",
            title=f"{word.attention:.1%} of the class attention",
        )
        yield tag("ruby", text, tag("rt", guess.text, class_="right" if guess.right else "wrong")) if guess else text
        last = word.end
    yield shown.caption[last:]


def ablation_png(path: Path, table: pd.DataFrame, by_seed: pd.DataFrame) -> None:
    """The rows of ablation.csv: R@1 and mAP of the arms with their intervals, every seed as a dot."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained", sharey=True)
    for axis, metric in zip(axes, ("R@1", "mAP"), strict=True):
        rows = table[(table["direction"] == "t2i") & (table["metric"] == metric)][::-1]
        for place, row in enumerate(rows.to_dict("records")):
            colour = COLOURS[row["arm"].partition("+")[0]]
            axis.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2.5, solid_capstyle="round")
            axis.plot(row["value"], place, "o", color=colour, markersize=8)
            axis.annotate(f"{row['value']:.1f}", (row["value"], place), (0, 7), textcoords="offset points",
                          ha="center", fontsize=8)  # fmt: skip
            seeds = by_seed[(by_seed["arm"] == row["arm"]) & (by_seed["metric"] == metric)]
            dots = seeds[seeds["direction"] == "t2i"]["value"]
            axis.plot(dots, [place - 0.25] * len(dots), "|", color="#333", markersize=7)
        axis.set_title(f"{metric}, text-to-image, percent", fontsize=10.5)
        axis.set_yticks(range(len(rows)), list(rows["arm"]))
        axis.set_ylim(-0.6, len(rows) - 0.3)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    figure.supxlabel("point and line: mean over seeds with its 95 % interval over queries; ticks: seeds", fontsize=8)
    save_figure(path, figure)
