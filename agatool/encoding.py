"""Encode images and captions: features for the cosine stage, tokens for re-ranking, memory bounded.

Shape suffixes: Q texts, G images, K images whose tokens are kept, N texts of a batch, E shared space. Tokens: L
of a text, P of an image, S of all texts end to end; their widths are D and H.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from agatool import console
from agatool.data.images import decode_image, eval_transform, to_tensor
from agatool.errors import CheckpointError, DataError
from agatool.model import Encoded, PersonSearchModel, evaluating
from agatool.tokenization import Tokenizer

KEEP_BYTES = 2 * 1024**3  # tokens kept for re-ranking, of images and of texts each
_DECODERS = 4  # threads; Pillow decodes outside Python's global lock

Item = TypeVar("Item")
Result = TypeVar("Result")


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


def model_device(model: PersonSearchModel) -> torch.device:
    """Where the model's weights are, and so where its inputs must be."""
    return next(model.parameters()).device


@contextmanager
def inference(model: PersonSearchModel, bf16: bool) -> Iterator[None]:
    """Evaluation mode, no gradients and, with `bf16`, bfloat16 autocast inside the block."""
    with evaluating(model), autocasting(model, bf16):
        yield


@contextmanager
def autocasting(model: PersonSearchModel, bf16: bool) -> Iterator[None]:
    """The part of `inference` that every thread has to enter by itself."""
    autocast = torch.autocast(model_device(model).type, torch.bfloat16, enabled=bf16)
    with torch.inference_mode(), autocast:
        yield


def in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    ahead: int,
    initializer: Callable[[], None] | None = None,
) -> Iterator[Result]:
    """`map` by threads, never more than `ahead` items further than what was taken; each starts with `initializer`."""
    with ThreadPoolExecutor(workers, initializer=initializer) as pool:
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
    with inference(model, bf16), console.progress("Encoding images", len(paths)) as task:
        for images in _decoded(paths, model.config.image_size, batch_size):
            encoded = encode_batch(model, images)
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
            yield from encode_batch(model, images).tokens.split(1)

    return ImageSet(finite(features), kept, encode_again)


def _room(tokens: Tensor, images: int, keep_bytes: int, bf16: bool) -> Tensor:
    """Memory for the tokens of the first images; bfloat16 loses nothing where autocast rounds them anyway."""
    dtype = torch.bfloat16 if bf16 else tokens.dtype
    count = min(images, keep_bytes // (tokens[0].numel() * dtype.itemsize))
    return torch.empty(count, *tokens.shape[1:], dtype=dtype)


def encode_batch(model: PersonSearchModel, images: Tensor) -> Encoded:
    """uint8 images [B, 3, height, width] from the CPU -> tokens and features on the model's device."""
    on_device = images.to(model_device(model))
    return model.encode_image(eval_transform(on_device, model.config.image_mean, model.config.image_std))


def _decoded(paths: Sequence[Path], size: tuple[int, int], batch_size: int) -> Iterator[Tensor]:
    """uint8 batches [B, 3, height, width], decoded by threads at most two batches ahead of the model."""
    images = in_order(lambda path: to_tensor(decode_image(path), size), paths, _DECODERS, 2 * batch_size)
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
    with inference(model, bf16), console.progress("Encoding captions", len(captions)) as task:
        for texts in even_slices(np.argsort(lengths, kind="stable"), batch_size):
            batch = tokenizer.pad([encodings[text] for text in texts]).to(device)
            encoded = model.encode_text(batch.ids, batch.mask)
            features[texts] = encoded.feature.float().cpu()
            rows = np.concatenate([np.arange(starts[text], starts[text] + lengths[text]) for text in texts])
            packed = encoded.tokens[batch.mask.bool()].float()
            tokens[torch.from_numpy(rows).to(tokens.device)] = packed.to(tokens.device)
            task.advance(len(texts))
    return TextSet(finite(features), tokens, lengths, starts)


def even_slices(order: np.ndarray, size: int) -> list[np.ndarray]:
    """`order` cut into as few parts of at most `size` as possible, none of them a small remainder."""
    return np.array_split(order, -(-len(order) // size))


def finite(scores: Tensor) -> Tensor:
    """`scores`, or CheckpointError where one is NaN or infinite."""
    if not torch.isfinite(scores).all():
        raise CheckpointError("The model's output is not finite", "Its weights are broken; choose another one.")
    return scores
