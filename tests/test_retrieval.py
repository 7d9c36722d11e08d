"""top-k against a full sort, image-by-image re-ranking against the plain way, tails, and the protocol end to end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from agatool import retrieval
from agatool.config import EvalConfig, ModelConfig, TextConvention
from agatool.data.images import decode_image, eval_transform, to_tensor
from agatool.encoding import ImageSet, TextSet, encode_images, encode_texts, inference, pack_texts
from agatool.errors import CheckpointError, DataError
from agatool.metrics import METRICS, rank_metrics, summarise
from agatool.model import PersonSearchModel
from agatool.tokenization import Tokenizer, load_tokenizer, train_tokenizer

PEOPLE, COLOURS = 4, ("red", "green", "blue", "white", "black", "yellow")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Operations this small only lose by being shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """12 images of 4 people, 2 captions each of quite different lengths; person 9 is only in `lonely`."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    images, captions = [], []
    for number in range(12):
        path = f"p{number}.png"
        Image.fromarray(rng.integers(0, 255, (32, 16, 3), dtype=np.uint8)).save(root / path)
        images.append((100 + number, path, 7 + number % PEOPLE, "test"))
        for tail in ("", " and " + " ".join(rng.choice(COLOURS, 12))):
            captions.append((len(captions), 100 + number, f"a person in {rng.choice(COLOURS)} trousers{tail}"))
    image_table = pd.DataFrame(images, columns=["image_id", "path", "person_id", "split"])
    caption_table = pd.DataFrame(captions, columns=["caption_id", "image_id", "caption"])

    def split(name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        if name == "empty":
            return image_table[:0], caption_table[:0]
        return image_table, caption_table

    return SimpleNamespace(image_root=root, images=image_table, captions=caption_table, split=split)


@pytest.fixture(scope="module")
def tokenizer(prepared: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(prepared.captions["caption"], out, vocab_size=120)
    return load_tokenizer(out, TextConvention())


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> PersonSearchModel:
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=(32, 16), patch=8, image_width=24, image_depth=1, image_heads=2, text_width=16, text_heads=2,
        text_mlp=32, text_layers=1, fusion_layers=2, embed_dim=8, vocab_size=tokenizer.vocab_size, dropout=0.5,
    )  # fmt: skip
    model = PersonSearchModel(config)
    with torch.no_grad():  # the usual start is so small that every pair would score the same
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and not name.startswith("image_encoder"):
                weight.normal_(0, 0.3)
    return model  # in training mode, which every function must leave and come back to


@pytest.fixture(scope="module")
def paths(prepared: SimpleNamespace) -> list[Path]:
    return [prepared.image_root / path for path in prepared.images["path"]]


@pytest.fixture(scope="module")
def images(model: PersonSearchModel, paths: list[Path]) -> ImageSet:
    return encode_images(model, paths, batch_size=5)


@pytest.fixture(scope="module")
def texts(model: PersonSearchModel, tokenizer: Tokenizer, prepared: SimpleNamespace) -> TextSet:
    return encode_texts(model, tokenizer, prepared.captions["caption"].tolist(), batch_size=7)


def plain_itm(model: PersonSearchModel, tokenizer: Tokenizer, caption: str, path: Path) -> list[float]:
    """One pair, nothing shared, nothing padded, every output computed."""
    model.eval()
    with torch.no_grad():
        pixels = to_tensor(decode_image(path), model.config.image_size)[None]
        image = model.encode_image(eval_transform(pixels, model.config.image_mean, model.config.image_std))
        batch = tokenizer.pad(tokenizer.encode([caption]))
        text = model.encode_text(batch.ids, batch.mask)
        score = model.itm(model.fuse(text.tokens, batch.mask, image.tokens))[0].tolist()
    model.train()
    return score


# --- encoding ---


def test_batching_does_not_change_the_features(
    model: PersonSearchModel, tokenizer: Tokenizer, prepared: SimpleNamespace, images: ImageSet, texts: TextSet
) -> None:
    paths = [prepared.image_root / path for path in prepared.images["path"]]
    captions = prepared.captions["caption"].tolist()
    for row in (0, 4, 5, 11):
        alone = encode_images(model, [paths[row]], 1)
        torch.testing.assert_close(images.features[row], alone.features[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(images.kept[row], alone.kept[0], atol=1e-5, rtol=0)
    for row in (0, 1, 13, 23):
        alone_text = encode_texts(model, tokenizer, [captions[row]], 1)
        torch.testing.assert_close(texts.features[row], alone_text.features[0], atol=1e-5, rtol=0)
        mine = texts.tokens[texts.starts[row] :][: texts.lengths[row]]
        torch.testing.assert_close(mine, alone_text.tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(texts.features.norm(dim=1), torch.ones(len(captions)))
    assert model.training


@pytest.mark.parametrize("kept", [0, 5, 12])
def test_tokens_beyond_the_memory_are_encoded_again(
    model: PersonSearchModel, paths: list[Path], images: ImageSet, kept: int
) -> None:
    one = images.kept[0].numel() * 4
    small = encode_images(model, paths, 5, keep_bytes=kept * one + 3)
    assert len(small.kept) == kept
    wanted = [1, 4, 5, 6, 11]
    with inference(model, bf16=False):
        found = torch.cat(list(small.tokens(wanted)))
    torch.testing.assert_close(found, images.kept[wanted], atol=1e-5, rtol=0)


def test_a_broken_image_is_named(model: PersonSearchModel, paths: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"broken\.png"):
        encode_images(model, [*paths, broken, *paths], 3)
    assert model.training


def test_a_model_that_gives_nan_is_refused(model: PersonSearchModel, paths: list[Path]) -> None:
    broken = PersonSearchModel(model.config)
    torch.nn.init.constant_(broken.vision_proj.weight, float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        encode_images(broken, paths, 4)


def test_nothing_to_encode(model: PersonSearchModel, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError):
        encode_images(model, [], 4)
    with pytest.raises(DataError):
        encode_texts(model, tokenizer, [], 4)


# --- top k ---


def small_integers(rows: int) -> st.SearchStrategy[list[list[int]]]:
    """Vectors whose products are exact in float32 and often equal."""
    return st.lists(st.lists(st.integers(-1, 1), min_size=3, max_size=3), min_size=rows, max_size=12)


@given(small_integers(0), small_integers(0), st.integers(0, 15), st.integers(1, 40))
@settings(deadline=None)
def test_top_k_is_the_head_of_a_stable_sort(
    query_rows: list[list[int]], gallery_rows: list[list[int]], k: int, chunk: int
) -> None:
    queries = torch.tensor(query_rows, dtype=torch.float32).view(-1, 3)
    gallery = torch.tensor(gallery_rows, dtype=torch.float32).view(-1, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_CHUNK_SCORES", chunk)
        scores, indices = retrieval.top_k(queries, gallery, k)
    full = (queries @ gallery.T).numpy()
    expected = np.argsort(-full, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indices.numpy(), expected)
    np.testing.assert_array_equal(scores.numpy(), np.take_along_axis(full, expected, axis=1))


# --- re-ranking ---


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_image_by_image_equals_pair_by_pair(
    model: PersonSearchModel,
    tokenizer: Tokenizer,
    prepared: SimpleNamespace,
    paths: list[Path],
    images: ImageSet,
    texts: TextSet,
    batch_size: int,
) -> None:
    rng = np.random.default_rng(0)
    text_index, image_index = rng.integers(0, 24, 20), rng.choice([0, 2, 7, 11], 20)
    actual = retrieval.rerank(model, texts, images, text_index, image_index, batch_size)
    captions = prepared.captions["caption"]
    expected = [
        plain_itm(model, tokenizer, captions[text], paths[image])
        for text, image in zip(text_index, image_index, strict=True)
    ]
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)
    assert actual.std() > 0.01  # the comparison says something
    assert actual.dtype == np.float32


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(
    model: PersonSearchModel, paths: list[Path], images: ImageSet, texts: TextSet, threads: int
) -> None:
    text_index, image_index = np.arange(48) % 24, np.arange(48) // 4
    expected = retrieval.rerank(model, texts, images, text_index, image_index, 3)
    again = encode_images(model, paths, 5, keep_bytes=0)
    torch.set_num_threads(threads)
    try:
        np.testing.assert_array_equal(retrieval.rerank(model, texts, images, text_index, image_index, 3), expected)
        encoded_again = retrieval.rerank(model, texts, again, text_index, image_index, 3)
        np.testing.assert_allclose(encoded_again, expected, atol=1e-5)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


def test_directions_share_their_pairs(
    model: PersonSearchModel, images: ImageSet, texts: TextSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    t2i = retrieval.top_k(texts.features, images.features, 5)[1]
    i2t = retrieval.top_k(images.features, texts.features, 5)[1]
    seen: list[tuple[int, int]] = []
    plain = retrieval.rerank

    def spy(*arguments: object, **options: object) -> np.ndarray:
        seen.extend(zip(arguments[3].tolist(), arguments[4].tolist(), strict=True))  # type: ignore[attr-defined]
        return plain(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(retrieval, "rerank", spy)
    both = retrieval.rerank_candidates(model, texts, images, {"t2i": t2i, "i2t": i2t}, 8)
    assert len(seen) == len(set(seen)) < t2i.numel() + i2t.numel()
    for direction, candidates in (("t2i", t2i), ("i2t", i2t)):
        query = np.arange(len(candidates)).repeat(5)
        other = candidates.numpy().ravel()
        text, image = (query, other) if direction == "t2i" else (other, query)
        expected = plain(model, texts, images, text, image, 8)
        np.testing.assert_allclose(both[direction].flatten(0, 1), expected, atol=1e-5)  # type: ignore[index]


def test_no_pairs(model: PersonSearchModel, images: ImageSet, texts: TextSet) -> None:
    nothing = np.zeros(0, dtype=np.int64)
    assert retrieval.rerank(model, texts, images, nothing, nothing, 4).shape == (0, 2)


def test_bfloat16_is_close(
    model: PersonSearchModel, tokenizer: Tokenizer, paths: list[Path], prepared: SimpleNamespace
) -> None:
    captions = prepared.captions["caption"].tolist()
    scores = []
    for bf16 in (False, True):
        images = encode_images(model, paths, 5, bf16)
        texts = encode_texts(model, tokenizer, captions, 5, bf16)
        assert images.features.dtype == texts.features.dtype == torch.float32
        scores.append(retrieval.rerank(model, texts, images, np.arange(24), np.arange(24) % 12, 5, bf16))
    np.testing.assert_allclose(scores[0], scores[1], atol=0.1)


# --- tails ---


@st.composite
def shortlists(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Similarities [Q, G], the top k [Q, k] and their logits, with ties in both."""
    gallery = draw(st.integers(1, 9))
    k = draw(st.integers(0, gallery))
    rows = draw(st.integers(1, 4))
    values = st.integers(-2, 2)
    similarity = np.array([[draw(values) for _ in range(gallery)] for _ in range(rows)], dtype=np.float32)
    logits = np.array([[draw(values) for _ in range(k)] for _ in range(rows)], dtype=np.float32)
    candidates = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return similarity, candidates, logits.reshape(rows, k)


@given(shortlists())
@settings(deadline=None)
def test_tails(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    similarity, candidates, logits = case
    order = np.argsort(-similarity, axis=1, kind="stable")
    tensors = [torch.from_numpy(array) for array in (order, candidates, logits)]
    matrix = np.full_like(similarity, retrieval.OUTSIDE)
    np.put_along_axis(matrix, candidates, logits, axis=1)
    reference = np.argsort(-matrix, axis=1, kind="stable")
    np.testing.assert_array_equal(retrieval.reranked(*tensors, "reference").numpy(), reference)
    by_itc = [np.lexsort((np.arange(len(row)), -itc, -row)) for row, itc in zip(matrix, similarity, strict=True)]
    np.testing.assert_array_equal(retrieval.reranked(*tensors, "itc").numpy(), by_itc)


def test_score_matrix(model: PersonSearchModel, images: ImageSet, texts: TextSet) -> None:
    for direction, shape in (("t2i", (24, 12)), ("i2t", (12, 24))):
        matrix = retrieval.score_matrix(model, texts, images, direction, 5, 8)  # type: ignore[arg-type]
        assert matrix.shape == shape
        assert ((matrix != retrieval.OUTSIDE).sum(1) == 5).all()


def test_score_matrix_from_tensors(model: PersonSearchModel, images: ImageSet, texts: TextSet) -> None:
    """Parity tests start from tensors instead of files."""
    ids = torch.randint(5, 40, (6, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 3, 9, 5])[:, None]
    model.eval()
    with torch.no_grad():
        encoded = model.encode_text(ids, mask)
        expected = model.itm(model.fuse(encoded.tokens, mask, images.kept[:6]))[:, 1]
    packed = pack_texts(encoded, mask)
    scores = retrieval.score_matrix(model, packed, images, "t2i", 12, 4)
    model.train()
    torch.testing.assert_close(scores.diagonal(), expected, atol=1e-5, rtol=0)


# --- what the candidates are sorted by ---


@pytest.mark.parametrize("temperature", [0.02, 0.5, 3.0])
def test_posterior_undoes_how_negatives_were_drawn(temperature: float) -> None:
    """With ITC's softmax drawing the negatives, the best possible ITM and the cosine give back the true probability."""
    generator = torch.Generator().manual_seed(0)
    cosine = torch.rand(4, 6, generator=generator) * 2 - 1
    truth = torch.rand(4, 6, generator=generator).softmax(1)  # that candidate v is the one that text t describes
    drawn = (cosine / temperature).softmax(1)
    best = torch.stack([drawn, truth], -1).log() + 5  # Bayes: odds of a match are truth : drawn
    found = retrieval.candidate_scores(best, cosine, temperature, "posterior")
    torch.testing.assert_close(found.softmax(1), truth)
    assert (retrieval.candidate_scores(best, cosine, temperature, "itm") == best[..., 1]).all()


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CheckpointError):
        retrieval.candidate_scores(torch.zeros(1, 2, 2), torch.ones(1, 2), 0.0, "posterior")


# --- the protocol ---


@pytest.fixture(scope="module")
def evaluation(model: PersonSearchModel, tokenizer: Tokenizer, prepared: SimpleNamespace) -> retrieval.Evaluation:
    config = EvalConfig(rerank=5, batch_size=6, bootstrap=50)
    return retrieval.evaluate(model, tokenizer, prepared, "test", config)  # type: ignore[arg-type]


def all_pairs(model: PersonSearchModel, texts: TextSet, images: ImageSet) -> dict[str, Tensor]:
    """What every text would be re-ranked by with every image, [24, 12], and ITM's log-odds of a match."""
    every = [retrieval.rerank(model, texts, images, np.full(12, text), np.arange(12), 1) for text in range(24)]
    itm = torch.from_numpy(np.array(every))
    odds = itm[..., 1] - itm[..., 0]
    cosine = texts.features @ images.features.T
    return {"itm": itm[..., 1], "posterior": odds + cosine / model.temperature.detach(), "odds": odds}


@pytest.mark.parametrize("score_name", ["posterior", "itm"])
def test_evaluation_equals_the_plain_protocol(
    model: PersonSearchModel,
    prepared: SimpleNamespace,
    images: ImageSet,
    texts: TextSet,
    tokenizer: Tokenizer,
    score_name: str,
) -> None:
    config = EvalConfig(rerank=5, batch_size=6, bootstrap=50, score=score_name)  # type: ignore[arg-type]
    evaluation = retrieval.evaluate(model, tokenizer, prepared, "test", config)  # type: ignore[arg-type]
    cosine = (texts.features @ images.features.T).numpy()
    score = all_pairs(model, texts, images)[score_name].numpy()
    image_persons = prepared.images["person_id"].to_numpy()
    text_persons = image_persons.repeat(2)
    for direction, itc, logits, queries, gallery in (
        ("t2i", cosine, score, text_persons, image_persons),
        ("i2t", cosine.T, score.T, image_persons, text_persons),
    ):
        order = np.argsort(-itc, axis=1, kind="stable")
        again = [[*sorted(row[:5], key=lambda item: -line[item]), *row[5:]]
                 for row, line in zip(order, logits, strict=True)]  # fmt: skip
        for stage, ranking in (("cosine", order), ("reranked", np.array(again))):
            for figure in summarise(rank_metrics(ranking, queries, gallery), 0):
                value = evaluation.value(direction, stage, figure.metric)  # type: ignore[arg-type]
                assert value == pytest.approx(figure.value), (direction, stage, figure.metric)
    assert set(evaluation.seconds) == {"encode_images", "encode_texts", "cosine", "rerank", "metrics"}
    assert model.training


def test_metrics_table(evaluation: retrieval.Evaluation) -> None:
    expected = [(d, s, m) for d in ("t2i", "i2t") for s in ("cosine", "reranked") for m in METRICS]
    assert [row[:3] for row in evaluation.metrics] == expected
    assert all(row.low <= row.value <= row.high for row in evaluation.metrics)
    table = pd.DataFrame(evaluation.metrics)
    assert list(table.columns) == ["direction", "stage", "metric", "value", "low", "high"]


def test_queries_table_survives_csv(
    model: PersonSearchModel,
    images: ImageSet,
    texts: TextSet,
    evaluation: retrieval.Evaluation,
    prepared: SimpleNamespace,
    tmp_path: Path,
) -> None:
    scores = all_pairs(model, texts, images)
    image_at, text_at = (
        {name: place for place, name in enumerate(column)}
        for column in (prepared.images["image_id"], prepared.captions["caption_id"])
    )
    evaluation.queries.to_csv(tmp_path / "queries.csv", index=False)
    table = pd.read_csv(tmp_path / "queries.csv")
    assert table.groupby("direction").size().to_dict() == {"t2i": 24, "i2t": 12}
    assert set(table["stage"]) == {"reranked"}
    person_of = prepared.images.set_index("image_id")["person_id"]
    path_of = prepared.images.set_index("image_id")["path"]
    for row in table[table["direction"] == "t2i"].itertuples():
        ids, hits = json.loads(row.top_ids), json.loads(row.top_hits)
        assert hits == [int(person_of[image] == row.person_id) for image in ids]
        assert json.loads(row.top_paths) == [path_of[image] for image in ids]
        assert len(ids) == len(set(ids)) == len(json.loads(row.top_cosine)) == 10
        odds = json.loads(row.top_itm)
        assert len(odds) == 5
        mine = {name: score[text_at[row.query_id], [image_at[i] for i in ids[:5]]] for name, score in scores.items()}
        assert odds == pytest.approx(mine["odds"].tolist(), abs=2e-4)
        assert (mine["posterior"].diff() <= 0).all()
        assert 1 in hits[: row.first_hit]
        assert row.first_hit == hits.index(1) + 1
    for name in ("mAP", "mINP"):
        column = table[table["direction"] == "t2i"][name[1:].lower()]
        assert 100 * column.mean() == pytest.approx(evaluation.value("t2i", "reranked", name))


def test_cosine_alone_and_one_direction(
    model: PersonSearchModel, tokenizer: Tokenizer, prepared: SimpleNamespace, evaluation: retrieval.Evaluation
) -> None:
    config = EvalConfig(rerank=0, batch_size=6, bootstrap=0)
    alone = retrieval.evaluate(model, tokenizer, prepared, "test", config, ["i2t"])  # type: ignore[arg-type]
    assert {row[:2] for row in alone.metrics} == {("i2t", "cosine")}
    assert set(alone.queries["stage"]) == {"cosine"}
    assert all(np.isnan(row.low) for row in alone.metrics)
    assert alone.value("i2t", "cosine", "mAP") == pytest.approx(evaluation.value("i2t", "cosine", "mAP"))
    assert set(alone.queries["top_itm"]) == set(alone.queries["top_paths"]) == {"[]"}


@pytest.mark.parametrize("tail", ["itc", "reference"])
def test_k_beyond_the_gallery(
    model: PersonSearchModel, tokenizer: Tokenizer, prepared: SimpleNamespace, tail: str
) -> None:
    """With everything re-ranked no tail is left to differ in."""
    config = EvalConfig(rerank=500, tail=tail, batch_size=64, bootstrap=0)  # type: ignore[arg-type]
    found = retrieval.evaluate(model, tokenizer, prepared, "test", config)  # type: ignore[arg-type]
    assert len(json.loads(found.queries["top_itm"][0])) == 10
    exact = EvalConfig(rerank=24, batch_size=3, bootstrap=0)
    same = retrieval.evaluate(model, tokenizer, prepared, "test", exact)  # type: ignore[arg-type]
    assert [row.value for row in found.metrics] == pytest.approx([row.value for row in same.metrics])


def test_chunks_do_not_change_the_evaluation(
    model: PersonSearchModel,
    tokenizer: Tokenizer,
    prepared: SimpleNamespace,
    evaluation: retrieval.Evaluation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retrieval, "_CHUNK_SCORES", 60)
    config = EvalConfig(rerank=5, batch_size=6, bootstrap=50)
    chunked = retrieval.evaluate(model, tokenizer, prepared, "test", config)  # type: ignore[arg-type]
    assert chunked.metrics == evaluation.metrics
    assert chunked.queries["top_ids"].tolist() == evaluation.queries["top_ids"].tolist()


def test_queries_nobody_matches_are_counted_and_announced(
    model: PersonSearchModel,
    tokenizer: Tokenizer,
    prepared: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An image of a person without captions is a query that cannot succeed; tiny galleries are fine."""
    retrieval.console.configure()
    images = prepared.images[:3]
    captions = prepared.captions[prepared.captions["image_id"] < 102]
    few = SimpleNamespace(image_root=prepared.image_root, split=lambda name: (images, captions))
    config = EvalConfig(rerank=2, bootstrap=20)
    found = retrieval.evaluate(model, tokenizer, few, "test", config)  # type: ignore[arg-type]
    assert "1 i2t queries" in capsys.readouterr().err
    assert found.value("i2t", "reranked", "R@10") == pytest.approx(200 / 3)
    lonely = found.queries.query("direction == 'i2t' and query_id == 102").iloc[0]
    assert (lonely["relevant"], lonely["first_hit"], lonely["ap"], lonely["inp"]) == (0, 0, 0, 0)
    assert found.value("t2i", "reranked", "R@5") == 100


def test_an_empty_split_and_a_path_that_leaves_the_folder(
    model: PersonSearchModel, tokenizer: Tokenizer, prepared: SimpleNamespace
) -> None:
    with pytest.raises(DataError, match="empty"):
        retrieval.evaluate(model, tokenizer, prepared, "empty", EvalConfig())  # type: ignore[arg-type]
    outside = prepared.images.assign(path="../secret.png")
    hostile = SimpleNamespace(image_root=prepared.image_root, split=lambda name: (outside, prepared.captions))
    with pytest.raises(DataError, match="leaves"):
        retrieval.evaluate(model, tokenizer, hostile, "test", EvalConfig())  # type: ignore[arg-type]
