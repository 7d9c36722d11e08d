"""`aga report RUN RUN ...`: runs side by side, with paired tests over the queries they share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from agatool.charts import line_chart
from agatool.errors import UsageError
from agatool.files import write_text
from agatool.html_report import DIRECTIONS, STAGES, files_list, protocol, shown, write_report
from agatool.metrics import paired_test
from agatool.page import Markup, contents, document, join, section, table, tag
from agatool.report import METRICS, Panel, final_stage, series, with_interval
from agatool.run_files import RunFiles, read_run

SIGNIFICANT = 0.05


class Comparison(NamedTuple):
    """How much higher run `second` is than run `first` over the queries that both have; docs/report.md."""

    direction: str
    metric: str
    first: str
    second: str
    queries: int
    difference: float  # percentage points, as low and high
    low: float
    high: float
    p: float
    better: int  # queries that `second` does better
    worse: int


class Report(NamedTuple):
    """What `aga report` wrote."""

    path: Path
    comparisons: list[Comparison]  # each run with the first one
    unpaired: str  # why there are none; empty where there are


def report(folders: Sequence[Path], out: Path | None = None) -> Report:
    """One run: its page again. Several: a page that sets them side by side, by default ./report.html.

    Raises UsageError for a run given twice, DataError for a folder that is no run, DiskError.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("A run is given twice", "Give every run once: aga report runs/a runs/b")
    if out is not None and out.is_dir():
        raise UsageError(f"{out} is a folder", f"Give a file: --out {out / 'report.html'}")
    if len(folders) == 1:
        return Report(write_report(folders[0], out), [], "")
    runs = _named_apart([read_run(folder) for folder in folders])
    path = out or Path("report.html")
    unpaired = _why_unpaired(runs)
    comparisons = [] if unpaired else [row for run in runs[1:] for row in compare(runs[0], run)]
    write_text(path, _page(runs, comparisons, unpaired, path))
    return Report(path, comparisons, unpaired)


def _named_apart(runs: list[RunFiles]) -> list[RunFiles]:
    """Runs of the same folder name take their parent's name along; where even that is the same, a number."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.folder.resolve().parent.name}/{run.name}" for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({place + 1})" for place, name in enumerate(names)]
    return [_renamed(run, name) for run, name in zip(runs, names, strict=True)]


def _renamed(run: RunFiles, name: str) -> RunFiles:
    return RunFiles(**{**vars(run), "name": name})


def _why_unpaired(runs: Sequence[RunFiles]) -> str:
    """Why the runs' queries cannot be matched; empty where they can."""
    missing = [run.name for run in runs if not run.record]
    if missing:
        return f"Not evaluated yet: {', '.join(missing)}."
    seen = {(run.record["dataset"], run.record["split"]) for run in runs}
    if len(seen) > 1:
        told = ", ".join(f"{dataset} {split}" for dataset, split in sorted(seen))
        return f"The runs were evaluated on different data ({told})."
    if any(run.record["files"] != runs[0].record["files"] for run in runs):
        return "The runs were evaluated on differently prepared versions of the data set."
    return ""


def compare(first: RunFiles, second: RunFiles) -> list[Comparison]:
    """Paired tests of R@1 and AP in each direction that both runs have, over queries matched by query_id."""
    rows = []
    for direction in DIRECTIONS:
        a, b = (run.queries[run.queries["direction"] == direction] for run in (first, second))
        both = a.merge(b, on="query_id", suffixes=("_a", "_b"))
        if both.empty:
            continue
        hits = [(both[f"first_hit_{side}"] == 1).to_numpy(float) for side in "ab"]
        precisions = [both[f"ap_{side}"].to_numpy(float) for side in "ab"]
        for metric, (left, right) in {"R@1": hits, "mAP": precisions}.items():
            test = paired_test(100 * left, 100 * right)
            counts = int((right > left).sum()), int((left > right).sum())
            rows.append(Comparison(direction, metric, first.name, second.name, len(both), *test, *counts))
    return rows


def _page(runs: Sequence[RunFiles], comparisons: Sequence[Comparison], unpaired: str, path: Path) -> str:
    parts: dict[str, list[Markup]] = {
        "Metrics": _metrics(runs),
        "Paired tests": _paired(comparisons, unpaired),
        "Curves": _curves(runs),
        "What differs": _differences(runs),
        "Files": [files_list(runs, path.parent)],
    }
    parts = {title: body for title, body in parts.items() if body}
    names = " · ".join(run.name for run in runs)
    top = join(tag("h1", f"{len(runs)} runs side by side"), tag("p", names, class_="muted"), contents(list(parts)))
    return document(f"{names} - agatool report", top, *(section(title, *body) for title, body in parts.items()))


