"""Maps against brute force, localisation on cases with a known answer, pictures and tables, hostile captions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from agatool import attention, heatmaps, localisation, visualizing
from agatool.attention import Look, Pair
from agatool.config import ModelConfig, TextConvention
from agatool.data.prepare import Prepared, prepare
from agatool.errors import DataError, UsageError
from agatool.model import AttentionMaps, PersonSearchModel
from agatool.objective import fillable_ids
from agatool.runs import SHIPPED, is_model
from agatool.tokenization import Tokenizer, load_tokenizer

SAMPLE = Path(__file__).parent.parent / "sample_data"
CAPTIONS = ["A man in a red shirt.", "The woman carries a blue shoulder-bag and wears dark trousers"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Operations this small only lose by being shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare("sample", SAMPLE, tmp_path_factory.mktemp("data") / "sample", vocab_size=400)


@pytest.fixture(scope="module")
def tokenizer(prepared: Prepared) -> Tokenizer:
    return load_tokenizer(prepared.tokenizer, TextConvention())


def _model(tokenizer: Tokenizer, **changes: object) -> PersonSearchModel:
    torch.manual_seed(0)
    sizes = {
        "image_size": (48, 32), "patch": 8, "image_width": 24, "image_depth": 1, "image_heads": 2, "text_width": 16,
        "text_heads": 2, "text_mlp": 32, "text_layers": 1, "fusion_layers": 2, "embed_dim": 8,
        "vocab_size": tokenizer.vocab_size, "dropout": 0.5,
    }  # fmt: skip
    model = PersonSearchModel(ModelConfig.model_validate({**sizes, **changes}))
    model.tokenizer = tokenizer
    with torch.no_grad():  # the usual start is so small that every map would be flat
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and not name.startswith("image_encoder"):
                weight.normal_(0, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> PersonSearchModel:
    return _model(tokenizer)


@pytest.fixture(scope="module")
def image(prepared: Prepared) -> Path:
    return prepared.image_root / prepared.images["path"][0]


def _encode(model: PersonSearchModel, captions: list[str]) -> tuple[attention.Batch, Tensor, Tensor, Tensor]:
    """(batch, text tokens, image tokens, words [N, W, L]) of captions with an image of noise each."""
    encodings = model.tokenizer.encode(captions)
    batch = model.tokenizer.pad(encodings)
    noise = torch.rand(len(captions), 3, *model.config.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        text, image = model.encode_text(batch.ids, batch.mask).tokens, model.encode_image(noise).tokens
    spans = [encoding.words for encoding in encodings]
    return batch, text, image, attention.token_words(encodings, spans, batch.ids.shape[1])


# -- maps ---------------------------------------------------------------------------------------------------------


def test_attention_is_the_mean_over_a_words_tokens_without_the_class_column(model: PersonSearchModel) -> None:
    batch, text, image, words = _encode(model, CAPTIONS)
    seen, match = attention.look_words(model, text, batch.mask, image, words)
    maps = AttentionMaps()
    with torch.no_grad():
        logits = model.itm(model.fuse(text, batch.mask, image, maps=maps))
    assert match.tolist() == pytest.approx(logits.softmax(-1)[:, 1].tolist(), rel=1e-5)
    assert (batch.word_of == 0).sum() >= 2
    for layer, caption, head in itertools.product(range(2), range(2), range(2)):
        for word in range(int(batch.word_of[caption].max()) + 1):
            tokens = [n for n, of in enumerate(batch.word_of[caption].tolist()) if of == word]
            expected = sum(maps.cross[layer][caption, head, token, 1:] for token in tokens) / len(tokens)
            torch.testing.assert_close(seen.attention[layer, caption, word, head], expected)


def test_gradcam_is_attention_times_the_positive_gradient() -> None:
    weights = [torch.rand(2, 3, 5, 7, requires_grad=True) for _ in range(2)]
    slopes = [torch.randn(2, 3, 5, 7) for _ in range(2)]
    words = torch.zeros(2, 1, 5)
    words[:, 0, 3] = 1
    target = sum((w * s).sum() for w, s in zip(weights, slopes, strict=True))
    seen = attention.views(weights, [torch.ones(2, 3, 7)] * 2, target, words)
    for layer in range(2):
        expected = (weights[layer] * slopes[layer].clamp(min=0))[:, :, 3, 1:]
        torch.testing.assert_close(seen.gradcam[layer, :, 0], expected)


@torch.no_grad()
def test_norm_is_the_length_of_what_a_patch_adds(model: PersonSearchModel) -> None:
    """Of weight times value vector through the head's part of the output projection, written out patch by patch."""
    batch, text, image, words = _encode(model, CAPTIONS[:1])
    seen, _ = attention.look_words(model, text, batch.mask, image, words)
    word = int((words[0].sum(1) == 1).nonzero()[0])  # of one token
    for layer, (_, value) in enumerate(model.project_image(image)):
        output = model.fusion_layers[layer].cross_attention.output.weight
        for head, patch in itertools.product(range(2), (0, 5, 23)):
            added = seen.attention[layer, 0, word, head, patch] * value[0, head, 1 + patch]
            expected = (output[:, 8 * head : 8 * head + 8] @ added).norm()
            torch.testing.assert_close(seen.norm[layer, 0, word, head, patch], expected, atol=1e-6, rtol=1e-4)


