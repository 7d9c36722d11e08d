"""Queries against an index: the two stages, images and texts together, many at once, the hint, and what is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from agatool import console
from agatool.checkpoint import load, save_model
from agatool.data.prepare import Prepared
from agatool.encoding import encode_images, encode_texts
from agatool.errors import CheckpointError, DataError, UsageError
from agatool.hint import ABSENT, made_up_descriptions, share_as_good
from agatool.indexing import build_index
from agatool.model import log_odds
from agatool.results import as_document, explained, rows, write_page, write_sheet, write_table
from agatool.retrieval import candidate_scores, rerank_candidates, top_k
from agatool.search import Answer, Query, Searcher, as_query, open_searcher, read_queries

TEXTS = ["a woman in a red coat with a black backpack", "a man in blue jeans", "a person with an umbrella"]
HOSTILE = '<img src=x onerror="alert(1)">&.jpg'


@pytest.fixture(scope="module")
def gallery(sample: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of the sample's test people and one with a hostile name."""
    folder = tmp_path_factory.mktemp("search") / "gallery"
    folder.mkdir()
    for path in sample.split("test")[0]["path"]:
        (folder / path).write_bytes((sample.image_root / path).read_bytes())
    Image.new("RGB", (20, 40), (200, 30, 30)).save(folder / HOSTILE)
    return folder


@pytest.fixture(scope="module")
def folder(gallery: Path, tiny_run: Path) -> Path:
    return build_index(gallery, checkpoint=tiny_run, device="cpu").folder


