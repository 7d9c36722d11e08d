"""`aga compare-masks --train`: train every way of masking alike, and test each against random masking.

Shape suffixes: R seeds, Q queries.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from agatool import console
from agatool.config import RunConfig, build_config, read_toml, to_toml
from agatool.data.prepare import Prepared
from agatool.errors import DataError, StoppedError, UsageError
from agatool.files import write_text
from agatool.mask_figures import ablation_png
from agatool.masking import Strategy
from agatool.metrics import METRICS, QueryMetrics, bootstrap_interval, paired_test
from agatool.report import write_csv
from agatool.run_files import read_run
from agatool.train import run

RESAMPLES = 2000


class Arm(NamedTuple):
    """One way of training."""

    strategy: Strategy
    tem: bool

    @property
    def name(self) -> str:
        """As tables and folders call it."""
        return f"{self.strategy}+tem" if self.tem else self.strategy


BASELINE = Arm("random", False)
ARMS = (BASELINE, Arm("content", False), Arm("attention", False), Arm("attention", True), Arm("random", True))


def find_arms(names: str) -> tuple[Arm, ...]:
    """The arms of a list with commas, the baseline always among them and first. UsageError for an unknown name."""
    wanted = {name.strip() for name in names.split(",")}
    if unknown := wanted - {arm.name for arm in ARMS}:
        raise UsageError(f"--arms {sorted(unknown)[0]!r}", f"Choose among {', '.join(arm.name for arm in ARMS)}.")
    return tuple(arm for arm in ARMS if arm == BASELINE or arm.name in wanted)


def run_ablation(
    base: RunConfig, prepared: Prepared, out: Path, seeds: int, arms: tuple[Arm, ...] = ARMS
) -> pd.DataFrame:
    """Train what is not trained yet, write ablation.csv, ablation_seeds.csv and ablation.png -> ablation.csv's table.

    Raises what `agatool.train.run` raises, UsageError for arms in `out` that were trained otherwise.
    """
    train_arms(base, prepared, out, seeds, arms)
    values = read_arms(out, seeds, arms)
    table, by_seed = ablation_table(values), seed_table(values)
    write_csv(out / "ablation.csv", table)
    write_csv(out / "ablation_seeds.csv", by_seed)
    ablation_png(out / "ablation.png", table, by_seed)
    return table


# --- training -----------------------------------------------------------------------------------------------


def arm_folder(out: Path, arm: Arm, seed: int) -> Path:
    """The run folder of an arm."""
    return out / "arms" / f"{arm.name}-seed{seed}"


def arm_config(base: RunConfig, arm: Arm, seed: int) -> RunConfig:
    """`base` with the arm's masking and TEM, and the seed; nothing else differs between arms."""
    return base.model_copy(
        update={
            "masking": base.masking.model_copy(update={"strategy": arm.strategy}),
            "tem": base.tem.model_copy(update={"enabled": arm.tem}),
            "train": base.train.model_copy(update={"seed": seed}),
        }
    )


def train_arms(base: RunConfig, prepared: Prepared, out: Path, seeds: int, arms: tuple[Arm, ...] = ARMS) -> None:
    """Train and evaluate the arms; a finished one is left alone, an interrupted one resumes.

    Goes seed by seed, so that what there is after a while can be compared. Raises UsageError where `out` holds arms
    of another configuration, StoppedError when asked to stop.
    """
    _claim(out, base)
    jobs = [(arm, seed) for seed in range(seeds) for arm in arms]
    for number, (arm, seed) in enumerate(jobs, 1):
        folder = arm_folder(out, arm, seed)
        stored = folder / "config.toml"
        if stored.is_file() and read_run(folder).record:
            console.info(f"{folder.name}: finished already")
            continue
        console.info(f"{folder.name}: arm {number} of {len(jobs)}")
        resume = stored.is_file()
        config = build_config(read_toml(stored)) if resume else arm_config(base, arm, seed)
        try:
            run(config, prepared, folder, resume)
        except StoppedError as error:
            hint = "The same command again goes on from here."
            raise StoppedError(error.message, hint, error.exit_code) from error


