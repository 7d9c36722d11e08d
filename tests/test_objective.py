"""The objective against brute force: targets, queues, negatives, losses, TEM, teacher, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agatool.config import MaskingConfig, ModelConfig, ObjectiveConfig, RunConfig, TemConfig
from agatool.data.prepare import Prepared
from agatool.data.sampling import TrainBatch
from agatool.errors import UsageError
from agatool.masking import Masked, mask_words
from agatool.model import PersonSearchModel
from agatool.objective import (
    NO_PERSON,
    Draws,
    Negatives,
    Objective,
    Phase,
    class_attention,
    fill_words,
    hard_negatives,
    same_person_targets,
    single_piece_words,
    soft_cross_entropy,
)
from agatool.tokenization import Tokenizer, load_tokenizer, train_tokenizer
from agatool.train import open_run

CAPTIONS = (
    "A man in a red jacket, black trousers and white sneakers.",
    "The woman wears a blue dress and carries a yellow handbag.",
    "A tall man with short brown hair is holding a phone.",
    "She walks away in a green coat; her hair is tied in a ponytail.",
    "A girl with a backpack.",
    "This person has a striped shirt under an unbuttoned overcoat.",
)
PERSONS = (0, 0, 1, 2, 2, 3)
FULL = Phase(alpha=0.3, itc_only=False, tem=False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """So small a vocabulary that some words fall to pieces."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([*CAPTIONS, "a man in a red jacket and a blue dress", "her hair is short"], path, 120)
    return load_tokenizer(path, ModelConfig().text)


def make_objective(tokenizer: Tokenizer, queue: int = 8, **sections: dict) -> Objective:
    torch.manual_seed(0)
    student = PersonSearchModel(
        ModelConfig(
            image_size=(64, 32), image_width=16, image_depth=1, image_heads=2, stem="conv", text_width=16,
            text_heads=2, text_mlp=32, text_layers=2, fusion_layers=2, embed_dim=8, dropout=0.0,
            vocab_size=tokenizer.vocab_size + 3,
        )
    )  # fmt: skip
    torch.nn.init.normal_(student.word_embeddings.weight, std=0.5)
    objective = Objective(
        student,
        tokenizer,
        ObjectiveConfig(**{"queue_size": queue, **sections.get("objective", {})}),
        MaskingConfig(**{"strategy": "attention", "ratio": 0.4, **sections.get("masking", {})}),
        TemConfig(**{"enabled": True, "probability": 1.0, **sections.get("tem", {})}),
    )
    with torch.no_grad():  # a teacher that is somebody else
        for parameter in objective.teacher.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return objective.train()


def make_batch(tokenizer: Tokenizer, persons: tuple[int, ...] = PERSONS) -> TrainBatch:
    captions = [CAPTIONS[n % len(CAPTIONS)] for n in range(len(persons))]
    encodings = tokenizer.encode(captions)
    images = torch.randn(len(persons), 3, 64, 32, generator=seeded(5))
    content = tokenizer.content_mask(captions, encodings)
    return TrainBatch(images, tokenizer.pad(encodings), content, torch.tensor(persons))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masked_by(objective: Objective, batch: TrainBatch, seed: int = 0) -> Masked:
    attention = class_attention(objective.teacher, batch.text.ids, batch.text.mask, objective.masking)[1]
    return mask_words(
        batch.text, objective.vocabulary, objective.masking, generator=seeded(seed), class_attention=attention
    )


# --- ITC ----------------------------------------------------------------------------------------------------


def unit(rows: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, 8, generator=seeded(seed)), dim=1)


