"""compare-masks: counts and tables against plain loops, images that matter, classes, pages, and the ablation's arms."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from agatool import ablation, compare_masks
from agatool.ablation import (
    ARMS,
    Values,
    ablation_table,
    arm_config,
    arm_folder,
    find_arms,
    run_ablation,
    seed_table,
    train_arms,
)
from agatool.checkpoint import save_model
from agatool.compare_masks import MASKS_COLUMNS, STRATEGIES, Comparison, compare, described, mask_table, masking_of
from agatool.config import MaskingConfig, ModelConfig, RunConfig, build_config
from agatool.data.images import decode_image, eval_transform, to_tensor
from agatool.data.prepare import Prepared
from agatool.data.word_classes import CLASSES, FUNCTION, named, read_truth, usual_class
from agatool.errors import DataError, UsageError
from agatool.model import PersonSearchModel
from agatool.tokenization import load_tokenizer

TINY = {
    "image_size": (32, 16), "image_width": 16, "image_depth": 1, "image_heads": 2, "text_width": 16, "text_heads": 2,
    "text_mlp": 32, "text_layers": 2, "fusion_layers": 1, "embed_dim": 8, "max_positions": 80, "dropout": 0.0,
    "text": {"max_tokens": 72},
}  # fmt: skip


@pytest.fixture(scope="module")
def prepared(sample: Prepared) -> Prepared:
    return sample


@pytest.fixture(scope="module")
def model(prepared: Prepared) -> PersonSearchModel:
    """Random weights, large enough that every input makes a difference."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(prepared.tokenizer, ModelConfig.model_validate(TINY).text)
    made = PersonSearchModel(ModelConfig.model_validate({**TINY, "vocab_size": tokenizer.vocab_size}))
    torch.nn.init.normal_(made.word_embeddings.weight)
    made.tokenizer = tokenizer
    return made.eval()


@pytest.fixture(scope="module")
def comparison(model: PersonSearchModel, prepared: Prepared) -> Comparison:
    return compare(model, prepared, "train", MaskingConfig(ratio=0.25), draws=2, limit=0)


def test_every_strategy_masks_equally_many_words_of_every_caption(comparison: Comparison) -> None:
    counts = comparison.masked.groupby(["strategy", "draw", "caption_id"]).size().unstack([0, 1])
    assert set(counts.columns.get_level_values(0)) == set(STRATEGIES)
    of_caption = comparison.words.groupby("caption_id").size()
    for caption_id, row in counts.iterrows():
        assert set(row) == {max(1, round(0.25 * of_caption[caption_id]))}
    assert not comparison.masked.duplicated(["strategy", "draw", "caption_id", "word"]).any()
    ratio = mask_table(comparison)["realised_ratio"]
    assert ratio.nunique() == 1
    assert ratio[0] == pytest.approx(counts.iloc[:, 0].sum() / len(comparison.words))


def test_words_are_those_of_the_captions(comparison: Comparison) -> None:
    captions = comparison.captions.set_index("caption_id")["caption"]
    for row in comparison.words.itertuples():
        assert captions[row.caption_id][row.start : row.end].lower() == row.text
    assert set(comparison.words["class"]) <= set(CLASSES)
    shares = comparison.words.groupby("caption_id")["attention"].sum()
    assert np.allclose(shares, 1, atol=1e-5)


def fill_in_again(model: PersonSearchModel, comparison: Comparison, path: Path | None, chosen: pd.DataFrame) -> Tensor:
    """log-probabilities [L, V] of one caption with `chosen` words masked, one pass, nothing shared."""
    caption_id = chosen["caption_id"].iloc[0]
    caption = comparison.captions.set_index("caption_id").loc[caption_id, "caption"]
    code = model.tokenizer.encode([caption])[0]
    words, mask = set(chosen["word"]), model.tokenizer.mask_id
    hidden = [mask if word in words else token for token, word in zip(code.ids, code.word_of, strict=True)]
    height, width = model.config.image_size
    image = torch.zeros(1, 3, height, width)
    if path is not None:
        pixels = to_tensor(decode_image(path), (height, width))[None]
        image = eval_transform(pixels, model.config.image_mean, model.config.image_std)
    with torch.inference_mode():
        ids = torch.tensor([hidden])
        text = model.encode_text(ids, torch.ones_like(ids)).tokens
        return model.mlm(model.fuse(text, torch.ones_like(ids), model.encode_image(image).tokens))[0].log_softmax(-1)


