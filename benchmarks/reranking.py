"""How much re-ranking image by image saves: the same pairs, the plain way and ours, in one run.

    python benchmarks/reranking.py [--preset tiny] [--images 64] [--texts 32]

Prints seconds and ratios; random weights, because only the cost is looked at.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from agatool.config import build_config
from agatool.encoding import ImageSet, TextSet, pack_texts
from agatool.model import PersonSearchModel, evaluating
from agatool.retrieval import rerank


def pair_by_pair(model: PersonSearchModel, tokens: Tensor, mask: Tensor, images: Tensor, batch: int = 64) -> np.ndarray:
    """The peers' way: every pair projects its image again, in padded batches, all tokens through the last layer."""
    texts = torch.arange(len(tokens)).repeat(len(images))
    which = torch.arange(len(images)).repeat_interleave(len(tokens))
    parts = []
    for pairs in torch.arange(len(texts)).split(batch):
        fused = model.fuse(tokens[texts[pairs]], mask[texts[pairs]], images[which[pairs]])
        parts.append(model.itm(fused))
    return torch.cat(parts).numpy()


def timed(work: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Seconds of the second of two calls, and its result."""
    work()
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def main() -> None:
    """Build a model, make up images and texts of 15 to 45 tokens, and re-rank every pair both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tiny", choices=["tiny", "base"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--texts", type=int, default=32)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = PersonSearchModel(build_config(preset=options.preset).model).eval()
    lengths = torch.randint(15, 46, (options.texts,))
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    height, width = model.config.image_size
    with evaluating(model):
        encoded = model.encode_text(torch.randint(5, 900, mask.shape), mask)
        images = model.encode_image(torch.randn(options.images, 3, height, width))
        texts: TextSet = pack_texts(encoded, mask)
        gallery = ImageSet(images.feature, images.tokens)
        text_index = np.tile(np.arange(options.texts), options.images)
        image_index = np.repeat(np.arange(options.images), options.texts)
        plain, expected = timed(lambda: pair_by_pair(model, encoded.tokens, mask, images.tokens))
        ours, scores = timed(lambda: rerank(model, texts, gallery, text_index, image_index, batch_size=128))
    print(f"{len(text_index)} pairs, preset {options.preset}, {torch.get_num_threads()} threads")
    print(f"pair by pair    {plain:8.2f} s")
    print(f"image by image  {ours:8.2f} s   {plain / ours:.2f} times as fast")
    print(f"largest difference of a score: {np.abs(scores - expected).max():.1e}")


if __name__ == "__main__":
    main()
