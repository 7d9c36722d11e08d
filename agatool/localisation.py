"""Whether heat lies where it should: heat inside the part that a word names, and the pointing game.

Plain arrays only, no torch. Shape suffixes: W words of one image, R rows and C columns of the patch grid, Y and X
pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from agatool.data.prepare import Prepared
from agatool.data.word_classes import NamedWord, read_truth
from agatool.errors import DataError
from agatool.files import contained, read_json

CLASSES = ("garment", "colour", "accessory")
JUDGED = "garment + colour"  # the words of both: what the defaults of `aga visualize-attention` are chosen by
_KINDS = {"clothing": "garment", "pattern": "garment", "colour": "colour", "belonging": "accessory"}
_BORDER = 2  # cells around a map; a bicubic kernel reaches so far
_BLOB_WIDTH = 0.25  # standard deviation of the centre blob, as a share of the image's height and width
_TIE = 1e-6  # pixels this close to the peak, relative to it, share it

Setting = tuple[str, str, str, str]  # mode, method, layer, head


# -- pure functions of maps and masks -----------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _bicubic(cells: int, pixels: int) -> np.ndarray:
    """[pixels, border + cells + border]: the matrix that resamples one axis of a bordered map."""
    bordered = cells + 2 * _BORDER
    identity = Image.fromarray(np.eye(bordered, dtype=np.float32))
    box = (0, _BORDER, bordered, _BORDER + cells)
    return np.asarray(identity.resize((bordered, pixels), Image.Resampling.BICUBIC, box=box))


def upsample(maps_WRC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Heat of patches [W, R, C] -> heat of pixels [W, Y, X] of an image of `size` (height, width), never negative.

    Bicubic, so that a peak between two hot patches lies between them. Beyond the border lies what is lower, the patch
    at the border (repeated, as usual) or its neighbour (mirrored): repeating a peak would drag it to the very edge.
    """
    rows, columns = (_bicubic(cells, pixels) for cells, pixels in zip(maps_WRC.shape[-2:], size, strict=True))
    bordered = maps_WRC.astype(np.float32)
    for border in (((0, 0), (_BORDER, _BORDER), (0, 0)), ((0, 0), (0, 0), (_BORDER, _BORDER))):
        bordered = np.minimum(np.pad(bordered, border, mode="reflect"), np.pad(bordered, border, mode="edge"))
    return np.maximum(rows @ bordered @ columns.T, 0.0)


