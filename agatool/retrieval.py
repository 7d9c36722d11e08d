"""Encode a gallery, chunked top-k, ITM re-ranking, and the two-stage evaluation made of them.

Shape suffixes: Q queries, G gallery items, C queries of a chunk, k candidates of a query, N pairs of a text
and an image, E shared space, K images whose tokens are kept. Tokens: L of a text, P of an image, S of all
texts end to end; their widths are D and H.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from agatool import console
from agatool.config import EvalConfig
from agatool.data.images import decode_image, eval_transform, to_tensor
from agatool.errors import CheckpointError, DataError
from agatool.files import contained
from agatool.metrics import QueryMetrics, join_metrics, rank_metrics, summarise
from agatool.model import Encoded, PersonSearchModel, evaluating
from agatool.tokenization import Tokenizer

if TYPE_CHECKING:
    from agatool.data.prepare import Prepared

Direction = Literal["t2i", "i2t"]
Item, Result = TypeVar("Item"), TypeVar("Result")
Tail = Literal["itc", "reference"]
DIRECTIONS: tuple[Direction, ...] = ("t2i", "i2t")
KEEP_BYTES = 2 * 1024**3  # tokens kept for re-ranking, of images and of texts each
OUTSIDE = -100.0  # the reference's score of a pair outside the top k
TOP = 10  # gallery items listed for each query
_CHUNK_SCORES = 8_000_000  # similarities held at once: 32 MB, and 64 MB for their order
_CPU_TEXTS = 32  # texts an image is fused with at once on a CPU: more leave its cache and carry more padding
_DECODERS = 4  # threads; Pillow decodes outside Python's global lock


@dataclass(frozen=True)
class ImageSet:
    """Encoded images: features of all, tokens of the first K; the rest is encoded again for re-ranking."""

    features: Tensor  # [G, E] float32 on the CPU
    kept: Tensor  # [K, P, H]
    encode_again: Callable[[Sequence[int]], Iterator[Tensor]] | None = None  # indices -> tokens [1, P, H] each

    def tokens(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Tokens [1, P, H] of each image of `indices`, which must ascend."""
        stored = [index for index in indices if index < len(self.kept)]
        for index in stored:
            yield self.kept[index : index + 1]
        if len(stored) < len(indices):
            assert self.encode_again is not None
            yield from self.encode_again(indices[len(stored) :])


