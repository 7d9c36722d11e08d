"""What people read: CSV tables, what was evaluated, and training curves as PNG. Sees plain data only, no torch."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pandas as pd

from agatool import __version__
from agatool.files import atomic_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

METRIC_COLUMNS = ("direction", "stage", "metric", "value", "low", "high")
METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")
PACKAGES = ("torch", "timm", "transformers", "numpy")
EVALUATION_FORMAT = 1
LARGEST_DRAWN = 1e30  # charts leave out what is larger, or no number
_SAME_DATA = ("images.csv", "captions.csv")  # tables whose hashes say that two evaluations saw the same data


def write_csv(path: Path, table: pd.DataFrame, decimals: int = 4) -> None:
    """Write a table atomically; floats with so many decimals, so that the same figures give the same bytes."""
    with atomic_file(path) as temporary:
        table.to_csv(temporary, index=False, float_format=f"%.{decimals}f", lineterminator="\n")


def metric_table(metrics: Sequence[Sequence[Any]]) -> pd.DataFrame:
    """Rows (direction, stage, metric, value, low, high), in percent, as the table that metrics.csv holds."""
    return pd.DataFrame([tuple(row) for row in metrics], columns=list(METRIC_COLUMNS))


def metric_rows(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The metrics for people, (header, rows): a row a metric, a column a direction and stage."""
    cells = {(row.direction, row.stage, row.metric): with_interval(row) for row in table.itertuples()}
    columns = list(dict.fromkeys((direction, stage) for direction, stage, _ in cells))
    rows = [[metric, *(cells.get((*column, metric), "") for column in columns)] for metric in METRICS]
    return ["", *(" ".join(column) for column in columns)], rows


def with_interval(row: Any) -> str:
    """A figure with fields value, low and high: `61.3 [59.8-62.7]`, without the bracket where there is no interval."""
    return f"{row.value:.1f}" if math.isnan(row.low) else f"{row.value:.1f} [{row.low:.1f}-{row.high:.1f}]"


# -- what was evaluated -------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Versions and kind of system, enough to reproduce a figure; nothing that names the machine."""
    found = {"agatool": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["platform"] = " ".join(part for part in (platform.system(), platform.machine(), *platform.libc_ver()) if part)
    return found


def evaluation_record(
    out: Path, data: Path, info: dict[str, Any], split: str, model: str, device: str, config: dict[str, Any]
) -> dict[str, Any]:
    """evaluation.json: what the CSVs in `out` were made from. `data` is stored relative to `out`: both can move.

    `info` is the dataset.json of the prepared folder `data`, `model` the model folder's name, and `config` the run's
    configuration as nested tables, its `eval` as it was used.
    """
    return {
        "format": EVALUATION_FORMAT,
        "dataset": info["name"],
        "split": split,
        "data": Path(os.path.relpath(data.resolve(), out.resolve())).as_posix(),
        "files": {name: info["files"][name] for name in _SAME_DATA},
        "counts": info["counts"][split],
        "model": model,
        "device": device,
        "environment": environment(),
        "config": config,
    }


# -- curves -------------------------------------------------------------------------------------------------------


class Series(NamedTuple):
    """One line over the training steps."""

    label: str
    steps: list[float]
    values: list[float]
    noisy: bool  # one value a step: draw its moving average


class Panel(NamedTuple):
    """The lines that share a pair of axes."""

    title: str
    series: list[Series]
    marked: int | None = None  # a step to point at: the chosen epoch


_LOG_PANELS = {
    "Training loss": {"loss": "total", "itc": "ITC", "itm": "ITM", "mlm": "MLM"},
    "Training accuracy": {"itm_accuracy": "ITM", "mlm_accuracy": "MLM"},
    "Words masked and enriched, share": {"masked_ratio": "masked", "tem_replaced": "enriched"},
    "Gradient norm": {"gradient_norm": "before clipping"},
    "Learning rate": {"lr": "largest group"},
}


def series(table: pd.DataFrame, column: str, label: str, noisy: bool = False) -> Series:
    """A column of a log over its steps, without the gaps."""
    known = table[["step", column]].astype(float)
    known = known[(known.abs() < LARGEST_DRAWN).all(axis=1)]
    return Series(label, known["step"].tolist(), known[column].tolist(), noisy)


def final_stage(validation: pd.DataFrame) -> pd.DataFrame:
    """The rows of the stage that models are chosen by."""
    return validation[validation["stage"] == validation["stage"].iloc[-1]] if len(validation) else validation


def chosen_step(validation: pd.DataFrame) -> int | None:
    """The step whose model became best/: R@1, then mAP, of the final stage on val; the first of equals."""
    ranked = final_stage(validation).sort_values(["R@1", "mAP"], ascending=False, kind="stable")
    return int(ranked["step"].iloc[0]) if len(ranked) else None


def curve_panels(log: pd.DataFrame, validation: pd.DataFrame) -> list[Panel]:
    """What train_log.csv and validation.csv show over the steps; panels without data are left out."""
    metrics = [
        series(part, metric, f"{metric} {stage}")
        for stage, part in validation.groupby("stage", sort=False)
        for metric in ("R@1", "mAP")
    ]
    panels = [Panel("Validation, text to image, percent", metrics, chosen_step(validation))]
    for title, columns in _LOG_PANELS.items():
        lines = [series(log, column, label, noisy=True) for column, label in columns.items() if column in log]
        panels.append(Panel(title, lines))
    kept = [panel._replace(series=[line for line in panel.series if line.steps]) for panel in panels]
    return [panel for panel in kept if panel.series]


def smoothed(values: Sequence[float]) -> list[float]:
    """The moving average over a fiftieth of the run."""
    return pd.Series(values).rolling(max(1, len(values) // 50), min_periods=1).mean().tolist()


def curves_png(path: Path, log: pd.DataFrame, validation: pd.DataFrame) -> None:
    """The curves of a run as one picture; none is written where there is nothing to draw."""
    panels = curve_panels(log, validation)
    if not panels:
        return
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.6 * rows), layout="constrained", squeeze=False)
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw(axis, panel)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    save_figure(path, figure)


def _draw(axis: Any, panel: Panel) -> None:
    for line in panel.series:
        if line.noisy:
            (raw,) = axis.plot(line.steps, line.values, alpha=0.25, linewidth=0.8)
            axis.plot(line.steps, smoothed(line.values), color=raw.get_color(), linewidth=1.6, label=line.label)
        else:
            axis.plot(line.steps, line.values, marker="o", markersize=3.5, linewidth=1.6, label=line.label)
    if panel.marked is not None:
        axis.axvline(panel.marked, color="0.35", linewidth=1, linestyle=":", label=f"chosen: step {panel.marked}")
    axis.set_title(panel.title, fontsize=10, loc="left", fontweight="bold")
    axis.set_xlabel("step", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.set_xlim(0, max(max(line.steps) for line in panel.series) * 1.02)  # all panels of a run begin at its start
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)


def save_figure(path: Path, figure: Any, dpi: int = 110) -> None:
    """Write a figure (PNG, PDF, SVG) atomically, without what would make the bytes differ from run to run."""
    dated = {".png": "Software", ".pdf": "CreationDate", ".svg": "Date"}
    with atomic_file(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "agatool"}):
        figure.savefig(temporary, dpi=dpi, metadata={dated[path.suffix]: None})
    plt.close(figure)
