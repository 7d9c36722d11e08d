"""report.html of a run: one page made from nothing but the run's files and the gallery's images."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from agatool.charts import histogram, line_chart
from agatool.data.prepare import Prepared
from agatool.errors import DataError
from agatool.files import contained, write_text
from agatool.page import Markup, contents, document, join, section, table, tag, thumbnail
from agatool.report import chosen_step, curve_panels, metric_rows
from agatool.run_files import RunFiles, numbers, read_run, scores, texts

SHEETS = 6  # queries shown of each kind: worst, random, best
DIRECTIONS = {"t2i": "text to image", "i2t": "image to text"}
STAGES = {"cosine": "cosine", "reranked": "re-ranked"}
_RANKS = {"1": (1, 1), "2 to 5": (2, 5), "6 to 10": (6, 10), "11 to 50": (11, 50), "past 50": (51, math.inf)}
_FILES = (
    "metrics.csv", "queries.csv", "evaluation.json", "train_log.csv", "validation.csv", "curves.png", "config.toml",
    "best/README.md",
)  # fmt: skip


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page of the run or evaluation in `folder`, by default as its report.html -> where it is.

    The same files give the same bytes. Raises DataError for a folder that is no run, DiskError.
    """
    run, path = read_run(folder), out or folder / "report.html"
    parts = _evaluated(run) if run.record else {}
    panels = curve_panels(run.log, run.validation)
    if panels:
        parts["Curves"] = [tag("div", *map(line_chart, panels), class_="charts")]
    parts["Configuration"] = _configuration(run)
    parts["Files"] = [files_list([run], path.parent)]
    sections = [section(title, *body) for title, body in parts.items()]
    write_text(path, document(f"{run.name} - agatool report", _top(run, list(parts)), *sections))
    return path


def _top(run: RunFiles, titles: Sequence[str]) -> Markup:
    if not run.record:
        told = "This run has not been evaluated yet. aga train --resume finishes it, aga eval evaluates what it has."
        return join(tag("h1", run.name), tag("p", told, class_="note"), contents(titles))
    record = run.record
    heading = tag("h1", f"{run.name}: {record['dataset']}, {record['split']}")
    counts = ", ".join(f"{record['counts'].get(key, '?'):,} {key}" for key in ("persons", "images", "captions"))
    preset = f" Preset {run.config['preset']}." if "preset" in run.config else ""
    about = tag("p", f"{counts}.{preset} {_chosen(run)}", class_="muted")
    return join(heading, about, *_cautions(run), _cards(run.metrics), contents(titles))


def _chosen(run: RunFiles) -> str:
    """How the evaluated model was selected."""
    model, step = run.record["model"], chosen_step(run.validation)
    if model == "best":
        at = f" (step {step})" if step is not None else ""
        return f"Model: best/{at}, selected on val by R@1, then mAP, of the final stage; test selected nothing."
    if model == "last":
        return "Model: last/, the state at the end of the training, not the one selected on val."
    return f"Model: {model}; how it was selected is not recorded here."


def _cautions(run: RunFiles) -> list[Markup]:
    split = run.record["split"]
    if split == "test" or run.record["dataset"] != run.config.get("data.dataset"):
        return []
    why = "the model was selected on it" if split == "val" else "the model was trained on it"
    return [tag("p", f"These figures are of the {split} split. They flatter: {why}.", class_="note")]


# -- figures ------------------------------------------------------------------------------------------------------


def _cards(metrics: pd.DataFrame) -> Markup:
    """The figures to look at first: R@1 of each stage and mAP of the last, of the first direction."""
    rows = metrics[metrics["direction"] == metrics["direction"].iloc[0]]
    where = DIRECTIONS.get(rows["direction"].iloc[0], rows["direction"].iloc[0])
    first = rows[rows["metric"] == "R@1"]
    cards = [_card(f"R@1 {STAGES.get(row.stage, row.stage)}, {where}", row) for row in first.itertuples()]
    cards += [_card(f"{row.metric} {STAGES.get(row.stage, row.stage)}, {where}", row)
              for row in rows[rows["stage"] == rows["stage"].iloc[-1]].itertuples()
              if row.metric in ("mAP", "mINP")][: 4 - len(cards)]  # fmt: skip
    return tag("div", *cards, class_="cards")


def _card(name: str, row: Any) -> Markup:
    # Spaces that do not break: on a narrow card the figures stay together.
    span = "no interval" if math.isnan(row.low) else f"95\xa0% CI {row.low:.1f}\xa0to\xa0{row.high:.1f}"
    return tag(
        "div",
        tag("div", name, class_="name"),
        tag("div", f"{row.value:.1f}", tag("small", " %"), class_="big"),
        tag("div", span, class_="range"),
        class_="card",
    )