@dataclass(frozen=True)
class TextSet:
    """Encoded texts: features, and their tokens after the text layers end to end, without padding."""

    features: Tensor  # [Q, E] float32 on the CPU
    tokens: Tensor  # [S, D]
    lengths: np.ndarray  # [Q] tokens of each text
    starts: np.ndarray  # [Q] row of each text's first token

    def padded(self, texts: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens [N, L, D] and mask [N, L] of the texts with these indices."""
        lengths = self.lengths[texts]
        place = np.arange(lengths.max())
        mask = place < lengths[:, None]
        rows = torch.from_numpy(np.where(mask, self.starts[texts][:, None] + place, 0))
        tokens = self.tokens[rows.to(self.tokens.device)]
        return tokens.to(device), torch.from_numpy(mask).to(device)


def pack_texts(encoded: Encoded, mask: Tensor) -> TextSet:
    """A TextSet of what `encode_text` gave for one batch with this mask [Q, L]."""
    real = mask.bool()
    lengths = real.sum(1).cpu().numpy()
    return TextSet(encoded.feature.float().cpu(), encoded.tokens[real], lengths, np.cumsum(lengths) - lengths)


# --- encoding -----------------------------------------------------------------------------------------------


def model_device(model: PersonSearchModel) -> torch.device:
    """Where the model's weights are, and so where its inputs must be."""
    return next(model.parameters()).device


@contextmanager
def _inference(model: PersonSearchModel, bf16: bool) -> Iterator[None]:
    with evaluating(model), _precision(model, bf16):
        yield


@contextmanager
def _precision(model: PersonSearchModel, bf16: bool) -> Iterator[None]:
    """What every thread has to enter by itself."""
    autocast = torch.autocast(model_device(model).type, torch.bfloat16, enabled=bf16)
    with torch.inference_mode(), autocast:
        yield


def _in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int) -> Iterator[Result]:
    """`map` by threads, never more than `ahead` items further than what was taken."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def encode_images(
    model: PersonSearchModel,
    paths: Sequence[Path],
    batch_size: int,
    bf16: bool = False,
    keep_bytes: int = KEEP_BYTES,
) -> ImageSet:
    """Decode and encode image files on the model's device, keeping the tokens of as many as `keep_bytes` allow.

    `bf16` runs the model under bfloat16 autocast; features come out in float32. Raises DataError for no or a
    broken image and CheckpointError for features that are not finite.
    """
    if not paths:
        raise DataError("There are no images to encode", "Choose another split or folder.")
    features = torch.empty(len(paths), model.config.embed_dim)
    kept, done = torch.empty(0), 0
    with _inference(model, bf16), console.progress("Encoding images", len(paths)) as task:
        for images in _decoded(paths, model.config.image_size, batch_size):
            encoded = _encode_batch(model, images)
            if done == 0:
                kept = _room(encoded.tokens, len(paths), keep_bytes, bf16)
            stop = done + len(images)
            features[done:stop] = encoded.feature.float().cpu()
            kept[done:stop] = encoded.tokens[: max(0, len(kept) - done)].cpu()
            done = stop
            task.advance(len(images))

    def encode_again(indices: Sequence[int]) -> Iterator[Tensor]:
        chosen = [paths[index] for index in indices]
        for images in _decoded(chosen, model.config.image_size, batch_size):
            yield from _encode_batch(model, images).tokens.split(1)

    return ImageSet(_finite(features), kept, encode_again)


def _room(tokens: Tensor, images: int, keep_bytes: int, bf16: bool) -> Tensor:
    """Memory for the tokens of the first images; bfloat16 loses nothing where autocast rounds them anyway."""
    dtype = torch.bfloat16 if bf16 else tokens.dtype
    count = min(images, keep_bytes // (tokens[0].numel() * dtype.itemsize))
    return torch.empty(count, *tokens.shape[1:], dtype=dtype)


def _encode_batch(model: PersonSearchModel, images: Tensor) -> Encoded:
    """uint8 images [B, 3, height, width] from the CPU -> tokens and features on the model's device."""
    on_device = images.to(model_device(model))
    return model.encode_image(eval_transform(on_device, model.config.image_mean, model.config.image_std))


def _decoded(paths: Sequence[Path], size: tuple[int, int], batch_size: int) -> Iterator[Tensor]:
    """uint8 batches [B, 3, height, width], decoded by threads at most two batches ahead of the model."""
    images = _in_order(lambda path: to_tensor(decode_image(path), size), paths, _DECODERS, 2 * batch_size)
    while batch := list(islice(images, batch_size)):
        yield torch.stack(batch)


def encode_texts(
    model: PersonSearchModel,
    tokenizer: Tokenizer,
    captions: Sequence[str],
    batch_size: int,
    bf16: bool = False,
    keep_bytes: int = KEEP_BYTES,
) -> TextSet:
    """Encode captions in batches of similar length; the text layers run once, re-ranking takes it from there.

    The tokens stay on the model's device up to `keep_bytes`, beyond that in main memory. Raises DataError for
    no caption and CheckpointError for features that are not finite.
    """
    if not captions:
        raise DataError("There are no captions to encode", "Choose another split.")
    encodings = tokenizer.encode(captions)
    lengths = np.array([len(encoding.ids) for encoding in encodings])
    starts = np.cumsum(lengths) - lengths
    needed = int(lengths.sum()) * model.config.text_width * torch.float32.itemsize
    device = model_device(model)
    features = torch.empty(len(captions), model.config.embed_dim)
    tokens = torch.empty(int(lengths.sum()), model.config.text_width, device=device if needed <= keep_bytes else "cpu")
    with _inference(model, bf16), console.progress("Encoding captions", len(captions)) as task:
        for texts in _even_slices(np.argsort(lengths, kind="stable"), batch_size):
            batch = tokenizer.pad([encodings[text] for text in texts]).to(device)
            encoded = model.encode_text(batch.ids, batch.mask)
            features[texts] = encoded.feature.float().cpu()
            rows = np.concatenate([np.arange(starts[text], starts[text] + lengths[text]) for text in texts])
            packed = encoded.tokens[batch.mask.bool()].float()
            tokens[torch.from_numpy(rows).to(tokens.device)] = packed.to(tokens.device)
            task.advance(len(texts))
    return TextSet(_finite(features), tokens, lengths, starts)


