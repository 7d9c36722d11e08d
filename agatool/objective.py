"""Student, EMA teacher, queues and losses: ITC, ITM, MLM, with TEM's enriched texts; `forward(batch)` -> losses.

Shape suffixes: B pairs of the batch, L tokens, E shared space, Q queue slots, K keys (batch + filled queue),
S masked tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from agatool.config import MaskingConfig, ObjectiveConfig, TemConfig
from agatool.data.sampling import TrainBatch
from agatool.masking import Masked, Vocabulary, aggregate, mask_words
from agatool.model import AttentionMaps, Encoded, PersonSearchModel
from agatool.tokenization import Tokenizer

NO_PERSON = -1  # marks an empty queue slot
TEMPERATURE_RANGE = (0.001, 0.5)  # ALBEF's clamp


@dataclass(frozen=True)
class Phase:
    """What of the objective is on at a step."""

    alpha: float  # share of the teacher's soft targets
    itc_only: bool
    tem: bool
    half_size: bool = False  # images of half the height and width, a quarter of the work


@dataclass
class Draws:
    """A step's random choices; given to `forward`, they are replayed instead of drawn (parity tests do that)."""

    masked: Masked | None = None
    negatives: Negatives | None = None


@dataclass
class Negatives:
    """Hard negatives: for each text an image of another person and the other way round; -1 where there is none."""

    image_of_text: Tensor  # [B]
    text_of_image: Tensor  # [B]


