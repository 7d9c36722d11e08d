"""Rank a gallery: chunked top-k, ITM re-ranking, and the two-stage evaluation made of them.

Shape suffixes: Q queries, G gallery items, C queries of a chunk, k candidates of a query, N pairs of a text
and an image, E shared space.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from agatool import console
from agatool.config import EvalConfig
from agatool.encoding import (
    ImageSet,
    TextSet,
    autocasting,
    encode_images,
    encode_texts,
    even_slices,
    finite,
    in_order,
    inference,
    model_device,
)
from agatool.encoding import pack_texts as pack_texts  # for callers that start from tensors
from agatool.errors import DataError
from agatool.files import contained
from agatool.metrics import QueryMetrics, join_metrics, rank_metrics, summarise
from agatool.model import PersonSearchModel, log_odds
from agatool.tokenization import Tokenizer

if TYPE_CHECKING:
    from agatool.data.prepare import Prepared

Direction = Literal["t2i", "i2t"]
Tail = Literal["itc", "reference"]
Score = Literal["posterior", "itm"]
DIRECTIONS: tuple[Direction, ...] = ("t2i", "i2t")
OUTSIDE = -100.0  # the reference's score of a pair outside the top k
TOP = 10  # gallery items listed for each query
_CHUNK_SCORES = 8_000_000  # similarities held at once: 32 MB, and 64 MB for their order
_CPU_TEXTS = 32  # texts an image is fused with at once on a CPU: more leave its cache and carry more padding


def top_k(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine of the k best gallery items of each query and their indices, best first: [Q, k] both.

    `queries` [Q, E] and `gallery` [G, E] are unit length; k is cut to G. Equal scores keep the gallery's order.
    Exactly the head of a stable full sort, in memory that does not grow with Q.
    """
    k = min(k, len(gallery))
    chunks = [_top_k_chunk(similarity_CG, k) for _, similarity_CG in _similarities(queries, gallery)]
    return torch.cat([scores for scores, _ in chunks]), torch.cat([indices for _, indices in chunks])