def _even_slices(order: np.ndarray, size: int) -> list[np.ndarray]:
    """`order` cut into as few parts of at most `size` as possible, none of them a small remainder."""
    return np.array_split(order, -(-len(order) // size))


def _finite(scores: Tensor) -> Tensor:
    if not torch.isfinite(scores).all():
        raise CheckpointError("The model's output is not finite", "Its weights are broken; choose another one.")
    return scores


# --- ranking ------------------------------------------------------------------------------------------------


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
    """ITM logit of "match" for N pairs (`text_index[n]`, `image_index[n]`): [N] float32.

    Goes image by image: an image's keys and values are projected once and shared by all its texts, which
    run in batches of similar length. Same scores as pair by pair. Raises CheckpointError for scores that are
    not finite.
    """
    if len(text_index) == 0:
        return np.empty(0, dtype=np.float32)
    device = model_device(model)
    size = min(batch_size, _CPU_TEXTS) if device.type == "cpu" else batch_size
    order = np.lexsort((texts.lengths[text_index], image_index))
    which, starts = np.unique(image_index[order], return_index=True)

    def score(job: tuple[np.ndarray, Tensor]) -> Tensor:
        pairs, image = job
        parts = []
        with _precision(model, bf16):
            projected = model.project_image(image.to(device))
            for batch in _even_slices(pairs, size):
                text_tokens, mask = texts.padded(text_index[batch], device)
                fused = model.fuse(text_tokens, mask, projected, cls_only=True)
                parts.append(model.itm(fused)[:, 1].float())
        return torch.cat(parts)  # stays on the device, so that a GPU's queue of work never runs dry

    logits = []
    with (
        _inference(model, bf16),
        _threads_across_images(device) as across,
        console.progress("Re-ranking pairs", len(order)) as task,
    ):
        jobs = zip(np.split(order, starts[1:]), images.tokens(which.tolist()), strict=True)
        for done in across(score, jobs):
            logits.append(done)
            task.advance(len(done))
    scores = np.empty(len(order), dtype=np.float32)
    scores[order] = _finite(torch.cat(logits)).cpu().numpy()
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
        yield partial(_in_order, workers=threads, ahead=4 * threads)
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
    """ITM logits [Q, k] of each direction's candidates [Q, k]; a pair that both directions want is run once."""
    codes: dict[Direction, np.ndarray] = {}
    for direction, indices in candidates.items():
        query = np.arange(len(indices))[:, None]
        text, image = (query, indices.numpy()) if direction == "t2i" else (indices.numpy(), query)
        codes[direction] = image * len(texts.lengths) + text
    wanted = np.unique(np.concatenate([code.ravel() for code in codes.values()]))
    image_index, text_index = np.divmod(wanted, len(texts.lengths))
    scores = rerank(model, texts, images, text_index, image_index, batch_size, bf16)
    return {name: torch.from_numpy(scores[np.searchsorted(wanted, code)]) for name, code in codes.items()}


def reranked(order_CG: Tensor, candidates_Ck: Tensor, itm_Ck: Tensor, tail: Tail = "itc") -> Tensor:
    """Complete ranking [C, G]: the candidates by ITM logit, best first, and behind them everything else.

    `order_CG` is the ranking by cosine. `tail` "itc" leaves the rest, and candidates of equal logit, in its
    order; "reference" puts both in the gallery's order, as a stable sort of `score_matrix` would.
    """
    if tail == "reference":
        candidates_Ck, by_index = candidates_Ck.sort(dim=1)
        itm_Ck = itm_Ck.gather(1, by_index)
    head = candidates_Ck.gather(1, itm_Ck.argsort(dim=1, descending=True, stable=True))
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
    itm = rerank_candidates(model, texts, images, {direction: candidates}, batch_size)[direction]
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
    candidates: dict[Direction, Tensor] = {}
    itm: dict[Direction, Tensor] = {}
    if config.rerank:
        for direction in directions:
            queries, gallery = sides[direction]
            candidates[direction] = top_k(queries.features, gallery.features, config.rerank)[1]
        clock.lap("cosine")
        itm = rerank_candidates(model, texts, images, candidates, config.batch_size, bf16)
        clock.lap("rerank")
    metrics: list[MetricRow] = []
    query_tables: list[pd.DataFrame] = []
    for direction in directions:
        shortlist = (candidates[direction], itm[direction]) if config.rerank else None
        stages, table = _score(direction, *sides[direction], shortlist, config.tail)
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


def _score(
    direction: Direction,
    queries: _Side,
    gallery: _Side,
    shortlist: tuple[Tensor, Tensor] | None,
    tail: Tail,
) -> tuple[dict[str, QueryMetrics], pd.DataFrame]:
    """Metrics of every stage and the query table of the last; `shortlist` is candidates and ITM logits, [Q, k].

    Complete rankings exist for one chunk of queries at a time: ICFG-PEDES has 394 million pairs.
    """
    parts: dict[str, list[QueryMetrics]] = {}
    tables = []
    for chunk, similarity_CG in _similarities(queries.features, gallery.features):
        order_CG = similarity_CG.sort(dim=1, descending=True, stable=True).indices
        rankings = {"cosine": order_CG}
        itm_Ck = torch.empty(len(order_CG), 0)
        if shortlist is not None:
            itm_Ck = shortlist[1][chunk]
            rankings["reranked"] = reranked(order_CG, shortlist[0][chunk], itm_Ck, tail)
        for stage, ranking in rankings.items():
            scored = rank_metrics(ranking.numpy(), queries.persons[chunk], gallery.persons)
            parts.setdefault(stage, []).append(scored)
        top = ranking[:, :TOP]
        best_itm = itm_Ck.sort(dim=1, descending=True).values[:, :TOP]
        listed = _Listed(top.numpy(), similarity_CG.gather(1, top).numpy(), best_itm.numpy())
        tables.append(_query_table(direction, stage, queries, gallery, chunk, scored, listed))
    return {stage: join_metrics(chunks) for stage, chunks in parts.items()}, pd.concat(tables)


class _Listed(NamedTuple):
    """The head of a ranking."""

    items: np.ndarray  # [C, 10] gallery indices
    cosine: np.ndarray  # [C, 10]
    itm: np.ndarray  # [C, 10], fewer or none where fewer were re-ranked


def _query_table(
    direction: Direction,
    stage: str,
    queries: _Side,
    gallery: _Side,
    chunk: slice,
    scored: QueryMetrics,
    listed: _Listed,
) -> pd.DataFrame:
    hits = gallery.persons[listed.items] == queries.persons[chunk][:, None]
    paths = gallery.names[listed.items] if direction == "t2i" else np.empty((len(hits), 0), dtype=object)
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
            "top_ids": _json_rows(gallery.ids[listed.items]),
            "top_paths": _json_rows(paths),
            "top_hits": _json_rows(hits.astype(int)),
            "top_cosine": _json_rows(listed.cosine.astype(float).round(5)),
            "top_itm": _json_rows(listed.itm.astype(float).round(4)),
        }
    )


def _json_rows(values: np.ndarray) -> list[str]:
    """Each row as a JSON list, so that a list fits into one CSV cell and comes back whole."""
    return [json.dumps(row, ensure_ascii=False) for row in values.tolist()]