def test_losses_and_ranks_against_one_pass_a_caption(
    model: PersonSearchModel, prepared: Prepared, comparison: Comparison
) -> None:
    groups = list(comparison.masked.groupby(["strategy", "draw", "caption_id"]))
    paths = comparison.captions.set_index("caption_id")["image"]
    multi_piece = 0
    for (_, _, caption_id), chosen in groups[:: max(1, len(groups) // 25)]:
        own = fill_in_again(model, comparison, prepared.image_root / paths[caption_id], chosen)
        none = fill_in_again(model, comparison, None, chosen)
        code = model.tokenizer.encode([comparison.captions.set_index("caption_id").loc[caption_id, "caption"]])[0]
        for row in chosen.itertuples():
            places = [place for place, word in enumerate(code.word_of) if word == row.word]
            labels = [code.ids[place] for place in places]
            assert row.pieces == len(places)
            multi_piece += len(places) > 1
            for column, table in (("ce_image", own), ("ce_no_image", none)):
                expected = -sum(table[place, label].item() for place, label in zip(places, labels, strict=True))
                assert getattr(row, column) == pytest.approx(expected, abs=2e-4)
            ranks = [int((own[p] > own[p, label]).sum()) for p, label in zip(places, labels, strict=True)]
            assert row.top1 == (max(ranks) == 0)
            assert row.top5 == (max(ranks) < 5)
            assert row.guess == model.tokenizer.decode_word([int(own[place].argmax()) for place in places])
    assert multi_piece  # otherwise the sums over pieces were not tested


def test_the_other_image_is_another_persons(prepared: Prepared) -> None:
    for limit in (0, 7):
        sample = compare_masks._sample(prepared, "train", limit)
        persons = prepared.images.set_index("path")["person_id"]
        names = [path.relative_to(prepared.image_root).as_posix() for path in sample.paths]
        own, other = (np.array([persons[names[i]] for i in indices]) for indices in (sample.right, sample.other))
        assert (own != other).all()
        assert [names[i] for i in sample.right] == sample.captions["image"].tolist()
        assert len(sample.captions) == (limit or len(prepared.split("train")[1]))


def test_the_image_changes_the_losses(comparison: Comparison) -> None:
    masked = comparison.masked
    assert (masked["ce_image"] - masked["ce_other_image"]).abs().median() > 1e-4
    assert (masked["ce_image"] - masked["ce_no_image"]).abs().median() > 1e-4


def test_one_person_has_no_other_image(model: PersonSearchModel, prepared: Prepared) -> None:
    with pytest.raises(DataError, match="one person"):
        compare(model, prepared, "val", MaskingConfig(), limit=1)


def test_mask_table_against_loops(comparison: Comparison) -> None:
    table = mask_table(comparison)
    assert tuple(table.columns) == MASKS_COLUMNS
    words = {(row.caption_id, row.word): row for row in comparison.words.itertuples()}
    for record in table.to_dict("records"):
        rows = [row for row in comparison.masked.itertuples() if row.strategy == record["strategy"]]
        about = [words[row.caption_id, row.word] for row in rows]
        assert record["content_share"] == pytest.approx(sum(word.content for word in about) / len(rows))
        assert record["visible_share"] == pytest.approx(sum(word.visible for word in about) / len(rows))
        gain = sum(row.ce_other_image - row.ce_image for row in rows) / len(rows)
        assert record["image_gain"] == pytest.approx(gain, abs=1e-6)
    content = table.set_index("strategy")["content_share"]
    assert content["content"] == 1


def test_attention_follows_the_attention(model: PersonSearchModel, prepared: Prepared) -> None:
    sharp = compare(model, prepared, "train", MaskingConfig(ratio=0.25, temperature=0), draws=1, limit=20)
    rows = described(sharp).query("strategy == 'attention'")
    for caption_id, part in rows.groupby("caption_id"):
        scores = sharp.words[sharp.words["caption_id"] == caption_id]["attention"]
        assert part["attention"].min() >= scores.nlargest(len(part)).min() - 1e-7


def test_same_seed_same_result_and_pieces(model: PersonSearchModel, prepared: Prepared) -> None:
    config = MaskingConfig(ratio=0.25, unit="piece")
    first, second = (compare(model, prepared, "test", config, draws=1, limit=9) for _ in range(2))
    pd.testing.assert_frame_equal(first.masked, second.masked)
    assert (first.masked["pieces"] == 1).all()
    assert mask_table(first)["realised_ratio"].nunique() == 1


# --- classes and truth --------------------------------------------------------------------------------------


def test_truth_names_the_words_that_it_should(prepared: Prepared) -> None:
    truth = read_truth(prepared)
    assert truth is not None
    image = prepared.images["path"][0]
    caption = prepared.captions["caption"][0]
    words = truth.of(image, 0, caption)
    assert words
    first = words[0]
    assert named(words, first.start, first.end) == first
    assert named(words, first.end, first.end + 1) is None
    assert truth.of(image, 0, "x" + caption) is None
    assert truth.of("elsewhere.jpg", 0, caption) is None
    table = pd.read_csv(prepared.image_root.parent / "truth" / "captions.csv", na_filter=False)
    rows = table[(table["img_path"] == image) & (table["caption_index"] == 0)]
    assert [word.wrong for word in words] == rows["wrong"].astype(bool).tolist()
    colours = [word.text for word in words if word.word_class == "colour"]
    assert colours == rows[rows["attribute"].str.endswith("_color")]["text"].tolist()


@pytest.mark.parametrize(
    ("word", "kind"),
    [("navy", "colour"), ("crimson", "colour"), ("jeans", "clothing"), ("backpack", "belonging"), ("man", "person"),
     ("striped", "pattern"), ("ponytail", "hair"), ("walking", "other content")],
)  # fmt: skip
def test_lexicon(word: str, kind: str) -> None:
    assert usual_class(word) == kind


def test_without_truth(model: PersonSearchModel, prepared: Prepared, tmp_path: Path) -> None:
    """Other data: classes from the lexicon, no visible share, and everything is written all the same."""
    bare = Prepared(**{**vars(prepared), "image_root": tmp_path / "raw" / "imgs"})
    bare.image_root.parent.mkdir()
    bare.image_root.symlink_to(prepared.image_root)
    comparison = compare(model, bare, "test", MaskingConfig(ratio=0.25), draws=1, limit=6)
    assert comparison.words["visible"].isna().all()
    assert (comparison.words["content"] == (comparison.words["class"] != FUNCTION)).all()
    document = compare_masks.write_comparison(tmp_path, comparison, bare, "bare")
    assert document["masks"][0]["visible_share"] is None
    assert pd.read_csv(tmp_path / "masks.csv")["visible_share"].isna().all()


def test_a_broken_truth_is_a_data_error(prepared: Prepared, tmp_path: Path) -> None:
    broken = Prepared(**{**vars(prepared), "image_root": tmp_path / "imgs"})
    (tmp_path / "truth").mkdir()
    for text in (
        "",
        "img_path,start\nx,1\n",
        "img_path,caption_index,start,end,text,part,attribute,wrong\na,b,c,d,e,f,g,h",
    ):
        (tmp_path / "truth" / "captions.csv").write_text(text)
        with pytest.raises(DataError, match="broken"):
            read_truth(broken)


# --- files --------------------------------------------------------------------------------------------------


def test_what_the_command_writes(model: PersonSearchModel, prepared: Prepared, tmp_path: Path) -> None:
    save_model(tmp_path / "model", model, "card")
    config = masking_of(tmp_path / "model", 0.25, ["masking.temperature=0.5"])
    assert (config.ratio, config.temperature) == (0.25, 0.5)
    out = tmp_path / "out"
    table, document = compare_masks.compare_masks(tmp_path / "model", prepared, "test", config, 1, 8, out)
    assert {file.name for file in out.iterdir()} == {
        "masks.csv", "classes.csv", "most_masked.csv", "against_random.csv", "words.csv", "masks.png", "captions.html",
    }  # fmt: skip
    assert (out / "masks.csv").read_text().splitlines()[0] == ",".join(MASKS_COLUMNS)
    assert [row["strategy"] for row in document["masks"]] == list(STRATEGIES) == table["strategy"].tolist()
    assert {row["strategy"] for row in document["against_random"]} == {"content", "attention"}
    shares = pd.read_csv(out / "classes.csv").groupby("strategy")["share"].sum()
    assert np.allclose(shares, 1, atol=1e-3)
    page = (out / "captions.html").read_text()
    assert page.count('class="sheet shown"') == 8
    masked = sum(len(part) for _, part in pd.read_csv(out / "words.csv").groupby("strategy"))
    assert page.count('class="word masked"') == masked


def test_the_page_escapes_captions(tmp_path: Path, prepared: Prepared) -> None:
    from agatool.mask_figures import Guess, ShownCaption, Word, captions_html

    image = prepared.image_root / prepared.images["path"][0]
    shown = ShownCaption(image, "<b>red</b> & blue", [Word(0, 3, 0.0), Word(3, 6, 1.0)], {"x": {1: Guess("<i>", True)}})
    chart = tmp_path / "chart.png"
    chart.write_bytes(b"png")
    captions_html(tmp_path / "page.html", "<script>", chart, (["a"], [["<u>"]]), [shown])
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;" in page
    assert not any(hostile in page for hostile in ("<script>", "<u>", "<i>", "<b>red"))


# --- the ablation -------------------------------------------------------------------------------------------


def values(arm: str, per_query: list[list[float]]) -> Values:
    return Values("t2i", "reranked", "R@1", arm, np.array(per_query))


def test_ablation_table_is_paired_over_queries() -> None:
    generator = np.random.default_rng(0)
    base = generator.choice([0.0, 100.0], (2, 200))
    better = np.where(generator.random((2, 200)) < 0.2, 100.0, base)
    table = ablation_table([values("random", base.tolist()), values("attention", better.tolist())])
    random, attention = table.to_dict("records")
    assert (random["difference"], random["p"]) == (0, 1)
    assert attention["value"] == pytest.approx(better.mean())
    assert attention["difference"] == pytest.approx(better.mean() - base.mean())
    assert attention["difference_low"] < attention["difference"] < attention["difference_high"]
    assert attention["p"] < 0.01
    assert attention["low"] < attention["value"] < attention["high"]
    assert attention["seed_sd"] == pytest.approx(np.std(better.mean(1), ddof=1))
    assert math.isnan(ablation_table([values("random", base[:1].tolist())])["seed_sd"][0])
    assert seed_table([values("attention", better.tolist())])["value"].tolist() == better.mean(1).tolist()


def test_arms_differ_in_masking_and_tem_alone() -> None:
    base = build_config({"masking": {"ratio": 0.25}, "train": {"max_steps": 3}})
    assert [arm.name for arm in ARMS] == ["random", "content", "attention", "attention+tem", "random+tem"]
    for arm in ARMS:
        made = arm_config(base, arm, 7).model_dump()
        assert (made["masking"]["strategy"], made["tem"]["enabled"], made["train"]["seed"]) == (*arm, 7)
        made["masking"]["strategy"], made["tem"]["enabled"] = base.masking.strategy, base.tem.enabled
        made["train"]["seed"] = base.train.seed
        assert made == base.model_dump()


TWO_ARMS = (ARMS[0], ARMS[3])  # only as many as it takes to compare them: each one trains


def test_arms_by_name() -> None:
    assert find_arms("attention+tem, random") == TWO_ARMS == find_arms("attention+tem")
    with pytest.raises(UsageError, match=r"--arms 'agm'"):
        find_arms("random,agm")


@pytest.fixture(scope="module")
def trained(
    prepared: Prepared,
    tiny_config: Callable[..., RunConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[RunConfig, Path]:
    """Arms trained for two steps each, one seed."""
    out = tmp_path_factory.mktemp("ablation")
    base = tiny_config("train.max_steps=2")
    run_ablation(base, prepared, out, 1, TWO_ARMS)
    return base, out


def test_ablation_files(trained: tuple[RunConfig, Path]) -> None:
    _, out = trained
    table = pd.read_csv(out / "ablation.csv")
    assert table["arm"].unique().tolist() == [arm.name for arm in TWO_ARMS]
    own = pd.read_csv(arm_folder(out, TWO_ARMS[1], 0) / "metrics.csv")
    own = own[own["stage"] == "reranked"].set_index(["direction", "metric"])["value"]
    mine = table[table["arm"] == "attention+tem"].set_index(["direction", "metric"])["value"]
    assert np.allclose(mine.sort_index(), own.sort_index(), atol=1e-3)
    assert (out / "ablation.png").stat().st_size > 1000
    assert len(ablation.ablation_rows(table)[1]) == len(TWO_ARMS)


def test_finished_arms_stay_and_interrupted_ones_resume(trained: tuple[RunConfig, Path], prepared: Prepared) -> None:
    base, out = trained
    folders = [arm_folder(out, arm, 0) for arm in TWO_ARMS]
    before = {file: file.stat().st_mtime_ns for folder in folders for file in folder.rglob("*")}
    record = folders[1] / "evaluation.json"
    queries = (folders[1] / "queries.csv").read_bytes()
    record.unlink()  # as if it had been killed after its last step
    train_arms(base, prepared, out, 1, TWO_ARMS)
    changed = {file for file, time in before.items() if file.exists() and file.stat().st_mtime_ns != time}
    assert record in changed
    assert all(file.is_relative_to(folders[1]) for file in changed)
    assert not any("checkpoints" in file.parts for file in changed)  # resumed after its last step
    assert (folders[1] / "queries.csv").read_bytes() == queries


def test_arms_of_another_configuration_are_refused(trained: tuple[RunConfig, Path], prepared: Prepared) -> None:
    base, out = trained
    other = base.model_copy(update={"masking": base.masking.model_copy(update={"ratio": 0.3})})
    with pytest.raises(UsageError, match="another configuration"):
        train_arms(other, prepared, out, 1, TWO_ARMS)