def _similarities(queries: Tensor, gallery: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """[C, G] at a time, always cut in the same places, so that a second pass gives the same bits."""
    rows = max(1, _CHUNK_SCORES // max(1, len(gallery)))
    for start in range(0, max(1, len(queries)), rows):  # one chunk even of nothing
        chunk = slice(start, min(start + rows, len(queries)))
        yield chunk, queries[chunk] @ gallery.T


def _top_k_chunk(similarity_CG: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k == 0:
        empty = similarity_CG[:, :0]
        return empty, empty.long()
    # torch.topk picks any of the items that tie for the last place; here the first in the gallery get it.
    last = similarity_CG.topk(k, dim=1).values[:, -1:]
    above, level = similarity_CG > last, similarity_CG == last
    free = k - above.sum(1, keepdim=True)
    chosen = above | (level & (level.cumsum(1) <= free))
    indices = chosen.nonzero()[:, 1].view(-1, k)  # ascending, so that the stable sort settles ties
    scores, order = similarity_CG.gather(1, indices).sort(dim=1, descending=True, stable=True)
    return scores, indices.gather(1, order)


def rerank(
    model: PersonSearchModel,
    texts: TextSet,
    images: ImageSet,
    text_index: np.ndarray,
    image_index: np.ndarray,
    batch_size: int,
    bf16: bool = False,
) -> np.ndarray:
    """ITM logits (no match, match) of N pairs (`text_index[n]`, `image_index[n]`): [N, 2] float32.

    Goes image by image: an image's keys and values are projected once and shared by all its texts, which
    run in batches of similar length. Same scores as pair by pair. Raises CheckpointError for scores that are
    not finite.
    """
    if len(text_index) == 0:
        return np.empty((0, 2), dtype=np.float32)
    device = model_device(model)
    size = min(batch_size, _CPU_TEXTS) if device.type == "cpu" else batch_size
    order = np.lexsort((texts.lengths[text_index], image_index))
    which, starts = np.unique(image_index[order], return_index=True)

    def score(job: tuple[np.ndarray, Tensor]) -> Tensor:
        pairs, image = job
        parts = []
        with autocasting(model, bf16):
            projected = model.project_image(image.to(device))
            for batch in even_slices(pairs, size):
                text_tokens, mask = texts.padded(text_index[batch], device)
                fused = model.fuse(text_tokens, mask, projected, cls_only=True)
                parts.append(model.itm(fused).float())
        return torch.cat(parts)  # stays on the device, so that a GPU's queue of work never runs dry

    logits = []
    with (
        inference(model, bf16),
        _threads_across_images(device) as across,
        console.progress("Re-ranking pairs", len(order)) as task,
    ):
        jobs = zip(np.split(order, starts[1:]), images.tokens(which.tolist()), strict=True)
        for done in across(score, jobs):
            logits.append(done)
            task.advance(len(done))
    scores = np.empty((len(order), 2), dtype=np.float32)
    scores[order] = finite(torch.cat(logits)).cpu().numpy()
    return scores


@contextmanager
def _threads_across_images(device: torch.device) -> Iterator[Callable[..., Iterator[Tensor]]]:
    """A `map` for re-ranking: on a CPU every thread takes an image of its own.

    The operations are small: split inside, the threads wait for each other some thirty times an image, which
    on a busy machine made the whole ten times slower.
    """
    if device.type != "cpu":
        yield map
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one_thread = partial(torch.set_num_threads, 1)  # a new thread starts with the process's number
        yield partial(in_order, workers=threads, ahead=4 * threads, initializer=one_thread)
    finally:
        torch.set_num_threads(threads)


def rerank_candidates(
    model: PersonSearchModel,
    texts: TextSet,
    images: ImageSet,
    candidates: dict[Direction, Tensor],
    batch_size: int,
    bf16: bool = False,
) -> dict[Direction, Tensor]:
    """ITM logits [Q, k, 2] of each direction's candidates [Q, k]; a pair that both directions want is run once."""
    codes: dict[Direction, np.ndarray] = {}
    for direction, indices in candidates.items():
        query = np.arange(len(indices))[:, None]
        text, image = (query, indices.numpy()) if direction == "t2i" else (indices.numpy(), query)
        codes[direction] = image * len(texts.lengths) + text
    wanted = np.unique(np.concatenate([code.ravel() for code in codes.values()]))
    image_index, text_index = np.divmod(wanted, len(texts.lengths))
    scores = rerank(model, texts, images, text_index, image_index, batch_size, bf16)
    return {name: torch.from_numpy(scores[np.searchsorted(wanted, code)]) for name, code in codes.items()}


def candidate_scores(itm_Qk2: Tensor, cosine_Qk: Tensor, temperature: float, score: Score) -> Tensor:
    """What the candidates are sorted by, [Q, k].

    "itm" is the ITM logit of "match" alone, as RaSa and MARS rank. "posterior" is the log-odds of a match plus
    cosine / temperature. Training draws ITM's hard negatives with probability softmax(cosine / temperature), so
    ITM learns how much likelier a true pair is than ITC says, and the product of both is the probability of a
    candidate (docs/evaluation.md derives it). Raises CheckpointError for scores that are not finite.
    """
    return itm_Qk2[..., 1] if score == "itm" else finite(log_odds(itm_Qk2) + cosine_Qk / temperature)


def reranked(order_CG: Tensor, candidates_Ck: Tensor, score_Ck: Tensor, tail: Tail = "itc") -> Tensor:
    """Complete ranking [C, G]: the candidates by score, best first, and behind them everything else.

    `order_CG` is the ranking by cosine. `tail` "itc" leaves the rest, and candidates of equal score, in its
    order; "reference" puts both in the gallery's order, as a stable sort of `score_matrix` would.
    """
    if tail == "reference":
        candidates_Ck, by_index = candidates_Ck.sort(dim=1)
        score_Ck = score_Ck.gather(1, by_index)
    head = candidates_Ck.gather(1, score_Ck.argsort(dim=1, descending=True, stable=True))
    is_candidate = torch.zeros_like(order_CG, dtype=torch.bool).scatter_(1, candidates_Ck, True)
    rest = order_CG[~is_candidate.gather(1, order_CG)].view(len(order_CG), -1)
    return torch.cat([head, rest.sort(dim=1).values if tail == "reference" else rest], dim=1)


def score_matrix(
    model: PersonSearchModel, texts: TextSet, images: ImageSet, direction: Direction, k: int, batch_size: int
) -> Tensor:
    """The reference's score matrix [Q, G]: ITM logits of the top k by cosine, OUTSIDE elsewhere.

    Texts by images for "t2i", images by texts for "i2t". Holds the whole matrix: for few queries.
    """
    sides = (texts.features, images.features)
    queries, gallery = sides if direction == "t2i" else sides[::-1]
    candidates = top_k(queries, gallery, k)[1]
    itm = rerank_candidates(model, texts, images, {direction: candidates}, batch_size)[direction][..., 1]
    return torch.full((len(queries), len(gallery)), OUTSIDE).scatter_(1, candidates, itm)


# --- evaluation ---------------------------------------------------------------------------------------------


class MetricRow(NamedTuple):
    """A row of metrics.csv; the figures are in percent, the interval is NaN without resamples."""

    direction: Direction
    stage: str  # cosine | reranked
    metric: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; docs/evaluation.md explains the columns."""

    metrics: list[MetricRow]
    queries: pd.DataFrame  # one row for each direction and query, of the last stage
    seconds: dict[str, float]  # spent in each part

    def value(self, direction: Direction, stage: str, metric: str) -> float:
        """One metric in percent; KeyError where it was not evaluated."""
        return {row[:3]: row.value for row in self.metrics}[direction, stage, metric]


class _Side(NamedTuple):
    """Queries or gallery of a direction."""

    features: Tensor  # [., E]
    persons: np.ndarray  # identities
    ids: np.ndarray  # image_id or caption_id
    names: np.ndarray  # image path or caption


def evaluate(
    model: PersonSearchModel,
    tokenizer: Tokenizer,
    prepared: Prepared,
    split: str,
    config: EvalConfig,
    directions: Sequence[Direction] = DIRECTIONS,
    bf16: bool = False,
) -> Evaluation:
    """Run the two-stage protocol of docs/evaluation.md over one split, on the model's device.

    Raises DataError for an empty split or a broken image, CheckpointError for a model that gives NaN.
    """
    image_table, caption_table = prepared.split(split)
    if image_table.empty or caption_table.empty:
        raise DataError(f"Split {split!r} has no images or no captions", "Choose another --split.")
    clock = _Clock()
    paths = [contained(Path(prepared.image_root), path) for path in image_table["path"]]
    images = encode_images(model, paths, config.batch_size, bf16)
    clock.lap("encode_images")
    texts = encode_texts(model, tokenizer, caption_table["caption"].tolist(), config.batch_size, bf16)
    clock.lap("encode_texts")
    sides = _sides(image_table, caption_table, images, texts)
    shortlists: dict[Direction, _Shortlist] = {}
    if config.rerank:
        best: dict[Direction, tuple[Tensor, Tensor]] = {}
        for name in directions:
            queries, gallery = sides[name]
            best[name] = top_k(queries.features, gallery.features, config.rerank)
        clock.lap("cosine")
        wanted = {name: items for name, (_, items) in best.items()}
        itm = rerank_candidates(model, texts, images, wanted, config.batch_size, bf16)
        temperature = model.temperature.item()
        for name, (cosine, items) in best.items():
            scores = candidate_scores(itm[name], cosine, temperature, config.score)
            shortlists[name] = _Shortlist(items, scores, log_odds(itm[name]))
        clock.lap("rerank")
    metrics: list[MetricRow] = []
    query_tables: list[pd.DataFrame] = []
    for direction in directions:
        stages, table = _score(direction, *sides[direction], shortlists.get(direction), config.tail)
        query_tables.append(table)
        for stage, values in stages.items():
            metrics += [MetricRow(direction, stage, *figure) for figure in summarise(values, config.bootstrap)]
        if unmatched := int((table["relevant"] == 0).sum()):
            console.warn(f"{unmatched} {direction} queries have no relevant item in the gallery and count as zero")
    clock.lap("metrics")
    return Evaluation(metrics, pd.concat(query_tables, ignore_index=True), clock.laps)


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def _sides(
    image_table: pd.DataFrame, caption_table: pd.DataFrame, images: ImageSet, texts: TextSet
) -> dict[Direction, tuple[_Side, _Side]]:
    """Queries and gallery of both directions; a caption's identity is its image's."""
    person_of = image_table.set_index("image_id")["person_id"]
    image_side = _Side(
        images.features,
        image_table["person_id"].to_numpy(),
        image_table["image_id"].to_numpy(),
        image_table["path"].to_numpy(),
    )
    text_side = _Side(
        texts.features,
        caption_table["image_id"].map(person_of).to_numpy(),
        caption_table["caption_id"].to_numpy(),
        caption_table["caption"].to_numpy(),
    )
    return {"t2i": (text_side, image_side), "i2t": (image_side, text_side)}


class _Shortlist(NamedTuple):
    """The candidates of a direction's queries; each [Q, k]."""

    items: Tensor  # gallery indices
    scores: Tensor  # what they are sorted by
    odds: Tensor  # ITM's log-odds of a match

    def rows(self, chunk: slice) -> _Shortlist:
        return _Shortlist(*(part[chunk] for part in self))


def _score(
    direction: Direction,
    queries: _Side,
    gallery: _Side,
    shortlist: _Shortlist | None,
    tail: Tail,
) -> tuple[dict[str, QueryMetrics], pd.DataFrame]:
    """Metrics of every stage and the query table of the last.

    Complete rankings exist for one chunk of queries at a time: ICFG-PEDES has 394 million pairs.
    """
    parts: dict[str, list[QueryMetrics]] = {}
    tables = []
    for chunk, similarity_CG in _similarities(queries.features, gallery.features):
        order_CG = similarity_CG.sort(dim=1, descending=True, stable=True).indices
        rankings = {"cosine": order_CG}
        listed = order_CG[:, :0]  # of the head of the ranking, what has log-odds
        odds_CG = torch.zeros_like(similarity_CG)
        if shortlist is not None:
            items_Ck, scores_Ck, odds_Ck = shortlist.rows(chunk)
            rankings["reranked"] = reranked(order_CG, items_Ck, scores_Ck, tail)
            listed = rankings["reranked"][:, : min(TOP, items_Ck.shape[1])]
            odds_CG.scatter_(1, items_Ck, odds_Ck)
        for stage, ranking in rankings.items():
            scored = rank_metrics(ranking.numpy(), queries.persons[chunk], gallery.persons)
            parts.setdefault(stage, []).append(scored)
        top = ranking[:, :TOP]
        head = _Head(*(part.numpy() for part in (top, similarity_CG.gather(1, top), odds_CG.gather(1, listed))))
        tables.append(_query_table(direction, stage, queries, gallery, chunk, scored, head))
    return {stage: join_metrics(chunks) for stage, chunks in parts.items()}, pd.concat(tables)


class _Head(NamedTuple):
    """The head of a ranking."""

    items: np.ndarray  # [C, 10] gallery indices
    cosine: np.ndarray  # [C, 10]
    odds: np.ndarray  # [C, 10] of a match, by ITM; fewer or none where fewer were re-ranked


def _query_table(
    direction: Direction,
    stage: str,
    queries: _Side,
    gallery: _Side,
    chunk: slice,
    scored: QueryMetrics,
    head: _Head,
) -> pd.DataFrame:
    hits = gallery.persons[head.items] == queries.persons[chunk][:, None]
    paths = gallery.names[head.items] if direction == "t2i" else np.empty((len(hits), 0), dtype=object)
    return pd.DataFrame(
        {
            "direction": direction,
            "stage": stage,
            "query_id": queries.ids[chunk],
            "query": queries.names[chunk],
            "person_id": queries.persons[chunk],
            "relevant": scored.relevant,
            "first_hit": scored.first_hit,
            "ap": scored.ap,
            "inp": scored.inp,
            "top_ids": _json_rows(gallery.ids[head.items]),
            "top_paths": _json_rows(paths),
            "top_hits": _json_rows(hits.astype(int)),
            "top_cosine": _json_rows(head.cosine.astype(float).round(5)),
            "top_itm": _json_rows(head.odds.astype(float).round(4)),
        }
    )


def _json_rows(values: np.ndarray) -> list[str]:
    """Each row as a JSON list, so that a list fits into one CSV cell and comes back whole."""
    return [json.dumps(row, ensure_ascii=False) for row in values.tolist()]
