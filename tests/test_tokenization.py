"""Tokenization: exact alignment for any text, ALBEF's convention, hostile captions, training, loading."""

from __future__ import annotations

import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from agatool.config import TextConvention
from agatool.errors import CheckpointError
from agatool.tokenization import SPECIAL, Encoding, Tokenizer, load_tokenizer, train_tokenizer

WORDS = ["a", "the", "man", "t", "shirt", "red", "jeans", "wears", "is", "back", "##pack", "##s", "cafe", "漢", "字"]
CHARACTERS = [*string.ascii_lowercase, *string.digits, *string.punctuation, "ß", "σ", "ς", "é"]
VOCABULARY = list(dict.fromkeys([*SPECIAL, *WORDS, *CHARACTERS, *(f"##{c}" for c in string.ascii_lowercase)]))

ALBEF = {"cleanup": "albef", "sep": False}
CONVENTIONS = [
    TextConvention(),
    TextConvention(max_words=3),
    TextConvention(max_tokens=6),
    TextConvention(**ALBEF, max_words=50),
    TextConvention(**ALBEF, max_words=3),
    TextConvention(**ALBEF, max_tokens=5),
]

# Any text, and text that is dense in what alignment could get wrong.
TRICKY = [*"aZ9 '’-/._,\t\n\"*", "İ", "ß", "Σ", "e\u0301", "\u0301", "\u200b", "\u00ad", "漢", "字", "か", "한"]
TRICKY += [
    "🙂",
    "👩🏽‍🦰",
    "€",
    "\x00",
    "\ufeff",
    "\ufb01",
    "नि",
    "\u0378",
    "\u2028",
    "[MASK]",
    "t-shirt",
    "man's",
    "  ",
    "أ",
]
captions = st.text(max_size=60) | st.lists(st.sampled_from(TRICKY), max_size=30).map("".join)