def itc_by_loops(
    queries: Tensor, teachers: Tensor, keys: Tensor, persons: list[int], key_persons: list[int], alpha: float, t: float
) -> float:
    """-sum over keys of target * log p, target = (1 - alpha) / same persons + alpha * the teacher's softmax."""
    losses = []
    for query, teacher, person in zip(queries.tolist(), teachers.tolist(), persons, strict=True):
        student = [math.exp(sum(a * b for a, b in zip(query, key, strict=True)) / t) for key in keys.tolist()]
        soft = [math.exp(sum(a * b for a, b in zip(teacher, key, strict=True)) / t) for key in keys.tolist()]
        same = key_persons.count(person)
        loss = 0.0
        for mine, theirs, key_person in zip(student, soft, key_persons, strict=True):
            target = (1 - alpha) * (key_person == person) / same + alpha * theirs / sum(soft)
            loss -= target * math.log(mine / sum(student))
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("filled", [0, 3, 8])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_itc_over_batch_and_queue_against_loops(tokenizer: Tokenizer, filled: int, alpha: float) -> None:
    objective = make_objective(tokenizer)
    image, text, old_image, old_text = (unit(6, seed) for seed in range(4))
    queued = [2, 7, 0, 0, 9, 3, 2, 1][:filled]  # some of the batch's persons among them
    queue_image, queue_text = unit(8, 10), unit(8, 11)
    with torch.no_grad():
        objective.image_queue[:filled], objective.text_queue[:filled] = queue_image[:filled], queue_text[:filled]
        # what lies in empty slots must not matter
        objective.image_queue[filled:] = objective.text_queue[filled:] = 1e3
        objective.person_queue[:filled] = torch.tensor(queued, dtype=torch.long)
        objective.enqueued.fill_(filled)
        objective.student.temperature.fill_(0.2)
    loss, i2t, t2i = objective._itc(image, text, old_image, old_text, torch.tensor(PERSONS), alpha)
    persons, key_persons = list(PERSONS), [*PERSONS, *queued]
    text_keys, image_keys = torch.cat([old_text, queue_text[:filled]]), torch.cat([old_image, queue_image[:filled]])
    expected = 0.5 * (
        itc_by_loops(image, old_image, text_keys, persons, key_persons, alpha, 0.2)
        + itc_by_loops(text, old_text, image_keys, persons, key_persons, alpha, 0.2)
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(i2t, image @ old_text.T / 0.2, atol=1e-5)
    assert torch.allclose(t2i, text @ old_image.T / 0.2, atol=1e-5)


def test_targets_share_one_among_the_same_person() -> None:
    targets = same_person_targets(torch.tensor([1, 2]), torch.tensor([1, 2, 1, NO_PERSON]))
    assert targets.tolist() == [[0.5, 0, 0.5, 0], [0, 1, 0, 0]]


def test_the_queue_holds_the_newest(tokenizer: Tokenizer) -> None:
    objective = make_objective(tokenizer, queue=4)
    features = unit(9, 0)
    for start in (0, 3, 6):
        part = features[start : start + 3]
        objective._enqueue(part, -part, torch.arange(start, start + 3))
        held = objective.person_queue.tolist()
        newest = list(range(max(0, start - 1), start + 3))
        assert sorted(person for person in held if person != NO_PERSON) == newest
        for slot, person in enumerate(held):
            if person != NO_PERSON:
                assert torch.equal(objective.image_queue[slot], features[person])
                assert torch.equal(objective.text_queue[slot], -features[person])
    objective._enqueue(features, features, torch.arange(100, 109))  # a batch larger than the queue
    assert sorted(objective.person_queue.tolist()) == [105, 106, 107, 108]


def test_no_queue(tokenizer: Tokenizer) -> None:
    objective = make_objective(tokenizer, queue=0)
    for seed in range(2):
        assert torch.isfinite(objective(make_batch(tokenizer), FULL, seeded(seed)).total)


def test_itc_only_is_the_plain_contrast(tokenizer: Tokenizer) -> None:
    objective = make_objective(tokenizer)
    batch = make_batch(tokenizer)
    losses = objective(batch, Phase(0.4, itc_only=True, tem=True), seeded())
    with torch.no_grad():
        image = objective.student.encode_image(batch.images).feature
        text = objective.student.encode_text(batch.text.ids, batch.text.mask).feature
    persons, t = list(PERSONS), objective.student.temperature.item()
    both = [itc_by_loops(a, a, b, persons, persons, 0.0, t) for a, b in ((image, text), (text, image))]
    assert losses.terms["itc"].item() == pytest.approx(sum(both) / 2, rel=1e-4)
    assert set(losses.terms) == {"itc"}
    assert int(objective.enqueued) == 0


@pytest.mark.parametrize("itc_only", [True, False])
def test_half_size_is_the_mean_of_two_by_two_pixels(tokenizer: Tokenizer, itc_only: bool) -> None:
    batch = make_batch(tokenizer)
    small = replace(batch, images=batch.images.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)))
    expected = make_objective(tokenizer)(small, Phase(0.3, itc_only, tem=False), seeded())
    found = make_objective(tokenizer)(batch, Phase(0.3, itc_only, tem=False, half_size=True), seeded())
    torch.testing.assert_close(found.terms, expected.terms)


