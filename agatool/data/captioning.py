"""Writes what an annotator would say about one picture of a person, and keeps what every word means."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

MIN_WORDS, MAX_WORDS = 15, 45
TYPO_RATE = 0.008  # of the words of five letters and more

# The body part of the mask that a word about an attribute describes; "person" is the whole figure.
PART_OF = {
    "gender": "person", "build": "person", "stature": "person", "hair_length": "hair", "hair_color": "hair",
    "top_type": "top", "top_color": "top", "top_pattern": "top", "pattern_color": "top",
    "inner_color": "inner", "bottom_type": "bottom", "bottom_color": "bottom",
    "shoe_type": "shoes", "shoe_color": "shoes", "bag_type": "bag", "bag_color": "bag",
    "hat_type": "hat", "hat_color": "hat", "glasses": "glasses", "umbrella_color": "umbrella",
    "phone": "phone", "scarf_color": "scarf",
}  # fmt: skip

# How a value is said, the usual word more often; values that are missing here are said as they are.
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "color": {
        "gray": ("gray", "grey"), "red": ("red", "red", "red", "red", "red", "crimson"),
        "navy": ("navy", "navy", "dark-blue"), "beige": ("beige", "beige", "tan", "cream"),
        "purple": ("purple", "purple", "purple", "violet"), "teal": ("teal", "teal", "turquoise"),
        "khaki": ("khaki", "khaki", "olive"), "blond": ("blond", "blonde", "fair"),
    },
    "hair_color": {"red": ("red", "ginger"), "gray": ("gray", "grey"), "blond": ("blond", "blonde", "fair"),
                   "black": ("black", "black", "dark")},
    "gender": {"man": ("man", "man", "man", "guy", "male", "gentleman"),
               "woman": ("woman", "woman", "woman", "lady", "girl", "female")},
    "build": {"slim": ("slim", "thin", "slender"), "heavy": ("heavy", "stout", "chubby")},
    "stature": {"tall": ("tall",), "short": ("short",)},
    "hair_length": {"short": ("short", "short", "cropped"), "long": ("long",),
                    "shoulder-length": ("shoulder-length", "medium-length"), "bun": ("bun",)},
    "top_type": {
        "t-shirt": ("t-shirt", "t-shirt", "tshirt", "tee"), "shirt": ("shirt", "shirt", "blouse"),
        "sweater": ("sweater", "sweater", "pullover", "jumper"), "hoodie": ("hoodie", "hoodie", "sweatshirt"),
        "jacket": ("jacket", "jacket", "blazer"), "coat": ("coat", "coat", "overcoat"),
        "vest": ("vest", "tank-top", "vest"), "dress": ("dress", "dress", "gown"),
    },
    "top_pattern": {"striped": ("striped", "striped", "stripy"), "checked": ("checked", "plaid", "checkered"),
                    "logo": ("logo", "logo", "print", "emblem")},
    "bottom_type": {"trousers": ("trousers", "pants", "pants", "slacks"), "jeans": ("jeans", "jeans", "denims")},
    "shoe_type": {"sneakers": ("sneakers", "trainers"), "loafers": ("loafers", "brogues")},
    "bag_type": {"backpack": ("backpack", "backpack", "rucksack"), "handbag": ("handbag", "handbag", "purse"),
                 "shoulder-bag": ("satchel", "shoulder-bag"), "suitcase": ("suitcase", "luggage")},
    "hat_type": {"cap": ("cap",), "beanie": ("beanie",), "hat": ("hat",)},
    "glasses": {"glasses": ("glasses", "spectacles"), "sunglasses": ("sunglasses", "sunglasses", "shades")},
    "phone": {"phone": ("phone", "phone", "cellphone", "smartphone")},
}  # fmt: skip

# How often an annotator mentions what is there to see.
MENTIONED = {"hair": 0.8, "shoes": 0.78, "bag": 0.9, "hat": 0.9, "glasses": 0.7, "scarf": 0.85, "umbrella": 0.95,
             "phone": 0.8, "inner": 0.7, "pattern": 0.9, "pattern_color": 0.65, "bottom": 0.95, "build": 0.15,
             "stature": 0.15, "shoe_type": 0.5}  # fmt: skip

COLOR_NAMED = 0.95  # of the things mentioned, even by the terse

# Sentence shapes. {P} the person with article, {H} hair, {W} list of things worn, {C} what they do, -ing,
# {he} {his} pronouns. A caption opens with one of OPENINGS[groups] and goes on with one of FOLLOWERS[group].
OPENINGS: dict[str, tuple[str, ...]] = {
    "HWC": (
        "{P} with {H} is wearing {W} while {C}.",
        "{P} with {H} wears {W} and is {C}.",
        "{P} who has {H} is dressed in {W} and is {C}.",
        "dressed in {W}, {P} with {H} is {C}.",
        "{P} with {H}, {C}, is wearing {W}.",
        "{P} {C} has {H} and wears {W}.",
    ),
    "HW": (
        "{P} with {H} is wearing {W}.",
        "{P} with {H} wears {W}.",
        "{P} has {H} and is dressed in {W}.",
        "{P} who has {H} is walking in {W}.",
        "wearing {W}, {P} with {H} walks along.",
        "the person in the picture is {P} with {H} wearing {W}.",
        "in the picture {P} with {H} has on {W}.",
        "this is {P} with {H} and {W}.",
    ),
    "WC": (
        "{P} in {W} is {C}.",
        "{P} wearing {W} is {C}.",
        "{P} is dressed in {W} and is {C}.",
        "{C}, {P} is wearing {W}.",
        "{P} wears {W} while {C}.",
        "the picture shows {P} in {W} who is {C}.",
    ),
    "W": (
        "{P} is wearing {W}.",
        "{P} wears {W}.",
        "{P} dressed in {W} is walking.",
        "{P} is walking in {W}.",
        "dressed in {W}, {P} walks by.",
        "the picture shows {P} wearing {W}.",
        "we can see {P} who has on {W}.",
        "{P} in {W} walks down the street.",
    ),
    "H": ("{P} has {H}.", "this is {P} with {H}.", "{P} with {H} is walking.", "the picture shows {P} with {H}."),
    "HC": ("{P} with {H} is {C}.", "{C}, {P} with {H} walks along.", "there is {P} with {H} {C}."),
    "C": ("{P} is {C}.", "{C}, {P} walks along."),
    "": ("{P} is walking.", "this is {P}."),
}
FOLLOWERS: dict[str, tuple[str, ...]] = {
    "W": (
        "{he} is wearing {W}.",
        "{he} wears {W}.",
        "{he} has on {W}.",
        "{he} also wears {W}.",
        "{he} has {W} on.",
        "{he} appears to be wearing {W}.",
    ),
    "H": ("{he} has {H}.", "{he} is seen with {H}.", "{he} has got {H}.", "the person has {H}."),
    "C": ("{he} is {C}.", "{he} is walking and {C}.", "{he} walks while {C}.", "{he} is seen {C}."),
    "HC": ("{he} has {H} and is {C}.", "{he} is {C} and has {H}.", "with {H}, {he} is {C}."),
    "WC": ("{he} wears {W} and is {C}.", "{he} is {C} and wears {W}.", "{he} wears {W} while {C}."),
    "HW": ("{he} has {H} and wears {W}.", "{he} has {H} and {W}.", "{he} wears {W} and has {H}."),
    "HWC": ("{he} has {H}, wears {W} and is {C}.", "with {H}, {he} wears {W} while {C}."),
}
FILLERS = (
    "{he} is walking down the street.",
    "{he} walks straight ahead.",
    "{he} seems to be in a hurry.",
    "{he} is walking alone.",
    "{he} is looking ahead.",
)
VIEW_FILLERS = {
    "front": ("{he} is facing the camera.", "{he} walks towards the camera."),
    "back": ("{he} is seen from behind.", "{he} walks away from the camera."),
    "side": ("{he} is seen from the side.", "{he} walks past the camera."),
}
CARRIED = {
    "backpack": ("carrying {bag}", "carrying {bag} on {his} back", "wearing {bag}"),
    "handbag": ("carrying {bag}", "holding {bag} in {his} hand", "holding {bag}"),
    "shoulder-bag": ("carrying {bag}", "carrying {bag} over {his} shoulder", "wearing {bag} across the body"),
    "suitcase": ("pulling {bag}", "pulling {bag} behind {him}", "dragging {bag}"),
}
PRONOUNS = {"man": {"he": "he", "his": "his", "him": "him"}, "woman": {"he": "she", "his": "her", "him": "her"}}


@dataclass(frozen=True)
class Piece:
    """A word of a caption; `part` is set where it speaks of the person, `attribute` where it states a value."""

    text: str
    part: str = ""
    attribute: str = ""
    value: str = ""
    correct: str = ""  # what it should say, where the annotator erred


@dataclass(frozen=True)
class Span:
    """Where a piece of meaning stands in the finished caption (character offsets, end exclusive)."""

    start: int
    end: int
    piece: Piece


class _Speaker:
    """One annotator looking at one picture: decides what to mention, what to call it, and errs."""

    def __init__(
        self,
        attributes: Mapping[str, str],
        visible: frozenset[str],
        values: Mapping[str, Sequence[str]],
        noise: float,
        rng: np.random.Generator,
    ) -> None:
        self.a, self.visible, self.values, self.noise, self.rng = attributes, visible, values, noise, rng
        self.care = rng.uniform(0.75, 1.0)  # some annotators are terse

    def chance(self, what: str) -> bool:
        return bool(self.rng.random() < MENTIONED[what] * self.care)

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def word(self, attribute: str) -> Piece:
        """One attribute's value as a word, wrong with the noise's probability."""
        true = self.a[attribute]
        others = [value for value in self.values.get(attribute, ()) if value != true]
        if others and self.rng.random() < self.noise:
            return self.name(attribute, self.pick(others), true)
        return self.name(attribute, true)

    def name(self, attribute: str, value: str, correct: str = "") -> Piece:
        text = self.pick(wordings(attribute, value))
        part = "face" if value == "bald" else PART_OF[attribute]
        return Piece(text, part, attribute, value, correct)

    def color(self, attribute: str) -> list[Piece]:
        return [self.word(attribute)] if self.rng.random() < COLOR_NAMED else []

    def person(self) -> list[Piece]:
        pieces = [Piece("a" if self.rng.random() < 0.75 else "the")]
        for attribute in ("stature", "build"):
            if self.a[attribute] != "average" and self.chance(attribute):
                pieces.append(self.word(attribute))
        if self.a["hair_length"] == "bald" and "face" in self.visible and self.chance("hair"):
            pieces.append(self.name("hair_length", "bald"))
        return [*pieces, self.name("gender", self.a["gender"])]

    def hair(self) -> list[Piece]:
        if self.a["hair_length"] == "bald" or "hair" not in self.visible or not self.chance("hair"):
            return []
        colour, length = self.color("hair_color"), self.word("hair_length")
        noun = Piece("hair", "hair")
        if length.value == "ponytail" or length.value == "bun":
            styles = ([Piece("a"), *colour, length],
                      [*colour, noun, Piece("tied"), Piece("in"), Piece("a"), length])  # fmt: skip
            return styles[int(self.rng.integers(2))]
        return [length, *colour, noun]

    def top(self) -> list[Piece]:
        if "top" not in self.visible:
            return []
        colour, kind = self.color("top_color"), self.word("top_type")
        after: list[Piece] = []
        pattern = self.a["top_pattern"]
        if pattern == "logo" and "logo" in self.visible and self.chance("pattern"):
            where = self.pick(("on the front", "on the chest", "on it"))
            second = self.color("pattern_color") if self.chance("pattern_color") else []
            after = [Piece("with"), Piece("a"), *second, self.name("top_pattern", "logo"), *plain(where)]
        elif pattern in ("striped", "checked") and self.chance("pattern"):
            if self.chance("pattern_color") and colour:
                colour = [*colour, Piece("and"), self.word("pattern_color")]
            colour = [*colour, self.word("top_pattern")]
        if self.a["inner_color"] != "none" and "inner" in self.visible and self.chance("inner"):
            inner = [self.word("inner_color"), Piece(self.pick(("shirt", "top", "undershirt")), "inner")]
            after = [*plain(self.pick(("over a", "with a", "on top of a"))), *inner, *after]
        return [Piece("a"), *colour, kind, *after]

    def bottom(self) -> list[Piece]:
        if "bottom" not in self.visible or self.a["bottom_type"] == "none" or not self.chance("bottom"):
            return []
        colour, kind = self.color("bottom_color"), self.word("bottom_type")
        if kind.value == "skirt":
            return [Piece("a"), *colour, kind]
        lead = plain(self.pick(("", "", "", "a pair of")))
        return [*lead, *colour, kind]

    def shoes(self) -> list[Piece]:
        if "shoes" not in self.visible or not self.chance("shoes"):
            return []
        colour = self.color("shoe_color")
        kind = self.word("shoe_type") if self.chance("shoe_type") else Piece("shoes", "shoes")
        return [*colour, kind] if colour else [Piece("a"), Piece("pair"), Piece("of"), kind]

    def accessories(self) -> list[list[Piece]]:
        """Hat, glasses and scarf: what is worn besides clothes."""
        found: list[list[Piece]] = []
        if "hat" in self.visible and self.chance("hat"):
            found.append([Piece("a"), *self.color("hat_color"), self.word("hat_type")])
        if "glasses" in self.visible and self.chance("glasses"):
            found.append([self.word("glasses")])
        if "scarf" in self.visible and self.chance("scarf"):
            found.append([Piece("a"), *self.color("scarf_color"), Piece("scarf", "scarf")])
        return found

    def activities(self) -> list[list[Piece]]:
        """What the person does with what they carry, each starting with an -ing word."""
        found: list[list[Piece]] = []
        if "bag" in self.visible and self.chance("bag"):
            kind = self.word("bag_type")
            bag = [Piece("a"), *self.color("bag_color"), kind]
            found.append(list(fill(self.pick(CARRIED[kind.value]), {"bag": bag})))
        if "umbrella" in self.visible and self.chance("umbrella"):
            umbrella = [Piece("a"), *self.color("umbrella_color"), Piece("umbrella", "umbrella")]
            found.append([Piece(self.pick(("holding", "carrying"))), *umbrella])
        if "phone" in self.visible and self.chance("phone"):
            lead = self.pick(("looking at a", "using a", "holding a", "looking at {his}"))
            found.append([*plain(lead), self.word("phone")])
        return found


def wordings(attribute: str, value: str) -> tuple[str, ...]:
    """How an attribute's value is said, the usual word more often."""
    kind = "color" if attribute.endswith("_color") and attribute not in WORDS else attribute
    return WORDS.get(kind, {}).get(value, (value,))


