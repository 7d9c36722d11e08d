"""What a caption's words are about: by the sample data set's truth, elsewhere by a small lexicon."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from agatool.data.captioning import PART_OF, WORDS
from agatool.data.prepare import Prepared
from agatool.data.synthetic import VALUES
from agatool.errors import DataError

OTHER, FUNCTION = "other content", "function word"
CLASSES = ("colour", "pattern", "clothing", "hair", "belonging", "person", OTHER, FUNCTION)

_CLASS_OF_PART = {
    "person": "person", "hair": "hair", "face": "hair", "top": "clothing", "inner": "clothing", "bottom": "clothing",
    "shoes": "clothing", "bag": "belonging", "hat": "belonging", "glasses": "belonging", "umbrella": "belonging",
    "phone": "belonging", "scarf": "belonging",
}  # fmt: skip
# What people write in real captions and the sample's annotators never do.
_MORE_WORDS = {
    "clothing": "shoes shirt shirts top tops undershirt undershirts clothes clothing suit uniform pant trouser shoe "
    "boot sneaker sleeve sleeves collar leggings tights socks sock sweatpants capris polo cardigan parka short-sleeved "
    "long-sleeved sleeveless flats heels slippers",
    "colour": "colored coloured dark light bright gold golden silver maroon grey-blue turquoise",
    "pattern": "stripes stripe plaid checks dots dotted polka floral patterned pattern logo print printed design",
    "hair": "hair haired ponytail braid bangs bald beard mustache shaved",
    "belonging": "bag bags scarf umbrella watch tie belt purse briefcase helmet gloves mask bottle bicycle bike cart",
    "person": "person people pedestrian child boy kid adult men women young old asian",
}


@dataclass(frozen=True)
class NamedWord:
    """A word that the truth knows: where it stands, what it is about, and whether it is wrong."""

    start: int
    end: int
    text: str
    word_class: str
    wrong: bool
    part: str  # of the figure, as truth/parts.json has it; "person" is all of it


class WordTruth:
    """The words of every caption that name something in its picture (truth/captions.csv of a rendered data set)."""

    def __init__(self, words: dict[tuple[str, int], list[NamedWord]]) -> None:
        self._words = words

    def of(self, image: str, number: int, caption: str) -> list[NamedWord] | None:
        """The named words of the caption `number` of an image; None where the truth speaks of another text."""
        words = self._words.get((image, number))
        if words is None or any(caption[word.start : word.end] != word.text for word in words):
            return None
        return words


def named(words: Sequence[NamedWord], start: int, end: int) -> NamedWord | None:
    """The first named word that overlaps the characters from `start` to `end`."""
    return next((word for word in words if word.start < end and start < word.end), None)


def read_truth(prepared: Prepared) -> WordTruth | None:
    """The truth beside the image folder, None where there is none. Raises DataError for a broken file."""
    path = prepared.image_root.parent / "truth" / "captions.csv"
    if not path.is_file():
        return None
    kinds = {
        "img_path": str, "caption_index": int, "start": int, "end": int, "text": str, "part": str, "attribute": str,
        "wrong": int,
    }  # fmt: skip
    try:
        table = pd.read_csv(path, dtype=kinds, usecols=list(kinds), na_filter=False, encoding="utf-8")
    except (OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} is broken: {error}", "Run aga prepare --dataset sample again.") from error
    words: dict[tuple[str, int], list[NamedWord]] = {}
    for row in table.itertuples(index=False):
        kind = _class(row.part, row.attribute)
        word = NamedWord(row.start, row.end, row.text, kind, bool(row.wrong), row.part)
        words.setdefault((row.img_path, row.caption_index), []).append(word)
    return WordTruth(words)


def _class(part: str, attribute: str) -> str:
    if attribute.endswith("_color"):
        return "colour"
    return "pattern" if attribute == "top_pattern" else _CLASS_OF_PART.get(part, OTHER)


def _lexicon() -> Iterator[tuple[str, str]]:
    """Every word that the sample's annotators have for an attribute, and some more; earlier entries win."""
    for attribute in ("hair_length", *PART_OF):
        kind = _class(PART_OF[attribute], attribute)
        said = WORDS.get("color" if attribute.endswith("_color") else attribute, {})
        for value in dict.fromkeys((*VALUES.get(attribute, ()), *said)):
            yield from ((word, kind) for word in said.get(value, (value,)))
    for kind, text in _MORE_WORDS.items():
        yield from ((word, kind) for word in text.split())


_LEXICON: dict[str, str] = {}
for _word, _kind in _lexicon():
    _LEXICON.setdefault(_word, _kind)


def usual_class(word: str) -> str:
    """The class of a lower-case content word as it is usually meant: a lexicon, not a tagger."""
    return _LEXICON.get(word, OTHER)