# --- ITM ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_a_negative_is_never_the_same_person(persons: list[int], seed: int) -> None:
    ids = torch.tensor(persons)
    scores = 50 * torch.randn(2, len(persons), len(persons), generator=seeded(seed))
    negatives = hard_negatives(scores[0], scores[1], ids, seeded(seed))
    for chosen in (negatives.image_of_text, negatives.text_of_image):
        for row, other in enumerate(chosen.tolist()):
            if other == -1:
                assert set(persons) == {persons[row]}
            else:
                assert persons[other] != persons[row]


def test_negatives_are_drawn_by_similarity() -> None:
    rows = 20_000
    persons = torch.tensor([0, 1, 2, 3, 0])
    scores = torch.tensor([[5.0, 0.0, 1.0, 2.0, 5.0]]).expand(5, -1)
    counts = torch.zeros(5)
    generator = seeded(1)
    for _ in range(rows // 5):
        counts[hard_negatives(scores, scores, persons, generator).image_of_text[0]] += 1
    expected = torch.tensor([0.0, 1.0, math.e, math.e**2, 0.0])
    expected /= expected.sum()
    assert (counts / counts.sum() - expected).abs().max() < 0.03


@pytest.mark.parametrize("without", [(), (2,), (0, 5)])
def test_itm_against_pair_by_pair(tokenizer: Tokenizer, without: tuple[int, ...]) -> None:
    objective = make_objective(tokenizer)
    batch, student = make_batch(tokenizer), objective.student
    images = torch.tensor([2, 3, 0, 1, 5, 4])
    texts = torch.tensor([5, 4, 3, 2, 1, 0])
    images[list(without)] = texts[list(without)] = -1
    with torch.no_grad():
        tokens = student.encode_text(batch.text.ids, batch.text.mask).tokens
        seen = student.encode_image(batch.images).tokens
        pairs = [(row, row, 1) for row in range(6)]
        pairs += [(row, image, 0) for row, image in enumerate(images.tolist()) if image >= 0]
        pairs += [(text, row, 0) for row, text in enumerate(texts.tolist()) if text >= 0]
        losses, right = [], 0
        for text, image, label in pairs:
            fused = student.fuse(tokens[text : text + 1], batch.text.mask[text : text + 1], seen[image : image + 1])
            logits = student.itm(fused)[0]
            losses.append(-logits.log_softmax(0)[label].item())
            right += int(logits.argmax()) == label
        loss, accuracy = objective._itm(tokens, batch.text.mask, student.project_image(seen), Negatives(images, texts))
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert accuracy.item() == pytest.approx(right / len(pairs))


@pytest.mark.parametrize("persons", [(7, 7, 7), (7,)])
def test_a_batch_of_one_person_trains(tokenizer: Tokenizer, persons: tuple[int, ...]) -> None:
    objective = make_objective(tokenizer)
    losses = objective(make_batch(tokenizer, persons), FULL, seeded())
    assert losses.terms["itm"].item() == 0
    losses.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in objective.student.parameters() if p.grad is not None)