def plain(text: str) -> list[Piece]:
    """Words without a meaning of their own."""
    return [Piece(word) for word in text.split()]


def fill(template: str, slots: Mapping[str, Sequence[Piece]]) -> Iterator[Piece]:
    """The template's words, with {slot} replaced; unknown slots stay as words."""
    for word in re.findall(r"\{\w+\}|[^\s{},.]+|[,.]", template):
        yield from slots.get(word[1:-1], [Piece(word)]) if word.startswith("{") else [Piece(word)]


def listed(items: Sequence[Sequence[Piece]], rng: np.random.Generator) -> list[Piece]:
    """Things in a row: commas, and an "and" (or a "with") before the last."""
    joined: list[Piece] = []
    for position, item in enumerate(items):
        if position and position == len(items) - 1:
            joined += plain("and" if rng.random() < 0.85 else ", and")
        elif position:
            joined.append(Piece(","))
        joined += item
    return joined


def describe(
    attributes: Mapping[str, str],
    visible: frozenset[str],
    view: str,
    values: Mapping[str, Sequence[str]],
    noise: float,
    rng: np.random.Generator,
) -> tuple[str, list[Span]]:
    """One caption of one picture and the meaning of its words.

    `visible` names what the picture shows, `values` the values an annotator may confuse with one another;
    with probability `noise` a stated value is wrong. The caption has MIN_WORDS to MAX_WORDS words.
    """
    while True:
        speaker = _Speaker(attributes, visible, values, noise, rng)
        pieces = _compose(speaker, view)
        if _count(pieces) <= MAX_WORDS:
            return _finish(pieces, rng)