def _evaluated(run: RunFiles) -> dict[str, list[Markup]]:
    """The sections that an evaluation adds, in order: title -> contents."""
    parts: dict[str, list[Markup]] = {}
    queries = run.text_queries()
    if len(queries):
        parts |= _Sheets(run).sections(queries)
    header, rows = metric_rows(run.metrics)
    parts["Metrics"] = [table(["Percent", *header[1:]], rows, "Metrics with 95 % intervals"), *protocol(run.config)]
    if len(queries):
        charts = [
            histogram(title, groups)
            for title, column in (("Cosine", "top_cosine"), ("Log-odds of a match by ITM", "top_itm"))
            if sum(map(len, (groups := scores(queries, column)).values()))
        ]
        told = "Scores of the first ten of every text query: items of the person looked for, and of others."
        parts["Scores"] = [tag("p", told, class_="muted"), tag("div", *charts, class_="charts")]
    return parts


def protocol(config: dict[str, Any]) -> list[Markup]:
    """What the figures mean, in sentences: stages, the order past the candidates, intervals."""
    rerank, tail = config.get("eval.rerank", 0), config.get("eval.tail", "itc")
    if rerank:
        past = (
            "the rest stays in its cosine order (tail: itc)"
            if tail == "itc"
            else "the rest is one tie, settled by the order in which the images are listed (tail: reference, as "
            "published code does it), so mAP and mINP depend on that order"
        )
        posterior = config.get("eval.score", "itm") == "posterior"  # before there was a choice it was the logit
        by = "ITM's log-odds of a match plus cosine / temperature" if posterior else "the ITM logit"
        stages = f"cosine ranks the whole gallery; re-ranking sorts the top {rerank} by {by}, and {past}."
    else:
        stages = "cosine ranks the whole gallery; nothing was re-ranked."
    drawn = config.get("eval.bootstrap", 0)
    spans = f"In brackets: 95 % bootstrap intervals over queries ({drawn} resamples)." if drawn else "No intervals."
    relevant = "An item is right when it shows or describes the same person."
    return [tag("p", f"Protocol: {stages} {relevant} {spans}", class_="muted")]


# -- ranked sheets ------------------------------------------------------------------------------------------------


class _Sheets:
    """Queries with the head of their ranking; images that cannot be shown are named instead."""

    def __init__(self, run: RunFiles) -> None:
        self.prepared: Prepared | None = None
        self._thumbnails: dict[str, str | None] = {}
        try:
            self.prepared = run.prepared()
        except DataError:  # its message holds paths of this machine
            self.missing = tag(
                "p",
                "The gallery's images are not where they were when this was evaluated, or the data set has been "
                "prepared again since; file names stand in for them. aga report writes this page again.",
                class_="note",
            )

    def sections(self, queries: pd.DataFrame) -> dict[str, list[Markup]]:
        """Failures, random queries and the best ones."""
        failed = queries[queries["first_hit"] != 1]
        worst = _one_a_person(failed.sort_values("ap", kind="stable"))
        found = queries[queries["first_hit"] == 1]
        best = _one_a_person(found.sort_values("ap", ascending=False, kind="stable"))
        rest = queries.drop([*worst.index, *best.index])
        drawn = rest.iloc[np.random.default_rng(0).permutation(len(rest))[:SHEETS]].sort_values("ap", kind="stable")
        share = f"{len(failed):,} of {len(queries):,} queries ({100 * len(failed) / len(queries):.1f} %)"
        how = "Below are those of lowest average precision, one a person." if len(failed) else ""
        told = tag("p", f"{share} put another person first. {how}", class_="muted")
        notes = [] if self.prepared else [self.missing]
        parts = {
            "Failures": [*notes, told, _rank_bars(queries["first_hit"]), *map(self._sheet, _rows(worst))],
            "Random queries": [*map(self._sheet, _rows(drawn))],
            "Best queries": [*map(self._sheet, _rows(best))],
        }
        return {title: body for title, body in parts.items() if body}

    def _sheet(self, row: Any) -> Markup:
        rank = f"right person at rank {row.first_hit:.0f}" if row.first_hit > 0 else "the gallery lacks this person"
        facts = f"{rank} · average precision {100 * row.ap:.1f} % · {row.relevant:.0f} images of the person"
        paths, hits, cosine, itm = texts(row.top_paths), *map(numbers, (row.top_hits, row.top_cosine, row.top_itm))
        tiles = [self._wanted(int(row.query_id))]
        for place, (path, hit) in enumerate(zip(paths, hits, strict=False)):
            told = [f"{name} {values[place]:.{digits}f}" for name, values, digits in
                    (("cos", cosine, 3), ("ITM", itm, 2)) if place < len(values)]  # fmt: skip
            tiles.append(self._tile(path, bool(hit), place + 1, told))
        return tag(
            "article",
            tag("h3", f"“{row.query}”"),
            tag("p", facts, class_="facts"),
            tag("ul", *tiles, class_="tiles"),
            class_="sheet",
        )

    def _tile(self, path: str, hit: bool, rank: int, told: Sequence[str]) -> Markup:
        verdict = "right person" if hit else "another person"
        picture = self._picture(path, f"Rank {rank}, {verdict}, {', '.join(told)}")
        label = tag("b", f"{rank} ✓" if hit else f"{rank}")
        return tag("li", picture, label, *(tag("div", line) for line in told), class_="tile hit" if hit else "tile")

    def _wanted(self, caption_id: int) -> Markup:
        """The image that the caption was written for."""
        if self.prepared is None or not 0 <= caption_id < len(self.prepared.captions):
            return Markup()
        image = self.prepared.images.iloc[int(self.prepared.captions["image_id"].iloc[caption_id])]
        picture = self._picture(str(image["path"]), "The image that this text describes")
        return tag("li", picture, tag("b", "described"), class_="tile wanted")

    def _picture(self, path: str, told: str) -> Markup:
        if path not in self._thumbnails:
            self._thumbnails[path] = self._thumbnail(path)
        address = self._thumbnails[path]
        name = PurePosixPath(path).name
        shown = tag("img", src=address, alt=told) if address else tag("span", name)
        return tag("div", shown, class_="frame", title=name)

    def _thumbnail(self, path: str) -> str | None:
        if self.prepared is None:
            return None
        try:
            return thumbnail(contained(self.prepared.image_root, path))
        except DataError:
            return None