def make(convention: TextConvention) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece({p: i for i, p in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend, convention)


TOKENIZERS = [make(convention) for convention in CONVENTIONS]
PLAIN = TOKENIZERS[0]


def words_of(caption: str, tokenizer: Tokenizer = PLAIN) -> list[str]:
    return [caption[start:end] for start, end in tokenizer.encode([caption])[0].words]


def pieces_of(caption: str, tokenizer: Tokenizer = PLAIN) -> list[str]:
    return [tokenizer.piece(token) for token in tokenizer.encode([caption])[0].ids]


def check(tokenizer: Tokenizer, caption: str, encoding: Encoding) -> None:
    convention = tokenizer.convention
    assert len(encoding.ids) == len(encoding.word_of) <= convention.max_tokens
    assert encoding.ids[0] == tokenizer.cls_id
    assert (encoding.ids[-1] == tokenizer.sep_id) == convention.sep
    body = slice(1, -1 if convention.sep else None)
    assert not set(encoding.ids[body]) & (set(tokenizer.special_ids) - {tokenizer.unk_id})
    assert encoding.word_of[0] == -1
    end = 0
    for start, stop in encoding.words:  # disjoint, ordered, not empty, inside the caption
        assert end <= start < stop <= len(caption)
        assert any(character.isalnum() for character in caption[start:stop])
        end = stop
    words = [word for word in encoding.word_of if word >= 0]
    assert words == sorted(words)
    assert set(words) == set(range(len(set(words))))  # words with tokens come first, without gaps
    assert len(set(words)) <= len(encoding.words)


@settings(max_examples=100, deadline=None)
@given(caption=captions)
def test_alignment_holds_for_any_text(caption: str) -> None:
    for tokenizer in TOKENIZERS:
        check(tokenizer, caption, tokenizer.encode([caption])[0])


@settings(max_examples=100, deadline=None)
@given(caption=captions)
def test_each_token_lies_in_its_word(caption: str) -> None:
    """Encoded on its own, a word gives the tokens that it has within the caption."""
    encoding = PLAIN.encode([caption])[0]
    complete = encoding.word_of[-2] if len(encoding.ids) == PLAIN.convention.max_tokens else len(encoding.words)
    for word, (start, end) in enumerate(encoding.words[: max(complete, 0)]):
        alone = PLAIN.encode([caption[start:end]])[0].ids[1:-1]
        within = [i for i, of in zip(encoding.ids, encoding.word_of, strict=True) if of == word]
        assert alone == within


@settings(max_examples=100, deadline=None)
@given(caption=captions)
def test_what_is_in_no_word_is_a_separator(caption: str) -> None:
    """No letter or digit that BERT reads is left out of the words, beyond the cut or before it."""
    for tokenizer in (PLAIN, *TOKENIZERS[1:3]):
        inside = {i for start, end in tokenizer.encode([caption])[0].words for i in range(start, end)}
        outside = {character for i, character in enumerate(caption) if i not in inside and character.isalnum()}
        assert all(PLAIN.encode([character])[0].words == [] for character in outside)


@settings(max_examples=100, deadline=None)
@given(caption=captions)
def test_a_cut_changes_neither_words_nor_tokens_before_it(caption: str) -> None:
    whole = make(TextConvention(max_tokens=500)).encode([caption])[0]
    for tokenizer in TOKENIZERS[1:3]:
        cut = tokenizer.encode([caption])[0]
        count = len(cut.ids) - 1
        assert cut.words == whole.words
        assert (cut.ids[:count], cut.word_of[:count]) == (whole.ids[:count], whole.word_of[:count])


def reference_clean(caption: str, max_words: int) -> str:
    """The clean-up as ALBEF's data code defines it."""
    caption = re.sub(r"([,.'!?\"()*#:;~])", "", caption.lower()).replace("-", " ").replace("/", " ")
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    words = caption.split(" ")
    return " ".join(words[:max_words]) if len(words) > max_words else caption


@settings(max_examples=100, deadline=None)
@given(caption=captions)
def test_albef_ids_are_those_of_the_cleaned_text(caption: str) -> None:
    for tokenizer in TOKENIZERS[3:]:
        convention = tokenizer.convention
        text = reference_clean(caption, convention.max_words or 10**6)
        bare = tokenizers.Tokenizer(tokenizer.backend.model)
        bare.normalizer = normalizers.BertNormalizer(lowercase=True)
        bare.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        ids = bare.encode(text).ids[: convention.max_tokens - 1]
        assert tokenizer.encode([caption])[0].ids == [tokenizer.cls_id, *ids]


def test_words_join_at_hyphens_and_apostrophes() -> None:
    assert words_of("A man's T-shirt, red/blue. He’s -- 5€!") == ["A", "man's", "T-shirt", "red", "blue", "He’s", "5€"]
    encoding = PLAIN.encode(["the t-shirt, red"])[0]
    assert encoding.word_of == [-1, 0, 1, 1, 1, -1, 2, -1]
    assert encoding.words == [(0, 3), (4, 11), (13, 16)]


def test_ideographs_are_words_of_their_own() -> None:
    assert words_of("red漢字t-shirt") == ["red", "漢", "字", "t-shirt"]


def test_an_accent_does_not_break_a_word() -> None:
    assert words_of("the cafe\u0301s is") == ["the", "cafe\u0301s", "is"]


def test_albef_maps_back_to_the_original() -> None:
    caption = "İs red. The MAN'S t-shirt"
    tokenizer = TOKENIZERS[3]
    encoding = tokenizer.encode([caption])[0]
    assert [caption[a:b] for a, b in encoding.words] == ["İs", "red", "The", "MAN'S", "t-shirt"]
    assert pieces_of(caption, tokenizer)[-3:] == ["##s", "t", "shirt"]
    assert encoding.word_of[-2:] == [4, 4]


def test_albef_glues_words_that_its_cleanup_glues() -> None:
    assert words_of("a shirt.He is", TOKENIZERS[3]) == ["a", "shirt.He", "is"]


def test_words_beyond_the_cut_are_kept_without_tokens() -> None:
    caption = "the man, wears red jeans"
    encoding = TOKENIZERS[1].encode([caption])[0]
    assert len(encoding.words) == 5
    assert [word for word in encoding.word_of if word >= 0] == [0, 1, 2]


def test_nothing_to_encode() -> None:
    assert PLAIN.encode([]) == []
    assert [encoding.words for encoding in PLAIN.encode(["", " ", "...!"])] == [[], [], []]
    assert PLAIN.pad([]).ids.shape == (0, 0)


@pytest.mark.parametrize("name", SPECIAL)
def test_a_typed_special_token_is_text(name: str) -> None:
    for tokenizer in TOKENIZERS:
        encoding = tokenizer.encode([f"red {name}{name}"])[0]
        assert tokenizer.mask_id not in encoding.ids
        assert encoding.ids.count(tokenizer.cls_id) == 1
        assert encoding.ids.count(tokenizer.sep_id) == tokenizer.convention.sep
        assert tokenizer.pad_id not in encoding.ids


def test_a_tokenizer_files_own_habits_are_switched_off(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(PLAIN.backend.to_str())
    backend.enable_padding(length=30)
    backend.enable_truncation(4)
    backend.add_tokens(["t-shirt", "[mask]"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, TextConvention())
    text = "the man wears the t-shirt [mask]"
    assert tokenizer.encode([text])[0].ids == PLAIN.encode([text])[0].ids
    assert tokenizer.vocab_size == len(VOCABULARY) + 2


def test_a_lone_surrogate_is_no_crash() -> None:
    assert words_of("red \udcff jeans") == ["red", "jeans"]


def test_pad() -> None:
    batch = PLAIN.pad(PLAIN.encode(["red t-shirt", "the"]))
    assert batch.ids.shape == batch.mask.shape == batch.word_of.shape == (2, 6)
    assert batch.mask.sum(1).tolist() == [6, 3]
    assert batch.ids[1, 3:].tolist() == [PLAIN.pad_id] * 3
    assert batch.word_of[1].tolist() == [-1, 0, -1, -1, -1, -1]
    assert batch.to("cpu").ids.equal(batch.ids)


def test_content_words() -> None:
    caption = "He's wearing the man's red t-shirt, isn't it"
    encoding = PLAIN.encode([caption])[0]
    assert PLAIN.content_words(caption, encoding) == [False, True, False, True, True, True, False, False]
    mask = PLAIN.content_mask([caption, "the red"], PLAIN.encode([caption, "the red"]))
    assert mask[1].tolist() == [False, True, *[False] * 6]
    assert PLAIN.content_mask(["..."], PLAIN.encode(["..."])).shape == (1, 1)


def test_pieces() -> None:
    backpack = PLAIN.encode(["backpacks"])[0].ids[1:-1]
    assert PLAIN.decode_word(backpack) == "backpacks"
    assert [PLAIN.is_continuation(token) for token in backpack] == [False, True, True]
    assert PLAIN.piece(10**6) == "[UNK]"


def test_replaceable_ids() -> None:
    backend = tokenizers.Tokenizer.from_str(PLAIN.backend.to_str())
    backend.add_tokens(["[unused3]", "vest"])
    tokenizer = Tokenizer(backend, TextConvention())
    fits = {tokenizer.piece(int(i)) for i in tokenizer.replaceable_ids.nonzero()[0]}
    assert {"red", "shirt", "漢", "vest"} <= fits
    assert not fits & {*SPECIAL, "##s", "##pack", "7", "-", "[unused3]"}


SENTENCES = ["A man wears a red-striped T-shirt.", "The woman's jeans are striped; a café 漢字 🙂 bag."] * 4

TRAIN = f"""
import sys; from pathlib import Path; from agatool.tokenization import train_tokenizer
train_tokenizer({SENTENCES!r}, Path(sys.argv[1]), 150)
"""


def test_training_is_deterministic_and_complete(tmp_path: Path) -> None:
    first, second, other = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"
    train_tokenizer(SENTENCES, first, 150)
    train_tokenizer(reversed(SENTENCES), second, 150)
    subprocess.run([sys.executable, "-c", TRAIN, str(other)], check=True)
    assert first.read_bytes() == second.read_bytes() == other.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "c.json"]
    tokenizer = load_tokenizer(first, TextConvention())
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert tokenizer.vocab_size <= 150
    encodings = tokenizer.encode(SENTENCES[:1])
    assert tokenizer.unk_id not in encodings[0].ids
    assert "striped" in pieces_of(SENTENCES[0], tokenizer)


def test_training_on_many_characters_stays_in_size(tmp_path: Path) -> None:
    sentences = ["red jeans red jeans", *(chr(0x4E00 + i) for i in range(2000))]
    train_tokenizer(sentences, tmp_path / "t.json", 60)
    tokenizer = load_tokenizer(tmp_path / "t.json", TextConvention())
    assert tokenizer.vocab_size <= 60
    assert pieces_of("red jeans", tokenizer)[1:-1] == ["red", "jeans"]


def test_training_on_nothing(tmp_path: Path) -> None:
    train_tokenizer([], tmp_path / "t.json")
    tokenizer = load_tokenizer(tmp_path / "t.json", TextConvention())
    assert pieces_of("red", tokenizer) == ["[CLS]", "[UNK]", "[SEP]"]


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    PLAIN.save(tmp_path / "tokenizer.json")
    (tmp_path / "vocab").mkdir()
    (tmp_path / "vocab" / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    for source in (tmp_path, str(tmp_path / "tokenizer.json"), tmp_path / "vocab", tmp_path / "vocab" / "vocab.txt"):
        loaded = load_tokenizer(source, TextConvention())
        assert loaded.encode(SENTENCES) == PLAIN.encode(SENTENCES)
        assert loaded.vocab_size == len(VOCABULARY)


def test_broken_tokenizers_are_refused(tmp_path: Path) -> None:
    convention = TextConvention()
    with pytest.raises(CheckpointError, match="neither"):
        load_tokenizer(tmp_path, convention)
    with pytest.raises(CheckpointError, match="There is no tokenizer at"):
        load_tokenizer(tmp_path / "missing.json", convention)
    for text in ("{", "[" * 5000, "\x00", "{}"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match="not a readable tokenizer"):
            load_tokenizer(tmp_path, convention)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nred\n")
    with pytest.raises(CheckpointError, match=re.escape("lacks [CLS], [SEP], [MASK]")):
        load_tokenizer(tmp_path / "vocab.txt", convention)
    tokenizers.Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="BPE where BERT has WordPiece"):
        load_tokenizer(tmp_path, convention)


def test_a_hub_name_offline_says_how_to_bring_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(CheckpointError, match=r"bert-base-uncased.*no network") as caught:
        load_tokenizer("bert-base-uncased", TextConvention())
    assert "vocab.txt" in caught.value.hint


def test_a_hub_name_takes_vocab_txt_where_there_is_no_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")

    def download(name: str, file: str) -> str:
        assert name == "google/bert"
        if file == "tokenizer.json":
            raise EntryNotFoundError("404")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_tokenizer("google/bert", TextConvention()).vocab_size == len(VOCABULARY)
