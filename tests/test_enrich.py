"""aga enrich: what it writes, what it leaves alone, and that a killed run ends with the same bytes."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import agatool.enrich
from agatool.captions import open_captions
from agatool.checkpoint import load, save_model
from agatool.config import ModelConfig, TextConvention
from agatool.data.annotations import parse_record, read_records
from agatool.data.images import decode_image, to_tensor
from agatool.enrich import enrich
from agatool.enriching import EnrichConfig, Enricher, MaskedWord, cased, maskable, rewrite, usual_words, whole_words
from agatool.errors import CheckpointError, DataError, UsageError
from agatool.model import PersonSearchModel
from agatool.tokenization import load_tokenizer, train_tokenizer
from agatool.truth import Truth

SAMPLE = Path(__file__).parents[1] / "sample_data"
RECORDS = json.loads((SAMPLE / "data_captions.json").read_text())
ALL = EnrichConfig(min_probability=0, ratio=0.5)  # every masked word is replaced, whatever an untrained model thinks


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained model whose vocabulary has whole words and fragments of them."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer([text for record in RECORDS for text in record["captions"]], folder / "tokenizer.json", 400)
    convention = TextConvention(max_tokens=60)
    tokenizer = load_tokenizer(folder / "tokenizer.json", convention)
    sizes = ModelConfig(
        image_size=(32, 16), image_width=24, image_depth=1, image_heads=2, text_width=24, text_heads=2, text_mlp=24,
        text_layers=2, fusion_layers=1, embed_dim=8, vocab_size=tokenizer.vocab_size, text=convention,
    )  # fmt: skip
    torch.manual_seed(3)
    model = PersonSearchModel(sizes)
    model.tokenizer = tokenizer
    save_model(folder / "model", model, "")
    return folder / "model"


@pytest.fixture
def sample(tmp_path):
    """A caption file of twelve records with its pictures in imgs/ beside it."""
    (tmp_path / "imgs").mkdir()
    for record in RECORDS[:12]:
        shutil.copy(SAMPLE / "imgs" / record["img_path"], tmp_path / "imgs")
    return write(tmp_path / "captions.json", RECORDS[:12])


def write(path, records):
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    """File name -> bytes, but for job.json, which names the folder of the images."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "job.json"}


# -- formats ----------------------------------------------------------------------------------------------------


def test_json_keeps_schema_order_and_everything_else(checkpoint, sample, tmp_path):
    records = [{**record, "n": 3, "x": 1.5, "deep": {"a": [None, True, "é"]}} for record in RECORDS[:12]]
    result = enrich(checkpoint, write(sample, records), tmp_path / "out", ALL)
    written = json.loads((tmp_path / "out/captions.json").read_text(encoding="utf-8"))
    assert [{**new, "captions": new["captions_original"]} for new in written] == [
        {**old, "captions_original": old["captions"]} for old in records
    ]
    assert all(type(new["n"]) is int and type(new["x"]) is float for new in written)
    assert all(len(new["captions"]) == 2 and new["captions"] != new["captions_original"] for new in written)
    assert result.summary["captions"] == 24
    assert sorted(contents(tmp_path / "out")) == ["captions.json", "edits.csv", "kept.csv", "summary.csv"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_lines_and_tables(checkpoint, sample, tmp_path, kind):
    rows = [
        {"image": record["img_path"], "caption": record["captions"][0], "person_id": 7, "note": 'a, "b"\nc'}
        for record in RECORDS[:5]
    ]
    rows[4]["caption"] = json.dumps(RECORDS[4]["captions"]) if kind == "csv" else RECORDS[4]["captions"]
    file = sample.with_name(f"own.{kind}")
    if kind == "jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        with file.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    enrich(checkpoint, file, tmp_path / "out", ALL)
    before, after = list(read_records(file)), list(read_records(tmp_path / "out" / file.name))
    assert [{**new, "caption": new["caption_original"]} for new in after] == [
        {**old, "caption_original": old["caption"]} for old in before
    ]
    assert all(parse_record(new).captions != parse_record(old).captions for old, new in zip(before, after, strict=True))
    assert [len(parse_record(new).captions) for new in after] == [1, 1, 1, 1, 2]


def test_enriching_again_keeps_the_first_original(checkpoint, sample, tmp_path):
    enrich(checkpoint, sample, tmp_path / "one", ALL)
    enrich(checkpoint, tmp_path / "one/captions.json", tmp_path / "two", ALL, image_root=tmp_path / "imgs")
    written = json.loads((tmp_path / "two/captions.json").read_text())
    assert [record["captions_original"] for record in written] == [record["captions"] for record in RECORDS[:12]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 50_000 + "]" * 50_000, "too deeply"),
        ('[{"captions": 1e999}]', "out of range"),
        ('{"item": []}', "no list"),
        ('[{"captions": ["a"]}', "not valid JSON"),
        ('[{"img_path": "a.jpg"}]', "no usable caption"),
        ("[]", "no usable caption"),
    ],
)
def test_broken_files(checkpoint, tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DataError, match=message):
        enrich(checkpoint, tmp_path / "c.json", tmp_path / "out", ALL)
    assert not (tmp_path / "out").exists()


