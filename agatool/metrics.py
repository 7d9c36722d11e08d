"""Retrieval metrics as pure functions of rankings, with intervals over queries and a paired test of two runs.

Shape suffixes: Q queries, G gallery items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

CUTOFFS = (1, 5, 10)
METRICS = (*(f"R@{cutoff}" for cutoff in CUTOFFS), "mAP", "mINP")
CONFIDENCE = 0.95
_BATCH_VALUES = 4_000_000  # resampled values held at once: 32 MB


@dataclass(frozen=True)
class QueryMetrics:
    """What each query scored, all [Q]; zero everywhere for a query without a relevant gallery item."""

    relevant: np.ndarray  # int64: relevant items in the gallery
    first_hit: np.ndarray  # int64: rank of the first relevant item, from 1; 0 where there is none
    ap: np.ndarray  # float64 in 0..1: average precision
    inp: np.ndarray  # float64 in 0..1: inverse negative penalty

    def values(self) -> dict[str, np.ndarray]:
        """Per-query values in 0..1 under each name of METRICS; the means over queries are the metrics."""
        first_hit = np.where(self.first_hit > 0, self.first_hit, np.iinfo(np.int64).max)
        recall = {f"R@{cutoff}": (first_hit <= cutoff).astype(float) for cutoff in CUTOFFS}
        return {**recall, "mAP": self.ap, "mINP": self.inp}


def rank_metrics(ranking_QG: np.ndarray, query_ids_Q: np.ndarray, gallery_ids_G: np.ndarray) -> QueryMetrics:
    """Score complete rankings: `ranking_QG` holds gallery indices, best first; the query's id is relevant.

    AP is the mean over relevant items of the precision at their rank, without interpolation (Zheng et
    al. 2015). INP is the number of relevant items over the rank of the last one (Ye et al. 2021, "Deep
    learning for person re-identification: a survey and outlook"). A query without a relevant item counts
    as zero: leaving it out would let a gallery raise the figure by what it lacks. Raises ValueError where
    a ranking does not cover the gallery.
    """
    queries = len(query_ids_Q)
    if ranking_QG.shape != (queries, len(gallery_ids_G)):
        raise ValueError(f"Rankings {ranking_QG.shape}, {queries} queries, {len(gallery_ids_G)} items")
    # Every hit, query by query and in rank order, so that ragged numbers of relevant items need no padding.
    row, column = np.nonzero(gallery_ids_G[ranking_QG] == query_ids_Q[:, None])
    rank = column + 1
    relevant = np.bincount(row, minlength=queries)
    end = np.cumsum(relevant)
    start = end - relevant
    precision = (np.arange(len(row)) - start[row] + 1) / rank
    found = relevant > 0
    first_hit, inp = np.zeros(queries, dtype=np.int64), np.zeros(queries)
    first_hit[found] = rank[start[found]]
    inp[found] = relevant[found] / rank[end[found] - 1]
    ap = np.bincount(row, weights=precision, minlength=queries) / np.maximum(relevant, 1)
    return QueryMetrics(relevant, first_hit, ap, inp)


def join_metrics(parts: Sequence[QueryMetrics]) -> QueryMetrics:
    """The queries of several chunks, one after the other."""
    names = ("relevant", "first_hit", "ap", "inp")
    return QueryMetrics(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class Figure(NamedTuple):
    """One metric in percent with its interval (NaN where no resamples were asked for)."""

    metric: str
    value: float
    low: float
    high: float


def summarise(metrics: QueryMetrics, resamples: int, seed: int = 0) -> list[Figure]:
    """The METRICS in percent, each with its bootstrap interval over the same resampled queries."""
    values = metrics.values()
    stacked = 100 * np.stack([values[name] for name in METRICS])
    low, high = bootstrap_interval(stacked, resamples, seed)
    columns = zip(METRICS, stacked.mean(-1), low, high, strict=True)
    return [Figure(name, float(mean), float(a), float(b)) for name, mean, a, b in columns]


def bootstrap_interval(values: np.ndarray, resamples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile bootstrap interval (Efron 1979) of the mean over the last axis, [..., Q] -> low, high.

    Rows share their resampled queries. NaN without resamples; a single query gives an interval of no
    width. Queries are drawn on their own although those of one person resemble each other, so the
    interval is on the narrow side.
    """
    if resamples == 0:
        unknown = np.full(values.shape[:-1], np.nan)
        return unknown, unknown
    if values.shape[-1] < 2:
        return values.mean(-1), values.mean(-1)
    interval = stats.bootstrap(
        (values,),
        np.mean,
        axis=-1,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _BATCH_VALUES // values.size),
        method="percentile",
        confidence_level=CONFIDENCE,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return interval.low, interval.high


class PairedTest(NamedTuple):
    """How much higher run b is than run a over the same queries."""

    difference: float  # mean of b - a, in the unit of the values
    low: float
    high: float
    p: float  # two-sided


def paired_test(a_Q: np.ndarray, b_Q: np.ndarray, resamples: int = 2000, seed: int = 0) -> PairedTest:
    """Compare two runs' per-query values of one metric, query by query.

    The interval is the bootstrap of the mean difference. `p` is the share of random sign flips of the
    differences whose mean is at least as far from zero (Fisher's randomisation test, exact for few
    queries). Raises ValueError where the runs do not have the same number of queries.
    """
    if a_Q.shape != b_Q.shape or a_Q.ndim != 1 or len(a_Q) == 0:
        raise ValueError(f"Runs over {a_Q.shape} and {b_Q.shape} queries cannot be paired")
    difference_Q = b_Q - a_Q
    low, high = bootstrap_interval(difference_Q, resamples, seed)
    p = _sign_flip_p(difference_Q, resamples, seed)
    return PairedTest(float(difference_Q.mean()), float(low), float(high), p)


def _sign_flip_p(difference_Q: np.ndarray, resamples: int, seed: int) -> float:
    moved = difference_Q[difference_Q != 0]  # flipping the sign of zero changes nothing
    if len(moved) < 2:
        return 1.0  # one difference is as likely in either direction
    test = stats.permutation_test(
        (moved,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _BATCH_VALUES // len(moved)),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)
