"""Tokenizer loading/training, token <-> word alignment.

Shapes: B captions of a batch, L tokens of its longest, W words of its wordiest caption, V vocabulary ids.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from agatool.config import TextConvention
from agatool.errors import CheckpointError
from agatool.files import write_text

if TYPE_CHECKING:
    import torch

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUATION = "##"
UNUSED = "[unused{}]"  # an entry without a word; BERT has a thousand
BERT_IDS = (0, 100, 101, 102, 103)  # of SPECIAL in BERT's English vocabularies
MAX_FILE_BYTES = 64 * 1024**2  # of a tokenizer file; BERT's have a few MB at most

Span = tuple[int, int]  # (start, end) character offsets, end excluded

# The ideographs that BERT sets apart, each a word of its own (Devlin et al. 2018, `tokenization.py`).
_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f"
_LETTERS = rf"[^\W_{_CJK}]+"
# A word: an ideograph, or letters and digits with single hyphens or apostrophes inside ("t-shirt", "man's").
_WORD = re.compile(rf"[{_CJK}]|{_LETTERS}(?:[-'’\u2010\u2011]{_LETTERS})*")
_LETTERED, _READ = 1, 2  # a span that the rule calls a word; a span that the tokenizer reads as a unit
_SURROGATE = re.compile("[\ud800-\udfff]")  # from undecodable bytes on a command line; not valid Unicode

# ALBEF's `pre_caption` (Li et al. 2021), in its order: what is found -> what replaces it.
_ALBEF_CLEANUP = (
    (re.compile(r"[,.'!?\"()*#:;~]"), ""),
    (re.compile("[-/]"), " "),
    (re.compile(r"\s{2,}"), " "),
)

# English function words: what carries grammar rather than a visible property.
STOP_WORDS = frozenset(
    """
    a an the this that these those some any each every either neither both all such other another same
    own i me my mine myself you your yours yourself yourselves he him his himself she her hers herself
    it its itself we us our ours ourselves they them their theirs themselves who whom whose which what
    someone something am is are was were be been being do does did doing done have has had having can
    could may might must shall should will would ca wo ai and or nor but so yet if because as while
    whereas although though unless until than then when where whether of in on at by for with without
    within about against between into onto through during before after above below to from up down out
    off over under around across along near behind beside besides upon toward towards via per like
    unlike among beneath underneath there here how why also too very just only not no more most much
    many few less least again further once even quite rather really
    """.split()  # noqa: SIM905 - a list of quoted words reads worse
)
_CLITIC = re.compile(r"(?:n['’]t|['’](?:s|re|ve|ll|d|m))$")


@dataclass(frozen=True)
class Encoding:
    """One caption as tokens and words.

    ids      token ids: [CLS], the pieces, and [SEP] where the convention has one.
    word_of  for each token the index of its word; -1 for special tokens and for pieces outside every word
             (punctuation), which are therefore never masked.
    words    (start, end) of every word in the original caption, in order. Words with tokens come first,
             without gaps; words beyond the cut follow. A character in no word is a separator.
    """

    ids: list[int]
    word_of: list[int]
    words: list[Span]


@dataclass(frozen=True)
class Batch:
    """Padded captions.

    ids      (B, L) int64.
    mask     (B, L) bool: True for a token, False for padding.
    word_of  (B, L) int64: the index of the token's word, -1 for none.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    word_of: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(*(x.to(device, non_blocking=True) for x in (self.ids, self.mask, self.word_of)))


