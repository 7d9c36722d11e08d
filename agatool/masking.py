"""Which words to mask: random, content, attention (AGM).

Shapes: B captions, L tokens, S text layers, U maskable units. A unit is a word, or a piece where pieces are
masked on their own; a caption never has more units than tokens, so U = L and no size depends on the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agatool.config import MaskingConfig
from agatool.tokenization import Batch, Tokenizer

IGNORE = -100  # label of a position that MLM does not predict
MASKED, RANDOM = 0.8, 0.1  # of the masked words; the rest stays as it is (BERT, Devlin et al. 2018)

Strategy = Literal["attention", "random", "content"]
Aggregation = Literal["ema", "mean", "last", "rollout"]


@dataclass(frozen=True)
class Vocabulary:
    """What masking needs to know of a tokenizer."""

    mask_id: int
    vocab_size: int
    special_ids: tuple[int, ...]  # ascending; never drawn as a random replacement

    @staticmethod
    def of(tokenizer: Tokenizer) -> Vocabulary:
        """The part of `tokenizer` that masking needs."""
        return Vocabulary(tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids)


@dataclass(frozen=True)
class Masked:
    """A batch for masked language modelling.

    ids     (B, L) int64: masked words are [MASK] (80 %), random pieces (10 %) or kept (10 %).
    chosen  (B, L) bool: the positions to predict.
    labels  (B, L) int64: the original ids at `chosen`, IGNORE elsewhere.
    ratio   () float32: the realised ratio, chosen units / all units of the batch.
    """

    ids: Tensor
    chosen: Tensor
    labels: Tensor
    ratio: Tensor


@dataclass(frozen=True)
class Chosen:
    """Which units of a batch are to be masked, before anything is done to them.

    unit_of  (B, L) int64: the token's unit, -1 for none.
    present  (B, U) bool: the units that exist.
    units    (B, U) bool: the chosen ones.
    tokens   (B, L) bool: their tokens.
    """

    unit_of: Tensor
    present: Tensor
    units: Tensor
    tokens: Tensor


def aggregate(attention: Tensor, how: Aggregation, tau: float = 0.5) -> Tensor:
    """Class attention of all text layers -> one score per token, (B, L).

    attention  mean over heads: the [CLS] rows (S, B, L), or for `rollout` the full maps (S, B, L, L).
    how        `ema`: later layers weigh more, ā = (1 - tau) ā + tau a; `mean`; `last`; `rollout`.
    """
    if how == "rollout":
        return rollout(attention)
    if how == "last":
        return attention[-1]
    if how == "mean":
        return attention.mean(0)
    score_BL = attention[0]
    for layer_BL in attention[1:]:
        score_BL = torch.lerp(score_BL, layer_BL, tau)
    return score_BL


def rollout(maps_SBLL: Tensor) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020), the [CLS] row: (S, B, L, L) -> (B, L).

    Each map is averaged with the identity for the residual path and the layers are multiplied. Only row 0 of
    the product is wanted, so it is a vector that walks from the last layer down to the first.
    """
    row_B1L = torch.zeros_like(maps_SBLL[-1, :, :1])
    row_B1L[..., 0] = 1
    for map_BLL in reversed(maps_SBLL.unbind(0)):
        row_B1L = 0.5 * (row_B1L + row_B1L @ map_BLL)
    return row_B1L.squeeze(1)


def _membership(unit_of_BL: Tensor) -> Tensor:
    """(B, L, U) bool: token l belongs to unit u."""
    return unit_of_BL[:, :, None] == torch.arange(unit_of_BL.shape[1], device=unit_of_BL.device)


def word_scores(scores_BL: Tensor, word_of_BL: Tensor) -> Tensor:
    """Token scores -> word scores, (B, U) float32, that sum to one in each caption.

    A word's score is the sum over its pieces. Tokens outside every word (specials, padding, punctuation) count
    as zero before normalising. A caption without any score gets zeros.
    """
    # A masked sum, because scatter_add on a GPU adds in an order that differs from run to run.
    summed_BU = (scores_BL.float()[:, :, None] * _membership(word_of_BL)).sum(1)
    total_B1 = summed_BU.sum(1, keepdim=True)
    return summed_BU / total_B1.masked_fill(total_B1 == 0, 1)


def choose_words(
    strategy: Strategy,
    present_BU: Tensor,
    *,
    ratio: float,
    generator: torch.Generator,
    temperature: float = 1.0,
    scores_BU: Tensor | None = None,
    content_BU: Tensor | None = None,
) -> Tensor:
    """Draw k = max(1, round(ratio n)) of each caption's n units, without replacement: (B, U) bool.

    strategy     `random`: all alike. `content`: all content units alike, others once those are used up.
                 `attention`: with probability proportional to score^(1/temperature), by Gumbel top-k (Kool et
                 al. 2019); temperature 0: the top scores; units of score 0 once the others are used up.
    present_BU   the units that exist. A caption without any gets none chosen.
    scores_BU    needed by `attention`; content_BU needed by `content`.
    generator    on the CPU, whatever the device of the tensors, so that the draw is the same on both.

    Every strategy chooses equally many, so a comparison is at the same realised ratio.
    """
    key_BU = _gumbel(present_BU, generator)
    preferred_BU = present_BU
    if strategy == "content":
        assert content_BU is not None, "content masking needs the content words"
        preferred_BU = present_BU & content_BU
    elif strategy == "attention":
        assert scores_BU is not None, "attention masking needs the class attention"
        preferred_BU = present_BU & (scores_BU > 0)
        log_BU = scores_BU.double().where(preferred_BU, 1).log()
        key_BU = log_BU / temperature + key_BU if temperature > 0 else log_BU
    n_B1 = present_BU.sum(1, keepdim=True)
    # `ratio * n` in double and rounded half to even: what Python's round(ratio * n) gives
    k_B1 = (n_B1.double() * ratio).round().clamp(min=1)
    return (_ranks(key_BU, present_BU.int() + preferred_BU.int()) < k_B1) & present_BU