@pytest.fixture(scope="module")
def searcher(folder: Path) -> Searcher:
    return open_searcher(folder, device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def answers(searcher: Searcher) -> list[Answer]:
    return searcher.search([Query(text) for text in TEXTS], k=6, rerank=4)


# --- ranking ---


def test_hits_are_the_two_stages_of_evaluation(searcher: Searcher, answers: list[Answer]) -> None:
    index, model = searcher.index, searcher.model
    images = encode_images(model, [index.path(row) for row in range(len(index))], 4)
    texts = encode_texts(model, model.tokenizer, TEXTS, 4)
    cosines, candidates = top_k(texts.features, images.features, 4)
    itm = rerank_candidates(model, texts, images, {"t2i": candidates}, 4)["t2i"]
    scores = candidate_scores(itm, cosines, model.temperature.item(), "posterior")
    cosine = (texts.features @ images.features.T).numpy()
    nothing = torch.full(cosine.shape, -math.inf)
    score, odds = (nothing.scatter(1, candidates, values).numpy() for values in (scores, log_odds(itm)))
    for number, answer in enumerate(answers):
        order = np.lexsort((-cosine[number], -score[number]))[:6]
        assert [hit.row for hit in answer.hits] == order.tolist()
        assert [hit.rank for hit in answer.hits] == [1, 2, 3, 4, 5, 6]
        assert [hit.name for hit in answer.hits] == index.images["path"].iloc[order].tolist()
        np.testing.assert_allclose([hit.cosine for hit in answer.hits], cosine[number, order], atol=1e-5)
        told = [-math.inf if hit.match is None else hit.match for hit in answer.hits]
        np.testing.assert_allclose(told, odds[number, order], atol=1e-4)


def test_many_queries_find_what_one_finds(searcher: Searcher, answers: list[Answer]) -> None:
    for text, together in zip(TEXTS, answers, strict=True):
        alone = searcher.search([Query(text)], k=6, rerank=4)[0]
        assert [hit.row for hit in alone.hits] == [hit.row for hit in together.hits]
        np.testing.assert_allclose([hit.cosine for hit in alone.hits], [hit.cosine for hit in together.hits], atol=1e-5)


def test_without_re_ranking_the_cosine_sorts(searcher: Searcher) -> None:
    answer = searcher.search([Query(TEXTS[0])], k=100, rerank=0)[0]
    assert len(answer.hits) == len(searcher.index)
    assert all(hit.match is None for hit in answer.hits)
    cosines = [hit.cosine for hit in answer.hits]
    assert cosines == sorted(cosines, reverse=True)


def test_an_image_finds_itself_first(searcher: Searcher) -> None:
    answer = searcher.search([Query(image=searcher.index.path(3))], k=5)[0]
    assert answer.hits[0].row == 3
    assert answer.hits[0].cosine == pytest.approx(1, abs=1e-5)
    assert answer.as_good is None
    assert all(hit.match is None for hit in answer.hits)


def test_image_and_text_rank_by_the_sum_of_their_cosines(searcher: Searcher) -> None:
    image = searcher.index.path(2)
    queries = [Query(TEXTS[0], image), Query(TEXTS[0]), Query(image=image), Query(TEXTS[1])]
    total = len(searcher.index)
    both, text, picture, _ = (answer.hits for answer in searcher.search(queries, k=total, rerank=0))
    sums = {hit.row: hit.cosine for hit in text}
    for hit in picture:
        sums[hit.row] += hit.cosine
    assert [hit.row for hit in both] == sorted(sums, key=lambda row: -sums[row])
    reranked = searcher.search(queries, k=total, rerank=3)[0].hits
    assert {hit.row for hit in reranked[:3]} == {hit.row for hit in both[:3]}
    temperature = searcher.model.temperature.item()
    scores = [hit.match + hit.cosine / temperature for hit in reranked[:3] if hit.match is not None]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


# --- what changed since ---


def test_images_that_changed_or_went_are_left_out(
    gallery: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "gallery"
    copy.mkdir()
    for path in gallery.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    searcher = open_searcher(copy, tiny_run, device="cpu")
    index = searcher.index
    index.path(0).unlink()
    Image.new("RGB", (9, 9)).save(index.path(1), "PNG")
    index.path(2).touch()  # the same content
    console.configure()
    answer = searcher.search([Query(TEXTS[0])], k=100)[0]
    assert {hit.row for hit in answer.hits} == set(range(2, len(index)))
    assert f"aga index {copy} --out {copy}.index" in capsys.readouterr().err.replace("\n", " ")


def test_a_folder_is_indexed_first_and_kept_up_to_date(gallery: Path, folder: Path, tmp_path: Path) -> None:
    extra = Image.new("RGB", (20, 40), (1, 2, 3))
    extra.save(gallery / "later.png")
    try:
        assert "later.png" in set(open_searcher(gallery, device="cpu").index.images["path"])
    finally:
        (gallery / "later.png").unlink()
        build_index(gallery, device="cpu")
    with pytest.raises(DataError, match="no gallery"):
        open_searcher(tmp_path / "nowhere")


def test_another_model_is_refused(folder: Path, tiny_run: Path, tmp_path: Path) -> None:
    model = load(tiny_run / "best")
    with torch.no_grad():
        model.vision_proj.bias.add_(0.1)
    save_model(tmp_path / "other", model, "another")
    with pytest.raises(CheckpointError, match="not the model") as caught:
        open_searcher(folder, tmp_path / "other", device="cpu")
    assert caught.value.hint.endswith(f"--out {folder} --checkpoint {tmp_path / 'other'}")
    info = json.loads((folder / "index.json").read_text())
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    (moved / "index.json").write_text(json.dumps({**info, "model": str(tmp_path / "gone")}))
    with pytest.raises(CheckpointError, match="any more"):
        open_searcher(moved, device="cpu")
    assert len(open_searcher(moved, tiny_run, device="cpu").index) == len(pd.read_csv(folder / "images.csv"))


# --- queries ---


@pytest.mark.parametrize("text", ["", "  ", "a\0b", "x" * 20_000, "\u200b"])
def test_a_query_without_words_is_an_error(text: str, searcher: Searcher) -> None:
    with pytest.raises(UsageError):
        as_query(text)
    with pytest.raises(UsageError):
        as_query(None)


def test_queries_of_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("a red coat\n\n  blue   jeans \n", encoding="utf-8")
    (tmp_path / "q.csv").write_text('query,other\n"a red coat",1\nblue jeans,2\n')
    (tmp_path / "q.json").write_text(json.dumps([{"captions": ["a red coat", "blue jeans"], "id": 1}]))
    (tmp_path / "q.jsonl").write_text('{"caption": "a red coat"}\n"blue jeans"\n')
    for name in ("q.txt", "q.csv", "q.json", "q.jsonl"):
        assert read_queries(tmp_path / name) == [Query("a red coat"), Query("blue jeans")], name


@pytest.mark.parametrize(
    ("name", "content"),
    [("q.txt", ""), ("q.txt", "fine\n\x01\n"), ("q.csv", "a,b\n1,2\n"), ("q.json", "{}"), ("q.jsonl", "[1]\n")],
)
def test_a_broken_file_of_queries_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=name):
        read_queries(tmp_path / name)


# --- the hint ---


def test_made_up_descriptions_are_always_the_same_and_all_different() -> None:
    texts = made_up_descriptions(50)
    assert texts == made_up_descriptions(50)
    assert texts == made_up_descriptions(60)[:50]
    assert len(set(texts)) == 50
    assert all(5 < len(text.split()) < 80 for text in texts)


def test_the_share_counts_made_up_descriptions_that_fit_as_well() -> None:
    made_up = np.array([0.1, 0.2, 0.3, 0.4])
    assert [share_as_good(made_up, best) for best in (0.05, 0.2, 0.35, 0.5)] == [1, 0.75, 0.25, 0]
    assert share_as_good(np.empty(0), 0.3) is None


def test_the_hint_compares_the_best_cosine(searcher: Searcher, answers: list[Answer]) -> None:
    for answer in answers:
        best = searcher.search([answer.query], k=1, rerank=0)[0].hits[0].cosine
        assert answer.as_good == pytest.approx(np.mean(searcher.index.made_up >= best))
        assert answer.probably_absent == (answer.as_good >= ABSENT)
        assert bool(explained(answer)) == answer.probably_absent


def test_the_threshold_decides(answers: list[Answer]) -> None:
    hits = answers[0].hits
    assert "62%" in explained(Answer(Query("x"), hits, 0.62))
    assert explained(Answer(Query("x"), hits, ABSENT - 0.01)) == ""
    assert explained(Answer(Query("x"), hits, None)) == ""


# --- what is written ---


def test_json_says_everything(searcher: Searcher, answers: list[Answer]) -> None:
    document = json.loads(json.dumps(as_document(searcher.index, answers)))
    assert document["images"] == len(searcher.index)
    assert [query["text"] for query in document["queries"]] == TEXTS
    assert [hit["path"] for hit in document["queries"][0]["hits"]] == [hit.name for hit in answers[0].hits]
    assert document["queries"][0]["hits"][5]["match"] is None
    assert rows(answers[0])[0][0] == "1"


def test_csv_has_a_row_for_each_hit(answers: list[Answer], tmp_path: Path) -> None:
    write_table(tmp_path / "hits.csv", answers)
    table = pd.read_csv(tmp_path / "hits.csv")
    assert len(table) == 18
    assert table["query"].tolist() == [1] * 6 + [2] * 6 + [3] * 6
    assert table["path"][:6].tolist() == [hit.name for hit in answers[0].hits]
    assert table["match"].isna().sum() == 6


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.told = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.told += data


def test_the_page_is_self_contained_and_escapes_everything(searcher: Searcher, tmp_path: Path) -> None:
    text = 'a "red" <script>alert(1)</script> & co'
    answers = searcher.search([Query(text)], k=100, rerank=0)
    write_page(tmp_path / "hits.html", searcher.index, answers)
    page = _Page()
    page.feed((tmp_path / "hits.html").read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert text in page.told
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == len(searcher.index)
    assert all((picture["src"] or "").startswith("data:image/jpeg;base64,") for picture in pictures)
    assert HOSTILE in [picture["alt"] for picture in pictures]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_sheet_shows_every_hit(searcher: Searcher, answers: list[Answer], tmp_path: Path) -> None:
    write_sheet(tmp_path / "one.png", searcher.index, [*answers[:1]])
    write_sheet(tmp_path / "all.png", searcher.index, answers)
    one, every = (np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("one.png", "all.png"))
    assert one.shape[1] == every.shape[1]
    assert every.shape[0] > 2.5 * one.shape[0]
    assert (one < 128).mean() > 0.01
    with pytest.raises(UsageError, match="too long"):
        write_sheet(tmp_path / "x.png", searcher.index, answers * 20)
    write_sheet(tmp_path / "odd.png", searcher.index, [Answer(Query("$x_{$ a $ \u2603"), answers[0].hits[:1], None)])


@pytest.fixture(autouse=True)
def _console_as_it_was() -> Iterator[None]:
    yield
    console.configure()


def test_batches_do_not_matter(folder: Path, searcher: Searcher, answers: list[Answer]) -> None:
    make: Callable[[int], Searcher] = lambda size: Searcher(searcher.index, searcher.model, size)  # noqa: E731
    for size in (1, 64):
        again = make(size).search([Query(text) for text in TEXTS], k=6, rerank=4)
        for one, other in zip(again, answers, strict=True):
            assert [hit.row for hit in one.hits] == [hit.row for hit in other.hits]