def _rows(queries: pd.DataFrame) -> list[Any]:
    return list(queries.itertuples())


def _one_a_person(queries: pd.DataFrame) -> pd.DataFrame:
    return queries.drop_duplicates("person_id").head(SHEETS)


def _rank_bars(first_hit: pd.Series) -> Markup:
    """At which rank the right person comes first, over all queries."""
    counts = {name: int(first_hit.between(low, high).sum()) for name, (low, high) in _RANKS.items()}
    counts["not there"] = int((first_hit < 1).sum())
    cells = []
    for name, count in counts.items():
        if count or name != "not there":
            share = 100 * count / len(first_hit)
            fill = tag("i", style=f"width:{share:.1f}%")
            bar = tag("div", fill, class_="bar first" if name == "1" else "bar", aria_hidden="true")
            cells += [tag("span", f"Rank {name}"), bar, tag("span", f"{count:,} ({share:.1f} %)")]
    heading = tag("h3", "Rank at which the right person comes first")
    return join(heading, tag("div", *cells, class_="bars"))


# -- configuration and files --------------------------------------------------------------------------------------


def _configuration(run: RunFiles) -> list[Markup]:
    parts = []
    if run.record:
        parts.append(_folded("Environment", {**run.record["environment"], "device": run.record["device"]}))
    return [*parts, _folded("Configuration keys", run.config)]


def _folded(title: str, values: dict[str, Any]) -> Markup:
    rows = [[key, shown(value)] for key, value in values.items()]
    grid = tag("div", table(["Key", "Value"], rows, title), class_="plain")
    return tag("details", tag("summary", title), grid)


def shown(value: Any) -> str:
    """A configuration value for people; of an absolute path only its end, for the page may be handed on."""
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    if text.startswith(("/", "~", "\\")) or PureWindowsPath(text).drive:
        return f"…/{PureWindowsPath(text).name}"
    return text


def files_list(runs: Sequence[RunFiles], base: Path) -> Markup:
    """Links to the files of the runs, relative to the page's folder `base`."""
    items = []
    for run in runs:
        there = [name for name in _FILES if (run.folder / name).is_file()]
        links = [tag("a", name, href=_link(run.folder / name, base)) for name in there]
        items.append(tag("div", *([tag("b", run.name)] if len(runs) > 1 else []), *links, class_="links"))
    return join(*items)


def _link(path: Path, base: Path) -> str:
    relative = Path(os.path.relpath(path.resolve(), base.resolve())).as_posix()
    return quote(relative if "/" in relative else f"./{relative}")