def _metrics(runs: Sequence[RunFiles]) -> list[Markup]:
    tables = []
    for direction, told in DIRECTIONS.items():
        header, rows = [told.capitalize()], []
        for run in runs:
            if run.metrics.empty:
                continue
            part = run.metrics[run.metrics["direction"] == direction]
            for stage, figures in part.groupby("stage", sort=False):
                cells = {row.metric: with_interval(row) for row in figures.itertuples()}
                rows.append([f"{run.name}, {STAGES.get(stage, stage)}", *(cells.get(name, "") for name in METRICS)])
        if rows:
            tables.append(table([*header, *METRICS], rows, f"Metrics, {told}, percent with 95 % intervals"))
    evaluated = [run for run in runs if run.record]
    on = {f"{run.name}: {run.record['dataset']} {run.record['split']}, {run.record['model']}" for run in evaluated}
    notes = [tag("p", f"Evaluated: {'; '.join(sorted(on))}.", class_="muted")] if on else []
    protocols = {tuple(run.config.get(f"eval.{key}") for key in ("rerank", "score", "tail")) for run in evaluated}
    return tables + notes + (protocol(evaluated[0].config) if len(protocols) == 1 else [])


def comparison_rows(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """The tests for people, (header, rows); the last column is the verdict."""
    header = ["", "Difference", "95 % interval", "p", "Queries better", "Worse", "Verdict"]
    rows = [
        [
            f"{row.second} − {row.first}, {row.metric}, {DIRECTIONS[row.direction]}",
            f"{row.difference:+.2f}",
            f"{row.low:+.2f} to {row.high:+.2f}",
            "< 0.001" if row.p < 0.001 else f"{row.p:.3f}",
            f"{row.better:,}",
            f"{row.worse:,}",
            "no clear difference" if row.p >= SIGNIFICANT else "better" if row.difference > 0 else "worse",
        ]
        for row in comparisons
    ]
    return header, rows


def _paired(comparisons: Sequence[Comparison], unpaired: str) -> list[Markup]:
    if unpaired:
        return [tag("p", f"{unpaired} So there is nothing to pair.", class_="note")]
    if not comparisons:
        return [tag("p", "The runs share no query.", class_="note")]
    header, rows = comparison_rows(comparisons)
    told = (
        "Percentage points over the queries that both runs have, each run against the first, in the last stage that "
        "each of them ran. p is that of a sign-flip test, two-sided, not corrected for the number of tests; it does "
        "not cover training again with another seed."
    )
    coloured = [[*cells, tag("span", verdict, class_=verdict.partition(" ")[0])] for *cells, verdict in rows]
    return [table(header, coloured, "Paired tests"), tag("p", told, class_="muted")]


def _curves(runs: Sequence[RunFiles]) -> list[Markup]:
    finals = {run.name: final_stage(run.validation) for run in runs}
    panels = [
        Panel(f"Validation {metric}, text to image, final stage, percent",
              [series(rows, metric, name) for name, rows in finals.items()])
        for metric in ("R@1", "mAP")
    ]  # fmt: skip
    with_loss = [run for run in runs if "loss" in run.log]
    panels.append(Panel("Training loss, total", [series(run.log, "loss", run.name, noisy=True) for run in with_loss]))
    kept = [panel._replace(series=[line for line in panel.series if line.steps]) for panel in panels]
    charts = [line_chart(panel) for panel in kept if panel.series]
    return [tag("div", *charts, class_="charts")] if charts else []


def _differences(runs: Sequence[RunFiles]) -> list[Markup]:
    """The configuration keys, and facts of the evaluation, in which the runs differ."""
    facts = [_facts(run) for run in runs]
    keys = list(dict.fromkeys(key for fact in facts for key in fact))
    differing = [key for key in keys if len({fact.get(key, "not set") for fact in facts}) > 1]
    if not differing:
        return [tag("p", "The runs have the same configuration.", class_="muted")]
    rows = [[key, *(fact.get(key, "not set") for fact in facts)] for key in differing]
    return [table(["Key", *(run.name for run in runs)], rows, "Configuration keys that differ")]


def _facts(run: RunFiles) -> dict[str, str]:
    record = run.record
    told = {key: record.get(key, "none") for key in ("dataset", "split", "model", "device")}
    versions = {f"environment.{key}": value for key, value in record.get("environment", {}).items()}
    return {key: shown(value) for key, value in {**run.config, **told, **versions}.items()}
