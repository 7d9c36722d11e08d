"""TEM for export: mask words of captions, fill them in as the image-conditioned MLM would, keep what it is sure of.

Shape suffixes: B captions of a batch, L tokens, U words of a caption, M images, P image tokens, H their width, S masked
tokens, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from agatool.config import MaskingConfig, Section, TemConfig
from agatool.data.images import eval_transform
from agatool.data.sampling import stream_seed
from agatool.data.word_classes import OTHER, usual_class
from agatool.encoding import even_slices, finite, inference, model_device
from agatool.masking import choose_words, word_scores
from agatool.model import Encoded, ImageKeysValues, PersonSearchModel, log_odds
from agatool.objective import class_attention, fill_words, fillable_ids
from agatool.tokenization import STOP_WORDS, Batch, Encoding, Span, Tokenizer

ROUNDS = 3  # turns in which a caption's words are masked; docs/enrich.md compares with one
# Vowel letters that sound like consonants, and the other way round: a uniform, an hour.
_VOWEL_SOUND = re.compile(r"(?!uni|use|one|eu)[aeiou]|hour|honest", re.IGNORECASE)


class EnrichConfig(Section):
    """How captions are enriched (docs/enrich.md)."""

    strategy: Literal["attention", "random", "content"] = "attention"
    ratio: float = Field(0.25, gt=0, le=1)  # of a caption's maskable words
    decode: Literal["argmax", "top-k", "sample"] = "argmax"
    top_k: int = Field(5, ge=1)
    temperature: float = Field(1.0, gt=0)
    min_probability: float = Field(0.985, ge=0, le=1)
    variants: int = Field(1, ge=1)
    views: int = Field(4, ge=1)  # images of the person that a caption is checked against, its own included
    seed: int = Field(0, ge=0)
    text_only: bool = False
    batch_size: int = Field(64, ge=1)


@dataclass(frozen=True)
class MaskedWord:
    """A word that was masked, and what came of it."""

    position: int  # counts the caption's words
    start: int  # characters, end excluded
    end: int
    word: str
    replacement: str  # the word itself where it stayed
    probability: float  # that `replacement`, or what it would have been, is right and not `word`
    attention: float  # the word's share of the caption's class attention

    @property
    def replaced(self) -> bool:
        """Whether the caption has another word here now."""
        return self.replacement != self.word


@dataclass(frozen=True)
class Version:
    """An enriched caption."""

    text: str
    masked: list[MaskedWord]
    itm_original: float  # ITM logit of the caption as it was with its own image alone
    itm_enriched: float


def whole_words(tokenizer: Tokenizer, captions: Sequence[str]) -> set[int]:
    """Ids that are a whole word somewhere in the captions."""
    found: set[int] = set()
    for caption, encoding in zip(captions, tokenizer.encode(captions), strict=True):
        found.update(encoding.ids[token] for token in maskable(tokenizer, caption, encoding).values())
    return found


def usual_words(tokenizer: Tokenizer) -> set[int]:
    """Ids that are a function word or a word for what people wear, carry and look like."""
    fits = np.flatnonzero(tokenizer.replaceable_ids)
    words = {int(token_id): tokenizer.piece(int(token_id)) for token_id in fits}
    return {token_id for token_id, word in words.items() if word in STOP_WORDS or usual_class(word) != OTHER}


def maskable(tokenizer: Tokenizer, caption: str, encoding: Encoding) -> dict[int, int]:
    """Words that may be replaced -> their token: those that are one piece and nothing but that piece.

    So neither half a word is left over nor punctuation lost that a clean-up dropped inside one, and what the
    vocabulary does not know stays as it is.
    """
    tokens: dict[int, int] = {}
    pieces = np.bincount([word for word in encoding.word_of if word >= 0], minlength=1)
    for token, word in enumerate(encoding.word_of):
        if word >= 0 and pieces[word] == 1:
            text = caption[slice(*encoding.words[word])]
            if tokenizer.backend.normalizer.normalize_str(text) == tokenizer.piece(encoding.ids[token]):
                tokens[word] = token
    return tokens


class Enricher:
    """A model that enriches captions; `words` are the ids that may be filled in."""

    def __init__(self, model: PersonSearchModel, config: EnrichConfig, words: set[int], bf16: bool = False) -> None:
        self.model, self.config, self.bf16 = model, config, bf16
        self.tokenizer: Tokenizer = model.tokenizer
        self.device = model_device(model)
        self.masking = MaskingConfig(strategy=config.strategy)
        self.tem = TemConfig(decode=config.decode, top_k=config.top_k, temperature=config.temperature)
        known = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        known[list(words)] = True
        self.fillable_V = fillable_ids(self.tokenizer, model.config.vocab_size) & known

    def look(self, images: Tensor) -> Tensor:
        """Decoded images, uint8 [M, 3, height, width] -> their tokens [M, P, H] on the model's device."""
        sizes = self.model.config
        with inference(self.model, self.bf16):
            parts = images.split(self.config.batch_size)
            pixels = (eval_transform(part.to(self.device), sizes.image_mean, sizes.image_std) for part in parts)
            return torch.cat([self.model.encode_image(part).tokens for part in pixels])

    def blank(self) -> Tensor:
        """Tokens [1, P, H] of a picture that shows nothing but the mean colour."""
        with inference(self.model, self.bf16):
            return self.model.encode_image(torch.zeros(1, 3, *self.model.config.image_size, device=self.device)).tokens

    def enrich(
        self, captions: Sequence[str], numbers: Sequence[int], image_tokens: Tensor, seen: Sequence[Sequence[int]]
    ) -> list[list[Version]]:
        """The `variants` enriched versions of each caption.

        numbers       the captions' numbers in their file: what is drawn depends on the seed and this alone.
        image_tokens  [M, P, H] on the model's device, from `look` or `blank`.
        seen          which of the images each caption is checked against; the first is the one it describes.
        """
        found: list[list[Version]] = [[] for _ in captions]
        encodings = self.tokenizer.encode(captions)
        with inference(self.model, self.bf16):
            for rows in self._batches(encodings, seen):
                texts = [_Text.of(self.tokenizer, captions[row], encodings[row], numbers[row]) for row in rows]
                own = self._view(image_tokens, [seen[row][:1] for row in rows])
                view = self._view(image_tokens, [seen[row] for row in rows])
                for row, versions in zip(rows, self._enrich_batch(texts, own, view), strict=True):
                    found[row] = versions
        return found

    def _batches(self, encodings: Sequence[Encoding], seen: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Captions, by number, that see equally many images and are of similar length."""
        lengths = np.array([len(encoding.ids) for encoding in encodings], dtype=int)
        counts = np.array([len(images) for images in seen], dtype=int)
        for count in np.unique(counts):
            rows = np.flatnonzero(counts == count)
            yield from even_slices(rows[np.argsort(lengths[rows], kind="stable")], self.config.batch_size)

    def _view(self, image_tokens: Tensor, seen: Sequence[Sequence[int]]) -> _View:
        """The tokens of each text's images side by side, in whatever order: attention merges them."""
        groups, index = np.unique([sorted(images) for images in seen], axis=0, return_inverse=True)
        together = image_tokens[torch.from_numpy(groups)].flatten(1, 2)
        return _View(self.model.project_image(together), torch.from_numpy(index.reshape(-1)))

    def _enrich_batch(self, texts: list[_Text], own: _View, view: _View) -> list[list[Version]]:
        batch = self.tokenizer.pad([text.encoding for text in texts]).to(self.device)
        encoded, attention = class_attention(self.model, batch.ids, batch.mask, self.masking)
        scores_BU = word_scores(attention, batch.word_of).cpu()
        itm = self._itm(encoded, batch, own)
        versions: list[list[Version]] = [[] for _ in texts]
        for variant in range(self.config.variants):
            seeds = [stream_seed(self.config.seed, text.number, variant) for text in texts]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            chosen = [
                self._choose(text, scores_U, generator)
                for text, scores_U, generator in zip(texts, scores_BU, generators, strict=True)
            ]
            filled = self._fill(texts, batch, chosen, generators, view)
            masked = [
                text.masked(words, scores_U.tolist())
                for text, words, scores_U in zip(texts, filled, scores_BU, strict=True)
            ]
            enriched = [text.rewritten(words) for text, words in zip(texts, masked, strict=True)]
            again = self.tokenizer.pad(self.tokenizer.encode(enriched)).to(self.device)
            itm_enriched = self._itm(self.model.encode_text(again.ids, again.mask), again, own)
            for row, parts in enumerate(zip(enriched, masked, itm, itm_enriched, strict=True)):
                versions[row].append(Version(*parts))
        return versions

    def _itm(self, encoded: Encoded, batch: Batch, view: _View) -> list[float]:
        """The logit of "match" of each text with its image; 0 without images."""
        if self.config.text_only:
            return [0.0] * len(encoded.tokens)
        return self._match(encoded, batch.mask, view)[:, 1].tolist()

    def _match(self, encoded: Encoded, mask_NL: Tensor, view: _View) -> Tensor:
        """ITM logits [N, 2] of N texts, on the CPU."""
        image_of = view.image_of.to(self.device)
        fused = self.model.fuse(encoded.tokens, mask_NL, view.projected, image_of, cls_only=True)
        return finite(self.model.itm(fused).float()).cpu()

    def _choose(self, text: _Text, scores_U: Tensor, generator: torch.Generator) -> list[int]:
        """The words to mask, in the caption's order."""
        words = list(text.token_of)
        if not words or not self.fillable_V.any():
            return []
        content = self.tokenizer.content_words(text.caption, text.encoding)
        chosen = choose_words(
            self.config.strategy,
            torch.ones(1, len(words), dtype=torch.bool),
            ratio=self.config.ratio,
            generator=generator,
            temperature=self.masking.temperature,
            scores_BU=scores_U[None, words],
            content_BU=torch.tensor([[content[word] for word in words]]),
        )
        return [words[index] for index in chosen[0].nonzero().flatten().tolist()]

    def _fill(
        self,
        texts: list[_Text],
        batch: Batch,
        chosen: list[list[int]],
        generators: list[torch.Generator],
        view: _View,
    ) -> list[dict[int, tuple[str | None, float]]]:
        """For each text its masked words -> the word filled in, None where it stays, and its probability.

        The words of a caption are masked in ROUNDS turns, so that most of them can be read while others are filled in.
        """
        filled: list[dict[int, tuple[str | None, float]]] = [{} for _ in texts]
        ids = batch.ids.clone()
        for number in range(ROUNDS):
            turns = [words[number::ROUNDS] for words in chosen]
            places = [(row, word, texts[row].token_of[word]) for row, words in enumerate(turns) for word in words]
            if not places:
                continue
            rows, tokens = (torch.tensor([place[part] for place in places]) for part in (0, 2))
            turn = _Turn(ids, batch.mask, rows, tokens, view)
            logits_SV = self._words(turn)
            parts = zip(logits_SV.split([len(words) for words in turns]), generators, strict=True)
            new_S = torch.cat([fill_words(part, self.fillable_V, self.tem, generator)[0] for part, generator in parts])
            sure_S = self._sureness(turn, logits_SV, new_S)
            old_S = ids[rows, tokens].cpu()
            new_S = new_S.where(sure_S >= self.config.min_probability, old_S)
            ids[rows, tokens] = new_S.to(self.device)
            for (row, word, _), new, old, sure in zip(
                places, new_S.tolist(), old_S.tolist(), sure_S.tolist(), strict=True
            ):
                filled[row][word] = (self.tokenizer.piece(new) if new != old else None, sure)
        return filled

    def _words(self, turn: _Turn) -> Tensor:
        """MLM logits [S, V] on the CPU at the turn's words, masked."""
        masked_BL = turn.ids.clone()
        masked_BL[turn.rows, turn.tokens] = self.tokenizer.mask_id
        encoded = self.model.encode_text(masked_BL, turn.mask)
        image_of = turn.view.image_of.to(self.device)
        fused = self.model.fuse(encoded.tokens, turn.mask, turn.view.projected, image_of)
        return finite(self.model.mlm(fused[turn.rows, turn.tokens]).float()).cpu()

    def _sureness(self, turn: _Turn, logits_SV: Tensor, new_S: Tensor) -> Tensor:
        """[S]: the probability that the new word and not the old one is right; 0.5 where they are the same.

        The odds of two judges are multiplied: MLM's, p(new) / p(old) where the word is masked, and ITM's, how much
        likelier the caption matches with the new word than with the old. ITM reads what MLM has to guess.
        """
        old_S = turn.ids[turn.rows, turn.tokens].cpu()
        log_S2 = logits_SV.log_softmax(-1).gather(1, torch.stack([new_S, old_S], 1))
        odds_S = log_S2[:, 0] - log_S2[:, 1]
        changed = (new_S != old_S).nonzero().flatten()
        if len(changed) and not self.config.text_only:
            before_B = self._match_odds(turn.ids, turn.mask, turn.view)
            for part in changed.split(self.config.batch_size):
                rows = turn.rows[part]
                with_new = turn.ids[rows]
                with_new[torch.arange(len(rows)), turn.tokens[part]] = new_S[part].to(self.device)
                view = turn.view._replace(image_of=turn.view.image_of[rows])
                odds_S[part] += self._match_odds(with_new, turn.mask[rows], view) - before_B[rows]
        return odds_S.sigmoid()

    def _match_odds(self, ids_NL: Tensor, mask_NL: Tensor, view: _View) -> Tensor:
        """Log-odds [N] that texts match their images."""
        return log_odds(self._match(self.model.encode_text(ids_NL, mask_NL), mask_NL, view))


class _Turn(NamedTuple):
    """Words of a batch that are masked together: token `tokens[s]` of text `rows[s]`, S of them."""

    ids: Tensor  # [B, L], as far as earlier turns filled them in
    mask: Tensor  # [B, L]
    rows: Tensor
    tokens: Tensor
    view: _View


class _View(NamedTuple):
    """What the texts of a batch look at."""

    projected: ImageKeysValues
    image_of: Tensor  # [B] which of them each text looks at


class _Text(NamedTuple):
    """A caption of a batch."""

    caption: str
    encoding: Encoding
    number: int
    token_of: dict[int, int]  # of its maskable words

    @staticmethod
    def of(tokenizer: Tokenizer, caption: str, encoding: Encoding, number: int) -> _Text:
        return _Text(caption, encoding, number, maskable(tokenizer, caption, encoding))

    def masked(self, filled: dict[int, tuple[str | None, float]], scores: list[float]) -> list[MaskedWord]:
        """What came of the masked words, in the caption's order."""
        words = []
        for position, (new, probability) in sorted(filled.items()):
            start, end = self.encoding.words[position]
            word = self.caption[start:end]
            replacement = word if new is None else cased(new, word)
            words.append(MaskedWord(position, start, end, word, replacement, probability, scores[position]))
        return words

    def rewritten(self, masked: list[MaskedWord]) -> str:
        """The caption with its new words."""
        new = {word.position: word.replacement for word in masked if word.replaced}
        return rewrite(self.caption, self.encoding.words, new)


def cased(word: str, like: str) -> str:
    """`word` with the capitals of `like`: "red" like "Blue" is "Red", like "BLUE" is "RED"."""
    if len(like) > 1 and like.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if like[:1].isupper() else word


def rewrite(caption: str, spans: Sequence[Span], new: Mapping[int, str]) -> str:
    """Put `new` words at their positions among the words at `spans`; a or an goes with what follows it."""
    words = {**new}
    for position in sorted({*new, *(position + 1 for position in new)}):
        if not 0 < position < len(spans) or not caption[spans[position - 1][1] : spans[position][0]].isspace():
            continue
        before, word = (words.get(at, caption[slice(*spans[at])]) for at in (position - 1, position))
        if before.lower() in ("a", "an"):
            words[position - 1] = cased("an" if _VOWEL_SOUND.match(word) else "a", before)
    parts, last = [], 0
    for position in sorted(words):
        start, end = spans[position]
        parts += [caption[last:start], words[position]]
        last = end
    return "".join([*parts, caption[last:]])
