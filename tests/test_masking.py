"""Masking: equal counts for every strategy, whole words, the draw's distribution, aggregation against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agatool.config import MaskingConfig
from agatool.masking import (
    IGNORE,
    Masked,
    Strategy,
    Vocabulary,
    aggregate,
    choose_words,
    mask_words,
    rollout,
    word_scores,
)
from agatool.tokenization import Batch

STRATEGIES: tuple[Strategy, ...] = ("random", "content", "attention")
VOCABULARY = Vocabulary(mask_id=103, vocab_size=1000, special_ids=(0, 100, 101, 102, 103))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batch(captions: list[list[int]]) -> Batch:
    """Captions given as their words' numbers of pieces; 0 stands for a punctuation token."""
    rows = []
    for caption in captions:
        row, word = [-1], 0
        for pieces in caption:
            row += [word] * pieces if pieces else [-1]
            word += pieces > 0
        rows.append([*row, -1])
    length = max(map(len, rows))
    word_of = torch.tensor([row + [-1] * (length - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    ids = torch.arange(200, 200 + length).expand(len(rows), -1).clone()
    ids[:, 0] = 101
    ids[~mask] = 0
    ids[torch.arange(len(rows)), mask.sum(1) - 1] = 102
    return Batch(ids, mask, word_of)


captions = st.lists(st.lists(st.integers(0, 3), max_size=14), min_size=1, max_size=5)


def expected_count(ratio: float, n: int) -> int:
    return max(1, round(ratio * n)) if n else 0


def run(batch: Batch, seed: int, **config: object) -> Masked:
    """Mask with arbitrary attention (zeros among it) and content flags."""
    noise = seeded(seed + 1)
    attention = torch.rand(batch.ids.shape, generator=noise) * (torch.rand(batch.ids.shape, generator=noise) < 0.6)
    content = torch.rand(batch.ids.shape, generator=noise) < 0.4
    settings = MaskingConfig.model_validate(config)
    return mask_words(batch, VOCABULARY, settings, generator=seeded(seed), class_attention=attention, content=content)


@settings(max_examples=60, deadline=None)
@given(
    shape=captions,
    ratio=st.floats(0.01, 0.99),
    temperature=st.sampled_from([0.0, 0.1, 1.0, 50.0]),
    seed=st.integers(0, 1000),
)
def test_every_strategy_masks_the_same_number_of_whole_words(
    shape: list[list[int]], ratio: float, temperature: float, seed: int
) -> None:
    batch = make_batch(shape)
    for strategy in STRATEGIES:
        masked = run(batch, seed, strategy=strategy, ratio=ratio, temperature=temperature)
        total = chosen_total = 0
        for row, words in enumerate(batch.word_of.tolist()):
            chosen = {word for word, hit in zip(words, masked.chosen[row].tolist(), strict=True) if hit}
            assert -1 not in chosen
            assert masked.chosen[row].tolist() == [word in chosen for word in words]  # whole words
            n = max(words) + 1
            assert len(chosen) == expected_count(ratio, n)
            total, chosen_total = total + n, chosen_total + len(chosen)
        assert masked.ratio.item() == pytest.approx(chosen_total / max(total, 1))
        assert torch.equal(masked.labels, torch.where(masked.chosen, batch.ids, IGNORE))
        assert torch.equal(masked.ids[~masked.chosen], batch.ids[~masked.chosen])


@settings(max_examples=40, deadline=None)
@given(shape=captions, ratio=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_every_strategy_masks_the_same_number_of_pieces(shape: list[list[int]], ratio: float, seed: int) -> None:
    batch = make_batch(shape)
    n = (batch.word_of >= 0).sum(1).tolist()
    for strategy in STRATEGIES:
        masked = run(batch, seed, strategy=strategy, ratio=ratio, unit="piece")
        assert masked.chosen.sum(1).tolist() == [expected_count(ratio, count) for count in n]
        assert not masked.chosen[batch.word_of < 0].any()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_captions_without_words_mask_nothing(strategy: Strategy) -> None:
    batch = make_batch([[], [0, 0], [1, 0]])
    masked = run(batch, 0, strategy=strategy)
    assert masked.chosen.sum(1).tolist() == [0, 0, 1]
    nothing = run(make_batch([[0]]), 0, strategy=strategy)
    assert nothing.ratio.item() == 0
    assert (nothing.labels == IGNORE).all()


def test_the_same_generator_state_gives_the_same_masks() -> None:
    batch = make_batch([[1, 2, 1, 3, 1, 1]] * 4)
    first, second, other = (run(batch, seed, strategy="attention", ratio=0.3) for seed in (3, 3, 4))
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.chosen, second.chosen)
    assert not torch.equal(first.ids, other.ids)


def choose(strategy: Strategy, present: Tensor, **more: object) -> Tensor:
    arguments: dict = {"ratio": 0.3, "generator": seeded(), **more}
    return choose_words(strategy, present, **arguments)


def test_temperature_zero_takes_the_top_scores() -> None:
    scores = torch.rand(50, 10, generator=seeded())
    present = torch.ones(50, 10, dtype=torch.bool)
    chosen = choose("attention", present, scores_BU=scores, temperature=0.0)
    expected = torch.zeros_like(present).scatter(1, scores.topk(3).indices, True)
    assert torch.equal(chosen, expected)
    assert torch.equal(choose("attention", present, scores_BU=scores, temperature=1e-6), expected)  # its limit


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_single_draw_is_proportional_to_the_score(temperature: float) -> None:
    rows = 20000
    score = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    present = torch.ones(rows, 5, dtype=torch.bool)
    chosen = choose("attention", present, scores_BU=score.expand(rows, -1), ratio=0.1, temperature=temperature)
    assert (chosen.sum(1) == 1).all()
    expected = score ** (1 / temperature)
    expected /= expected.sum()
    deviation = (expected * (1 - expected) / rows).sqrt()
    assert ((chosen.float().mean(0) - expected).abs() <= 4.5 * deviation).all()


def test_random_is_uniform_over_the_present_words() -> None:
    rows = 20000
    present = torch.tensor([True, True, False, True, True]).expand(rows, -1)
    share = choose("random", present, ratio=0.5).float().mean(0)
    assert share[2] == 0
    assert (share[present[0]] - 0.5).abs().max() < 4.5 * (0.25 / rows) ** 0.5


def test_words_of_the_second_rank_come_last() -> None:
    present = torch.ones(200, 6, dtype=torch.bool)
    good = torch.tensor([True, False, True, False, False, False]).expand(200, -1)
    for strategy in ("content", "attention"):
        more = {"content_BU": good, "scores_BU": good.float() / 2, "temperature": 1e6}
        few = choose(strategy, present, ratio=0.34, **more)
        assert torch.equal(few, good)
        many = choose(strategy, present, ratio=0.5, **more)
        assert (many & good).sum() == 400
        assert (many.sum(1) == 3).all()
        assert many[:, ~good[0]].any(0).all()  # the third word is drawn from all the others


def test_non_finite_attention_keeps_the_count() -> None:
    present = torch.ones(3, 10, dtype=torch.bool)
    for value in (float("nan"), float("inf")):
        scores = torch.full((3, 10), value)
        assert choose("attention", present, scores_BU=scores).sum(1).tolist() == [3, 3, 3]


def test_word_scores_sum_pieces_and_skip_the_rest() -> None:
    word_of = torch.tensor([[-1, 0, 0, -1, 1, -1], [-1, -1, -1, -1, -1, -1]])
    scores = torch.tensor([[9.0, 1.0, 2.0, 9.0, 3.0, 9.0]]).expand(2, -1)
    assert word_scores(scores, word_of).tolist() == [[0.5, 0.5, 0, 0, 0, 0], [0] * 6]


def attention_maps(layers: int = 4, rows: int = 3, length: int = 5) -> Tensor:
    return torch.rand(layers, rows, length, length, generator=seeded(), dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("tau", [0.2, 0.5, 1.0])
def test_ema_against_the_recursion(tau: float) -> None:
    rows = attention_maps()[:, :, 0]
    expected = rows[0]
    for layer in range(1, len(rows)):
        expected = (1 - tau) * expected + tau * rows[layer]
    assert torch.allclose(aggregate(rows, "ema", tau), expected, atol=1e-14)


def test_mean_and_last() -> None:
    rows = attention_maps()[:, :, 0]
    assert torch.allclose(aggregate(rows, "mean"), rows.sum(0) / 4)
    assert torch.equal(aggregate(rows, "last"), rows[3])


def test_rollout_against_the_matrix_product() -> None:
    maps = attention_maps()
    for row in range(maps.shape[1]):
        product = torch.eye(5, dtype=torch.float64)
        for layer in range(len(maps)):
            product = (0.5 * maps[layer, row] + 0.5 * torch.eye(5, dtype=torch.float64)) @ product
        assert torch.allclose(rollout(maps)[row], product[0], atol=1e-14)
    assert torch.equal(aggregate(maps, "rollout"), rollout(maps))
    assert torch.allclose(rollout(maps).sum(1), torch.ones(3, dtype=torch.float64))


def test_eighty_ten_ten() -> None:
    batch = make_batch([[1] * 30] * 1000)
    masked = run(batch, 0, strategy="random", ratio=0.5)
    new, old = masked.ids[masked.chosen], batch.ids[masked.chosen]
    assert len(new) == 15000
    is_mask, is_kept = new == VOCABULARY.mask_id, new == old
    for share, expected in ((is_mask, 0.8), (is_kept, 0.1), (~is_mask & ~is_kept, 0.1)):
        # a random id hits the original once in a thousand: within the tolerance
        assert share.float().mean().item() == pytest.approx(expected, abs=0.012)
    random_ids = new[~is_mask & ~is_kept]
    assert not torch.isin(random_ids, torch.tensor(VOCABULARY.special_ids)).any()
    assert random_ids.min() < 40
    assert random_ids.max() > 960
    assert random_ids.max() < VOCABULARY.vocab_size


def test_random_ids_cover_all_but_the_specials() -> None:
    vocabulary = Vocabulary(mask_id=4, vocab_size=8, special_ids=(0, 2, 3, 4, 6))
    batch = make_batch([[1] * 30] * 200)
    masked = mask_words(batch, vocabulary, MaskingConfig(strategy="random", ratio=0.9), generator=seeded())
    new = masked.ids[masked.chosen]
    assert set(new[new < 200].tolist()) == {1, 4, 5, 7}


def test_a_vocabulary_of_specials_only() -> None:
    vocabulary = Vocabulary(mask_id=4, vocab_size=5, special_ids=(0, 1, 2, 3, 4))
    batch = make_batch([[1] * 30] * 20)
    masked = mask_words(batch, vocabulary, MaskingConfig(strategy="random", ratio=0.9), generator=seeded())
    new = masked.ids[masked.chosen]
    assert set(new[new < 200].tolist()) == {4}


def test_the_pieces_of_a_word_share_one_fate() -> None:
    batch = make_batch([[3] * 8] * 300)
    masked = run(batch, 0, strategy="attention", ratio=0.5)
    hidden = (masked.ids == VOCABULARY.mask_id)[:, 1:-1].reshape(300, 8, 3)
    assert torch.equal(hidden.any(2), hidden.all(2))


def test_content_flags_follow_the_words() -> None:
    batch = make_batch([[2, 1, 3, 1], [1, 1, 1, 1]])
    content = torch.tensor([[False, False, True, False], [False, True, False, False]])
    for unit, expected in (("word", [3, 1]), ("piece", [2, 1])):
        config = MaskingConfig(strategy="content", ratio=0.25, unit=unit)
        masked = mask_words(batch, VOCABULARY, config, generator=seeded(), content=content)
        assert masked.chosen.sum(1).tolist() == expected
        assert (batch.word_of[0][masked.chosen[0]] == 2).all()
        assert (batch.word_of[1][masked.chosen[1]] == 1).all()
