"""Searches an index: cosine over all images, ITM for the best of them; by text, by image, or by both.

Shape suffixes: Q queries, C queries of a chunk, k candidates of a query, E shared space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agatool import console
from agatool.checkpoint import load
from agatool.data.annotations import CAPTION_KEYS, clean_caption, open_lines, read_records
from agatool.encoding import TextSet, encode_images, encode_texts
from agatool.errors import CheckpointError, DataError, UsageError
from agatool.hint import ABSENT, share_as_good
from agatool.index import Index, fingerprint_of, is_index, open_index
from agatool.indexing import build_index, default_index
from agatool.machine import memory_errors, pick_device, use_bf16
from agatool.model import PersonSearchModel, log_odds
from agatool.retrieval import candidate_scores, rerank, reranked, top_k
from agatool.runs import find_model

RERANK = 128  # candidates, as in evaluation
_CHUNK = 32  # queries whose candidates are encoded together
_TEXT_KEYS = ("query", *CAPTION_KEYS)  # of a record in a file of queries


@dataclass(frozen=True)
class Query:
    """A description, an image of somebody, or both."""

    text: str | None = None
    image: Path | None = None

    def __str__(self) -> str:
        return " + ".join(part for part in (self.image and self.image.name, self.text) if part)


@dataclass(frozen=True)
class Hit:
    """An image that a query found."""

    rank: int  # from 1
    row: int  # of the index
    name: str  # path below the gallery's root
    cosine: float
    match: float | None  # ITM's log-odds of a match, 0 is even; None where it was not re-ranked


@dataclass(frozen=True)
class Answer:
    """What a query found, best first."""

    query: Query
    hits: list[Hit]
    as_good: float | None  # share of the made-up descriptions that fit this gallery as well; None for an image

    @property
    def probably_absent(self) -> bool:
        """Whether the person described is probably not in this gallery (docs/search.md)."""
        return self.as_good is not None and self.as_good >= ABSENT


class Searcher:
    """An index and the model that made it. Raises CheckpointError where the model is another one."""

    def __init__(self, index: Index, model: PersonSearchModel, batch_size: int = 64, bf16: bool = False) -> None:
        if model.config.embed_dim != index.embeddings.shape[1]:
            raise CheckpointError(f"{index.folder} was not made by this model", index.update_command())
        self.index, self.model, self.batch_size, self.bf16 = index, model, batch_size, bf16

    def search(self, queries: Sequence[Query], k: int = 20, rerank: int = RERANK) -> list[Answer]:
        """The `k` best images of each query; with a text, its `rerank` best by cosine are sorted by ITM and cosine.

        Images that changed or went since they were indexed are left out, with a warning. Raises DataError for a
        query that is empty or an image that cannot be read.
        """
        features, texts, text_of = self._encode(queries)
        answers: list[Answer] = []
        stale: set[int] = set()
        for start in range(0, len(queries), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            lists = self._candidates(features[chunk], max(k, rerank), stale)
            wanted = [(text_of[start + q], rows[:rerank]) for q, (rows, _) in enumerate(lists)]
            matches = self._matches(texts, wanted)
            for query, (rows, cosines), match in zip(queries[chunk], lists, matches, strict=True):
                answers.append(self._answer(query, rows, cosines, match, k))
        if stale:
            console.warn(
                f"{len(stale)} images changed or went since they were indexed and are left out; "
                f"bring the index up to date: {self.index.update_command()}"
            )
        return answers

    def like(self, row: int, text: str | None, k: int, rerank: int = RERANK) -> Answer:
        """`search` by an image of the gallery itself, with or without a text."""
        return self.search([Query(text, self.index.path(row))], k, rerank)[0]

    def _encode(self, queries: Sequence[Query]) -> tuple[Tensor, TextSet | None, list[int | None]]:
        """Features [Q, E] of the queries, their texts encoded, and which text each query has.

        Of an image and a text it is the direction between the two: the cosine ranks by the sum of both cosines.
        """
        total = torch.zeros(len(queries), self.model.config.embed_dim)
        paths = list(dict.fromkeys(query.image for query in queries if query.image is not None))
        captions = [query.text for query in queries if query.text is not None]
        if not all(query.text or query.image for query in queries):
            raise DataError("A query without words and without an image", 'For example: "a woman in a red coat"')
        if paths:
            images = encode_images(self.model, paths, self.batch_size, self.bf16, keep_bytes=0).features
            for number, query in enumerate(queries):
                if query.image is not None:
                    total[number] += images[paths.index(query.image)]
        texts = None
        text_of: list[int | None] = [None] * len(queries)
        if captions:
            texts = encode_texts(self.model, self.model.tokenizer, captions, self.batch_size, self.bf16)
            for place, number in enumerate(number for number, query in enumerate(queries) if query.text is not None):
                text_of[number] = place
                total[number] += texts.features[place]
        return F.normalize(total, dim=1), texts, text_of

    def _candidates(self, features_CE: Tensor, count: int, stale: set[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rows and cosines of each query's best images that are still what was encoded."""
        cosines_Ck, rows_Ck = top_k(features_CE, self.index.embeddings, count)
        rows = np.unique(rows_Ck.numpy())
        gone = {int(row) for row in rows if not self.index.is_current(int(row))}
        stale |= gone
        lists = []
        for row, cosine in zip(rows_Ck.numpy(), cosines_Ck.numpy(), strict=True):
            kept = ~np.isin(row, list(gone))
            lists.append((row[kept], cosine[kept]))
        return lists

    def _matches(self, texts: TextSet | None, wanted: Sequence[tuple[int | None, np.ndarray]]) -> list[np.ndarray]:
        """ITM logits [k, 2] of each query's candidates, none for a query without a text."""
        asked = [(text, rows) for text, rows in wanted if text is not None and len(rows)]
        if texts is None or not asked:
            return [np.empty((0, 2), dtype=np.float32) for _ in wanted]
        pairs_text = np.concatenate([np.full(len(rows), text) for text, rows in asked])
        pairs_row = np.concatenate([rows for _, rows in asked])
        rows, pairs_image = np.unique(pairs_row, return_inverse=True)
        paths = [self.index.path(int(row)) for row in rows]
        images = encode_images(self.model, paths, self.batch_size, self.bf16)
        scores = rerank(self.model, texts, images, pairs_text, pairs_image, self.batch_size, self.bf16)
        ends = np.cumsum([len(rows) if text is not None else 0 for text, rows in wanted])
        return np.split(scores, ends[:-1])

    def _answer(self, query: Query, rows: np.ndarray, cosines: np.ndarray, match_k2: np.ndarray, k: int) -> Answer:
        place, itm, cosine = torch.arange(len(rows))[None], torch.from_numpy(match_k2)[None], torch.from_numpy(cosines)
        candidates = len(match_k2)
        scores = candidate_scores(itm, cosine[None, :candidates], self.model.temperature.item(), "posterior")
        order = reranked(place, place[:, :candidates], scores)[0, :k].tolist()
        match = log_odds(itm)[0].tolist()
        hits = [
            Hit(rank, int(rows[at]), self.index.name(int(rows[at])), float(cosines[at]),
                match[at] if at < candidates else None)
            for rank, at in enumerate(order, 1)
        ]  # fmt: skip
        describes = query.image is None and len(cosines) > 0
        return Answer(query, hits, share_as_good(self.index.made_up, float(cosines[0])) if describes else None)


