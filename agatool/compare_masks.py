"""`aga compare-masks`: does attention choose better words than chance? No training, any checkpoint.

Shape suffixes: B captions of a batch, L tokens, U maskable units, S masked tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from agatool import console
from agatool.checkpoint import load
from agatool.config import MaskingConfig, build_config, parse_override, read_toml
from agatool.data.prepare import Prepared
from agatool.data.sampling import stream_seed
from agatool.data.word_classes import CLASSES, FUNCTION, OTHER, WordTruth, named, read_truth, usual_class
from agatool.encoding import ImageSet, encode_images, finite, inference, model_device
from agatool.errors import DataError
from agatool.files import contained
from agatool.machine import memory_errors, pick_device, use_bf16
from agatool.mask_figures import Guess, ShownCaption, Word, captions_html, masks_png
from agatool.masking import Chosen, Strategy, select_words, word_scores
from agatool.metrics import paired_test
from agatool.model import ImageKeysValues, PersonSearchModel
from agatool.objective import class_attention
from agatool.report import write_csv
from agatool.tokenization import Batch, Encoding

STRATEGIES: tuple[Strategy, ...] = ("random", "content", "attention")
IMAGES = ("image", "other_image", "no_image")  # what the model looks at while it fills words in
MASKS_COLUMNS = (
    "strategy", "realised_ratio", "content_share", "visible_share", "mlm_top1", "mlm_top5", "ce_image",
    "ce_other_image", "ce_no_image", "image_gain",
)  # fmt: skip
BATCH = 32  # captions; their images' keys and values are held at once
MOST = 30  # words a strategy listed in most_masked.csv
SHOWN = 12  # captions of the page
_TOP = 5
_MEASURES = ("content", "visible", "image_gain")


@dataclass(frozen=True)
class Comparison:
    """What was masked and how well it was filled in; every table of the command is a group-by of these two.

    captions  caption_id, image (path below the image root), caption.
    words     every word that has tokens: caption_id, word, start, end, text, class, content, visible, attention.
              `visible` is NaN without truth; `attention` is the word's share of the class attention.
    masked    every masked unit: strategy, draw, caption_id, word, pieces, ce_image, ce_other_image, ce_no_image
              (nats, summed over the word's pieces), top1, top5 (with the right image), guess (the top-1 word).
    units     how many units could have been masked, over all draws.
    """

    captions: pd.DataFrame
    words: pd.DataFrame
    masked: pd.DataFrame
    units: int


def masking_of(model_folder: Path, ratio: float, overrides: Sequence[str] = ()) -> MaskingConfig:
    """The masking of the run that a model belongs to, else the defaults, at `ratio` and with `overrides`."""
    stored = model_folder.parent / "config.toml"
    run = read_toml(stored) if model_folder.is_dir() and stored.is_file() else {}
    layers = [run, {"masking": {"ratio": ratio}}, *(parse_override(text) for text in overrides)]
    return build_config(*layers).masking


# --- which captions and images ------------------------------------------------------------------------------


class _Sample(NamedTuple):
    """The captions that take part, in the order of their images; indices are into `paths`."""

    captions: pd.DataFrame  # caption_id, image_id, caption, image, number (of the caption among its image's)
    paths: list[Path]
    right: np.ndarray  # [captions] the caption's own image
    other: np.ndarray  # [captions] an image of another person


def _sample(prepared: Prepared, split: str, limit: int) -> _Sample:
    """`limit` captions of a split (0: all), drawn with a fixed seed, each with another person's image."""
    images, captions = prepared.split(split)
    captions = captions.assign(number=captions.groupby("image_id").cumcount())
    generator = np.random.default_rng(0)
    if 0 < limit < len(captions):
        captions = captions.iloc[np.sort(generator.choice(len(captions), limit, replace=False))]
    captions = captions.sort_values(["image_id", "caption_id"], ignore_index=True)
    used = images[images["image_id"].isin(captions["image_id"])].reset_index(drop=True)
    position = pd.Series(used.index, index=used["image_id"])
    right = captions["image_id"].map(position).to_numpy()
    persons = used["person_id"].to_numpy()
    if len(set(persons)) < 2:
        raise DataError(
            f"The captions of split {split!r} are about one person: there is no other person's image",
            "Choose another --split, or a larger --limit.",
        )
    other = np.array([generator.choice(np.flatnonzero(persons != persons[own])) for own in right])
    paths = [contained(prepared.image_root, path) for path in used["path"]]
    return _Sample(captions.assign(image=used["path"].to_numpy()[right]), paths, right, other)


# --- masking and filling in ---------------------------------------------------------------------------------


class _Looking(NamedTuple):
    """The images of a batch as the fusion layers want them, and which of them each caption looks at."""

    projected: ImageKeysValues
    image: Tensor  # [B]
    other_image: Tensor  # [B]
    no_image: Tensor  # [B]


def compare(
    model: PersonSearchModel,
    prepared: Prepared,
    split: str,
    config: MaskingConfig,
    draws: int = 3,
    limit: int = 1000,
    bf16: bool = False,
) -> Comparison:
    """Mask captions by every strategy at `config.ratio`, `draws` times each, and have the model fill them in.

    A masked word is always [MASK] here, never a random word or itself as in training: what is measured is whether
    the word can be told from the rest. The draws of the strategies share their random numbers, the three images
    their masks. Each image is encoded once. "No image" is one of the mean colour throughout. Raises DataError for
    a split with fewer than two persons, CheckpointError for a model that gives NaN.
    """
    sample = _sample(prepared, split, limit)
    truth = read_truth(prepared)
    encodings = model.tokenizer.encode(sample.captions["caption"].tolist())
    images = encode_images(model, sample.paths, BATCH, bf16)
    words: list[pd.DataFrame] = []
    masked: list[pd.DataFrame] = []
    units = 0
    with inference(model, bf16), console.progress("Filling in masked words", len(encodings)) as task:
        blank = model.encode_image(torch.zeros(1, 3, *model.config.image_size, device=model_device(model))).tokens
        for number, start in enumerate(range(0, len(encodings), BATCH)):
            part = slice(start, start + BATCH)
            rows, codes = sample.captions.iloc[part], encodings[part]
            batch = model.tokenizer.pad(codes).to(model_device(model))
            attention_BL = class_attention(model, batch.ids, batch.mask, config)[1]
            content_BW = model.tokenizer.content_mask(rows["caption"].tolist(), codes).to(batch.ids.device)
            words.append(_word_table(rows, codes, content_BW, word_scores(attention_BL, batch.word_of), truth))
            looking = _project(model, images, blank, sample.right[part], sample.other[part])
            for draw in range(draws):
                for strategy in STRATEGIES:
                    chosen = select_words(
                        batch,
                        config.model_copy(update={"strategy": strategy}),
                        generator=torch.Generator().manual_seed(stream_seed(draw, number, 3)),
                        class_attention=attention_BL,
                        content=content_BW,
                    )
                    table = _fill_in(model, batch, chosen, looking, rows["caption_id"].to_numpy())
                    masked.append(table.assign(strategy=strategy, draw=draw))
                units += int(chosen.present.sum())
            task.advance(len(rows))
    captions = sample.captions[["caption_id", "image", "caption"]]
    return Comparison(captions, pd.concat(words, ignore_index=True), pd.concat(masked, ignore_index=True), units)


def _word_table(
    captions: pd.DataFrame,
    encodings: Sequence[Encoding],
    content_BW: Tensor,
    scores_BU: Tensor,
    truth: WordTruth | None,
) -> pd.DataFrame:
    """The words of a batch that have tokens, as `Comparison.words`."""
    rows = []
    scores, flags = scores_BU.cpu().numpy(), content_BW.cpu().numpy()
    for line, (caption, encoding) in enumerate(zip(captions.itertuples(), encodings, strict=True)):
        known = truth.of(caption.image, caption.number, caption.caption) if truth else None
        for word, (start, end) in enumerate(encoding.words[: max(encoding.word_of, default=-1) + 1]):
            text, content, visible = caption.caption[start:end].lower(), bool(flags[line, word]), float("nan")
            kind = usual_class(text) if content else FUNCTION
            if known is not None:
                about = named(known, start, end)
                visible = float(about is not None and not about.wrong)
                kind = about.word_class if about else OTHER if content else FUNCTION
            rows.append((caption.caption_id, word, start, end, text, kind, content, visible, scores[line, word]))
    columns = ["caption_id", "word", "start", "end", "text", "class", "content", "visible", "attention"]
    return pd.DataFrame(rows, columns=columns)


def _project(
    model: PersonSearchModel, images: ImageSet, blank: Tensor, right: np.ndarray, other: np.ndarray
) -> _Looking:
    """Keys and values of every image that a batch needs, the blank one last."""
    device = blank.device
    needed = np.union1d(right, other)
    tokens = [tokens.to(device, blank.dtype) for tokens in images.tokens(needed.tolist())]
    own, others = (torch.from_numpy(np.searchsorted(needed, indices)).to(device) for indices in (right, other))
    projected = model.project_image(torch.cat([*tokens, blank]))
    return _Looking(projected, own, others, torch.full_like(own, len(needed)))


def _fill_in(
    model: PersonSearchModel, batch: Batch, chosen: Chosen, looking: _Looking, caption_ids: np.ndarray
) -> pd.DataFrame:
    """Every masked unit of a batch with what the model makes of it, looking at each of the images in turn."""
    hidden = batch.ids.masked_fill(chosen.tokens, model.tokenizer.mask_id)
    text_BLD = model.encode_text(hidden, batch.mask).tokens
    labels_S = batch.ids[chosen.tokens].cpu()
    # Masked units are numbered row by row; a token's unit is its `slot`.
    number_BU = chosen.units.flatten().cumsum(0).view_as(chosen.units) - 1
    slot_S = number_BU.gather(1, chosen.unit_of.clamp(min=0))[chosen.tokens].cpu()
    row_N = chosen.units.nonzero()[:, 0].cpu()
    zeros_N = torch.zeros(len(row_N), dtype=torch.float64)
    pieces_N = zeros_N.index_add(0, slot_S, torch.ones_like(slot_S, dtype=torch.float64))
    word_N = zeros_N.long().scatter(0, slot_S, batch.word_of[chosen.tokens].cpu())
    columns: dict[str, Any] = {
        "caption_id": caption_ids[row_N.numpy()],
        "word": word_N.numpy(),
        "pieces": pieces_N.int().numpy(),
    }
    for name in IMAGES:
        fused = model.fuse(text_BLD, batch.mask, looking.projected, getattr(looking, name))
        logits_SV = finite(model.mlm(fused[chosen.tokens]).float()).cpu()
        loss_S = F.cross_entropy(logits_SV, labels_S, reduction="none").double()
        columns[f"ce_{name}"] = zeros_N.index_add(0, slot_S, loss_S).numpy()
        if name == "image":
            rank_S = (logits_SV > logits_SV.gather(1, labels_S[:, None])).sum(1)
            for column, within in (("top1", 1), ("top5", _TOP)):  # a word is right when all its pieces are
                right_N = zeros_N.index_add(0, slot_S, (rank_S < within).double())
                columns[column] = (right_N == pieces_N).numpy()
            columns["guess"] = list(_guesses(model, logits_SV.argmax(1).tolist(), slot_S.tolist(), len(row_N)))
    return pd.DataFrame(columns)


def _guesses(model: PersonSearchModel, ids: Sequence[int], slots: Sequence[int], count: int) -> Iterator[str]:
    """The words that the best pieces make."""
    pieces: list[list[int]] = [[] for _ in range(count)]
    for token, slot in zip(ids, slots, strict=True):
        pieces[slot].append(token)
    yield from map(model.tokenizer.decode_word, pieces)


# --- tables -------------------------------------------------------------------------------------------------


def described(comparison: Comparison) -> pd.DataFrame:
    """Every masked unit with what is known of its word."""
    about = comparison.words[["caption_id", "word", "text", "class", "content", "visible", "attention"]]
    return comparison.masked.merge(about, on=["caption_id", "word"], how="left", validate="many_to_one")


def mask_table(comparison: Comparison) -> pd.DataFrame:
    """masks.csv: one row a strategy, columns MASKS_COLUMNS (docs/compare-masks.md)."""
    by_strategy = described(comparison).groupby("strategy", sort=False)
    means = dict.fromkeys(("content", "visible", "top1", "top5", *(f"ce_{image}" for image in IMAGES)), "mean")
    table = by_strategy.agg(means).reset_index()
    table.insert(1, "realised_ratio", by_strategy.size().to_numpy() / comparison.units)
    table["image_gain"] = table["ce_other_image"] - table["ce_image"]
    names = {"content": "content_share", "visible": "visible_share", "top1": "mlm_top1", "top5": "mlm_top5"}
    return table.rename(columns=names)[list(MASKS_COLUMNS)]


def class_table(comparison: Comparison) -> pd.DataFrame:
    """classes.csv: strategy, class, masked, share of the strategy's masked units; strategy "all" is every word."""
    words = pd.concat([comparison.words.assign(strategy="all"), described(comparison)])
    counts = words.groupby(["strategy", "class"]).size().rename("masked").reset_index()
    counts["share"] = counts["masked"] / counts.groupby("strategy")["masked"].transform("sum")
    table = _in_order(counts, "masked")
    table.attrs["order"] = CLASSES
    return table


def word_table(comparison: Comparison) -> pd.DataFrame:
    """most_masked.csv: strategy, word, class, masked, of (times it could have been), rate, image_gain in nats."""
    words = described(comparison)
    words["image_gain"] = words["ce_other_image"] - words["ce_image"]
    table = words.groupby(["strategy", "text"]).agg(
        {"class": lambda classes: classes.mode()[0], "word": "size", "image_gain": "mean"}
    )
    draws = comparison.masked["draw"].nunique()
    occurrences = comparison.words["text"].value_counts() * draws
    table = table.rename(columns={"word": "masked"}).reset_index().rename(columns={"text": "word"})
    table.insert(4, "of", table["word"].map(occurrences))
    table.insert(5, "rate", table["masked"] / table["of"])
    return _in_order(table, "masked").groupby("strategy", sort=False).head(MOST).reset_index(drop=True)


def _in_order(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """By strategy, then descending; equal ones in alphabetical order."""
    rank = table["strategy"].map({name: place for place, name in enumerate(("all", *STRATEGIES))})
    ordered = table.assign(rank=rank).sort_values(["rank", by], ascending=[True, False], kind="stable")
    return ordered.drop(columns="rank").reset_index(drop=True)


def against_random(comparison: Comparison) -> pd.DataFrame:
    """against_random.csv: strategy, measure, ratio to random, difference with 95 % interval, p; paired by caption."""
    words = described(comparison)
    words["image_gain"] = words["ce_other_image"] - words["ce_image"]
    whole = words.groupby("strategy")[list(_MEASURES)].mean()
    by_caption = words.groupby(["strategy", "caption_id"])[list(_MEASURES)].mean().astype(float)
    rows = []
    for strategy in STRATEGIES[1:]:
        for measure in _MEASURES:
            pairs = by_caption[measure].unstack("strategy")[["random", strategy]].dropna().to_numpy()
            if len(pairs):  # no truth: nothing is known to be visible
                ratio = whole.loc[strategy, measure] / whole.loc["random", measure]
                rows.append((strategy, measure, ratio, *paired_test(pairs[:, 0], pairs[:, 1])))
    return pd.DataFrame(rows, columns=["strategy", "measure", "ratio", "difference", "low", "high", "p"])


# --- the command --------------------------------------------------------------------------------------------


def compare_masks(
    model_folder: Path,
    prepared: Prepared,
    split: str,
    config: MaskingConfig,
    draws: int,
    limit: int,
    out: Path,
    device: str = "auto",
    precision: str = "auto",
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Open a model, compare the strategies over a split and write everything -> masks.csv's table, and for --json."""
    target = pick_device(device)
    model = load(model_folder).to(target)
    with memory_errors("Use --device cpu, or a machine with more memory."):
        comparison = compare(model, prepared, split, config, draws, limit, use_bf16(target, precision))
    title = f"Masks compared on {prepared.name}, {split}: {len(comparison.captions):,} captions"
    return mask_table(comparison), write_comparison(out, comparison, prepared, title)


def write_comparison(out: Path, comparison: Comparison, prepared: Prepared, title: str) -> dict[str, Any]:
    """masks.csv, classes.csv, most_masked.csv, against_random.csv, words.csv, masks.png and captions.html in `out`.

    Returns the first four as plain data, for --json.
    """
    tables = {
        "masks": mask_table(comparison),
        "classes": class_table(comparison),
        "most_masked": word_table(comparison),
        "against_random": against_random(comparison),
    }
    for name, table in tables.items():
        write_csv(out / f"{name}.csv", table)
    write_csv(out / "words.csv", described(comparison))
    masks_png(out / "masks.png", tables["masks"], tables["classes"])
    shown = list(_shown(comparison, prepared))
    captions_html(out / "captions.html", title, out / "masks.png", mask_rows(tables["masks"]), shown)
    return {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}


def _shown(comparison: Comparison, prepared: Prepared) -> Iterator[ShownCaption]:
    """Captions for the page, spread evenly over the compared ones, with the masks of the first draw."""
    chosen = np.unique(np.linspace(0, len(comparison.captions) - 1, SHOWN).round().astype(int))
    words = dict(list(comparison.words.groupby("caption_id")))
    masked = dict(list(comparison.masked.query("draw == 0").groupby(["caption_id", "strategy"])))
    for row in comparison.captions.iloc[chosen].itertuples():
        if row.caption_id not in words:
            continue
        guesses: dict[str, dict[int, Guess]] = {}
        for name in STRATEGIES:
            rows = masked[row.caption_id, name].itertuples()
            guesses[name] = {unit.word: Guess(unit.guess, unit.top1) for unit in rows}
        image = contained(prepared.image_root, row.image)
        spans = [Word(word.start, word.end, word.attention) for word in words[row.caption_id].itertuples()]
        yield ShownCaption(image, row.caption, spans, guesses)


def mask_rows(masks: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """masks.csv for a terminal or a page: header and rows, shares in percent, cross-entropies in nats."""
    percent = {name for name in MASKS_COLUMNS[1:] if not name.startswith(("ce_", "image_"))}
    rows = []
    for record in masks.to_dict("records"):
        shown = {
            name: "" if pd.isna(value) else f"{value:.1%}" if name in percent else f"{value:.3f}"
            for name, value in record.items()
            if name != "strategy"
        }
        rows.append([record["strategy"], *shown.values()])
    header = ["", "ratio", "content", "visible", "top-1", "top-5", "CE own", "CE other", "CE none", "image gain"]
    return header, rows