def test_csv_with_two_columns_of_one_name(tmp_path):
    (tmp_path / "c.csv").write_text("image,caption,caption\na.jpg,x,y\n")
    with pytest.raises(DataError, match="two columns"):
        open_captions(tmp_path / "c.csv")


# -- words ------------------------------------------------------------------------------------------------------


def test_edits_are_whole_words_and_all_that_changed(checkpoint, sample, tmp_path):
    enrich(
        checkpoint, sample, tmp_path / "out", EnrichConfig(min_probability=0, ratio=1, decode="sample", temperature=9)
    )
    written = json.loads((tmp_path / "out/captions.json").read_text())
    tokenizer = load(checkpoint).tokenizer
    captions = [text for record in RECORDS[:12] for text in record["captions"]]
    allowed = {tokenizer.piece(i) for i in whole_words(tokenizer, captions) | usual_words(tokenizer)}
    starts = {tokenizer.piece(int(i)) for i in tokenizer.replaceable_ids.nonzero()[0]}
    assert {"sn", "wh"} & (starts - allowed), "the vocabulary should have fragments to be kept out"
    enriched = [text for record in written for text in record["captions"]]
    edits = read_csv(tmp_path / "out/edits.csv")
    assert len({edit["replacement"].lower() for edit in edits}) > 50
    for number, (old, new) in enumerate(zip(captions, enriched, strict=True)):
        words = {int(e["position"]): e for e in edits if int(e["caption_id"]) == number}
        encoding = tokenizer.encode([old])[0]
        for position, edit in words.items():
            assert old[slice(*encoding.words[position])] == edit["word"]
            assert edit["replacement"].lower() in allowed
            assert edit["replacement"][0].isupper() == edit["word"][0].isupper()
        spans = {position: edit["replacement"] for position, edit in words.items()}
        assert rewrite(old, encoding.words, spans) == new


def test_only_whole_known_words_are_masked(checkpoint):
    tokenizer = load(checkpoint).tokenizer
    caption = "A man's Gray t-shirt, qzxjkv 字 café black."
    tokens = maskable(tokenizer, caption, tokenizer.encode([caption])[0])
    words = [caption[slice(*tokenizer.encode([caption])[0].words[word])] for word in tokens]
    assert words == ["A", "Gray", "black"]


def test_cleanup_does_not_swallow_punctuation(checkpoint):
    convention = TextConvention(sep=False, cleanup="albef", max_words=50)
    tokenizer = load_tokenizer(checkpoint / "tokenizer.json", convention)
    caption = "a red's bl,ack coat"  # read as "reds black coat"
    tokens = maskable(tokenizer, caption, tokenizer.encode([caption])[0])
    assert sorted(tokens) == [0, len(tokenizer.encode([caption])[0].words) - 1]


