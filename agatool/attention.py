"""Where words look in an image: cross-attention, norm, Grad-CAM and occlusion maps of a pair's words.

Shape suffixes: N texts given to the fusion layers, W words of a text (padded), L tokens, S fusion layers, h heads,
P image tokens without [CLS], R rows and C columns of a map, T ways to hide a part of an image, Y and X pixels,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from agatool.config import MaskingConfig
from agatool.data.images import decode_image, eval_transform, to_tensor
from agatool.encoding import finite, model_device
from agatool.errors import UsageError
from agatool.masking import word_scores
from agatool.model import Attention, AttentionMaps, ImageKeysValues, PersonSearchModel, log_odds
from agatool.objective import class_attention, fillable_ids
from agatool.tokenization import Batch, Encoding, Span, Tokenizer

Mode = Literal["words", "masked"]
Method = Literal["attention", "norm", "gradcam", "occlusion"]
MODES: tuple[Mode, ...] = ("words", "masked")
READ_OFF: tuple[Method, ...] = ("attention", "norm", "gradcam")  # the fusion layers' cross-attention

SHOWN_WORDS = 6  # of a caption, where none are asked for
GUESSES = 5
TEXTS = 64  # given to the fusion layers at once
CELLS = 32  # an image is divided into about so many to hide parts of it, whatever the model's own grid
_WINDOW = 2  # cells that are hidden together, down and across

# What points best on the val split of the sample data by `--measure`, with the shipped weights (docs/attention.md).
_METHOD: Method = "norm"
# The layer of each mode and method, as a share of the fusion layers, since models differ in how many they have.
_DEPTH: dict[tuple[Mode, Method], float] = {
    ("words", "attention"): 0.5,
    ("words", "norm"): 0.5,
    ("words", "gradcam"): 0.5,
    ("masked", "attention"): 1.0,
    ("masked", "norm"): 1.0,
    ("masked", "gradcam"): 1.0,
}
_HEAD = "max"


@dataclass(frozen=True)
class Look:
    """How to look: `layer` counts fusion layers from 1, `head` is mean, max or a head's number from 1.

    What is None is chosen by `settled`; occlusion has neither layer nor head.
    """

    mode: Mode = "words"
    method: Method | None = None
    layer: int | None = None
    head: str | None = None

    def settled(self, model: PersonSearchModel) -> Look:
        """With every choice made and checked against the model. Raises UsageError."""
        layers, heads = model.config.fusion_layers, model.config.text_heads
        method, head = self.method or _METHOD, self.head or _HEAD
        if method == "occlusion":
            if self.layer is not None or self.head is not None:
                raise UsageError("Occlusion has no --layer and no --head", "Add --method attention or gradcam.")
            return replace(self, method=method)
        layer = max(1, round(_DEPTH[self.mode, method] * layers)) if self.layer is None else self.layer
        if not 1 <= layer <= layers:
            raise UsageError(f"--layer {layer}, but the model has {layers} fusion layers", f"Give 1 to {layers}.")
        if head not in ("mean", "max") and not (head.isdecimal() and 1 <= int(head) <= heads):
            raise UsageError(f"--head {head}, but the model has {heads} heads", f"Give mean, max or 1 to {heads}.")
        if (self.mode, method, layer) == ("words", "gradcam", layers):
            raise UsageError(
                f"Grad-CAM of the match is zero in the last fusion layer ({layer}): only [CLS] is read there",
                "Give an earlier --layer, --mode masked, or --method attention.",
            )
        return replace(self, method=method, layer=layer, head=head)


# -- maps ---------------------------------------------------------------------------------------------------------


class Views(NamedTuple):
    """What words looked at in every fusion layer and head, each [S, N, W, h, P]."""

    attention: Tensor  # cross-attention weights
    norm: Tensor  # those weights times the length of what they weigh
    gradcam: Tensor  # those weights times the positive part of the target's gradient with respect to them

    def heat(self, look: Look, grid: tuple[int, int]) -> Tensor:
        """[N, W, R, C] of one settled way to look."""
        assert look.layer is not None
        assert look.head is not None
        weights_NWhP = self._asdict()[str(look.method)][look.layer - 1]
        if look.head == "mean":
            heat_NWP = weights_NWhP.mean(2)
        elif look.head == "max":
            heat_NWP = weights_NWhP.amax(2)
        else:
            heat_NWP = weights_NWhP[:, :, int(look.head) - 1]
        return heat_NWP.unflatten(-1, grid)


def views(cross: list[Tensor], lengths: list[Tensor], target: Tensor, words_NWL: Tensor) -> Views:
    """Read each word's maps off the cross-attention weights `cross`, S times [N, h, L, 1 + P].

    `lengths`, S times [N, h, 1 + P], are those of the value vectors (`Attention.value_norms`). `target` is the scalar
    whose gradient Grad-CAM takes (Selvaraju et al. 2017; on cross-attention: Li et al. 2021, ALBEF); `words_NWL` says
    which tokens a word has. A word's map is the mean over its tokens; the image's [CLS], the first column, is left out.
    """
    weight_NWL = words_NWL / words_NWL.sum(-1, keepdim=True).clamp(min=1)
    gradients = torch.autograd.grad(target, cross)

    def of_words(maps_NhLP: Tensor) -> Tensor:
        return (weight_NWL[:, None] @ maps_NhLP[..., 1:]).transpose(1, 2)

    with torch.no_grad():
        attention = [of_words(weights) for weights in cross]
        norm = [of_words(weights * length[:, :, None]) for weights, length in zip(cross, lengths, strict=True)]
        gradcam = [of_words(weights * grad.clamp(min=0)) for weights, grad in zip(cross, gradients, strict=True)]
        return Views(torch.stack(attention), torch.stack(norm), torch.stack(gradcam))


@torch.no_grad()
def _value_lengths(model: PersonSearchModel, projected: ImageKeysValues) -> list[Tensor]:
    layers = zip(model.fusion_layers, projected, strict=True)
    return [cast(Attention, layer.cross_attention).value_norms(value) for layer, (_, value) in layers]


def look_words(
    model: PersonSearchModel, text_tokens: Tensor, mask: Tensor, image_tokens: Tensor, words_NWL: Tensor
) -> tuple[Views, Tensor]:
    """Words of whole captions, [N, L, D] with mask [N, L], looking at one image each, [N, 1 + P, H].

    -> (views, probability of a match [N]). Grad-CAM's target is the ITM logit of "match".
    """
    with torch.enable_grad():
        maps, projected = AttentionMaps(), model.project_image(image_tokens)
        logits = model.itm(model.fuse(text_tokens.requires_grad_(), mask, projected, maps=maps))
        seen = views(maps.cross, _value_lengths(model, projected), logits[:, 1].sum(), words_NWL)
    return seen, finite(logits.detach().float()).softmax(-1)[:, 1]


def look_masked(
    model: PersonSearchModel, batch: Batch, image_tokens: Tensor, words_NL: Tensor, mask_id: int
) -> tuple[Views, Tensor]:
    """One word of each text, its tokens `words_NL`, masked and filled in while looking at an image each.

    -> (views with W = 1, MLM logits of its positions end to end [positions, V]). Grad-CAM's target is the logit of
    the word that was there.
    """
    with torch.no_grad():
        encoded = model.encode_text(batch.ids.masked_fill(words_NL, mask_id), batch.mask)
    with torch.enable_grad():
        maps, projected = AttentionMaps(), model.project_image(image_tokens)
        fused = model.fuse(encoded.tokens.requires_grad_(), batch.mask, projected, maps=maps)
        logits = model.mlm(fused[words_NL])
        target = logits.gather(1, batch.ids[words_NL][:, None]).sum()
        seen = views(maps.cross, _value_lengths(model, projected), target, words_NL[:, None].float())
    return seen, finite(logits.detach().float())


def look_occluded(model: PersonSearchModel, batch: Batch, pixels: Tensor, words_WL: Tensor) -> dict[Mode, Tensor]:
    """Heat [W, R, C] of one caption's words in each mode: what hiding a part of its image [1, 3, Y, X] takes away.

    Occlusion (Zeiler & Fergus 2014): windows of the image are painted in the mean colour, and a cell's heat is the
    mean loss over the windows that cover it, cut at zero. What is lost: in masked mode, of the MLM logit of the word
    that was there; in words mode, of what the word adds to the log-odds of a match, which are the whole caption's minus
    those of the caption with the word masked.
    """
    hidden, covers_TRC = occluded(pixels)
    ids = torch.cat([batch.ids, batch.ids.masked_fill(words_WL, model.tokenizer.mask_id)])
    use_WT: dict[Mode, list[Tensor]] = {"words": [], "masked": []}
    with torch.no_grad():
        projected = model.project_image(model.encode_image(hidden).tokens)
        mask = batch.mask.expand(len(hidden), -1)
        texts = model.encode_text(ids, batch.mask.expand(len(ids), -1)).tokens[:, None].expand(-1, len(hidden), -1, -1)
        whole = log_odds(model.itm(model.fuse(texts[0], mask, projected, cls_only=True)))
        for text, word_L in zip(texts[1:], words_WL, strict=True):
            fused = model.fuse(text, mask, projected)
            originals = batch.ids[0, word_L].expand(len(hidden), -1)
            use_WT["masked"].append(model.mlm(fused[:, word_L]).gather(2, originals[..., None]).sum((1, 2)))
            use_WT["words"].append(whole - log_odds(model.itm(fused)))
        return {mode: _lost(used, covers_TRC) for mode, used in use_WT.items()}


def _lost(use_WT: Sequence[Tensor], covers_TRC: Tensor) -> Tensor:
    """[W, R, C] from a figure of the whole image and of each occluded one, 1 + T for each word."""
    if not use_WT:
        return covers_TRC.new_zeros(0, *covers_TRC.shape[1:])
    used = finite(torch.stack(list(use_WT)).float())
    lost_WRC = torch.einsum("wt,trc->wrc", used[:, :1] - used[:, 1:], covers_TRC)
    return (lost_WRC / covers_TRC.sum(0)).clamp(min=0)


def occluded(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """An image [1, 3, Y, X] as it is and with each window hidden, [1 + T, 3, Y, X], and the windows, [T, R, C] 0 or 1.

    The image has about CELLS square cells; windows of _WINDOW x _WINDOW cells move by one cell and begin outside the
    image, so that every cell is covered equally often. Zero is the mean colour of normalised pixels.
    """
    height, width = pixels.shape[2:]
    side = (height * width / CELLS) ** 0.5
    rows, columns = min(height, max(1, round(height / side))), min(width, max(1, round(width / side)))
    down, right = _window_covers(rows), _window_covers(columns)
    covers_TRC = (down[:, None, :, None] * right[None, :, None, :]).flatten(0, 1).to(pixels)
    row_of, column_of = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    seen = 1 - covers_TRC[:, row_of][:, :, column_of]
    return torch.cat([pixels, pixels * seen[:, None]]), covers_TRC


def _window_covers(cells: int) -> Tensor:
    """[cells + _WINDOW - 1, cells]: which cells of an axis each position of the window covers."""
    first = torch.arange(1 - _WINDOW, cells)[:, None]
    cell = torch.arange(cells)
    return ((cell >= first) & (cell < first + _WINDOW)).float()


def guesses(logits_TV: Tensor, original_T: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """The best words for T masked pieces of one word that was `original_T`, with their probabilities, best first.

    Where a piece started a word or continued it, so do the guesses, and a hyphen stays what it is. The pieces are
    filled in independently, as the MLM does, so a word's probability is their product.
    """
    fillable = fillable_ids(tokenizer, logits_TV.shape[1])
    continuing = torch.tensor([tokenizer.is_continuation(piece) for piece in range(logits_TV.shape[1])])
    found: list[tuple[list[int], float]] = [([], 1.0)]
    for logits_V, original in zip(logits_TV.cpu(), original_T, strict=True):
        allowed = next((kind for kind in (fillable, continuing) if kind[original]), _only(original, len(logits_V)))
        top = logits_V.masked_fill(~allowed, float("-inf")).softmax(-1).topk(min(GUESSES, int(allowed.sum())))
        pieces = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        longer = [([*ids, piece], chance * p) for ids, chance in found for piece, p in pieces]
        found = sorted(longer, key=lambda word: -word[1])[:GUESSES]
    return [(tokenizer.decode_word(ids), chance) for ids, chance in found]


def _only(piece: int, size: int) -> Tensor:
    """[V] bool."""
    return torch.arange(size) == piece


def patch_grid(model: PersonSearchModel, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of patches that the image encoder makes of images [B, 3, height, width]."""
    rows, columns = model.image_encoder.vit.patch_embed(pixels[:1]).shape[1:3]
    return rows, columns