def open_searcher(
    target: Path,
    checkpoint: Path | None = None,
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "auto",
) -> Searcher:
    """Open an index with its model; any other folder is taken for a gallery and indexed first.

    Raises CheckpointError where the model is not the one that made the index: the hint is the command to rebuild.
    """
    if not is_index(target):
        if not target.is_dir():
            raise DataError(f"There is no index and no gallery {target}", "Give a folder of images, or an index.")
        build_index(target, default_index(target), checkpoint, batch_size, device, precision)
        target = default_index(target)
    index = open_index(target)
    path = find_model(checkpoint).resolve() if checkpoint is not None else index.model
    if not path.exists():
        raise CheckpointError(
            f"The model that made {target} is not at {path} any more",
            f"Give its folder with --checkpoint, or build the index again: {index.update_command(Path('MODEL'))}",
        )
    if fingerprint_of(path) != index.fingerprint:
        what = f"{path} is not the model that made {target}, or changed since"
        raise CheckpointError(what, f"Build the index again: {index.update_command(path)}")
    target_device = pick_device(device)
    return Searcher(index, load(path).to(target_device), batch_size, use_bf16(target_device, precision))


def run_search(
    target: Path, queries: Sequence[Query], k: int, rerank: int, batch_size: int = 64, **opening: str | Path | None
) -> tuple[Index, list[Answer]]:
    """`aga search`: open (or build) the index, answer all queries."""
    with memory_errors("Lower --batch-size or --rerank."):
        searcher = open_searcher(target, batch_size=batch_size, **opening)  # type: ignore[arg-type]
        return searcher.index, searcher.search(queries, k, rerank)


# -- queries ------------------------------------------------------------------------------------------------------


def as_query(text: str | None, image: Path | None = None) -> Query:
    """A query of what a user typed. Raises UsageError where there is nothing to search for."""
    if text is None and image is None:
        raise UsageError("Nothing to search for", 'For example: aga search FOLDER "a woman in a red coat"')
    try:
        return Query(clean_caption(text) if text is not None else None, image)
    except DataError as error:
        raise UsageError(f"The query cannot be used: {error.message}", "Describe a person in a few words.") from error


def read_queries(path: Path) -> list[Query]:
    """The queries of a file: one a line, or for .csv, .json and .jsonl the field `query`, `caption` or `captions`.

    Raises DataError, naming the place, for a query that cannot be used.
    """
    queries = []
    for number, text in enumerate(_texts(path), 1):
        try:
            queries.append(Query(clean_caption(text)))
        except DataError as error:
            raise DataError(f"{path}, query {number}: {error.message}", "Correct the file.") from error
    if not queries:
        raise DataError(f"{path} holds no queries", "Write one a line.")
    return queries


def _texts(path: Path) -> Iterator[object]:
    if path.suffix.lower() not in (".csv", ".json", ".jsonl"):
        yield from (line for line in open_lines(path) if line.strip())
        return
    for record in read_records(path):
        if not isinstance(record, dict):
            yield record
            continue
        fields = {str(key).strip().lower(): value for key, value in record.items()}
        given = next((fields[key] for key in _TEXT_KEYS if key in fields), None)
        yield from given if isinstance(given, list) else [given]
