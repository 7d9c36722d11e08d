"""Batches as a pure function of (seed, step): every pair once an epoch, the same whoever asks and in what order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agatool.config import DataConfig, ModelConfig
from agatool.data.images import decode_image, eval_transform, to_tensor
from agatool.data.prepare import Prepared
from agatool.data.sampling import GROUP_BATCHES, TrainBatch, TrainingData, epoch_batches, stream_seed
from agatool.errors import DataError
from agatool.tokenization import load_tokenizer

MODEL = ModelConfig(image_size=(32, 16))


def make(prepared: Prepared, batch_size: int = 16, seed: int = 0, **data: object) -> TrainingData:
    tokenizer = load_tokenizer(prepared.tokenizer, MODEL.text)
    return TrainingData(prepared, tokenizer, MODEL, DataConfig.model_validate(data), batch_size, seed)


def same(first: TrainBatch, second: TrainBatch) -> bool:
    pairs = [
        (first.images, second.images), (first.text.ids, second.text.ids), (first.text.mask, second.text.mask),
        (first.text.word_of, second.text.word_of), (first.content, second.content), (first.persons, second.persons),
    ]  # fmt: skip
    return all(torch.equal(one, other) for one, other in pairs)


def captions(batch: TrainBatch) -> list[tuple[int, ...]]:
    return [tuple(row[mask].tolist()) for row, mask in zip(batch.text.ids, batch.text.mask, strict=True)]


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=300),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
)
def test_an_epoch_is_all_pairs_but_the_remainder(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    batches = epoch_batches(np.array(lengths), batch_size, seed, epoch)
    chosen = np.concatenate(batches)
    assert len(set(chosen.tolist())) == len(chosen)  # each pair at most once
    assert set(chosen.tolist()) <= set(range(len(lengths)))
    if batch_size >= len(lengths):
        assert [len(batch) for batch in batches] == [len(lengths)]
    else:
        assert {len(batch) for batch in batches} == {batch_size}
        assert len(lengths) - len(chosen) == len(lengths) % batch_size
    again = epoch_batches(np.array(lengths), batch_size, seed, epoch)
    assert all(np.array_equal(one, other) for one, other in zip(batches, again, strict=True))


def test_batches_have_similar_lengths_but_no_order() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 8 * GROUP_BATCHES * 4)
    spread = [np.ptp(lengths[batch]) for batch in epoch_batches(lengths, 8, 0, 0)]
    assert np.mean(spread) < 10  # of 55: little is padding
    first, second = (np.concatenate(epoch_batches(lengths, 8, 0, epoch)) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    means = [lengths[batch].mean() for batch in epoch_batches(lengths, 8, 0, 0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3  # not short ones first


def test_seeds_differ() -> None:
    lengths = np.full(100, 20)
    orders = {tuple(np.concatenate(epoch_batches(lengths, 10, seed, epoch))) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    streams = {stream_seed(seed, step, purpose) for seed in range(5) for step in range(5) for purpose in range(3)}
    assert len(streams) == 75
    assert all(0 <= stream < 2**63 for stream in streams)


def test_a_batch_depends_on_seed_and_step_alone(sample: Prepared) -> None:
    forward, backward = make(sample), make(sample)
    steps = [0, 3, 4, 5, 9]
    first = {step: forward.batch(step) for step in steps}
    assert all(same(first[step], backward.batch(step)) for step in reversed(steps))
    assert same(first[4], make(sample, cache=False).batch(4))
    assert not same(first[4], make(sample, seed=1).batch(4))
    assert not same(first[0], first[4])  # the same place in another epoch
    torch.manual_seed(7)
    np.random.seed(7)
    assert same(first[5], make(sample).batch(5))  # no global state


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_give_the_same_batches(sample: Prepared, workers: int) -> None:
    plain = [make(sample, erase=0.5).batch(step) for step in range(3, 9)]
    threaded = list(make(sample, erase=0.5, workers=workers).batches(range(3, 9)))
    assert all(same(one, other) for one, other in zip(plain, threaded, strict=True))
    assert list(make(sample, workers=workers).batches(range(0))) == []


def test_threads_pass_errors_on(sample: Prepared) -> None:
    images = sample.images.assign(path=[path.replace("imgs", "nowhere") + "x" for path in sample.images["path"]])
    for workers in (0, 2):
        data = make(replace(sample, images=images), workers=workers)
        with pytest.raises(DataError, match="Cannot read image"):
            list(data.batches(range(3)))


def test_an_epoch_of_the_sample_in_words_and_people(sample: Prepared) -> None:
    data = make(sample)
    assert (len(data), data.batches_per_epoch) == (64, 4)
    images, texts = sample.split("train")
    person_of = images.set_index("image_id")["person_id"]
    expected = sorted(
        (int(person_of[image]), tuple(code.ids))
        for image, code in zip(texts["image_id"], data.tokenizer.encode(texts["caption"].tolist()), strict=True)
    )
    for epoch in range(2):
        batches = [data.batch(4 * epoch + number) for number in range(4)]
        seen = [pair for b in batches for pair in zip(b.persons.tolist(), captions(b), strict=True)]
        assert sorted(seen) == expected


def test_images_belong_to_their_captions(sample: Prepared) -> None:
    """Without augmentation, a pair's image is the caption's image."""
    data = make(sample, flip=0, pad=0)
    images, texts = sample.split("train")
    by_caption = {tuple(code.ids): index for index, code in enumerate(data.tokenizer.encode(texts["caption"].tolist()))}
    batch = data.batch(2)
    for row, caption in enumerate(captions(batch)):
        index = by_caption[caption]
        assert int(batch.persons[row]) == int(images.set_index("image_id")["person_id"][texts["image_id"][index]])
        path = images.set_index("image_id")["path"][texts["image_id"][index]]
        pixels = to_tensor(decode_image(sample.image_root / path), MODEL.image_size)[None]
        torch.testing.assert_close(batch.images[row], eval_transform(pixels, MODEL.image_mean, MODEL.image_std)[0])


def test_a_batch_larger_than_the_data(sample: Prepared) -> None:
    data = make(sample, batch_size=1000)
    assert data.batches_per_epoch == 1
    assert len(data.batch(0).images) == len(data.batch(1).images) == 64
    assert not same(data.batch(0), data.batch(1))


def test_to_a_device_is_the_same_batch(sample: Prepared) -> None:
    batch = make(sample).batch(0)
    moved = batch.to(torch.device("cpu"))
    assert same(batch, moved)


def test_no_train_split(sample: Prepared) -> None:
    rest = sample.images[sample.images["split"] != "train"]
    with pytest.raises(DataError, match="no split 'train'"):
        make(replace(sample, images=rest))