def _count(pieces: Sequence[Piece]) -> int:
    return sum(piece.text not in ",." for piece in pieces)


def _compose(speaker: _Speaker, view: str) -> list[Piece]:
    """One to three sentences that share out hair (H), clothes (W) and activities (C)."""
    rng = speaker.rng
    person, hair = speaker.person(), speaker.hair()
    clothes = [item for item in (speaker.top(), speaker.bottom(), speaker.shoes()) if item]
    extras, activities = speaker.accessories(), speaker.activities()
    if extras and rng.random() < 0.35:
        clothes, extras = [*extras, *clothes], []
    elif extras and rng.random() < 0.5:
        clothes, extras = [*clothes, *extras], []
    if len(clothes) > 2 and rng.random() < 0.15:
        clothes.reverse()
    gender = next(piece.value for piece in person if piece.attribute == "gender")
    base = {key: plain(word) for key, word in PRONOUNS[gender].items()}
    groups = {"H": [hair] if hair else [], "W": clothes, "C": activities}
    words: list[Piece] = []
    for number, plan in enumerate(_plan(groups, extras, rng)):
        present = "".join(key for key in "HWC" if plan.get(key))
        slots = {key: listed(items, rng) for key, items in plan.items()} | {"P": person}
        template = speaker.pick((FOLLOWERS if number else OPENINGS)[present])
        words += fill(template, slots)
    fillers = list(rng.permutation((*FILLERS, *VIEW_FILLERS[view])))
    while _count(words) < MIN_WORDS or (_count(words) < 34 and rng.random() < 0.12):
        words += fill(fillers.pop(), {})
    return [filled for piece in words for filled in (base[piece.text[1:-1]] if piece.text[0] == "{" else [piece])]


