"""`aga visualize-attention`: pairs to look at, pictures and tables of them, and the measurement on the sample data.

Shape suffixes as in attention.py.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from agatool import console
from agatool.attention import (
    MODES,
    READ_OFF,
    TEXTS,
    Explanation,
    Look,
    Pair,
    Views,
    explain,
    look_masked,
    look_occluded,
    look_words,
    patch_grid,
    read_pixels,
    token_words,
)
from agatool.data.annotations import clean_caption, parse_record, read_records
from agatool.data.images import decode_image
from agatool.data.prepare import Prepared
from agatool.data.word_classes import NamedWord
from agatool.encoding import model_device
from agatool.errors import DataError, UsageError
from agatool.files import contained
from agatool.heatmaps import PAIRS_A_SHEET, Panel, Picture, draw_pair, draw_sheet
from agatool.localisation import Scores, Truth, read_masks, upsample, word_kind
from agatool.model import PersonSearchModel
from agatool.report import write_csv
from agatool.tokenization import Batch

Format = Literal["png", "pdf", "svg"]
PAIRS, MEASURED = 4, 200  # pairs drawn, captions measured, where --count is left out
_BATCH = 16  # captions measured at once
_MARKS = ("maps.csv", "localisation.csv")  # a folder that holds one of them is an earlier output of ours

# -- pairs ----------------------------------------------------------------------------------------------------------


def single_pair(image: Path, text: str) -> Pair:
    """An image file and a text of the user's. Raises UsageError for a text that is none."""
    try:
        return Pair(_file_name(image.stem), image, clean_caption(text))
    except DataError as error:
        raise UsageError(f"--text: {error.message}", 'For example --text "a man in a red coat".') from error


def captions_pairs(file: Path, image_root: Path | None, count: int | None) -> list[Pair]:
    """The first `count` (None: all) captions of a file in any schema that `aga prepare` reads.

    Image paths start from `image_root`, by default the file's folder or an imgs/ or images/ in it. A record that
    cannot be used is told and left out. Raises DataError where none is left.
    """
    pairs = list(islice(_file_pairs(file, image_root), count))
    if not pairs:
        raise DataError(f"{file} holds no usable record", "See docs/datasets.md for the formats.")
    return pairs


def _file_pairs(file: Path, image_root: Path | None) -> Iterator[Pair]:
    roots = [image_root] if image_root else [file.parent / folder for folder in (".", "imgs", "images")]
    number = 0
    for position, raw in enumerate(read_records(file)):
        try:  # whose picture it is does not matter here
            record = parse_record({"id": 0, **raw} if isinstance(raw, dict) else raw)
            candidates = [contained(root, record.image) for root in roots]
        except DataError as error:
            console.warn(f"{file.name}[{position}] is left out: {error.message}")
            continue
        image = next((path for path in candidates if path.is_file()), candidates[0])
        for caption in record.captions:
            yield Pair(f"{number:04d}-{_file_name(image.stem)}", image, caption)
            number += 1


def dataset_pairs(prepared: Prepared, split: str, count: int, query: int | None = None) -> list[Pair]:
    """`count` captions spread evenly over a split, or the one with caption_id `query`, with their own images."""
    captions = prepared.captions if query is not None else prepared.split(split)[1]
    if query is not None:
        captions = captions[captions["caption_id"] == query]
        if captions.empty:
            raise DataError(
                f"{prepared.folder} has no caption {query}", f"caption_id runs to {len(prepared.captions) - 1}."
            )
    if captions.empty:
        raise DataError(f"Split {split!r} of {prepared.folder} has no captions", "Choose another --split.")
    paths = prepared.images.set_index("image_id")["path"]
    chosen = captions.iloc[spread(len(captions), count)]
    return [
        Pair(f"caption-{row.caption_id}", contained(prepared.image_root, paths[row.image_id]), str(row.caption))
        for row in chosen.itertuples()
    ]


def spread(total: int, count: int) -> list[int]:
    """`count` indices below `total` (all, where it is not so many), evenly spread."""
    count = min(count, total)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def _file_name(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:60].strip("_") or "image"


# -- the command ----------------------------------------------------------------------------------------------------


def claim_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is ours and to be overwritten. Raises UsageError."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", "Choose another --out.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not any((folder / name).is_file() for name in _MARKS):
        raise UsageError(f"{folder} holds something else; it is left alone", "Choose another --out.")
    if not overwrite:
        raise UsageError(f"{folder} is not empty", "Add --overwrite, or choose another --out.")
    shutil.rmtree(folder)