@dataclass
class StepLosses:
    """The weighted sum to descend, its terms, and figures for the log (all scalar tensors, still on the device)."""

    total: Tensor
    terms: dict[str, Tensor]
    report: dict[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module):
    """Holds the student and everything that training needs beside it."""

    person_queue: Tensor
    image_queue: Tensor
    text_queue: Tensor
    enqueued: Tensor
    fillable: Tensor

    def __init__(
        self,
        student: PersonSearchModel,
        tokenizer: Tokenizer,
        config: ObjectiveConfig,
        masking: MaskingConfig,
        tem: TemConfig,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student).eval().requires_grad_(False)
        self.tokenizer, self.config, self.masking, self.tem = tokenizer, config, masking, tem
        width = student.config.embed_dim
        self.register_buffer("image_queue", torch.zeros(config.queue_size, width))
        self.register_buffer("text_queue", torch.zeros(config.queue_size, width))
        self.register_buffer("person_queue", torch.full((config.queue_size,), NO_PERSON))
        self.register_buffer("enqueued", torch.tensor(0))
        self.vocabulary = Vocabulary(tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids)
        self.register_buffer("fillable", fillable_ids(tokenizer, student.config.vocab_size), persistent=False)

    def train(self, mode: bool = True) -> Objective:
        """Dropout never touches the teacher."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def begin_step(self) -> None:
        """Once before a step's batches, in the reference's order: clamp the temperature, move the teacher (EMA)."""
        self.student.temperature.clamp_(*TEMPERATURE_RANGE)
        ema = get_ema_multi_avg_fn(self.config.momentum)
        ema(list(self.teacher.parameters()), list(self.student.parameters()), 1)
        for teacher, student in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
            teacher.copy_(student)  # running statistics of a conv stem are averages already

    def forward(
        self, batch: TrainBatch, phase: Phase, generator: torch.Generator, draws: Draws | None = None
    ) -> StepLosses:
        """Losses of one batch; the teacher's features then join the queues. `begin_step` comes first."""
        draws = draws or Draws()
        if phase.half_size:
            batch = replace(batch, images=F.avg_pool2d(batch.images, 2))
        if phase.itc_only:
            return self._itc_only(batch)

        teacher_image, teacher_text, attention = self._teach(batch)
        masked = draws.masked or mask_words(
            batch.text,
            self.vocabulary,
            self.masking,
            generator=generator,
            class_attention=attention,
            content=batch.content,
        )
        soft_SV = self._teacher_words(masked, batch, teacher_image)
        report: dict[str, Tensor] = {}
        ids = batch.text.ids
        if phase.tem:
            ids, report = self._enrich(batch, masked, soft_SV, generator)
        report["masked_ratio"] = masked.ratio

        image = self.student.encode_image(batch.images)
        both = self.student.encode_text(torch.cat([ids, masked.ids]), torch.cat([batch.text.mask] * 2))
        (text_tokens, masked_tokens), text_feature = both.tokens.chunk(2), both.feature.chunk(2)[0]
        itc, i2t_BB, t2i_BB = self._itc(
            image.feature,
            text_feature,
            teacher_image.feature,
            teacher_text.feature,
            batch.persons,
            phase.alpha,
        )
        projected = self.student.project_image(image.tokens)
        negatives = draws.negatives or hard_negatives(t2i_BB, i2t_BB, batch.persons, generator)
        itm, report["itm_accuracy"] = self._itm(text_tokens, batch.text.mask, projected, negatives)
        fused = self.student.fuse(masked_tokens, batch.text.mask, projected)
        mlm, report["mlm_accuracy"] = self._mlm(
            fused[masked.chosen], batch.text.ids[masked.chosen], soft_SV, phase.alpha
        )
        self._enqueue(teacher_image.feature, teacher_text.feature, batch.persons)
        return self._sum({"itc": itc, "itm": itm, "mlm": mlm}, report)

    def _sum(self, terms: dict[str, Tensor], report: dict[str, Tensor]) -> StepLosses:
        config = self.config
        weights = {"itc": config.itc_weight, "itm": config.itm_weight, "mlm": config.mlm_weight}
        report["temperature"] = self.student.temperature.detach()
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return StepLosses(total, terms, report)

    def _itc_only(self, batch: TrainBatch) -> StepLosses:
        """In-batch contrast of the student with itself: a third of a full step's cost, where time is short."""
        image = self.student.encode_image(batch.images).feature
        text = self.student.encode_text(batch.text.ids, batch.text.mask).feature
        targets = same_person_targets(batch.persons, batch.persons)
        logits = image @ text.T / self.student.temperature
        itc = (soft_cross_entropy(logits, targets) + soft_cross_entropy(logits.T, targets)) / 2
        return self._sum({"itc": itc}, {})

    @torch.no_grad()
    def _teach(self, batch: TrainBatch) -> tuple[Encoded, Encoded, Tensor]:
        """The teacher's view of the originals, and the class attention [B, L] that AGM masks by."""
        image = self.teacher.encode_image(batch.images)
        text, attention = class_attention(self.teacher, batch.text.ids, batch.text.mask, self.masking)
        return image, text, attention

    @torch.no_grad()
    def _teacher_words(self, masked: Masked, batch: TrainBatch, image: Encoded) -> Tensor:
        """The teacher's MLM logits [S, V] at the masked tokens, seeing the image."""
        text = self.teacher.encode_text(masked.ids, batch.text.mask)
        return self.teacher.mlm(self.teacher.fuse(text.tokens, batch.text.mask, image.tokens)[masked.chosen])

    @torch.no_grad()
    def _enrich(
        self, batch: TrainBatch, masked: Masked, logits_SV: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """TEM: enriched ids [B, L] for a random share of the captions, and statistics of what was replaced."""
        whole = single_piece_words(batch.text.word_of)
        words, probability = fill_words(logits_SV, self.fillable, self.tem, generator)
        enriched = batch.text.ids.clone()
        enriched[masked.chosen] = words
        swap = torch.rand(len(batch.text.ids), 1, generator=generator).to(batch.text.ids.device) < self.tem.probability
        replaced = masked.chosen & whole & swap
        new = torch.where(replaced, enriched, batch.text.ids)
        count = replaced.sum().clamp(min=1)
        kept = (replaced & (new == batch.text.ids)).sum()
        report = {
            "tem_replaced": replaced.sum() / (batch.text.word_of >= 0).sum().clamp(min=1),
            "tem_same": kept / count,
            "tem_probability": probability[replaced[masked.chosen]].sum() / count,
        }
        return new, report

    def _itc(
        self,
        image: Tensor,
        text: Tensor,
        teacher_image: Tensor,
        teacher_text: Tensor,
        persons: Tensor,
        alpha: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ITC over batch + queue, and the in-batch similarities image x text, text x image [B, B] (no gradient)."""
        filled = min(int(self.enqueued), len(self.person_queue))  # empty slots are left out, not random vectors
        image_keys = torch.cat([teacher_image, self.image_queue[:filled]])
        text_keys = torch.cat([teacher_text, self.text_queue[:filled]])
        same = same_person_targets(persons, torch.cat([persons, self.person_queue[:filled]]))
        temperature = self.student.temperature
        i2t, t2i = image @ text_keys.T / temperature, text @ image_keys.T / temperature
        with torch.no_grad():
            soft_i2t = F.softmax(teacher_image @ text_keys.T / temperature, dim=1)
            soft_t2i = F.softmax(teacher_text @ image_keys.T / temperature, dim=1)
        i2t_loss = soft_cross_entropy(i2t, alpha * soft_i2t + (1 - alpha) * same)
        t2i_loss = soft_cross_entropy(t2i, alpha * soft_t2i + (1 - alpha) * same)
        batch = len(persons)
        return (i2t_loss + t2i_loss) / 2, i2t[:, :batch].detach(), t2i[:, :batch].detach()

    def _itm(
        self, text_tokens: Tensor, mask: Tensor, projected: list[tuple[Tensor, Tensor]], negatives: Negatives
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy over the pairs, one hard negative image a text and one hard negative text an image."""
        pairs = torch.arange(len(mask), device=mask.device)
        has_image, has_text = negatives.image_of_text >= 0, negatives.text_of_image >= 0
        if not (has_image.any() and has_text.any()):
            return text_tokens.sum() * 0.0, text_tokens.new_zeros(())  # one identity only: no negative, no term
        texts = torch.cat([pairs, pairs[has_image], negatives.text_of_image[has_text]])
        images = torch.cat([pairs, negatives.image_of_text[has_image], pairs[has_text]])
        # index_select, not [texts]: the threads of a CPU would add up a text's gradients in any order
        used = text_tokens.index_select(0, texts)
        logits = self.student.itm(self.student.fuse(used, mask[texts], projected, images, cls_only=True))
        labels = (torch.arange(len(texts), device=mask.device) < len(pairs)).long()
        return F.cross_entropy(logits.float(), labels), (logits.argmax(1) == labels).float().mean()

    def _mlm(self, fused_SD: Tensor, labels_S: Tensor, soft_SV: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Cross-entropy with the words, and with the teacher's distribution over the vocabulary."""
        if len(labels_S) == 0:
            return fused_SD.sum() * 0.0, fused_SD.new_zeros(())
        logits = self.student.mlm(fused_SD).float()
        hard = F.cross_entropy(logits, labels_S)
        soft = soft_cross_entropy(logits, F.softmax(soft_SV.float(), dim=-1))
        return (1 - alpha) * hard + alpha * soft, (logits.argmax(1) == labels_S).float().mean()

    @torch.no_grad()
    def _enqueue(self, image: Tensor, text: Tensor, persons: Tensor) -> None:
        size = len(self.person_queue)
        if size == 0:
            return
        image, text, persons = image[-size:], text[-size:], persons[-size:]
        slots = (self.enqueued + torch.arange(len(persons), device=persons.device)) % size
        self.image_queue[slots] = image.to(self.image_queue.dtype)
        self.text_queue[slots] = text.to(self.text_queue.dtype)
        self.person_queue[slots] = persons
        self.enqueued += len(persons)


def class_attention(
    model: PersonSearchModel, ids: Tensor, mask: Tensor, masking: MaskingConfig
) -> tuple[Encoded, Tensor]:
    """Encode texts and aggregate their class attention over the layers -> (encoded, attention [B, L]).

    Only the [CLS] row of each layer is computed, but for `rollout`, which needs the whole maps.
    """
    maps = AttentionMaps(class_only=masking.aggregation != "rollout")
    text = model.encode_text(ids, mask, maps)
    layers = torch.stack([weights.mean(1) for weights in maps.text_self])
    if masking.aggregation != "rollout":
        layers = layers[:, :, 0]
    return text, aggregate(layers, masking.aggregation, masking.tau)


def fillable_ids(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """[V] bool: ids that may be filled in as a whole word; a model's vocabulary may be padded past the tokenizer's."""
    fits = torch.zeros(vocab_size, dtype=torch.bool)
    fits[: tokenizer.vocab_size] = torch.from_numpy(tokenizer.replaceable_ids)
    return fits


def same_person_targets(persons_B: Tensor, persons_K: Tensor) -> Tensor:
    """[B, K]: uniform over the keys of the same identity."""
    same = (persons_B[:, None] == persons_K[None]).float()
    return same / same.sum(1, keepdim=True)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of -sum(targets * log_softmax(logits))."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(-1).mean()


def hard_negatives(t2i_BB: Tensor, i2t_BB: Tensor, persons: Tensor, generator: torch.Generator) -> Negatives:
    """Draw with probability softmax(similarity), same-person pairs excluded (Gumbel-max, so no loop and no crash).

    A row without any other person gets -1.
    """
    same = persons[:, None] == persons[None]
    noise = torch.empty(2, *same.shape).exponential_(generator=generator).log().neg().to(persons.device)

    def draw(scores: Tensor, gumbel: Tensor) -> Tensor:
        chosen = (scores.float() + gumbel).masked_fill(same, float("-inf")).argmax(1)
        return torch.where(same.all(1), -1, chosen)

    return Negatives(draw(t2i_BB, noise[0]), draw(i2t_BB, noise[1]))


def single_piece_words(word_of_BL: Tensor) -> Tensor:
    """[B, L] bool: the token is a word of one piece, so that replacing it cannot leave half a word."""
    same = (word_of_BL[:, :, None] == word_of_BL[:, None]).sum(-1)
    return (word_of_BL >= 0) & (same == 1)


def fill_words(
    logits_SV: Tensor, fillable_V: Tensor, tem: TemConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose a word for each masked token: ids [S] and their probabilities [S], whole words only."""
    probability = F.softmax(logits_SV.float().masked_fill(~fillable_V, float("-inf")) / tem.temperature, dim=-1)
    if tem.decode == "argmax":
        best = probability.max(-1)
        return best.indices, best.values
    count = min(tem.top_k, probability.shape[-1]) if tem.decode == "top-k" else probability.shape[-1]
    top = probability.topk(count, dim=-1)
    noise = torch.empty(top.values.shape).exponential_(generator=generator).to(logits_SV.device)
    pick = (top.values / noise).argmax(-1, keepdim=True)  # the exponential race: a draw by probability
    return top.indices.gather(1, pick)[:, 0], top.values.gather(1, pick)[:, 0]