def _gumbel(like_BU: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, float64: minus the logarithm of an exponential variable."""
    noise = torch.empty(like_BU.shape, dtype=torch.float64).exponential_(generator=generator)
    return -noise.log().to(like_BU.device)


def _ranks(key_BU: Tensor, tier_BU: Tensor) -> Tensor:
    """Rank of each unit, 0 first: by tier, then by key, both descending, then by position."""
    by_key = key_BU.argsort(dim=1, descending=True, stable=True)
    by_tier = tier_BU.gather(1, by_key).argsort(dim=1, descending=True, stable=True)
    return by_key.gather(1, by_tier).argsort(1)


def select_words(
    batch: Batch,
    config: MaskingConfig,
    *,
    generator: torch.Generator,
    class_attention: Tensor | None = None,
    content: Tensor | None = None,
) -> Chosen:
    """Choose the words (or pieces) of a batch by `config`; arguments as for `mask_words`.

    Tokens outside every word (`word_of` -1: specials, padding, punctuation) are never chosen.
    """
    word_of_BL = batch.word_of
    position_L = torch.arange(word_of_BL.shape[1], device=word_of_BL.device)
    unit_of_BL = word_of_BL if config.unit == "word" else position_L.where(word_of_BL >= 0, -1)
    member_BLU = _membership(unit_of_BL)
    content_BU = None
    if content is not None:
        content_BL = content.gather(1, word_of_BL.clamp(min=0))
        content_BU = (content_BL[:, :, None] & member_BLU).any(1)
    present_BU = member_BLU.any(1)
    chosen_BU = choose_words(
        config.strategy,
        present_BU,
        ratio=config.ratio,
        generator=generator,
        temperature=config.temperature,
        scores_BU=None if class_attention is None else word_scores(class_attention, unit_of_BL),
        content_BU=content_BU,
    )
    tokens_BL = chosen_BU.gather(1, unit_of_BL.clamp(min=0)) & (unit_of_BL >= 0)
    return Chosen(unit_of_BL, present_BU, chosen_BU, tokens_BL)


def mask_words(
    batch: Batch,
    vocabulary: Vocabulary,
    config: MaskingConfig,
    *,
    generator: torch.Generator,
    class_attention: Tensor | None = None,
    content: Tensor | None = None,
) -> Masked:
    """Choose the words (or pieces) of a batch by `config` and mask them.

    class_attention  (B, L), from `aggregate`; needed by the strategy `attention`.
    content          (B, W) bool, W at least the words that have tokens; needed by the strategy `content`.
    generator        on the CPU; the result is a function of the inputs and its state.
    """
    chosen = select_words(batch, config, generator=generator, class_attention=class_attention, content=content)
    ids_BL = _replace(batch.ids, chosen, vocabulary, generator)
    labels_BL = batch.ids.where(chosen.tokens, IGNORE)
    ratio = chosen.units.sum() / chosen.present.sum().clamp(min=1)
    return Masked(ids_BL, chosen.tokens, labels_BL, ratio)


def _replace(ids_BL: Tensor, chosen: Chosen, vocabulary: Vocabulary, generator: torch.Generator) -> Tensor:
    """The ids after 80/10/10; a word's pieces share one fate, so none gives it away."""
    fate_BU = torch.rand(chosen.units.shape, generator=generator).to(ids_BL.device)
    fate_BL = fate_BU.gather(1, chosen.unit_of.clamp(min=0))
    random_BL = _random_ids(ids_BL, vocabulary, generator)
    replaced_BL = random_BL.where(fate_BL < MASKED + RANDOM, ids_BL)
    replaced_BL = replaced_BL.masked_fill(fate_BL < MASKED, vocabulary.mask_id)
    return replaced_BL.where(chosen.tokens, ids_BL)


def _random_ids(like_BL: Tensor, vocabulary: Vocabulary, generator: torch.Generator) -> Tensor:
    """Uniform ids that skip the special ones; [MASK] where the vocabulary has nothing else."""
    ordinary = vocabulary.vocab_size - len(vocabulary.special_ids)
    if ordinary < 1:
        return torch.full_like(like_BL, vocabulary.mask_id)
    random_BL = torch.randint(ordinary, like_BL.shape, generator=generator)
    for special in vocabulary.special_ids:  # ascending: each one skipped shifts what lies above it
        random_BL += random_BL >= special
    return random_BL.to(like_BL.device)