class Tokenizer:
    """A BERT WordPiece vocabulary used under one text convention.

    backend     a `tokenizers.Tokenizer` with a WordPiece model, BERT normaliser and BERT pre-tokenizer.
    convention  clean-up, cuts and whether [SEP] ends the caption.
    """

    def __init__(self, backend: tokenizers.Tokenizer, convention: TextConvention) -> None:
        _check_wordpiece(backend)
        self.backend = backend
        self.convention = convention
        # ids are looked up by name: BERT has 0, 100, 101, 102, 103; a trained vocabulary 0 to 4
        self._vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        ids = [self._vocabulary[name] for name in SPECIAL]
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids
        self.special_ids = tuple(sorted(ids))
        self.vocab_size = max(self._vocabulary.values()) + 1
        # Without added tokens, post-processor, truncation and padding: a "[MASK]" typed in a caption is text.
        self._pieces = _assemble(backend.model, backend.normalizer)

    @property
    def is_placeholder(self) -> bool:
        """Whether the vocabulary has no word at all, as that of a checkpoint converted without one."""
        return UNUSED.format(0) in self._vocabulary and all(
            piece in SPECIAL or piece.startswith("[unused") for piece in self._vocabulary
        )

    def encode(self, captions: Sequence[str]) -> list[Encoding]:
        """Encode captions, cut to the convention's `max_words` and `max_tokens`.

        Raises CheckpointError where the vocabulary is a placeholder: every word would be [UNK].
        """
        if self.is_placeholder:
            raise CheckpointError(
                "This model has no vocabulary: it was converted without a tokenizer and cannot read text",
                "Convert the checkpoint again with --tokenizer FILE (docs/interop.md).",
            )
        originals = [_SURROGATE.sub("\ufffd", caption) for caption in captions]
        cleaned = [self._clean(caption) for caption in originals]
        encoded = self._pieces.encode_batch([text for text, _ in cleaned], add_special_tokens=False)
        return [
            self._align(caption, text, origin, pieces)
            for caption, (text, origin), pieces in zip(originals, cleaned, encoded, strict=True)
        ]

    def pad(self, encodings: Sequence[Encoding]) -> Batch:
        """Captions side by side, filled up with [PAD] to the longest."""
        import torch

        length = max((len(encoding.ids) for encoding in encodings), default=0)
        ids = np.full((len(encodings), length), self.pad_id, dtype=np.int64)
        word_of = np.full((len(encodings), length), -1, dtype=np.int64)
        mask = np.zeros((len(encodings), length), dtype=bool)
        for row, encoding in enumerate(encodings):
            stop = len(encoding.ids)
            ids[row, :stop], word_of[row, :stop], mask[row, :stop] = encoding.ids, encoding.word_of, True
        return Batch(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(word_of))

    def piece(self, token_id: int) -> str:
        """The vocabulary entry of an id, '##' included; '[UNK]' for an id without one."""
        return self.backend.id_to_token(token_id) or SPECIAL[1]

    def is_continuation(self, token_id: int) -> bool:
        """Whether the piece continues a word rather than starting one."""
        return self.piece(token_id).startswith(CONTINUATION)

    def decode_word(self, ids: Sequence[int]) -> str:
        """The pieces of one word put together: ["str", "##iped"] -> "striped"."""
        return "".join(self.piece(token_id).removeprefix(CONTINUATION) for token_id in ids)

    @property
    def replaceable_ids(self) -> np.ndarray:
        """(V,) bool: ids that may stand in for a word; no special, unused, '##' or letterless piece."""
        fits = np.zeros(self.vocab_size, dtype=bool)
        for piece, token_id in self._vocabulary.items():
            bracketed = piece.startswith("[") and piece.endswith("]")  # specials and [unused0]
            has_letter = any(character.isalpha() for character in piece)
            fits[token_id] = has_letter and not bracketed and not piece.startswith(CONTINUATION)
        return fits

    def content_words(self, caption: str, encoding: Encoding) -> list[bool]:
        """For each word of `encoding` whether it carries content: not one of STOP_WORDS."""
        words = (caption[start:end].lower() for start, end in encoding.words)
        return [_CLITIC.sub("", word) not in STOP_WORDS for word in words]

    def content_mask(self, captions: Sequence[str], encodings: Sequence[Encoding]) -> torch.Tensor:
        """(B, W) bool: `content_words` of each caption, False where it has fewer words; W is at least 1."""
        import torch

        flags = [self.content_words(*pair) for pair in zip(captions, encodings, strict=True)]
        content = np.zeros((len(flags), max(map(len, flags), default=1) or 1), dtype=bool)
        for row, words in enumerate(flags):
            content[row, : len(words)] = words
        return torch.from_numpy(content)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json` to `path`, atomically."""
        write_text(path, self.backend.to_str(pretty=True) + "\n")

    def _clean(self, caption: str) -> tuple[str, Sequence[int]]:
        """The text that WordPiece reads, and for each of its characters the position in the caption."""
        if self.convention.cleanup == "none":
            return caption, range(len(caption))
        return _albef_cleanup(caption)

    def _align(self, caption: str, text: str, origin: Sequence[int], pieces: tokenizers.Encoding) -> Encoding:
        """Tokens -> words. `origin` maps the characters of `text`, which was encoded, to the caption's."""
        spans = [(origin[start], origin[end - 1] + 1) for start, end in pieces.offsets]
        words = _join_words(caption, _pre_token_spans(spans, pieces.word_ids))
        count = min(self._pieces_within_words(text, pieces, spans, words), self._max_pieces)
        starts = [start for start, _ in words]
        word_of = []
        for start, _ in spans[:count]:
            word = bisect_right(starts, start) - 1
            word_of.append(word if word >= 0 and start < words[word][1] else -1)
        tail = [self.sep_id] if self.convention.sep else []
        ids = [self.cls_id, *pieces.ids[:count], *tail]
        return Encoding(ids, [-1, *word_of, *[-1] * len(tail)], words)

    @property
    def _max_pieces(self) -> int:
        return self.convention.max_tokens - 1 - self.convention.sep

    def _pieces_within_words(self, text: str, pieces: tokenizers.Encoding, spans: list[Span], words: list[Span]) -> int:
        """How many pieces lie before the cut at `max_words`.

        The whole caption is encoded and cut afterwards, so that words beyond the cut are known; a cut at a
        word's end gives the same pieces. ALBEF counts what spaces separate in the cleaned text, otherwise
        `words` count.
        """
        limit = self.convention.max_words
        if limit is None:
            return len(spans)
        if self.convention.cleanup == "albef":
            kept = " ".join(text.split(" ")[:limit])
            return sum(start < len(kept) for start, _ in pieces.offsets)
        if len(words) <= limit:
            return len(spans)
        return sum(start < words[limit - 1][1] for start, _ in spans)


def _substitute(pattern: re.Pattern[str], by: str, text: str, origin: Sequence[int]) -> tuple[str, Sequence[int]]:
    """`pattern.sub(by, text)` that keeps every character's origin; `by` takes that of its match's start."""
    parts: list[str] = []
    kept: list[int] = []
    last = 0
    for match in pattern.finditer(text):
        start, end = match.span()
        parts += [text[last:start], by]
        kept += origin[last:start]
        kept += [origin[start]] * len(by)
        last = end
    return "".join([*parts, text[last:]]), [*kept, *origin[last:]]


def _albef_cleanup(caption: str) -> tuple[str, Sequence[int]]:
    """ALBEF's clean-up without its cut, and for each character of the result the position in `caption`."""
    text = caption.lower()
    origin: Sequence[int] = range(len(caption))
    if len(text) != len(caption):  # a few characters grow when lowered: "İ" becomes "i" and a dot above
        origin = [i for i, character in enumerate(caption) for _ in character.lower()]
    for pattern, by in _ALBEF_CLEANUP:
        text, origin = _substitute(pattern, by, text, origin)
    text = text.rstrip("\n")
    start = len(text) - len(text.lstrip(" "))
    text = text.strip(" ")
    return text, origin[start : start + len(text)]


def _pre_token_spans(spans: list[Span], word_ids: list[int | None]) -> list[Span]:
    """One span for each unit that BERT splits into pieces, in caption coordinates."""
    found: list[Span] = []
    previous = None
    for (start, end), word_id in zip(spans, word_ids, strict=True):
        if word_id == previous:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
        previous = word_id
    return found


def _join_words(caption: str, pre_tokens: list[Span]) -> list[Span]:
    """Words of a caption: letters by rule, widened to what the tokenizer reads as one.

    What BERT reads as one unit is one word, however it is written: "cafe" with a combining accent, "5€", or
    "shirt.He" once ALBEF's clean-up dropped the full stop. What BERT does not read at all (characters its
    normaliser removes) is no word, and neither is a unit without a letter or digit.
    """
    spans = [(*match.span(), _LETTERED) for match in _WORD.finditer(caption)]
    spans += [(start, end, _READ) for start, end in pre_tokens]
    spans.sort()
    spans.append((len(caption), len(caption), 0))  # closes the last one
    words: list[Span] = []
    start = end = kind = 0
    for next_start, next_end, next_kind in spans:
        if next_start < end:  # overlaps the open one
            end = max(end, next_end)
            kind |= next_kind
        else:
            if kind == _LETTERED | _READ:
                words.append((start, end))
            start, end, kind = next_start, next_end, next_kind
    return words


def _assemble(model: models.Model, normalizer: normalizers.Normalizer) -> tokenizers.Tokenizer:
    """A tokenizer of these parts and nothing else: no added tokens, post-processor, truncation or padding."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def _check_wordpiece(backend: tokenizers.Tokenizer) -> None:
    """CheckpointError unless the tokenizer is of the BERT family, which the alignment relies on."""
    hint = "Use the tokenizer.json or vocab.txt of a BERT model, or one written by aga prepare."
    parts: tuple[tuple[Any, type], ...] = (
        (backend.model, models.WordPiece),
        (backend.normalizer, normalizers.BertNormalizer),
        (backend.pre_tokenizer, pre_tokenizers.BertPreTokenizer),
    )
    for part, wanted in parts:
        if not isinstance(part, wanted):
            raise CheckpointError(f"The tokenizer has {type(part).__name__} where BERT has {wanted.__name__}", hint)
    if backend.model.continuing_subword_prefix != CONTINUATION or backend.model.unk_token != SPECIAL[1]:
        raise CheckpointError("The tokenizer marks continuations or unknown words in another way than BERT", hint)
    missing = [name for name in SPECIAL if backend.token_to_id(name) is None]
    if missing:
        raise CheckpointError(f"The tokenizer lacks {', '.join(missing)}", hint)


def load_tokenizer(source: str | Path, convention: TextConvention) -> Tokenizer:
    """Load a BERT tokenizer for use under `convention`; `source` as in `load_tokenizer_file`."""
    return Tokenizer(load_tokenizer_file(source), convention)


def load_tokenizer_file(source: str | Path) -> tokenizers.Tokenizer:
    """Load from a `tokenizer.json`, a `vocab.txt`, a folder that has one of them, or a hub name.

    Raises CheckpointError where it is missing, broken or, for a hub name, cannot be fetched.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"{path} has neither tokenizer.json nor vocab.txt", "Give another folder.")
        path = found[0]
    elif not path.is_file():
        path = _fetch(str(source))
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path} is too large to be a tokenizer", "Check the file.")
        text = path.read_text(encoding="utf-8")
        return tokenizers.Tokenizer.from_str(text) if path.suffix != ".txt" else _from_vocabulary(text)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{path} is not a readable tokenizer: {error}", "Copy the file again.") from error


def _from_vocabulary(text: str) -> tokenizers.Tokenizer:
    """A lower-casing BERT tokenizer of a `vocab.txt`: one piece a line, the line number is the id."""
    vocabulary = {piece: token_id for token_id, piece in enumerate(text.removesuffix("\n").split("\n"))}
    return _with_special(vocabulary)


def _with_special(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """A lower-casing BERT tokenizer of a vocabulary, its special tokens known as such to other readers."""
    model = models.WordPiece(vocabulary, unk_token=SPECIAL[1], continuing_subword_prefix=CONTINUATION)
    backend = _assemble(model, normalizers.BertNormalizer(lowercase=True))
    backend.add_special_tokens([name for name in SPECIAL if name in vocabulary])
    return backend


def placeholder_tokenizer(vocab_size: int, bert_ids: bool) -> tokenizers.Tokenizer:
    """A vocabulary of special tokens and unused entries, for weights that come without theirs; ids mean the same.

    The special tokens are at BERT's ids, or at 0 to 4.
    """
    special = dict(zip(BERT_IDS if bert_ids else range(len(SPECIAL)), SPECIAL, strict=True))
    others = (token_id for token_id in range(vocab_size) if token_id not in special)
    unused = {UNUSED.format(number): token_id for number, token_id in enumerate(others)}
    return _with_special({piece: token_id for token_id, piece in special.items()} | unused)


def cached_tokenizer(name: str) -> tokenizers.Tokenizer | None:
    """The tokenizer of a hub entry if it is in the local cache; never goes to the network."""
    import huggingface_hub

    for file in ("tokenizer.json", "vocab.txt"):
        found = huggingface_hub.try_to_load_from_cache(name, file)
        if isinstance(found, str):
            return load_tokenizer_file(found)
    return None


def _fetch(name: str) -> Path:
    """The tokenizer file of a hub entry, from the local cache or the network."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or name.endswith((".json", ".txt")):
        raise CheckpointError(f"There is no tokenizer at {name}", "Check the path.")
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reason: Exception | None = None
    for file in ("tokenizer.json", "vocab.txt"):
        try:
            return Path(huggingface_hub.hf_hub_download(name, file))
        except LocalEntryNotFoundError as error:  # offline and not in the cache
            reason = error
        except EntryNotFoundError as error:  # the entry has no such file: try the next
            reason = error
        except Exception as error:
            reason = error
            break
    first_line = (str(reason).strip().splitlines() or [""])[0]
    raise CheckpointError(
        f"Cannot fetch the tokenizer {name!r} from the Hugging Face hub: {first_line}",
        f"Download vocab.txt from https://huggingface.co/{name} on a machine that can, and give its folder.",
    ) from reason


def train_tokenizer(captions: Iterable[str], out: Path, vocab_size: int = 8000) -> None:
    """Train a lower-casing WordPiece vocabulary on captions and write it to `out` as tokenizer.json.

    The five special tokens come first (ids 0 to 4). The same captions, in any order, give the same bytes.
    """
    counts = _count_words(captions)
    alphabet = _alphabet(counts, (vocab_size - len(SPECIAL)) // 4)
    # The trainer numbers continuation characters in the order of a randomly seeded hash map. Listed as
    # special tokens they get their ids beforehand, and nothing random is left.
    continuing = [CONTINUATION + character for character in alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a piece seen once teaches nothing
        special_tokens=[*SPECIAL, *continuing],
        initial_alphabet=alphabet,
        continuing_subword_prefix=CONTINUATION,
        show_progress=False,
    )
    known = set(alphabet)
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token=SPECIAL[1]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lines = (" ".join([word] * counts[word]) for word in sorted(counts) if known.issuperset(word))
    backend.train_from_iterator(lines, trainer)
    trained = _with_special(backend.get_vocab(with_added_tokens=False))
    write_text(out, trained.to_str(pretty=True) + "\n")


def _count_words(captions: Iterable[str]) -> Counter[str]:
    """How often each unit occurs that BERT's normaliser and pre-tokenizer make of the captions."""
    normalizer = normalizers.BertNormalizer(lowercase=True)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for caption in captions:
        text = normalizer.normalize_str(_SURROGATE.sub("\ufffd", caption))
        counts.update(word for word, _ in pre_tokenizer.pre_tokenize_str(text))
    return counts


def _alphabet(counts: Counter[str], size: int) -> list[str]:
    """The `size` most frequent characters, sorted; rarer ones would crowd out words and become [UNK]."""
    frequency: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            frequency[character] += count
    ranked = sorted(frequency, key=lambda character: (-frequency[character], character))
    return sorted(ranked[:size])