# --- MLM ----------------------------------------------------------------------------------------------------


def test_mlm_distils_over_the_vocabulary(tokenizer: Tokenizer) -> None:
    objective = make_objective(tokenizer)
    vocabulary = objective.student.config.vocab_size
    fused, teacher = torch.randn(5, 16, generator=seeded(1)), torch.randn(5, vocabulary, generator=seeded(2))
    labels = torch.tensor([6, 9, 6, 20, 31])
    loss, accuracy = objective._mlm(fused, labels, teacher, 0.3)
    student = objective.student.mlm(fused).double().exp()
    total, right = 0.0, 0
    for row in range(5):
        p, q = (student[row] / student[row].sum()).tolist(), teacher[row].double().exp()
        q = (q / q.sum()).tolist()
        hard = -math.log(p[labels[row]])
        soft = -sum(b * math.log(a) for a, b in zip(p, q, strict=True))
        total += 0.7 * hard + 0.3 * soft
        right += max(range(vocabulary), key=p.__getitem__) == labels[row]
    assert loss.item() == pytest.approx(total / 5, rel=1e-5)
    assert accuracy.item() == pytest.approx(right / 5)


def test_soft_cross_entropy_of_one_hot_is_the_hard_one() -> None:
    logits, labels = torch.randn(4, 7, generator=seeded()), torch.tensor([0, 6, 3, 3])
    one_hot = torch.nn.functional.one_hot(labels, 7).float()
    assert torch.allclose(soft_cross_entropy(logits, one_hot), torch.nn.functional.cross_entropy(logits, labels))


def test_nothing_masked_gives_no_mlm_loss(tokenizer: Tokenizer) -> None:
    objective = make_objective(tokenizer)
    loss, _ = objective._mlm(torch.zeros(0, 16), torch.zeros(0, dtype=torch.long), torch.zeros(0, 9), 0.3)
    assert loss.item() == 0


# --- TEM ----------------------------------------------------------------------------------------------------


@given(
    decode=st.sampled_from(["argmax", "top-k", "sample"]),
    top_k=st.integers(1, 200),
    temperature=st.floats(0.05, 20),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_only_whole_words_are_filled_in(
    tokenizer: Tokenizer, decode: str, top_k: int, temperature: float, seed: int
) -> None:
    config = TemConfig.model_validate({"decode": decode, "top_k": top_k, "temperature": temperature})
    fillable = make_fillable(tokenizer)
    logits = 5 * torch.randn(40, len(fillable), generator=seeded(seed))
    logits[:, ~fillable] += 100  # the model is sure of what must not be filled in
    words, probability = fill_words(logits, fillable, config, seeded(seed))
    assert fillable[words].all()
    for token in words.tolist():
        piece = tokenizer.piece(token)
        assert token not in tokenizer.special_ids
        assert not piece.startswith("##")
        assert any(character.isalpha() for character in piece)
    allowed = (logits.masked_fill(~fillable, -math.inf) / temperature).softmax(-1)
    assert torch.allclose(probability, allowed.gather(1, words[:, None])[:, 0])
    rank = (allowed > probability[:, None]).sum(1)
    limit = {"argmax": 1, "top-k": top_k, "sample": len(fillable)}[decode]
    assert (rank < limit).all()


def make_fillable(tokenizer: Tokenizer) -> Tensor:
    """A vocabulary padded by three ids that no word has."""
    return torch.cat([torch.from_numpy(tokenizer.replaceable_ids), torch.zeros(3, dtype=torch.bool)])


def test_sampling_follows_the_probabilities(tokenizer: Tokenizer) -> None:
    fillable = torch.ones(4, dtype=torch.bool)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, -1)
    for config, expected in (
        (TemConfig(decode="sample"), [0.5, 0.3, 0.15, 0.05]),
        (TemConfig(decode="top-k", top_k=2), [0.625, 0.375, 0, 0]),
    ):
        share = fill_words(logits, fillable, config, seeded())[0].bincount(minlength=4) / 20_000
        assert torch.allclose(share, torch.tensor(expected), atol=0.015)