def _plan(
    groups: Mapping[str, list[list[Piece]]], extras: list[list[Piece]], rng: np.random.Generator
) -> list[dict[str, list[list[Piece]]]]:
    """Which group goes into which sentence: all in one, or some of them later."""
    first = {"W": groups["W"]}
    later: list[dict[str, list[list[Piece]]]] = []
    for key, joins in (("H", 0.7), ("C", 0.35)):
        if groups[key]:
            if rng.random() < joins:
                first[key] = groups[key]
            elif later and rng.random() < 0.6:
                later[-1][key] = groups[key]
            else:
                later.append({key: groups[key]})
    if extras:
        home = [plan for plan in later if "W" not in plan]
        if len(later) > 1 or (home and rng.random() < 0.5):
            home[int(rng.integers(len(home)))]["W"] = extras
        else:
            later.append({"W": extras})
    if len(later) > 1 and rng.random() < 0.5:
        later.reverse()
    return [first, *later]


def _finish(pieces: Sequence[Piece], rng: np.random.Generator) -> tuple[str, list[Span]]:
    """Words to text: articles, capitals, full stops as annotators set them, and a few slips of the pen."""
    lower, last_stop = rng.random() < 0.12, rng.random() < 0.92
    loose = rng.random() < 0.04  # a space before every comma, as some annotators do
    text, spans = "", []
    starting = True
    for position, piece in enumerate(pieces):
        word = _slip(piece.text, rng)
        following = pieces[position + 1].text if position + 1 < len(pieces) else ""
        if word == "a" and following[:1] in "aeiou":
            word = "an"
        if word in (",", "."):
            if word == "." and not following and not last_stop:
                break
            text += f" {word}" if loose and word == "," else word
            starting = word == "."
            continue
        if starting and not lower:
            word = word[0].upper() + word[1:]
        starting = False
        text += f" {word}" if text else word
        if piece.part:
            spans.append(Span(len(text) - len(word), len(text), replace(piece, text=word)))
    return text, spans


def _slip(word: str, rng: np.random.Generator) -> str:
    """Now and then two letters change places or one gets lost."""
    if len(word) < 5 or rng.random() >= TYPO_RATE:
        return word
    at = int(rng.integers(1, len(word) - 2))
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :] if rng.random() < 0.6 else word[:at] + word[at + 1 :]
