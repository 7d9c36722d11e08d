"""What the words of rendered captions should say, and what became of them when captions were enriched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from agatool.data.captioning import wordings
from agatool.enriching import MaskedWord
from agatool.errors import DataError


class Truth:
    """The words that state an attribute's value in each caption (truth/captions.csv of a rendered data set).

    Raises DataError for another file.
    """

    def __init__(self, path: Path) -> None:
        kinds = {"img_path": str, "caption_index": int, "start": int, "end": int, "text": str, "attribute": str,
                 "value": str, "wrong": int, "correct": str}  # fmt: skip
        try:
            table = pd.read_csv(path, dtype=kinds, usecols=list(kinds), na_filter=False, encoding="utf-8")
        except (OSError, ValueError, OverflowError) as error:
            raise DataError(f"{path} is not a truth/captions.csv: {error}", "See sample_data/README.md.") from error
        self.path = path
        self._stated: dict[tuple[str, int], dict[tuple[int, int], _Stated]] = {}
        for row in table[table["attribute"] != ""].itertuples(index=False):
            right = wordings(row.attribute, row.correct if row.wrong else row.value)
            stated = _Stated(row.text, bool(row.wrong), frozenset(right))
            self._stated.setdefault((row.img_path, row.caption_index), {})[row.start, row.end] = stated

    def judge(self, image: str, position: int, masked: Sequence[MaskedWord]) -> dict[str, int]:
        """Counts of what became of one caption's attribute words, the `position`th of its image.

        A word is right where it is one of the ways in which the annotators say the attribute's value.
        """
        stated = self._stated.get((image, position), {})
        found = Counter({"wrong_words": sum(word.wrong for word in stated.values())})
        for word in masked:
            if (truth := stated.get((word.start, word.end))) is None:
                continue
            if truth.text != word.word:
                raise DataError(f"{self.path} is the truth of other captions", "Give the truth beside the file.")
            is_right = word.replacement.lower() in truth.right
            found["wrong_masked" if truth.wrong else "right_masked"] += 1
            found["wrong_made_right"] += truth.wrong and is_right
            found["right_made_wrong"] += not truth.wrong and word.replaced and not is_right
        return dict(found)


class _Stated(NamedTuple):
    """A word that states an attribute's value."""

    text: str
    wrong: bool
    right: frozenset[str]  # what it may say