def visualize(
    model: PersonSearchModel,
    pairs: Sequence[Pair],
    look: Look,
    words: str | None,
    out: Path,
    suffix: Format = "png",
) -> list[Explanation]:
    """Draw every pair into `out`: NAME.SUFFIX, contact sheets, maps.csv, words.csv, pairs.csv.

    `words` are separated by commas, or `all`. Raises UsageError where no caption has any of them, DataError for a
    broken image.
    """
    look = look.settled(model)
    wanted = [word.strip().lower() for word in words.split(",")] if words is not None else None
    explained: list[Explanation] = []
    with console.progress("Looking at pairs", len(pairs)) as task:
        for pair in pairs:
            explained.append(explain(model, pair, look, wanted))
            task.advance()
    if wanted and "all" not in wanted and not any(explanation.shown for explanation in explained):
        there = ", ".join(dict.fromkeys(word.text for word in explained[0].words))
        raise UsageError(f"--words {words}: no caption has any of them", f"The first caption's words: {there}")
    with console.progress("Drawing", len(explained)) as task:
        pictures = []
        for explanation in explained:
            pictures.append(_picture(explanation))
            draw_pair(out / f"{explanation.pair.name}.{suffix}", pictures[-1])
            task.advance()
    for start in range(0, len(pictures), PAIRS_A_SHEET):
        number = f"-{start // PAIRS_A_SHEET + 1}" if len(pictures) > PAIRS_A_SHEET else ""
        draw_sheet(out / f"contact_sheet{number}.{suffix}", pictures[start : start + PAIRS_A_SHEET])
    for name, table in _tables(explained, look).items():
        write_csv(out / name, table, decimals=7)
    return explained


def _picture(explanation: Explanation) -> Picture:
    image = np.asarray(decode_image(explanation.pair.image))
    most = max((word.attention for word in explanation.words), default=0.0) or 1.0
    panels = []
    for word in explanation.shown:
        assert word.heat is not None
        notes = [f"{guess} {100 * chance:.0f} %" for guess, chance in word.guesses]
        heat = upsample(word.heat[None], (image.shape[0], image.shape[1]))[0]
        panels.append(Panel(f"[{word.text}]" if notes else word.text, heat, notes))
    shades = [(*word.span, word.attention / most) for word in explanation.words]
    return Picture(image, explanation.pair.caption, shades, f"match {100 * explanation.match:.1f} %", panels)


def _tables(explained: Sequence[Explanation], look: Look) -> dict[str, pd.DataFrame]:
    """pairs.csv, words.csv and, one row a patch, maps.csv."""
    pairs, words, maps = [], [], []
    for explanation in explained:
        name = explanation.pair.name
        pairs.append((name, str(explanation.pair.image), explanation.pair.caption, explanation.match))
        for word in explanation.words:
            filled = " ".join(f"{guess}:{chance:.4f}" for guess, chance in word.guesses)
            words.append((name, word.number, word.text, *word.span, word.attention, filled))
        for word in explanation.shown:
            assert word.heat is not None
            cells = np.ndindex(word.heat.shape)
            maps += [(name, word.number, word.text, *cell, float(word.heat[cell])) for cell in cells]
    of_look = {"mode": look.mode, "method": look.method, "layer": look.layer, "head": look.head}
    return {
        "pairs.csv": pd.DataFrame(pairs, columns=["pair", "image", "caption", "match"]).assign(**of_look),
        "words.csv": pd.DataFrame(
            words, columns=["pair", "number", "word", "start", "end", "class_attention", "guesses"]
        ),
        "maps.csv": pd.DataFrame(maps, columns=["pair", "number", "word", "row", "column", "value"]),
    }


def summary(explained: Sequence[Explanation]) -> list[dict[str, object]]:
    """What the tables hold but for the maps, for JSON."""
    return [
        {
            "pair": each.pair.name,
            "image": str(each.pair.image),
            "caption": each.pair.caption,
            "match": each.match,
            "words": [
                {"word": word.text, "number": word.number, "class_attention": word.attention, "guesses": word.guesses}
                for word in each.shown
            ],
        }
        for each in explained
    ]


# -- measuring ------------------------------------------------------------------------------------------------------