def token_words(encodings: Sequence[Encoding], spans: Sequence[Sequence[Span]], length: int) -> Tensor:
    """[N, W, L] float: which tokens the words at these character spans have, padded with zeros to the most words.

    A span takes all words it touches; one behind the cut of the caption has no tokens.
    """
    words = torch.zeros(len(encodings), max(map(len, spans), default=0), length)
    for row, (encoding, wanted) in enumerate(zip(encodings, spans, strict=True)):
        for column, (start, end) in enumerate(wanted):
            touched = {n for n, (first, last) in enumerate(encoding.words) if first < end and last > start}
            for token, word in enumerate(encoding.word_of):
                words[row, column, token] = float(word in touched)
    return words


# -- explaining -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A caption and the image it is shown on; `name` is unique and fit for a file name."""

    name: str
    image: Path
    caption: str


@dataclass(frozen=True)
class Word:
    """A word of a caption; `heat` where it was asked for."""

    number: int  # position in the caption, from 0
    span: Span
    text: str
    attention: float  # its share of the caption's class attention (AGM's score)
    heat: np.ndarray | None = None  # [R, C] float32
    guesses: Sequence[tuple[str, float]] = ()  # masked mode: words and probabilities


@dataclass(frozen=True)
class Explanation:
    """What the words of a pair look at."""

    pair: Pair
    match: float  # probability of a match, by the ITM head
    words: Sequence[Word]

    @property
    def shown(self) -> list[Word]:
        """The words that have a map."""
        return [word for word in self.words if word.heat is not None]