@pytest.mark.parametrize(
    ("word", "like", "expected"),
    [("red", "blue", "red"), ("red", "Blue", "Red"), ("red", "BLUE", "RED"), ("the", "A", "The")],
)
def test_capitals(word, like, expected):
    assert cased(word, like) == expected


@pytest.mark.parametrize(
    ("caption", "new", "expected"),
    [
        ("a red hat", {1: "orange"}, "an orange hat"),
        ("An orange, red hat", {1: "Red"}, "A Red, red hat"),
        ("a red hat", {1: "uniform"}, "a uniform hat"),
        ("the orange hat", {0: "a"}, "an orange hat"),
        ("grade a, red", {2: "orange"}, "grade a, orange"),
        ("red", {0: "orange"}, "orange"),
    ],
)
def test_articles_follow(caption, new, expected):
    spans, at = [], 0
    for word in caption.replace(",", "").split():
        at = caption.index(word, at)
        spans.append((at, at + len(word)))
        at += len(word)
    assert rewrite(caption, spans, new) == expected


def test_unsure_words_stay(checkpoint, sample, tmp_path):
    result = enrich(checkpoint, sample, tmp_path / "out", EnrichConfig(min_probability=1))
    assert result.summary["replaced"] == 0
    assert result.summary["masked"] > 24
    written = json.loads((tmp_path / "out/captions.json").read_text())
    assert [record["captions"] for record in written] == [record["captions"] for record in RECORDS[:12]]


@pytest.mark.parametrize("text_only", [False, True])
@torch.no_grad()
def test_probability_weighs_the_new_word_against_the_old(checkpoint, text_only):
    """Odds of MLM times odds of ITM, recomputed from the model for a single word; the temperature has no say in it."""
    model = load(checkpoint).eval()
    tokenizer, caption = model.tokenizer, RECORDS[0]["captions"][0]
    words = whole_words(tokenizer, [caption])
    found = []
    for temperature in (0.01, 1.0):
        config = EnrichConfig(min_probability=0, ratio=0.01, temperature=temperature, text_only=text_only)
        enricher = Enricher(model, config, words)
        image = enricher.blank()
        found.append(enricher.enrich([caption], [0], image, [[0]])[0][0].masked)
    assert found[0] == found[1]
    (word,) = found[0]
    assert word.replaced

    def tokens(text):
        batch = tokenizer.pad(tokenizer.encode([text]))
        return batch, model.encode_text(batch.ids, batch.mask).tokens

    old, new = tokenizer.backend.token_to_id(word.word.lower()), tokenizer.backend.token_to_id(word.replacement.lower())
    batch, _ = tokens(caption)
    at = batch.word_of[0].tolist().index(word.position)
    batch.ids[0, at] = tokenizer.mask_id
    hidden = model.fuse(model.encode_text(batch.ids, batch.mask).tokens, batch.mask, image)
    logits = model.mlm(hidden[0, at])
    odds = logits[new] - logits[old]
    if not text_only:
        for text, sign in ((caption, -1), (caption[: word.start] + word.replacement + caption[word.end :], 1)):
            batch, encoded = tokens(text)
            match = model.itm(model.fuse(encoded, batch.mask, image, cls_only=True))[0]
            odds = odds + sign * (match[1] - match[0])
    assert word.probability == pytest.approx(odds.sigmoid().item(), abs=1e-5)


# -- draws ------------------------------------------------------------------------------------------------------


def test_draws_depend_on_seed_and_caption_alone(checkpoint):
    model = load(checkpoint)
    captions = [text for record in RECORDS[:6] for text in record["captions"]]
    words = whole_words(model.tokenizer, captions)

    def positions(order, batch_size, seed=0):
        config = EnrichConfig(strategy="random", min_probability=0, batch_size=batch_size, seed=seed)
        enricher = Enricher(model, config, words)
        versions = enricher.enrich([captions[i] for i in order], order, enricher.blank(), [[0]] * len(order))
        return {i: [word.position for word in version[0].masked] for i, version in zip(order, versions, strict=True)}

    whole = positions(list(range(12)), 64)
    assert whole == positions(list(range(12))[::-1], 5)
    assert whole[7] == positions([7], 1)[7]
    assert whole != positions(list(range(12)), 64, seed=1)


