"""The core model: shapes, and that every shortcut (cls_only, shared images, class rows, padding) changes nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agatool.config import ModelConfig
from agatool.model import AttentionMaps, ConvStem, PersonSearchModel, evaluating, resample_positions

B, L, V = 3, 7, 50
PATCHES = 8  # of a 32 x 16 image


def build(**changes: Any) -> PersonSearchModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "image_size": (32, 16), "patch": 8, "image_width": 24, "image_depth": 2, "image_heads": 2, "text_width": 16,
        "text_heads": 4, "text_mlp": 32, "text_layers": 2, "fusion_layers": 2, "embed_dim": 8, "vocab_size": V,
    }  # fmt: skip
    model = PersonSearchModel(ModelConfig(**{**sizes, **changes}))
    with torch.no_grad():  # embeddings start so small that all words would look alike
        model.word_embeddings.weight.normal_()
    return model.eval()


plain = cache(build)


@pytest.fixture(scope="module", params=["patch", "conv"])
def model(request: pytest.FixtureRequest) -> PersonSearchModel:
    return build(stem=request.param)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(5, V, (B, L), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mask() -> Tensor:
    return torch.arange(L) < torch.tensor([[7], [4], [2]])


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(B, 3, 32, 16, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_shapes(model: PersonSearchModel, images: Tensor, ids: Tensor, mask: Tensor) -> None:
    image, text = model.encode_image(images), model.encode_text(ids, mask)
    assert image.tokens.shape == (B, 1 + PATCHES, 24)
    assert text.tokens.shape == (B, L, 16)
    for feature in (image.feature, text.feature):
        assert feature.shape == (B, 8)
        torch.testing.assert_close(feature.norm(dim=1), torch.ones(B))
    fused = model.fuse(text.tokens, mask, image.tokens)
    assert fused.shape == (B, L, 16)
    assert model.itm(fused).shape == (B, 2)
    assert model.mlm(fused).shape == (B, L, V)
    assert model.mlm(fused[mask]).shape == (int(mask.sum()), V)


def test_every_parameter_learns(images: Tensor, ids: Tensor, mask: Tensor) -> None:
    model = build()
    image, text = model.encode_image(images), model.encode_text(ids, mask)
    fused = model.fuse(text.tokens, mask, image.tokens)
    similarity = image.feature @ text.feature.T / model.temperature
    (model.itm(fused).square().sum() + model.mlm(fused).square().sum() + similarity.square().sum()).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias of the keys shifts a query's scores alike for all keys, so softmax never sees it.
    assert all("key.bias" in name for name in idle), idle


@pytest.mark.parametrize("stem", ["patch", "conv"])
@settings(max_examples=10)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6))
@torch.no_grad()
def test_any_image_size(stem: str, rows: int, columns: int) -> None:
    encoded = build(stem=stem).encode_image(torch.randn(2, 3, 8 * rows, 8 * columns))
    assert encoded.tokens.shape == (2, 1 + rows * columns, 24)
    assert encoded.tokens.isfinite().all()


def test_resampled_positions() -> None:
    positions = torch.randn(1, 1 + 4 * 2, 5)
    assert resample_positions(positions, (4, 2), (4, 2)) is positions
    larger = resample_positions(positions, (4, 2), (12, 10))
    assert larger.shape == (1, 1 + 120, 5)
    assert torch.equal(larger[:, 0], positions[:, 0])
    flat = resample_positions(torch.full_like(positions, 0.7), (4, 2), (5, 3))
    torch.testing.assert_close(flat, torch.full((1, 16, 5), 0.7))
    # Rows and columns are not mixed up: what varies along the height alone still does.
    ramp = torch.cat([torch.zeros(1), torch.arange(4.0).repeat_interleave(2)])[None, :, None]
    grown = resample_positions(ramp, (4, 2), (8, 6))[0, 1:, 0].view(8, 6)
    assert grown.std(dim=1).max() < 1e-5
    assert (grown[1:, 0] > grown[:-1, 0]).all()


@pytest.mark.parametrize("patch", [3, 6, 12, 24])
def test_conv_stem_wants_a_power_of_two(patch: int) -> None:
    with pytest.raises(ValueError, match=f"power of two.*{patch}"):
        ConvStem((96, 48), patch)


def test_too_long_a_text_is_refused(model: PersonSearchModel) -> None:
    with pytest.raises(ValueError, match=r"65 tokens.*64 positions"):
        model.encode_text(torch.ones(1, 65).long(), torch.ones(1, 65))


@torch.no_grad()
def test_cls_only_is_the_cls_of_the_whole(model: PersonSearchModel, images: Tensor, ids: Tensor, mask: Tensor) -> None:
    image, text = model.encode_image(images), model.encode_text(ids, mask)
    whole = model.fuse(text.tokens, mask, image.tokens)
    short = model.fuse(text.tokens, mask, image.tokens, cls_only=True)
    assert short.shape == (B, 1, 16)
    torch.testing.assert_close(short, whole[:, :1])
    torch.testing.assert_close(model.itm(short), model.itm(whole))


@torch.no_grad()
def test_one_image_for_all_texts(model: PersonSearchModel, images: Tensor, ids: Tensor, mask: Tensor) -> None:
    image, text = model.encode_image(images[:1]).tokens, model.encode_text(ids, mask).tokens
    copied = model.fuse(text, mask, image.expand(B, -1, -1))
    torch.testing.assert_close(model.fuse(text, mask, image), copied)
    torch.testing.assert_close(model.fuse(text, mask, model.project_image(image)), copied)
    torch.testing.assert_close(model.fuse(text, mask, image, cls_only=True), copied[:, :1])
    shared, single = AttentionMaps(), AttentionMaps()
    torch.testing.assert_close(model.fuse(text, mask, image, maps=shared), copied)
    model.fuse(text, mask, image.expand(B, -1, -1), maps=single)
    torch.testing.assert_close(shared.cross, single.cross)


@torch.no_grad()
def test_image_index_says_who_looks_where(model: PersonSearchModel, images: Tensor, ids: Tensor, mask: Tensor) -> None:
    image, text = model.encode_image(images).tokens, model.encode_text(ids, mask).tokens
    texts, looks_at = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([2, 2, 0, 1, 0])
    given_index = model.fuse(text[texts], mask[texts], model.project_image(image), looks_at)
    torch.testing.assert_close(given_index, model.fuse(text[texts], mask[texts], image[looks_at]))
    one_by_one = [model.fuse(text[t : t + 1], mask[t : t + 1], image[i : i + 1]) for t, i in zip(texts, looks_at)]  # noqa: B905
    torch.testing.assert_close(given_index, torch.cat(one_by_one))


@torch.no_grad()
def test_maps_change_no_output(model: PersonSearchModel, images: Tensor, ids: Tensor, mask: Tensor) -> None:
    whole, rows = AttentionMaps(), AttentionMaps(class_only=True)
    text = model.encode_text(ids, mask)
    torch.testing.assert_close(model.encode_text(ids, mask, whole), text)
    torch.testing.assert_close(model.encode_text(ids, mask, rows), text)
    image = model.encode_image(images).tokens
    fused = model.fuse(text.tokens, mask, image)
    torch.testing.assert_close(model.fuse(text.tokens, mask, image, maps=whole), fused)

    assert [maps.shape for maps in whole.text_self] == [(B, 4, L, L)] * 2
    assert [maps.shape for maps in whole.fusion_self] == [(B, 4, L, L)] * 2
    assert [maps.shape for maps in whole.cross] == [(B, 4, L, 1 + PATCHES)] * 2
    assert [maps.shape for maps in rows.text_self] == [(B, 4, 1, L)] * 2
    for row, full in zip(rows.text_self, whole.text_self, strict=True):
        torch.testing.assert_close(row, full[:, :, :1])
    for maps in (*whole.text_self, *whole.fusion_self, *whole.cross):
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    for maps in (*whole.text_self, *whole.fusion_self):
        assert (maps.masked_select(~mask[:, None, None]) == 0).all()  # nobody looks at padding


@settings(max_examples=25)
@given(
    length=st.integers(1, 6),
    tail=st.lists(st.integers(0, V - 1), min_size=1, max_size=5),
    neighbour=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_padding_changes_nothing(length: int, tail: list[int], neighbour: int, seed: int) -> None:
    """Whatever stands in the padding, and whoever else is in the batch."""
    model = plain()
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(5, V, (1, length), generator=generator)
    image = model.encode_image(torch.randn(1, 3, 32, 16, generator=generator)).tokens
    alone = model.encode_text(text, torch.ones(1, length))
    fused = model.fuse(alone.tokens, torch.ones(1, length), image)

    width = length + len(tail)
    padded = torch.stack([torch.cat([text[0], torch.tensor(tail)]), torch.randint(0, V, (width,), generator=generator)])
    mask = torch.arange(width) < torch.tensor([[length], [min(neighbour, width)]])
    batch = model.encode_text(padded, mask)
    torch.testing.assert_close(batch.tokens[:1, :length], alone.tokens)
    torch.testing.assert_close(batch.feature[:1], alone.feature)
    torch.testing.assert_close(model.fuse(batch.tokens, mask, image)[:1, :length], fused)


def test_evaluating_restores_the_mode() -> None:
    model = build(dropout=0.5)
    for training in (True, False):
        model.train(training)
        with evaluating(model):
            assert not model.training
            assert not model.word_embeddings(torch.tensor([1])).requires_grad
        assert model.training is training
        with pytest.raises(KeyError), evaluating(model):
            raise KeyError
        assert model.training is training


def test_dropout_acts_in_training_only(ids: Tensor, mask: Tensor) -> None:
    model = build(dropout=0.5).train()
    first, second = model.encode_text(ids, mask).feature, model.encode_text(ids, mask).feature
    assert not torch.allclose(first, second)
    with evaluating(model):
        assert torch.equal(model.encode_text(ids, mask).feature, model.encode_text(ids, mask).feature)
