"""What people read: CSV tables and PNG curves. Sees plain data only, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from agatool.files import atomic_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METRIC_COLUMNS = ("direction", "stage", "metric", "value", "low", "high")
METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")


def write_csv(path: Path, table: pd.DataFrame, decimals: int = 4) -> None:
    """Write a table atomically; floats with so many decimals, so that the same figures give the same bytes."""
    with atomic_file(path) as temporary:
        table.to_csv(temporary, index=False, float_format=f"%.{decimals}f", lineterminator="\n")


def metric_table(metrics: Sequence[Sequence[Any]]) -> pd.DataFrame:
    """Rows (direction, stage, metric, value, low, high), in percent, as the table that metrics.csv holds."""
    return pd.DataFrame([tuple(row) for row in metrics], columns=list(METRIC_COLUMNS))


def metric_rows(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The metrics for a terminal, (header, rows): a row a metric, a column a direction and stage."""
    cells = {(row.direction, row.stage, row.metric): _with_interval(row) for row in table.itertuples()}
    columns = list(dict.fromkeys((direction, stage) for direction, stage, _ in cells))
    rows = [[metric, *(cells[*column, metric] for column in columns)] for metric in METRICS]
    return ["", *(" ".join(column) for column in columns)], rows


def _with_interval(row: Any) -> str:
    return f"{row.value:.1f}" if math.isnan(row.low) else f"{row.value:.1f} [{row.low:.1f}-{row.high:.1f}]"


def curves_png(path: Path, log: pd.DataFrame, validation: pd.DataFrame) -> None:
    """Losses, accuracies and validation metrics over the steps, as one picture."""
    panels = {
        "loss": ["loss", "itc", "itm", "mlm"],
        "accuracy": ["itm_accuracy", "mlm_accuracy"],
        "learning rate": ["lr"],
    }
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (title, columns) in zip(axes.flat, panels.items(), strict=False):
        for column in columns:
            if log[column].notna().any():
                _smooth_line(axis, log["step"], log[column], column)
        axis.set(title=title, xlabel="step")
    for stage, part in validation.groupby("stage"):
        for metric, style in (("R@1", "-o"), ("mAP", "--s")):
            axes.flat[3].plot(part["step"], part[metric], style, markersize=4, label=f"{metric} {stage}")
    axes.flat[3].set(title="validation, text-to-image, percent", xlabel="step")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save_figure(path, figure)


def _smooth_line(axis: Any, steps: pd.Series, values: pd.Series, label: str) -> None:
    line = axis.plot(steps, values, alpha=0.25, linewidth=0.8)[0]
    window = max(1, len(values) // 50)
    axis.plot(steps, values.rolling(window, min_periods=1).mean(), color=line.get_color(), label=label)


def save_figure(path: Path, figure: Any, dpi: int = 110) -> None:
    """Write a figure atomically, without the metadata that would make the bytes differ from run to run."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, metadata={"Software": None} if path.suffix == ".png" else None)
    plt.close(figure)