@pytest.mark.parametrize("strategy", ["attention", "random", "content"])
def test_every_strategy_masks_equally_many(checkpoint, strategy):
    model = load(checkpoint)
    caption = RECORDS[0]["captions"][0]
    enricher = Enricher(model, EnrichConfig(strategy=strategy, ratio=0.3), whole_words(model.tokenizer, [caption]))
    masked = enricher.enrich([caption], [0], enricher.blank(), [[0]])[0][0].masked
    count = len(maskable(model.tokenizer, caption, model.tokenizer.encode([caption])[0]))
    assert len(masked) == round(0.3 * count)
    if strategy == "content":
        assert not {word.word.lower() for word in masked} & {"a", "is", "in", "and", "she", "an"}


def test_variants(checkpoint, sample, tmp_path):
    config = EnrichConfig(min_probability=0, ratio=0.3, variants=3, decode="top-k")
    result = enrich(checkpoint, sample, tmp_path / "out", config)
    written = json.loads((tmp_path / "out/captions.json").read_text())
    assert [len(record["captions"]) for record in written] == [6] * 12
    assert len(set(written[0]["captions"][:3])) > 1
    assert result.summary["versions"] == 72
    assert {edit["variant"] for edit in read_csv(tmp_path / "out/edits.csv")} == {"0", "1", "2"}


# -- images -----------------------------------------------------------------------------------------------------


def test_missing_images_and_broken_records_stay_and_are_listed(checkpoint, sample, tmp_path):
    records = [dict(record) for record in RECORDS[:6]]
    records[1]["img_path"] = "nowhere.jpg"
    records[2]["img_path"] = "../captions.json"
    (sample.parent / "imgs" / records[3]["img_path"]).write_bytes(b"no picture")
    records[4]["captions"] = [records[4]["captions"][0], "", 5]
    mixed = [*records, 17]
    result = enrich(checkpoint, write(sample, mixed), tmp_path / "out", ALL)
    written = json.loads((tmp_path / "out/captions.json").read_text())
    assert [new["captions"] == old["captions"] for old, new in zip(records, written[:6], strict=True)] == [
        False, True, True, True, False, False,
    ]  # fmt: skip
    assert written[2] == records[2]  # not usable at all: exactly as it was
    assert written[4]["captions"][1:] == ["", 5]
    assert written[6] == 17
    kept = read_csv(tmp_path / "out/kept.csv")
    assert [(row["record"], row["caption_id"]) for row in kept] == [
        ("1", "2"), ("1", "3"), ("2", ""), ("3", "4"), ("3", "5"), ("4", ""), ("4", ""), ("6", ""),
    ]  # fmt: skip
    assert result.kept == len(kept)


def test_an_image_is_what_the_words_come_from(checkpoint, sample, tmp_path):
    """The same captions with other pictures get other probabilities."""
    enrich(checkpoint, sample, tmp_path / "one", ALL)
    for path in (tmp_path / "imgs").iterdir():
        Image.new("RGB", (64, 128), (250, 10, 10)).save(path)
    enrich(checkpoint, sample, tmp_path / "two", ALL)
    one, two = (read_csv(tmp_path / name / "edits.csv") for name in ("one", "two"))
    assert [edit["probability"] for edit in one] != [edit["probability"] for edit in two]


def probabilities(checkpoint, sample, records, out, **config):
    enrich(checkpoint, write(sample, records), out, EnrichConfig(min_probability=0, ratio=0.5, **config))
    return {edit["caption_id"]: edit["probability"] for edit in read_csv(out / "edits.csv")}