def test_enrichment_touches_masked_whole_words_alone(tokenizer: Tokenizer) -> None:
    objective = make_objective(tokenizer)
    batch = make_batch(tokenizer)
    whole = single_piece_words(batch.text.word_of)
    assert (~whole & (batch.text.word_of >= 0)).any()  # some words have several pieces
    changed = torch.zeros_like(whole)
    for seed in range(5):
        masked = masked_by(objective, batch, seed)
        logits = 5 * torch.randn(int(masked.chosen.sum()), len(objective.fillable), generator=seeded(seed))
        ids, report = objective._enrich(batch, masked, logits, seeded(seed))
        differs = ids != batch.text.ids
        assert not (differs & ~(masked.chosen & whole)).any()
        assert objective.fillable[ids[differs]].all()
        changed |= differs
        words = (batch.text.word_of >= 0).sum()
        assert report["tem_replaced"] == pytest.approx((masked.chosen & whole).sum() / words)
        assert 0 < report["tem_probability"] <= 1
    assert changed.any()


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_a_share_of_the_captions_is_enriched(tokenizer: Tokenizer, probability: float) -> None:
    objective = make_objective(tokenizer, tem={"probability": probability})
    batch = make_batch(tokenizer)
    enriched = 0
    for seed in range(60):
        masked = masked_by(objective, batch, seed)
        logits = torch.zeros(int(masked.chosen.sum()), len(objective.fillable))
        logits[:, objective.fillable.nonzero()[-1]] = 100.0  # a word of no caption
        ids, _ = objective._enrich(batch, masked, logits, seeded(seed))
        enriched += int((ids != batch.text.ids).any(1).sum())
    able = 60 * 6
    assert enriched <= able * (probability + 0.15)
    assert enriched >= able * (probability - 0.3)


def test_tem_leaves_the_targets_of_mlm_alone(tokenizer: Tokenizer) -> None:
    """With the same masks and negatives, TEM changes what ITC and ITM read, and nothing about MLM."""
    batch = make_batch(tokenizer)
    found = {}
    for tem in (False, True):
        objective = make_objective(tokenizer)
        negatives = Negatives(torch.tensor([2, 3, 0, 1, 5, 4]), torch.tensor([2, 3, 0, 1, 5, 4]))
        draws = Draws(masked_by(objective, batch), negatives)
        found[tem] = objective(batch, Phase(0.3, itc_only=False, tem=tem), seeded(), draws).terms
    assert found[True]["mlm"].item() == pytest.approx(found[False]["mlm"].item(), rel=1e-6)
    assert found[True]["itc"].item() != pytest.approx(found[False]["itc"].item(), rel=1e-6)
    assert found[True]["itm"].item() != pytest.approx(found[False]["itm"].item(), rel=1e-6)


# --- teacher, whole step, schedules -------------------------------------------------------------------------