def measure(model: PersonSearchModel, prepared: Prepared, split: str, count: int, out: Path) -> pd.DataFrame:
    """Every mode, method, layer and head reduction against the sample's part masks, over `count` captions.

    Writes `out`/localisation.csv and returns it (`Scores.table` has the columns). Raises DataError where the data set
    has no masks.
    """
    truth = read_masks(prepared)
    _, captions = prepared.split(split)
    paths = prepared.images.set_index("image_id")["path"]
    chosen = captions[captions["caption_id"].isin(truth.words)]
    if chosen.empty:
        raise DataError(f"No caption of split {split!r} names a part", "Choose another --split.")
    chosen = chosen.iloc[spread(len(chosen), count)]
    scores = Scores()
    with console.progress("Measuring captions", len(chosen)) as task:
        for start in range(0, len(chosen), _BATCH):
            part = chosen.iloc[start : start + _BATCH]
            jobs = [
                (str(row.caption), str(paths[row.image_id]), truth.words[row.caption_id]) for row in part.itertuples()
            ]
            _measure_batch(model, prepared.image_root, truth, jobs, scores)
            task.advance(len(part))
    table = scores.table()
    write_csv(out / "localisation.csv", table)
    return table


def _settings(model: PersonSearchModel) -> Iterator[Look]:
    """Every way to read maps off but single heads, and but Grad-CAM where it is zero by construction."""
    last = model.config.fusion_layers
    for mode in MODES:
        for method in READ_OFF:
            for layer in range(1, last + 1):
                if (mode, method, layer) != ("words", "gradcam", last):
                    yield from (Look(mode, method, layer, head) for head in ("mean", "max"))


def _measure_batch(
    model: PersonSearchModel, root: Path, truth: Truth, jobs: Sequence[tuple[str, str, list[NamedWord]]], scores: Scores
) -> None:
    """Judge the named words of some (caption, image path, words) under every setting."""
    tokenizer, device = model.tokenizer, model_device(model)
    encodings = tokenizer.encode([caption for caption, _, _ in jobs])
    batch = tokenizer.pad(encodings).to(device)
    spans = [[(word.start, word.end) for word in named] for _, _, named in jobs]
    members_NWL = token_words(encodings, spans, batch.ids.shape[1]).to(device)
    pixels = read_pixels(model, [contained(root, path) for _, path, _ in jobs])
    with torch.no_grad():
        image_tokens = model.encode_image(pixels).tokens
        text_tokens = model.encode_text(batch.ids, batch.mask).tokens
    grid = patch_grid(model, pixels)
    seen = {
        "words": look_words(model, text_tokens, batch.mask, image_tokens, members_NWL)[0],
        "masked": _masked_views(model, batch, image_tokens, members_NWL.bool()),
    }
    maps = {look: seen[look.mode].heat(look, grid).cpu().numpy() for look in _settings(model)}
    has_tokens = members_NWL.bool().any(-1)
    for row, (_, path, named) in enumerate(jobs):
        column = has_tokens[row].nonzero()[:, 0]  # the others lie behind the cut of the caption
        length = len(encodings[row].ids)
        one = Batch(*(x[row : row + 1, :length] for x in (batch.ids, batch.mask, batch.word_of)))
        hidden = look_occluded(model, one, pixels[row : row + 1], members_NWL[row, column, :length].bool())
        numbers = column.tolist()
        heats = {look: heat_NWRC[row][numbers] for look, heat_NWRC in maps.items()}
        heats |= {Look(mode, "occlusion"): heat_WRC.cpu().numpy() for mode, heat_WRC in hidden.items()}
        kinds = [str(word_kind(named[n])) for n in numbers]
        mask_WYX = truth.masks(path, [named[n] for n in numbers])
        for look, heat_WRC in heats.items():
            setting = (look.mode, str(look.method), str(look.layer or "-"), look.head or "-")
            scores.add(setting, kinds, upsample(heat_WRC, mask_WYX.shape[1:]), mask_WYX)
        scores.add_baselines(kinds, mask_WYX, grid)


def _masked_views(model: PersonSearchModel, batch: Batch, image_tokens: Tensor, members_NWL: Tensor) -> Views:
    """`look_masked` of every word of every caption, in the shape of `look_words`: [S, N, W, h, P]."""
    text_K, word_K = members_NWL.any(-1).nonzero(as_tuple=True)
    parts = []
    for text, word in zip(text_K.split(TEXTS), word_K.split(TEXTS), strict=True):
        texts = Batch(batch.ids[text], batch.mask[text], batch.word_of[text])
        parts.append(look_masked(model, texts, image_tokens[text], members_NWL[text, word], model.tokenizer.mask_id)[0])
    whole = []
    for maps in zip(*parts, strict=True):
        joined = torch.cat(maps, dim=1)[:, :, 0]  # [S, K, h, P]
        filled = joined.new_zeros(len(joined), *members_NWL.shape[:2], *joined.shape[2:])
        filled[:, text_K, word_K] = joined
        whole.append(filled)
    return Views(*whole)
