"""Metrics against brute-force oracles; intervals and the paired test against known answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from agatool.metrics import (
    CUTOFFS,
    METRICS,
    bootstrap_interval,
    join_metrics,
    paired_test,
    rank_metrics,
    summarise,
)


def oracle(ranking: list[int], person: int, gallery: list[int]) -> dict[str, float]:
    """The definitions of docs/evaluation.md, one query at a time, as plainly as can be."""
    ranks = [rank for rank, item in enumerate(ranking, 1) if gallery[item] == person]
    found = {f"R@{cutoff}": float(any(rank <= cutoff for rank in ranks)) for cutoff in CUTOFFS}
    if not ranks:
        return {**found, "mAP": 0.0, "mINP": 0.0}
    precisions = [sum(other <= rank for other in ranks) / rank for rank in ranks]
    return {**found, "mAP": sum(precisions) / len(ranks), "mINP": len(ranks) / ranks[-1]}


@st.composite
def retrieval_cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rankings of small galleries, from 1 item on, over few people, so that many queries match none or several."""
    gallery = draw(st.lists(st.integers(0, 4), min_size=1, max_size=25))
    queries = draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    rankings = [draw(st.permutations(range(len(gallery)))) for _ in queries]
    return np.array(rankings), np.array(queries), np.array(gallery)


@given(retrieval_cases())
@settings(deadline=None)
def test_metrics_equal_the_oracle(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    rankings, queries, gallery = case
    scored = rank_metrics(rankings, queries, gallery)
    for row, (ranking, person) in enumerate(zip(rankings, queries, strict=True)):
        expected = oracle(ranking.tolist(), int(person), gallery.tolist())
        actual = {name: value[row] for name, value in scored.values().items()}
        assert actual == pytest.approx(expected)
        assert scored.relevant[row] == (gallery == person).sum()
    means = [100 * np.mean([oracle(r.tolist(), int(p), gallery.tolist())[name]
                            for r, p in zip(rankings, queries, strict=True)]) for name in METRICS]  # fmt: skip
    assert [figure.value for figure in summarise(scored, 0)] == pytest.approx(means)


def test_a_worked_example() -> None:
    ranking, gallery = np.array([[2, 0, 1, 3]]), np.array([7, 9, 9, 7])
    scored = rank_metrics(ranking, np.array([7]), gallery)  # hits at ranks 2 and 4
    assert scored.first_hit.tolist() == [2]
    assert scored.ap.tolist() == [(1 / 2 + 2 / 4) / 2]
    assert scored.inp.tolist() == [2 / 4]
    assert [scored.values()[name][0] for name in METRICS[:3]] == [0, 1, 1]


def test_a_query_without_a_match_counts_as_zero() -> None:
    scored = rank_metrics(np.array([[0, 1], [0, 1]]), np.array([5, 8]), np.array([5, 6]))
    assert scored.relevant.tolist() == [1, 0]
    assert scored.first_hit.tolist() == [1, 0]
    assert {figure.metric: figure.value for figure in summarise(scored, 0)} == dict.fromkeys(METRICS, 50.0)


def test_person_ids_may_be_text() -> None:
    ids = np.array(["a", "b"], dtype=object)
    assert rank_metrics(np.array([[1, 0], [1, 0]]), ids, ids).first_hit.tolist() == [2, 1]


def test_rankings_must_be_complete() -> None:
    with pytest.raises(ValueError, match="2 items"):
        rank_metrics(np.array([[0]]), np.array([1]), np.array([1, 2]))


@given(retrieval_cases(), st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_chunks_join_to_the_whole(case: tuple[np.ndarray, np.ndarray, np.ndarray], cut: int) -> None:
    rankings, queries, gallery = case
    parts = [rank_metrics(rankings[rows], queries[rows], gallery) for rows in (slice(cut), slice(cut, None))]
    whole, joined = rank_metrics(rankings, queries, gallery), join_metrics(parts)
    for name, values in whole.values().items():
        np.testing.assert_array_equal(joined.values()[name], values)


def test_bootstrap_interval_is_near_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(10, 2, 900)
    low, high = bootstrap_interval(values, 2000, seed=3)
    half = 1.96 * values.std() / 30
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert (low, high) == bootstrap_interval(values, 2000, seed=3)


def test_bootstrap_rows_share_their_draws_and_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random((3, 50))
    together = bootstrap_interval(values, 200)
    monkeypatch.setattr("agatool.metrics._BATCH_VALUES", 1)
    alone = [bootstrap_interval(row, 200) for row in values]
    np.testing.assert_allclose(together, np.transpose(alone), rtol=1e-12)


@pytest.mark.parametrize("values", [np.ones(20), np.array([1.0])])
def test_bootstrap_of_values_that_do_not_vary(values: np.ndarray) -> None:
    assert np.allclose(bootstrap_interval(values, 100), 1)


def test_no_resamples_means_no_interval() -> None:
    scored = rank_metrics(np.array([[0, 1]]), np.array([5]), np.array([5, 6]))
    assert all(np.isnan((figure.low, figure.high)).all() for figure in summarise(scored, 0))


def test_paired_test_sees_what_an_unpaired_one_cannot() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(0, 10, 300)
    b = a + rng.normal(0.3, 1, 300)
    test = paired_test(a, b)
    assert test.difference == pytest.approx((b - a).mean())
    assert 0 < test.low < test.difference < test.high
    assert test.p < 0.01 < stats.ttest_ind(a, b).pvalue
    mirrored = paired_test(b, a)
    assert (mirrored.difference, mirrored.low) == pytest.approx((-test.difference, -test.high))


def test_paired_test_is_exact_for_few_queries() -> None:
    test = paired_test(np.zeros(5), np.array([1.0, 2, 3, 4, 0]))
    assert test.p == 2 / 2**4  # four queries moved, all of them up


def test_paired_test_of_equal_runs_and_of_one_moved_query() -> None:
    same = np.array([0.0, 1.0, 1.0])
    assert paired_test(same, same) == (0, 0, 0, 1)
    assert paired_test(same, np.array([1.0, 1.0, 1.0])).p == 1


def test_paired_test_needs_the_same_queries() -> None:
    with pytest.raises(ValueError, match="paired"):
        paired_test(np.ones(3), np.ones(4))