def test_other_images_of_the_person_are_looked_at(checkpoint, sample, tmp_path):
    """Of the same person in the same split, and --views of them; a record without a person has its own image alone."""
    ids = [1, 1, 1, 2, 1]
    records = [{**record, "id": person} for record, person in zip(RECORDS, ids, strict=False)]
    records[4]["split"] = "test"  # another person: some data sets begin to count anew
    views = {n: probabilities(checkpoint, sample, records, tmp_path / f"views{n}", views=n) for n in (1, 2, 3)}
    nobody = [{key: value for key, value in record.items() if key != "id"} for record in records]
    alone = probabilities(checkpoint, sample, nobody, tmp_path / "nobody")
    assert alone == views[1]
    assert {number for number in alone if views[3][number] == alone[number]} == {"6", "7", "8", "9"}
    Image.new("RGB", (64, 128), (250, 10, 10)).save(tmp_path / "imgs" / records[2]["img_path"])
    repainted = probabilities(checkpoint, sample, records, tmp_path / "repainted", views=2)
    assert {number for number in alone if repainted[number] == views[2][number]} == {"0", "1", "6", "7", "8", "9"}


@torch.no_grad()
def test_an_image_seen_alone_is_seen_mirrored_too(checkpoint, sample, tmp_path):
    """Its tokens and its mirror image's, side by side; ITM of the summary is of the image alone."""
    model = load(checkpoint)
    record = RECORDS[0]
    enricher = Enricher(model, ALL, whole_words(model.tokenizer, record["captions"]) | usual_words(model.tokenizer))
    image = to_tensor(decode_image(sample.parent / "imgs" / record["img_path"]), model.config.image_size)
    tokens = enricher.look(torch.stack([image, image.flip(2)]))
    by_hand = enricher.enrich(record["captions"], [0, 1], tokens, [[0, 1]] * 2)
    result = enrich(checkpoint, write(sample, [record]), tmp_path / "out", ALL)
    words = [word for versions in by_hand for word in versions[0].masked if word.replaced]
    edits = read_csv(tmp_path / "out/edits.csv")
    assert [edit["replacement"] for edit in edits] == [word.replacement for word in words]
    assert [edit["probability"] for edit in edits] == [f"{word.probability:.4f}" for word in words]
    batch = model.tokenizer.pad(model.tokenizer.encode(record["captions"]))
    text = model.encode_text(batch.ids, batch.mask)
    match = model.itm(model.fuse(text.tokens, batch.mask, tokens[:1].expand(2, -1, -1), cls_only=True))
    assert result.summary["mean_itm_original"] == pytest.approx(match[:, 1].mean().item(), abs=1e-5)


def test_text_only_needs_no_image(checkpoint, tmp_path):
    file = write(tmp_path / "c.json", [{"caption": record["captions"][0]} for record in RECORDS[:3]])
    with pytest.raises(DataError, match="no usable caption"):
        enrich(checkpoint, file, tmp_path / "out", ALL)
    result = enrich(checkpoint, file, tmp_path / "out", EnrichConfig(min_probability=0, text_only=True))
    assert result.summary["versions_changed"] == 3
    assert result.kept == 0
    assert "mean_itm_original" not in result.summary