def explain(model: PersonSearchModel, pair: Pair, look: Look, wanted: Sequence[str] | None = None) -> Explanation:
    """Maps of a pair's words by a settled `look`: of those in `wanted` (lower case; ("all",): every one), or of the
    SHOWN_WORDS with the most class attention. Raises DataError for a broken image.

    `model` is in evaluation mode and has its tokenizer, as `agatool.load` gives it.
    """
    tokenizer, device = model.tokenizer, model_device(model)
    encoding = tokenizer.encode([pair.caption])[0]
    batch = tokenizer.pad([encoding]).to(device)
    pixels = read_pixels(model, [pair.image])
    with torch.no_grad():
        image_tokens = model.encode_image(pixels).tokens
        encoded, attention_BL = class_attention(model, batch.ids, batch.mask, MaskingConfig())
        scores = word_scores(attention_BL, batch.word_of)[0].tolist()
    readable = 1 + max(encoding.word_of)
    words = [
        Word(number, span, pair.caption[slice(*span)], scores[number] if number < readable else 0.0)
        for number, span in enumerate(encoding.words)
    ]
    chosen = _choose(words[:readable], wanted)
    members_1WL = token_words([encoding], [[word.span for word in chosen]], batch.ids.shape[1]).to(device)
    seen, match = look_words(model, encoded.tokens, batch.mask, image_tokens, members_1WL)
    filled: list[list[tuple[str, float]]] = [[] for _ in chosen]
    if look.mode == "masked" and chosen:
        seen, filled = _explain_masked(model, batch, image_tokens, members_1WL[0].bool())
    if look.method == "occlusion":
        heat_WRC = look_occluded(model, batch, pixels, members_1WL[0].bool())[look.mode]
    else:
        heat_WRC = seen.heat(look, patch_grid(model, pixels)).flatten(0, 1)
    for word, heat, words_in in zip(chosen, heat_WRC.cpu().numpy(), filled, strict=True):
        words[word.number] = replace(word, heat=heat, guesses=words_in)
    return Explanation(pair, float(match[0]), words)


