"""Training batches as a pure function of (seed, step): which pairs, which augmentation, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from agatool.config import DataConfig, ModelConfig
from agatool.data.images import decode_image, to_tensor, train_transform
from agatool.data.prepare import Prepared
from agatool.tokenization import Batch, Tokenizer

CACHE_BYTES = 2 * 1024**3
GROUP_BATCHES = 16  # captions are sorted by length within so many batches: little padding, much randomness


@dataclass(frozen=True)
class TrainBatch:
    """Pairs of one training step, the texts padded to the longest."""

    images: Tensor  # [B, 3, height, width], normalised
    text: Batch  # ids, mask and word alignment, each [B, L]
    content: Tensor  # [B, W] bool, word is no stop-word
    persons: Tensor  # [B] identities

    def to(self, device: torch.device) -> TrainBatch:
        """The same batch on another device."""
        return TrainBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def stream_seed(seed: int, step: int, purpose: int) -> int:
    """A 64-bit seed that is the same for the same three numbers, on every machine."""
    return int(np.random.SeedSequence([seed, step, purpose]).generate_state(1, np.uint64)[0] >> 1)


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """All items once, shuffled, in batches of similar caption length; the last, smaller batch is left out.

    A set smaller than one batch is one batch.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    group = batch_size * GROUP_BATCHES
    ordered = [
        part[np.argsort(lengths[part], kind="stable")] for part in np.split(order, range(group, len(order), group))
    ]
    flat = np.concatenate(ordered)
    batches = [flat[start : start + batch_size] for start in range(0, len(flat), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()
    return [batches[index] for index in generator.permutation(len(batches))]


class TrainingData:
    """The pairs of the train split; `batch(step)` is the same for the same seed and step, whatever came before."""

    def __init__(
        self,
        prepared: Prepared,
        tokenizer: Tokenizer,
        model: ModelConfig,
        data: DataConfig,
        batch_size: int,
        seed: int,
    ) -> None:
        images, captions = prepared.split("train")
        self.tokenizer, self.model, self.data = tokenizer, model, data
        self.batch_size, self.seed = batch_size, seed
        self.paths: list[Path] = [prepared.image_root / path for path in images["path"]]
        position = {image: index for index, image in enumerate(images["image_id"])}
        self.image_of = np.array([position[image] for image in captions["image_id"]])
        self.persons = images["person_id"].to_numpy()[self.image_of]
        self.captions = captions["caption"].tolist()
        self.encodings = tokenizer.encode(self.captions)
        self.lengths = np.array([len(code.ids) for code in self.encodings])
        self.batches_per_epoch = max(1, len(self.lengths) // batch_size)
        height, width = model.image_size
        fits = len(self.paths) * 3 * height * width <= CACHE_BYTES
        self._cache: dict[int, Tensor] | None = {} if data.cache and fits else None
        self._epoch = lru_cache(maxsize=2)(lambda epoch: epoch_batches(self.lengths, batch_size, seed, epoch))

    def __len__(self) -> int:
        return len(self.lengths)

    def _image(self, index: int) -> Tensor:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        image = to_tensor(decode_image(self.paths[index]), self.model.image_size)
        if self._cache is not None:
            self._cache[index] = image
        return image

    def batch(self, step: int) -> TrainBatch:
        """The batch of the (micro-)step `step`, counted from the start of training."""
        epoch, number = divmod(step, self.batches_per_epoch)
        chosen = self._epoch(epoch)[number]
        generator = torch.Generator().manual_seed(stream_seed(self.seed, step, 0))
        images = torch.stack([self._image(index) for index in self.image_of[chosen]])
        model, data = self.model, self.data
        images = train_transform(
            images, generator, model.image_mean, model.image_std, flip=data.flip, pad=data.pad, erase=data.erase
        )
        encodings = [self.encodings[index] for index in chosen]
        content = self.tokenizer.content_mask([self.captions[index] for index in chosen], encodings)
        persons = torch.from_numpy(self.persons[chosen]).long()
        return TrainBatch(images, self.tokenizer.pad(encodings), content, persons)

    def batches(self, steps: Sequence[int]) -> Iterator[TrainBatch]:
        """The batches of `steps`, decoded ahead by `data.workers` threads (Pillow decodes outside Python's lock)."""
        if self.data.workers == 0:
            yield from map(self.batch, steps)
            return
        ahead = self.data.workers + 1
        with ThreadPoolExecutor(self.data.workers) as pool:
            waiting: list[Future[TrainBatch]] = [pool.submit(self.batch, step) for step in steps[:ahead]]
            for step in range(len(steps)):
                batch = waiting.pop(0).result()
                if step + ahead < len(steps):
                    waiting.append(pool.submit(self.batch, steps[step + ahead]))
                yield batch