# -- continuing -------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
from pathlib import Path
import agatool.enrich
from agatool.enriching import EnrichConfig
torch.set_num_threads(1)
agatool.enrich.CHUNK = 1
agatool.enrich.enrich(*map(Path, sys.argv[1:]), EnrichConfig(min_probability=0, ratio=0.5))
"""


def test_killed_and_continued_gives_the_same_bytes(checkpoint, sample, tmp_path, monkeypatch):
    monkeypatch.setattr(agatool.enrich, "CHUNK", 1)
    enrich(checkpoint, sample, tmp_path / "whole", ALL)
    out = tmp_path / "killed"
    run = subprocess.Popen([sys.executable, "-c", SCRIPT, checkpoint, sample, out], stderr=subprocess.DEVNULL)
    while not (out / "parts/0000001.json").exists() and run.poll() is None:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (out / "captions.json").exists(), "it was too fast to be killed"
    enrich(checkpoint, sample, out, ALL)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_job_is_left_alone_and_another_refused(checkpoint, sample, tmp_path):
    first = enrich(checkpoint, sample, tmp_path / "out", ALL)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert enrich(checkpoint, sample, tmp_path / "out", ALL) == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    other = EnrichConfig(min_probability=0, ratio=0.4, seed=1)
    with pytest.raises(UsageError, match="ratio, seed"):
        enrich(checkpoint, sample, tmp_path / "out", other)
    enrich(checkpoint, sample, tmp_path / "out", other, overwrite=True)
    write(sample, RECORDS[:11])
    with pytest.raises(UsageError, match="file"):
        enrich(checkpoint, sample, tmp_path / "out", other)


def test_folders_that_are_not_its_own_are_left_alone(checkpoint, sample, tmp_path):
    with pytest.raises(UsageError, match="lies in"):
        enrich(checkpoint, sample, tmp_path, ALL, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="something else"):
        enrich(checkpoint, sample, tmp_path / "mine", ALL, overwrite=True)
    assert (tmp_path / "mine/thesis.txt").read_text() == "x"
    with pytest.raises(UsageError, match="called"):
        enrich(checkpoint, write(tmp_path / "job.json", RECORDS[:1]), tmp_path / "out", ALL)


def test_a_model_without_a_word_head_is_refused(checkpoint, sample, tmp_path):
    model = load(checkpoint)
    model.config = model.config.model_copy(update={"untrained": ("mlm_bias",)})
    save_model(tmp_path / "model", model, "")
    with pytest.raises(CheckpointError, match="cannot predict words"):
        enrich(tmp_path / "model", sample, tmp_path / "out", ALL)


# -- truth ------------------------------------------------------------------------------------------------------


def test_truth_judges_by_meaning(tmp_path):
    (tmp_path / "captions.csv").write_text(
        "img_path,caption_index,start,end,text,part,attribute,value,wrong,correct\n"
        "a.jpg,0,2,6,grey,top,top_color,gray,0,\n"
        "a.jpg,0,7,12,shirt,top,top_type,shirt,1,sweater\n"
        "a.jpg,0,20,24,hair,hair,,,0,\n"
        "a.jpg,1,0,3,man,person,gender,man,0,\n"
    )
    truth = Truth(tmp_path / "captions.csv")

    def word(start, text, new):
        return MaskedWord(0, start, start + len(text), text, new, 0.9, 0.1)

    def judge(*words):
        return {name: count for name, count in truth.judge("a.jpg", 0, words).items() if count}

    assert judge() == {"wrong_words": 1}
    assert judge(word(2, "grey", "gray"), word(20, "hair", "shoes")) == {"wrong_words": 1, "right_masked": 1}
    assert judge(word(2, "grey", "Red")) == {"wrong_words": 1, "right_masked": 1, "right_made_wrong": 1}
    assert judge(word(7, "shirt", "Jumper")) == {"wrong_words": 1, "wrong_masked": 1, "wrong_made_right": 1}
    assert judge(word(7, "shirt", "coat")) == {"wrong_words": 1, "wrong_masked": 1}
    assert judge(word(7, "shirt", "shirt")) == {"wrong_words": 1, "wrong_masked": 1}
    with pytest.raises(DataError, match="other captions"):
        judge(word(2, "blue", "red"))
    (tmp_path / "captions.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="not a truth"):
        Truth(tmp_path / "captions.csv")


def test_truth_of_the_sample_is_counted(checkpoint, tmp_path):
    result = enrich(
        checkpoint, SAMPLE / "data_captions.json", tmp_path / "out", ALL, truth=SAMPLE / "truth/captions.csv"
    )
    wrong = sum(row["wrong"] == "1" for row in read_csv(SAMPLE / "truth/captions.csv"))
    assert result.summary["wrong_words"] == wrong
    assert 0 < result.summary["wrong_masked"] < wrong
    assert result.summary["right_made_wrong"] <= result.summary["replaced"]