def _explain_masked(
    model: PersonSearchModel, batch: Batch, image_tokens: Tensor, members_WL: Tensor
) -> tuple[Views, list[list[tuple[str, float]]]]:
    """Views [S, W, 1, h, P] and guesses of each word of one caption, masked in turn."""
    parts, filled = [], []
    for words_NL in members_WL.split(TEXTS):
        repeated = Batch(*(x.expand(len(words_NL), -1) for x in (batch.ids, batch.mask, batch.word_of)))
        images = image_tokens.expand(len(words_NL), -1, -1)
        seen, logits = look_masked(model, repeated, images, words_NL, model.tokenizer.mask_id)
        parts.append(seen)
        counts = words_NL.sum(1).tolist()
        originals = repeated.ids[words_NL].split(counts)
        filled += [
            guesses(part, ids.tolist(), model.tokenizer)
            for part, ids in zip(logits.split(counts), originals, strict=True)
        ]
    return Views(*(torch.cat(maps, dim=1) for maps in zip(*parts, strict=True))), filled


def _choose(words: Sequence[Word], wanted: Sequence[str] | None) -> list[Word]:
    """The words to look at, in the caption's order."""
    if wanted is None:
        wanted_numbers = {word.number for word in sorted(words, key=lambda word: -word.attention)[:SHOWN_WORDS]}
        return [word for word in words if word.number in wanted_numbers]
    return [word for word in words if "all" in wanted or word.text.lower() in wanted]


def read_pixels(model: PersonSearchModel, images: Sequence[Path]) -> Tensor:
    """Normalised images [B, 3, height, width] on the model's device."""
    config = model.config
    squashed = torch.stack([to_tensor(decode_image(path), config.image_size) for path in images])
    return eval_transform(squashed.to(model_device(model)), config.image_mean, config.image_std)