def score(heat_WYX: np.ndarray, mask_WYX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(share, hit), each [W]: heat inside the mask over all heat, and whether the peak lies in the mask.

    The pointing game of Zhang et al. 2016 (Top-down Neural Attention by Excitation Backprop) without its tolerance of
    some pixels. Where several pixels are the peak, `hit` is the share of them in the mask: what drawing one of them
    would give on average. A map without any heat counts as uniform.
    """
    heat, mask = heat_WYX.reshape(len(heat_WYX), -1), mask_WYX.reshape(len(mask_WYX), -1)
    heat = np.where(heat.max(1, keepdims=True) > 0, heat, 1.0)
    peak = heat >= heat.max(1, keepdims=True) * (1 - _TIE)
    return (heat * mask).sum(1) / heat.sum(1), (peak & mask).sum(1) / peak.sum(1)


def centre_blob(size: tuple[int, int]) -> np.ndarray:
    """[Y, X]: a Gaussian in the middle of the image, the guess of one who has not looked."""
    axes = (((np.arange(pixels) + 0.5) / pixels - 0.5) / _BLOB_WIDTH for pixels in size)
    down, right = (np.exp(-0.5 * axis**2) for axis in axes)
    return np.outer(down, right)


def coverage(mask_WYX: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[W, R, C]: the share of each patch that the mask covers: the best that a map of this grid can say."""
    rows, columns = (
        np.linspace(0, pixels, cells + 1).round().astype(int)
        for pixels, cells in zip(mask_WYX.shape[1:], grid, strict=True)
    )
    sums = np.add.reduceat(np.add.reduceat(mask_WYX.astype(np.float32), rows[:-1], 1), columns[:-1], 2)
    return sums / (np.diff(rows)[:, None] * np.diff(columns))


# -- truth of the sample data set ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """What the renderer of the sample data set knows of its captions and images."""

    folder: Path
    words: dict[int, list[NamedWord]]  # caption_id -> its words of CLASSES, the wrong ones left out
    numbers: dict[str, int]  # part -> its number in the masks

    def masks(self, path: str, words: Sequence[NamedWord]) -> np.ndarray:
        """[W, Y, X] bool: where the image with this path shows the part of each word. Raises DataError."""
        file = contained(self.folder / "parts", str(Path(path).with_suffix(".png")))
        try:
            with Image.open(file, formats=("PNG",)) as image:
                parts_YX = np.asarray(image)
        except Exception as error:  # a decoder fed a broken file raises nearly anything
            raise DataError(f"Cannot read the part mask {file}: {error}", "Prepare the sample again.") from error
        if parts_YX.ndim != 2:
            raise DataError(f"{file} is not a part mask: its shape is {parts_YX.shape}", "Prepare the sample again.")
        numbers = np.array([self.numbers[word.part] for word in words])
        return parts_YX == numbers[:, None, None]


def word_kind(word: NamedWord) -> str | None:
    """One of CLASSES, None for words about hair or the person as a whole."""
    return _KINDS.get(word.word_class)


def read_masks(prepared: Prepared) -> Truth:
    """The truth beside the images of a prepared sample data set. DataError where there is none or it does not fit."""
    named, folder = read_truth(prepared), prepared.image_root.parent / "truth"
    if named is None or not (folder / "parts.json").is_file():
        raise DataError(
            f"{prepared.name} has no part masks to measure against; the sample data set has",
            "aga visualize-attention --measure --dataset sample",
        )
    try:
        numbers = {name: int(number) for number, name in read_json(folder / "parts.json").items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{folder / 'parts.json'} is broken: {error}", "Prepare the sample again.") from error
    paths = prepared.images.set_index("image_id")["path"]
    captions = prepared.captions.assign(number=prepared.captions.groupby("image_id").cumcount())
    words = {
        row.caption_id: [
            word
            for word in named.of(paths[row.image_id], row.number, row.caption) or ()
            if word_kind(word) and not word.wrong and word.part in numbers
        ]
        for row in captions.itertuples()
    }
    return Truth(folder, {caption: found for caption, found in words.items() if found}, numbers)


# -- the table ----------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """Collects share and hit of every word under every setting."""

    rows: list[tuple[Setting, str, float, float]] = field(default_factory=list)

    def add(self, setting: Setting, kinds: Sequence[str], heat_WYX: np.ndarray, mask_WYX: np.ndarray) -> None:
        """Judge one image's words under one setting."""
        share, hit = score(heat_WYX, mask_WYX)
        self.rows += [(setting, *row) for row in zip(kinds, share.tolist(), hit.tolist(), strict=True)]

    def add_baselines(self, kinds: Sequence[str], mask_WYX: np.ndarray, grid: tuple[int, int]) -> None:
        """What one image's words get without any model: uniform, centre blob, and the best that the grid allows."""
        size = mask_WYX.shape[1:]
        guesses = {"uniform": np.ones(size), "centre": centre_blob((size[0], size[1]))}
        for name, heat in guesses.items():
            self.add(("-", name, "-", "-"), kinds, np.broadcast_to(heat, mask_WYX.shape), mask_WYX)
        best = upsample(coverage(mask_WYX, grid), (size[0], size[1]))
        self.add(("-", "best of grid", "-", "-"), kinds, best, mask_WYX)

    def table(self) -> pd.DataFrame:
        """mode, method, layer, head, class, words, heat_share, pointing, times_centre; shares from 0 to 1.

        `times_centre` is pointing over the centre blob's. Rows come in the order in which settings were added, the
        class JUDGED behind the others.
        """
        flat = pd.DataFrame([(*setting, *rest) for setting, *rest in self.rows], columns=_COLUMNS)
        flat = pd.concat([flat, flat[flat["class"].isin(JUDGED.split(" + "))].assign(**{"class": JUDGED})])
        means = flat.groupby(list(_COLUMNS[:5]), sort=False, as_index=False).agg(
            words=("pointing", "size"), heat_share=("heat_share", "mean"), pointing=("pointing", "mean")
        )
        centre = means[means["method"] == "centre"].set_index("class")["pointing"]
        reference = means["class"].map(centre)
        means["times_centre"] = (means["pointing"] / reference.where(reference > 0)).astype(float)
        return means


_COLUMNS = ("mode", "method", "layer", "head", "class", "heat_share", "pointing")


def table_rows(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The table for a terminal, (header, rows): a row a setting, pointing and heat share in percent for each class.

    Of JUDGED there is only the pointing; its heat says nothing new.
    """
    cells = {(*row[:4], row[4]): row for row in table.itertuples(index=False, name=None)}
    settings = list(dict.fromkeys(key[:4] for key in cells))
    columns = [f"{JUDGED}: hit", *(f"{kind}: {what}" for kind in CLASSES for what in ("hit", "heat"))]
    header = ["mode", "method", "layer", "head", *columns]
    rows = []
    for setting in settings:
        row = list(setting)
        for kind in (JUDGED, *CLASSES):
            *_, heat, hit, times = cells.get((*setting, kind), [float("nan")] * 3)
            row += [f"{100 * hit:.1f} ({times:.1f}x)", f"{100 * heat:.1f}"][: 1 if kind == JUDGED else 2]
        rows.append(row)
    return header, rows


def best_setting(table: pd.DataFrame, mode: str) -> Setting:
    """The setting of a mode that points best at the JUDGED words."""
    judged = table[(table["mode"] == mode) & (table["class"] == JUDGED)]
    best = judged.loc[judged["pointing"].idxmax()]
    return best["mode"], best["method"], best["layer"], best["head"]


def records(table: pd.DataFrame) -> list[dict[str, object]]:
    """The table's rows for JSON, which has no NaN."""
    return table.astype(object).where(table.notna(), None).to_dict("records")