def test_the_teacher_is_a_moving_average(tokenizer: Tokenizer) -> None:
    objective = make_objective(tokenizer, objective={"momentum": 0.9})
    teacher = [p.clone() for p in objective.teacher.parameters()]
    with torch.no_grad():
        objective.student.temperature.fill_(3.0)
    for buffer in objective.student.buffers():
        buffer.add_(1)
    objective.begin_step()
    assert objective.student.temperature.item() == pytest.approx(0.5)
    for old, new, student in zip(teacher, objective.teacher.parameters(), objective.student.parameters(), strict=True):
        assert torch.allclose(new, 0.9 * old + 0.1 * student, atol=1e-6)
    for mine, theirs in zip(objective.teacher.buffers(), objective.student.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_step_reaches_the_student_alone(tokenizer: Tokenizer) -> None:
    objective = make_objective(tokenizer)
    before = {name: p.clone() for name, p in objective.teacher.named_parameters()}
    losses = objective(make_batch(tokenizer), Phase(0.3, itc_only=False, tem=True), seeded())
    losses.total.backward()
    weights = {"itc": 0.5, "itm": 1.0, "mlm": 1.0}
    expected = sum(weights[name] * term.item() for name, term in losses.terms.items())
    assert losses.total.item() == pytest.approx(expected, rel=1e-5)
    assert not objective.teacher.training
    for name, parameter in objective.teacher.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    without = [name for name, p in objective.student.named_parameters() if p.grad is None]
    assert without == []
    assert int(objective.enqueued) == len(PERSONS)


def test_the_same_seed_gives_the_same_step(tokenizer: Tokenizer) -> None:
    batch, phase = make_batch(tokenizer), Phase(0.3, itc_only=False, tem=True)
    first, second, other = (make_objective(tokenizer)(batch, phase, seeded(seed)).total for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_two_threads_give_the_same_bytes_each_time(tokenizer: Tokenizer) -> None:
    """Texts are used several times by ITM; adding up their gradients must not depend on which thread comes first."""
    objective, batch = make_objective(tokenizer), make_batch(tokenizer, tuple(range(96)))
    torch.set_num_threads(2)
    try:
        found = []
        for _ in range(10):
            objective.zero_grad()
            objective(batch, FULL, seeded()).total.backward()
            found.append(objective.student.word_embeddings.weight.grad.clone())
            objective.enqueued.zero_()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(gradient, found[0]) for gradient in found)


def test_schedules(sample: Prepared, tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """alpha rises over `alpha_ramp_epochs`, ITC stands alone at first, TEM begins after its warm-up."""
    config = tiny_config(
        "train.epochs=5", "objective.alpha=0.4", "objective.alpha_ramp_epochs=2", "objective.itc_only=0.3",
        "tem.warmup=0.5", "data.half_size=0.4",
    )  # fmt: skip
    trainer = open_run(config, sample, tmp_path / "run", False)
    steps, total = trainer.steps_per_epoch, trainer.total_steps
    assert total == 5 * steps
    for step in range(total):
        phase = trainer.phase(step)
        assert phase.alpha == pytest.approx(0.4 * min(1, step / (2 * steps)))
        assert phase.itc_only == (step < 0.3 * total)
        assert phase.tem == (step >= 0.5 * total)
        assert phase.half_size == (step < 0.4 * total)


@pytest.mark.parametrize("k", [1, 2.5])
def test_learning_rate_warms_up_and_decays(
    sample: Prepared, tiny_config: Callable[..., RunConfig], tmp_path: Path, k: float
) -> None:
    """Cosine over the steps, its argument to the power k (Zhang & Li 2020, "k-decay")."""
    config = tiny_config(
        "train.max_steps=20", "train.warmup=0.1", "train.head_lr=1.0", "train.min_lr=0.1", f"train.k_decay={k}"
    )
    trainer = open_run(config, sample, tmp_path / "run", False)
    rates = []
    for step in range(20):
        trainer.schedule.step_update(step)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[:2] == pytest.approx([0.1, 0.55])
    expected = [0.1 + 0.45 * (1 + math.cos(math.pi * (step / 20) ** k)) for step in range(2, 20)]
    assert rates[2:] == pytest.approx(expected)


def test_images_that_cannot_be_halved_are_refused(
    sample: Prepared, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = tiny_config("data.half_size=0.5", "model.image_size=[48, 16]", "model.patch=16")
    with pytest.raises(UsageError, match="half of 48 x 16"):
        open_run(config, sample, tmp_path / "run", False)