def _claim(out: Path, base: RunConfig) -> None:
    """Note what the arms are trained from; UsageError if those in `out` were trained from something else.

    Their own config.toml does not tell: a run stores the sizes of the model that it started from.
    """
    note = out / "ablation.toml"
    if not note.is_file():
        write_text(note, to_toml(base))
    elif read_toml(note) != tomllib.loads(to_toml(base)):
        raise UsageError(
            f"The arms in {out} were trained with another configuration",
            "Give the same options as then, or another --out.",
        )


# --- comparing ----------------------------------------------------------------------------------------------


class Values(NamedTuple):
    """Per-query values in percent of one metric and arm."""

    direction: str
    stage: str
    metric: str
    arm: str
    per_query: np.ndarray  # [R, Q]


def read_arms(out: Path, seeds: int, arms: tuple[Arm, ...] = ARMS) -> list[Values]:
    """Every metric of every arm, query by query, in the same order. Raises DataError where the queries differ."""
    found: list[Values] = []
    asked: dict[str, list[int]] = {}
    for arm in arms:
        runs = [read_run(arm_folder(out, arm, seed)).queries for seed in range(seeds)]
        for direction in runs[0]["direction"].unique():
            parts = [queries[queries["direction"] == direction] for queries in runs]
            ids = [part["query_id"].tolist() for part in parts]
            if any(asked.setdefault(direction, ids[0]) != of_run for of_run in ids):
                raise DataError(f"The arms in {out} were evaluated on different queries", "Use another --out.")
            scored = [_query_metrics(part).values() for part in parts]
            stage = str(parts[0]["stage"].iloc[0])
            for metric in METRICS:
                stacked = 100 * np.stack([values[metric] for values in scored])
                found.append(Values(direction, stage, metric, arm.name, stacked))
    return found


def _query_metrics(queries: pd.DataFrame) -> QueryMetrics:
    relevant, first_hit = (queries[column].to_numpy(np.int64) for column in ("relevant", "first_hit"))
    return QueryMetrics(relevant, first_hit, queries["ap"].to_numpy(float), queries["inp"].to_numpy(float))


def ablation_table(values: list[Values]) -> pd.DataFrame:
    """ablation.csv: the arms' metrics in percent over all seeds, and how far they lie above random masking.

    The values of a query are averaged over the seeds; interval and test are over queries, so neither knows of
    the spread between seeds: `seed_sd` (NaN for one seed) and ablation_seeds.csv show that.
    """
    baseline = {(v.direction, v.metric): v.per_query.mean(0) for v in values if v.arm == BASELINE.name}
    rows = []
    for value in values:
        mean_Q = value.per_query.mean(0)
        low, high = bootstrap_interval(mean_Q, RESAMPLES)
        seeds = len(value.per_query)
        spread = value.per_query.mean(1).std(ddof=1) if seeds > 1 else np.nan
        test = paired_test(baseline[value.direction, value.metric], mean_Q, RESAMPLES)
        rows.append((*value[:4], seeds, mean_Q.mean(), float(low), float(high), spread, *test))
    columns = ["direction", "stage", "metric", "arm", "seeds", "value", "low", "high", "seed_sd"]
    return pd.DataFrame(rows, columns=[*columns, "difference", "difference_low", "difference_high", "p"])


def seed_table(values: list[Values]) -> pd.DataFrame:
    """ablation_seeds.csv: direction, stage, metric, arm, seed, value in percent."""
    rows = [(*value[:4], seed, mean) for value in values for seed, mean in enumerate(value.per_query.mean(1))]
    return pd.DataFrame(rows, columns=["direction", "stage", "metric", "arm", "seed", "value"])


def ablation_rows(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Text-to-image for a terminal: header and rows, R@1 and mAP with the difference from random masking."""
    part = table[(table["direction"] == "t2i") & table["metric"].isin(["R@1", "mAP"])]
    rows = []
    for arm, figures in part.groupby("arm", sort=False):
        cells = [str(arm)]
        for figure in figures.to_dict("records"):
            cells.append(f"{figure['value']:.1f} [{figure['low']:.1f}-{figure['high']:.1f}]")
            differs = f"{figure['difference']:+.1f} (p {figure['p']:.3f})"
            cells.append("" if arm == BASELINE.name else differs)
        rows.append(cells)
    return ["masking", "R@1", "to random", "mAP", "to random"], rows