def test_a_pair_is_seen_the_same_in_any_batch(model: PersonSearchModel) -> None:
    batch, text, image, words = _encode(model, CAPTIONS)
    together, matches = attention.look_words(model, text, batch.mask, image, words)
    one, one_text, _, one_words = _encode(model, CAPTIONS[:1])
    alone, match = attention.look_words(model, one_text, one.mask, image[:1], one_words)
    count = one_words.shape[1]
    for several, single in zip(together, alone, strict=True):
        torch.testing.assert_close(several[:, :1, :count], single, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(matches[:1], match)


def test_gradcam_of_the_match_needs_an_earlier_layer(model: PersonSearchModel) -> None:
    batch, text, image, words = _encode(model, CAPTIONS)
    seen, _ = attention.look_words(model, text, batch.mask, image, words)
    assert seen.gradcam[-1].abs().max() == 0
    assert seen.gradcam[0].max() > 0
    with pytest.raises(UsageError, match="last fusion layer"):
        Look("words", "gradcam", layer=2).settled(model)
    assert Look("masked", "gradcam", layer=2).settled(model).layer == 2


@pytest.mark.parametrize("method", ["attention", "norm", "occlusion"])
def test_masked_mode_does_not_see_the_word(model: PersonSearchModel, image: Path, method: attention.Method) -> None:
    look = Look("masked", method).settled(model)
    red, blue = (
        attention.explain(model, Pair("a", image, f"A man in a {colour} shirt"), look, [colour])
        for colour in ("red", "blue")
    )
    assert [word.text for word in red.shown] == ["red"]
    if method != "occlusion":  # that one asks for the logit of the word that was there
        np.testing.assert_array_equal(red.shown[0].heat, blue.shown[0].heat)
    assert red.shown[0].guesses == blue.shown[0].guesses
    assert red.match != blue.match


@pytest.mark.parametrize("mode", attention.MODES)
@pytest.mark.parametrize("method", attention.READ_OFF)
@pytest.mark.parametrize("head", ["mean", "max", "2"])
def test_every_way_to_look_gives_a_map(
    model: PersonSearchModel, image: Path, mode: attention.Mode, method: attention.Method, head: str
) -> None:
    look = Look(mode, method, 1, head).settled(model)
    explained = attention.explain(model, Pair("a", image, CAPTIONS[1]), look, ["all"])
    assert len(explained.shown) == len(explained.words) == 10
    for word in explained.shown:
        assert word.heat is not None
        assert word.heat.shape == (6, 4)
        assert (word.heat >= 0).all()
        assert len(word.guesses) == (5 if mode == "masked" else 0)
    assert any(word.heat is not None and word.heat.max() > 0 for word in explained.shown)


def test_head_mean_and_max_are_over_the_heads(model: PersonSearchModel, image: Path) -> None:
    def heat(head: str) -> np.ndarray:
        look = Look("words", "attention", 2, head).settled(model)
        word = attention.explain(model, Pair("a", image, CAPTIONS[0]), look, ["red"]).shown[0]
        assert word.heat is not None
        return word.heat

    first, second = heat("1"), heat("2")
    assert not np.allclose(first, second)
    np.testing.assert_allclose(heat("mean"), (first + second) / 2, rtol=1e-5)
    np.testing.assert_array_equal(heat("max"), np.maximum(first, second))


@pytest.mark.parametrize(
    ("size", "patch", "stem", "grid"),
    [((48, 32), 16, "patch", (3, 2)), ((32, 96), 8, "patch", (4, 12)), ((40, 24), 16, "conv", (3, 2))],
)
def test_any_grid(
    tokenizer: Tokenizer, image: Path, size: tuple[int, int], patch: int, stem: str, grid: tuple[int, int]
) -> None:
    other = _model(tokenizer, image_size=size, patch=patch, stem=stem, text_heads=4, fusion_layers=3)
    explained = attention.explain(
        other, Pair("a", image, CAPTIONS[0]), Look(method="attention", head="4").settled(other), ["shirt"]
    )
    assert explained.shown[0].heat is not None
    assert explained.shown[0].heat.shape == grid


@pytest.mark.parametrize(("layers", "layer"), [(1, 1), (2, 1), (6, 3)])
def test_default_layer_depends_on_how_many_there_are(tokenizer: Tokenizer, layers: int, layer: int) -> None:
    other = _model(tokenizer, fusion_layers=layers)
    if layers == 1:
        with pytest.raises(UsageError, match="last fusion layer"):
            Look(method="gradcam").settled(other)
    else:
        assert Look(method="gradcam").settled(other).layer == layer


@pytest.mark.parametrize(("changes", "message"), [
    ({"layer": 3}, "2 fusion layers"), ({"layer": -1}, "2 fusion layers"), ({"head": "3"}, "2 heads"),
    ({"head": "0"}, "2 heads"), ({"head": "median"}, "2 heads"),
])  # fmt: skip
def test_looks_that_the_model_does_not_have(model: PersonSearchModel, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(Look(method="attention"), **changes).settled(model)


def test_occlusion_has_no_layers(model: PersonSearchModel) -> None:
    for look in (Look(method="occlusion", layer=1), Look(method="occlusion", head="max")):
        with pytest.raises(UsageError, match="no --layer"):
            look.settled(model)


@pytest.mark.parametrize("size", [(128, 64), (48, 32), (17, 90), (1, 1), (96, 96)])
def test_every_cell_is_hidden_equally_often(size: tuple[int, int]) -> None:
    image = torch.rand(1, 3, *size) + 1
    images, covers = attention.occluded(image)
    assert len(images) == 1 + len(covers)
    assert torch.equal(images[:1], image)
    assert (covers.sum(0) == 4).all()
    for hidden, cover in zip(images[1:], covers, strict=True):
        gone = (hidden == 0).all(0)
        assert torch.equal(hidden[:, ~gone], image[0][:, ~gone])
        assert gone.any()
        assert gone.float().mean() == pytest.approx(float(cover.mean()), abs=0.1)
    assert 20 <= covers[0].numel() <= 45 or min(size) == 1


def test_occlusion_is_the_mean_loss_over_the_windows(model: PersonSearchModel) -> None:
    encoding = model.tokenizer.encode(CAPTIONS[1:])
    batch = model.tokenizer.pad(encoding)
    word = attention.token_words(encoding, [[encoding[0].words[5]]], batch.ids.shape[1])[0].bool()
    assert word.sum() > 1  # several pieces
    image = torch.rand(1, 3, *model.config.image_size, generator=torch.Generator().manual_seed(2))
    heat = attention.look_occluded(model, batch, image, word)

    def figures(pixels: Tensor) -> tuple[float, float]:
        with torch.no_grad():
            tokens = model.encode_image(pixels[None]).tokens
            fused = []
            for ids in (batch.ids, batch.ids.masked_fill(word, model.tokenizer.mask_id)):
                fused.append(model.fuse(model.encode_text(ids, batch.mask).tokens, batch.mask, tokens))
            odds = [model.itm(states)[0, 1] - model.itm(states)[0, 0] for states in fused]
            places = word[0].nonzero()[:, 0]
            logits = model.mlm(fused[1][0, places])
            return float(odds[0] - odds[1]), float(sum(logits[n, batch.ids[0, at]] for n, at in enumerate(places)))

    images, covers = attention.occluded(image)
    found = np.array([figures(pixels) for pixels in images])
    for mode, column in (("words", 0), ("masked", 1)):
        lost = found[0, column] - found[1:, column]
        for row, cell in np.ndindex(*covers.shape[1:]):
            expected = max(0.0, lost[covers[:, row, cell].numpy() > 0].mean())
            assert heat[mode][0, row, cell] == pytest.approx(expected, abs=1e-4)


def test_guesses_of_one_piece(tokenizer: Tokenizer) -> None:
    logits = torch.randn(1, tokenizer.vocab_size + 3, generator=torch.Generator().manual_seed(0))
    fits = fillable_ids(tokenizer, logits.shape[1])
    chances = logits[0].masked_fill(~fits, float("-inf")).softmax(-1)
    best = chances.argsort(descending=True)[:5].tolist()
    original = tokenizer.encode(["man"])[0].ids[1]
    found = attention.guesses(logits, [original], tokenizer)
    assert [word for word, _ in found] == [tokenizer.piece(piece) for piece in best]
    assert [chance for _, chance in found] == pytest.approx(chances[best].tolist())


def test_guesses_of_several_pieces_are_the_best_combinations(tokenizer: Tokenizer) -> None:
    originals = tokenizer.encode(["t-shirqq"])[0].ids[1:-1]
    pieces = [tokenizer.piece(number) for number in originals]
    hyphen = pieces.index("-")
    assert pieces[-1].startswith("##")
    logits = torch.randn(len(originals), tokenizer.vocab_size, generator=torch.Generator().manual_seed(0))
    continues = torch.tensor([tokenizer.is_continuation(number) for number in range(tokenizer.vocab_size)])
    best = []  # the five best of each place: no other can be in the five best combinations
    for place, piece in enumerate(pieces):
        allowed = continues if piece.startswith("##") else fillable_ids(tokenizer, tokenizer.vocab_size)
        chances = logits[place].masked_fill(~allowed, float("-inf")).softmax(-1)
        best.append([(originals[hyphen], 1.0)] if place == hyphen else
                    [(int(n), float(chances[n])) for n in chances.argsort(descending=True)[:5]])  # fmt: skip
    words = {
        tokenizer.decode_word([n for n, _ in choice]): float(np.prod([p for _, p in choice]))
        for choice in itertools.product(*best)
    }
    expected = sorted(words.items(), key=lambda word: -word[1])[:5]
    found = attention.guesses(logits, originals, tokenizer)
    assert [word for word, _ in found] == [word for word, _ in expected]
    assert all("-" in word for word, _ in found)
    assert [chance for _, chance in found] == pytest.approx([chance for _, chance in expected], rel=1e-4)


def test_token_words_take_every_word_that_a_span_touches(tokenizer: Tokenizer) -> None:
    caption = "a dark shoulder bag"
    encoding = tokenizer.encode([caption])[0]
    members = attention.token_words([encoding], [[(7, 19), (0, 1)]], len(encoding.ids))[0]
    assert {encoding.word_of[n] for n in members[0].nonzero()[:, 0].tolist()} == {2, 3}
    assert {encoding.word_of[n] for n in members[1].nonzero()[:, 0].tolist()} == {0}


# -- localisation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(8, 4), (3, 5), (1, 1), (1, 6)])
def test_upsampling_keeps_flat_maps_flat_and_peaks_in_the_middle_of_their_patch(grid: tuple[int, int]) -> None:
    size = (grid[0] * 16, grid[1] * 8)
    np.testing.assert_allclose(localisation.upsample(np.full((1, *grid), 3.0), size), 3.0, rtol=1e-5)
    for row, column in np.ndindex(grid):
        one = np.zeros((1, *grid))
        one[0, row, column] = 1
        heat = localisation.upsample(one, size)[0]
        down, right = np.unravel_index(heat.argmax(), size)
        if grid[0] > 1:
            assert abs(down + 0.5 - 16 * (row + 0.5)) < 1
        if grid[1] > 1:
            assert abs(right + 0.5 - 8 * (column + 0.5)) < 1
        assert heat.min() >= 0


def test_heat_does_not_rise_again_at_the_border() -> None:
    heat = localisation.upsample(np.array([[[0.1, 1, 0.2]] * 3]), (48, 48))[0, 24]
    assert (np.diff(heat[8:24]) >= 0).all()
    assert heat[:8].max() < 0.15
    assert heat[-8:].max() < 0.25


def test_a_peak_between_two_hot_patches_lies_between_them() -> None:
    heat = localisation.upsample(np.array([[[0, 1, 1, 0.0]] * 3]), (48, 64))[0]
    assert heat.max(0).argmax() in (31, 32)


def test_score_of_known_maps() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[:, :2, :2] = True  # a quarter of the image
    heat = np.zeros((4, 4, 4))
    heat[0, 0, 0], heat[0, 3, 3] = 3, 1  # peak inside, a quarter of the heat outside
    heat[1, 0, 0], heat[1, 3, 3] = 1, 3  # peak outside
    heat[2, 0, 0] = heat[2, 3, 3] = 2  # two peaks, one inside; map 3 has no heat at all
    share, hit = localisation.score(heat, mask)
    assert share.tolist() == pytest.approx([0.75, 0.25, 0.5, 0.25])
    assert hit.tolist() == pytest.approx([1, 0, 0.5, 0.25])


def test_centre_blob_and_coverage() -> None:
    blob = localisation.centre_blob((9, 5))
    assert np.unravel_index(blob.argmax(), blob.shape) == (4, 2)
    np.testing.assert_allclose(blob, blob[::-1, ::-1])
    mask = np.zeros((1, 10, 6), bool)
    mask[0, :5, 2:] = True
    np.testing.assert_allclose(localisation.coverage(mask, (2, 3)), [[[0, 1, 1], [0, 0, 0]]])
    uneven = localisation.coverage(mask, (3, 2))
    assert uneven.shape == (1, 3, 2)
    assert uneven[0, 2].tolist() == [0, 0]


def test_measure(model: PersonSearchModel, prepared: Prepared, tmp_path: Path) -> None:
    table = visualizing.measure(model, prepared, "test", 4, tmp_path)
    written = pd.read_csv(tmp_path / "localisation.csv")
    assert written.columns.tolist() == table.columns.tolist()
    assert set(table["method"]) == {*attention.READ_OFF, "occlusion", "uniform", "centre", "best of grid"}
    settings = set(zip(table["mode"], table["method"], table["layer"], strict=True))
    assert ("words", "gradcam", "1") in settings
    assert ("words", "gradcam", "2") not in settings  # zero by construction
    assert {("masked", method, layer) for method in attention.READ_OFF for layer in "12"} <= settings
    assert set(table["class"]) == {*localisation.CLASSES, localisation.JUDGED}
    assert table.groupby("class")["words"].nunique().eq(1).all()  # every setting judged the same words
    rows = table.set_index(["method", "class"])
    for kind in localisation.CLASSES:
        uniform, centre, best = (rows.loc[(name, kind)] for name in ("uniform", "centre", "best of grid"))
        assert uniform["pointing"] == pytest.approx(uniform["heat_share"])
        assert best["pointing"] > uniform["pointing"]
        assert centre["times_centre"] == pytest.approx(1) or centre["pointing"] == 0
    for _, setting in table.groupby(["mode", "method", "layer", "head"]):
        of = setting.set_index("class")
        both, parts = of.loc[localisation.JUDGED], of.loc[["garment", "colour"]]
        assert both["words"] == parts["words"].sum()
        assert both["pointing"] == pytest.approx((parts["pointing"] * parts["words"]).sum() / both["words"])
    again = visualizing.measure(model, prepared, "test", 4, tmp_path)
    pd.testing.assert_frame_equal(table, again)
    mode, *_ = localisation.best_setting(table, "masked")
    assert mode == "masked"
    assert len(json.loads(json.dumps(localisation.records(table), allow_nan=False))) == len(table)
    header, cells = localisation.table_rows(table)
    assert all(len(row) == len(header) for row in cells)


def test_masks_show_what_the_words_name(prepared: Prepared) -> None:
    truth = localisation.read_masks(prepared)
    paths = prepared.images.set_index("image_id")["path"]
    seen = set()
    for row in prepared.captions.head(20).itertuples():
        words = truth.words[row.caption_id]
        for word, mask in zip(words, truth.masks(paths[row.image_id], words), strict=True):
            assert row.caption[word.start : word.end] == word.text
            assert not word.wrong
            assert mask.shape == (128, 64)
            assert mask.any(), f"{word.text} is not in the picture"
            seen.add(localisation.word_kind(word))
    assert seen == set(localisation.CLASSES)


def test_measure_needs_masks(model: PersonSearchModel, prepared: Prepared, tmp_path: Path) -> None:
    other = replace(prepared, image_root=tmp_path / "imgs")
    with pytest.raises(DataError, match="no part masks"):
        visualizing.measure(model, other, "test", 5, tmp_path)


@pytest.mark.parametrize("path", ["../../secret.jpg", "/etc/passwd", "missing.jpg"])
def test_masks_stay_in_their_folder(prepared: Prepared, path: str) -> None:
    truth = localisation.read_masks(prepared)
    with pytest.raises(DataError):
        truth.masks(path, next(iter(truth.words.values())))


@pytest.mark.slow
@pytest.mark.skipif(not is_model(SHIPPED), reason="this copy has no shipped weights")
def test_shipped_weights_point_better_than_the_centre(prepared: Prepared, tmp_path: Path) -> None:
    from agatool import load

    table = visualizing.measure(load(SHIPPED), prepared, "test", 80, tmp_path)
    assert localisation.best_setting(table, "masked")[1] == "norm"
    for mode in attention.MODES:
        mine = Look(mode).settled(load(SHIPPED))
        rows = table[(table["mode"] == mode) & (table["method"] == mine.method) & (table["head"] == mine.head)]
        rows = rows[rows["layer"] == str(mine.layer)].set_index("class")
        assert rows.loc["colour", "times_centre"] > 2
        assert rows.loc[localisation.JUDGED, "times_centre"] > 1.5


# -- pairs, pictures, tables ----------------------------------------------------------------------------------------


def test_dataset_pairs(prepared: Prepared) -> None:
    pairs = visualizing.dataset_pairs(prepared, "test", 4)
    assert len({pair.name for pair in pairs}) == 4
    assert all(pair.image.is_file() for pair in pairs)
    (one,) = visualizing.dataset_pairs(prepared, "test", 4, query=7)
    assert (one.name, one.caption) == ("caption-7", prepared.captions["caption"][7])
    with pytest.raises(DataError, match="no caption 9999"):
        visualizing.dataset_pairs(prepared, "test", 4, query=9999)


@pytest.mark.parametrize(("total", "count"), [(10, 3), (3, 10), (7, 7), (1, 1)])
def test_spread(total: int, count: int) -> None:
    chosen = visualizing.spread(total, count)
    assert len(chosen) == len(set(chosen)) == min(count, total)
    assert chosen == sorted(chosen)
    assert chosen[-1] < total


def test_captions_file_in_any_schema(tmp_path: Path) -> None:
    (tmp_path / "imgs").mkdir()
    Image.new("RGB", (20, 40), "red").save(tmp_path / "imgs" / "a.png")
    (tmp_path / "list.json").write_text(
        json.dumps([
            {"img_path": "a.png", "captions": ["A red man", "He is red"], "id": 3, "split": "test"},
            {"img_path": "../a.png", "captions": ["A way out"], "id": 4},
            "no record",
            {"file_path": "a.png", "caption": "Nobody in particular"},
        ])
    )  # fmt: skip
    pairs = visualizing.captions_pairs(tmp_path / "list.json", None, None)
    assert [pair.caption for pair in pairs] == ["A red man", "He is red", "Nobody in particular"]
    assert {pair.image for pair in pairs} == {tmp_path / "imgs" / "a.png"}
    assert len({pair.name for pair in pairs}) == 3
    assert len(visualizing.captions_pairs(tmp_path / "list.json", None, 2)) == 2
    (tmp_path / "table.csv").write_text("image,caption\nimgs/a.png,red\n")
    assert visualizing.captions_pairs(tmp_path / "table.csv", tmp_path, None)[0].image.is_file()
    (tmp_path / "empty.jsonl").write_text('{"caption": "no image"}\n')
    with pytest.raises(DataError, match="no usable record"):
        visualizing.captions_pairs(tmp_path / "empty.jsonl", None, None)


@pytest.mark.parametrize("text", ["", "   ", "a\x00b", "x" * 20_000])
def test_texts_that_are_none(image: Path, text: str) -> None:
    with pytest.raises(UsageError, match="--text"):
        visualizing.single_pair(image, text)


def test_files_of_visualize(model: PersonSearchModel, prepared: Prepared, tmp_path: Path) -> None:
    pairs = visualizing.dataset_pairs(prepared, "test", 2)
    explained = visualizing.visualize(model, pairs, Look("masked"), None, tmp_path / "one")
    names = {f"{pair.name}.png" for pair in pairs}
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert files == names | {"contact_sheet.png", "maps.csv", "words.csv", "pairs.csv"}
    maps = pd.read_csv(tmp_path / "one" / "maps.csv")
    assert maps.columns.tolist() == ["pair", "number", "word", "row", "column", "value"]
    assert len(maps) == sum(len(one.shown) for one in explained) * 6 * 4
    first = maps[(maps["pair"] == pairs[0].name) & (maps["number"] == explained[0].shown[0].number)]
    heat = first.pivot(index="row", columns="column", values="value").to_numpy()
    np.testing.assert_allclose(heat, explained[0].shown[0].heat, atol=1e-6)
    words = pd.read_csv(tmp_path / "one" / "words.csv", na_filter=False)
    assert words.groupby("pair")["class_attention"].sum().tolist() == pytest.approx([1, 1], abs=1e-5)
    assert words["guesses"].str.count(":").max() == 5
    told = json.loads(json.dumps(visualizing.summary(explained)))
    assert [each["pair"] for each in told] == [pair.name for pair in pairs]
    assert [word["word"] for word in told[0]["words"]] == [word.text for word in explained[0].shown]
    visualizing.visualize(model, pairs, Look("masked"), None, tmp_path / "two")
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_other_formats_give_the_same_bytes_again(
    model: PersonSearchModel, image: Path, tmp_path: Path, suffix: visualizing.Format
) -> None:
    pair = visualizing.single_pair(image, "A man in a red shirt")
    for folder in ("one", "two"):
        visualizing.visualize(model, [pair], Look(), "red", tmp_path / folder, suffix)
    one, two = (tmp_path / folder / f"{pair.name}.{suffix}" for folder in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert len(one.read_bytes()) > 5000


@pytest.mark.parametrize(
    "caption",
    ["costs $5_{000}$ or $\\frac{1$", "红色 衣服 🙂", "!!!", "<b>bold</b> & 'quotes'", "w" * 400, "red " * 300],
)
def test_captions_that_are_hard_to_draw(model: PersonSearchModel, image: Path, tmp_path: Path, caption: str) -> None:
    words = None if caption.startswith("red") else "all"
    visualizing.visualize(model, [Pair("a", image, caption)], Look("masked"), words, tmp_path)
    with Image.open(tmp_path / "a.png") as picture:
        assert max(picture.size) < 20_000


@pytest.mark.parametrize("size", [(3, 200), (200, 3), (1, 1), (64, 64)])
def test_images_of_any_shape(model: PersonSearchModel, tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, "green").save(tmp_path / "any.png")
    pair = visualizing.single_pair(tmp_path / "any.png", "A man in a red shirt")
    (explained,) = visualizing.visualize(model, [pair], Look(), "red", tmp_path / "out")
    assert explained.shown[0].text == "red"


def test_words_that_are_not_there(model: PersonSearchModel, image: Path, tmp_path: Path) -> None:
    pairs = [visualizing.single_pair(image, "A man in a Red shirt")]
    with pytest.raises(UsageError, match="no caption has any") as caught:
        visualizing.visualize(model, pairs, Look(), "purple", tmp_path / "out")
    assert "shirt" in caught.value.hint
    assert not (tmp_path / "out").exists()
    (explained,) = visualizing.visualize(model, pairs, Look(), " RED , purple", tmp_path / "out")
    assert [word.text for word in explained.shown] == ["Red"]


def test_default_words_are_those_of_most_class_attention(model: PersonSearchModel, image: Path) -> None:
    explained = attention.explain(model, Pair("a", image, CAPTIONS[1]), Look().settled(model))
    shown = {word.number for word in explained.shown}
    assert len(shown) == attention.SHOWN_WORDS
    least = min(word.attention for word in explained.shown)
    assert all(word.attention <= least for word in explained.words if word.number not in shown)
    assert sum(word.attention for word in explained.words) == pytest.approx(1, abs=1e-5)


def test_output_folder_is_claimed(tmp_path: Path) -> None:
    visualizing.claim_output(tmp_path / "new", overwrite=False)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("all of it")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="left alone"):
            visualizing.claim_output(foreign, overwrite)
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "maps.csv").write_text("pair\n")
    with pytest.raises(UsageError, match="not empty"):
        visualizing.claim_output(ours, overwrite=False)
    visualizing.claim_output(ours, overwrite=True)
    assert not ours.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        visualizing.claim_output(tmp_path / "file", overwrite=True)


def test_shaded_caption_keeps_every_character() -> None:
    from matplotlib import pyplot as plt

    caption = "A man's t-shirt, (very) red.  Shoes"
    shades = [(0, 1, 0.1), (2, 7, 0.5), (8, 15, 1.0), (18, 22, 0.2), (24, 27, 0.9), (30, 35, 0.3)]
    figure = plt.figure()
    lines = heatmaps._wrapped(figure, caption, shades, 1.0)
    plt.close(figure)
    assert len(lines) > 2
    pieces = [piece for line in lines for piece in line]
    assert "".join(text for _, _, text, _ in pieces) == "".join(caption.split())
    assert {(text, shade) for _, _, text, shade in pieces if shade} == {
        (caption[start:end], shade) for start, end, shade in shades
    }
    assert all(left + width <= 1.0 or left == 0 for line in lines for left, width, _, _ in line)
