"""The numbers of the reference implementation out of this model; data/README.md says what each tensor is.

Every folder in data/ is one recording. Another one of the same kind is tested by putting it there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from agatool.config import MaskingConfig, ObjectiveConfig, TemConfig
from agatool.convert import Converted, open_reference
from agatool.data.sampling import TrainBatch
from agatool.foreign import our_name, plain_names
from agatool.masking import Masked
from agatool.model import AttentionMaps, evaluating
from agatool.objective import Draws, Negatives, Objective, Phase, StepLosses
from agatool.retrieval import OUTSIDE, ImageSet, TextSet, pack_texts, reranked, score_matrix, top_k
from agatool.tokenization import Batch

DATA = Path(__file__).parent / "data"
RECORDINGS = sorted(folder.parent.name for folder in DATA.glob("*/config.json"))
WITH_EVALUATION = sorted(file.parent.name for file in DATA.glob("*/evaluation.safetensors"))


@dataclass
class Recording:
    """One run of the reference."""

    config: dict
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]
    converted: Converted

    def numbered(self, prefix: str) -> list[Tensor]:
        """`prefix`0, `prefix`1, ..."""
        names = [name for name in self.expected if name.startswith(prefix) and name[len(prefix) :].isdigit()]
        return [self.expected[f"{prefix}{number}"] for number in range(len(names))]


def read(name: str) -> Recording:
    folder = DATA / name
    weights, inputs, expected = (
        load_file(folder / f"{part}.safetensors") for part in ("weights", "inputs", "expected")
    )
    converted = open_reference(folder / "weights.safetensors", folder / "config.json", with_teacher=True)
    return Recording(json.loads((folder / "config.json").read_text()), weights, inputs, expected, converted)


@pytest.fixture(params=RECORDINGS)
def recording(request: pytest.FixtureRequest) -> Recording:
    return read(request.param)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def test_the_recordings_are_there() -> None:
    assert {"albef_pretrain_tiny", "albef_retrieval_tiny"} <= set(RECORDINGS)
    assert WITH_EVALUATION


def test_features_logits_and_attention_maps(recording: Recording) -> None:
    model, inputs, expected = recording.converted.model, recording.inputs, recording.expected
    mask, maps = inputs["inputs/mask2"], AttentionMaps()
    with evaluating(model):
        image = model.encode_image(inputs["inputs/image1"])
        text = model.encode_text(inputs["inputs/ids2"], mask, maps)
        fused = model.fuse(text.tokens, mask, image.tokens, maps=maps)
        itm, mlm = model.itm(fused), model.mlm(fused)
    close(image.tokens, expected["features/image_embeds"])
    close(text.tokens, expected["features/text_embeds"])
    close(image.feature, expected["features/image_feat"])
    close(text.feature, expected["features/text_feat"])
    close(text.feature @ image.feature.T, expected["features/sim"])
    close(fused, expected["itm/fused"])
    close(itm, expected["itm/logits"])
    if "itm/mlm_logits" in expected:
        close(mlm, expected["itm/mlm_logits"])
    kinds = {"text_self": "text_self_attention", "fusion_self": "fusion_self_attention", "cross": "cross_attention"}
    for ours, theirs in kinds.items():
        wanted = recording.numbered(f"itm/{theirs}/")
        assert wanted
        for actual, layer in zip(getattr(maps, ours), wanted, strict=True):
            close(actual, layer)


def test_the_shortcuts_give_the_same_logits(recording: Recording) -> None:
    """What re-ranking uses: keys and values once an image, the last layer for [CLS] alone."""
    model, inputs = recording.converted.model, recording.inputs
    mask = inputs["inputs/mask2"]
    with evaluating(model):
        tokens = model.encode_text(inputs["inputs/ids2"], mask).tokens
        projected = model.project_image(model.encode_image(inputs["inputs/image1"]).tokens)
        logits = model.itm(model.fuse(tokens, mask, projected, cls_only=True))
    close(logits, recording.expected["itm/logits"])


def objective_of(recording: Recording) -> Objective:
    """The objective as the reference's step found it: its momentum copy, its queues, a plain sum of losses."""
    config, weights = recording.config, recording.weights
    model, teacher = recording.converted.model, recording.converted.teacher
    assert teacher is not None
    weight = float("losses/mlm" in recording.expected)
    settings = ObjectiveConfig(
        itc_weight=1, mlm_weight=weight, queue_size=config["queue_size"], momentum=config["momentum"]
    )
    objective = Objective(model, model.tokenizer, settings, MaskingConfig(), TemConfig())
    objective.teacher.load_state_dict(teacher)
    objective.image_queue.copy_(weights["image_queue"].T)
    objective.text_queue.copy_(weights["text_queue"].T)
    objective.person_queue.copy_(weights.get("idx_queue", torch.full((1, config["queue_size"]), -100))[0])
    objective.enqueued.fill_(config["queue_size"] + int(weights["queue_ptr"]))
    return objective


def replayed(recording: Recording, objective: Objective) -> StepLosses:
    """One step with the recorded random choices."""
    inputs, expected = recording.inputs, recording.expected
    ids, mask = inputs["inputs/ids2"], inputs["inputs/mask2"].bool()
    pairs, length = ids.shape
    # pre-training takes each pair as its own identity
    persons = inputs["inputs/idx"] if "idx_queue" in recording.weights else torch.arange(pairs)
    word_of = torch.arange(length).expand(pairs, length).where(mask, -1)
    batch = TrainBatch(inputs["inputs/image1"], Batch(ids, mask, word_of), torch.ones_like(mask), persons)
    drawn = torch.cat(recording.numbered("draws/multinomial/"))
    draws = Draws(negatives=Negatives(*drawn.chunk(2)))
    if (labels := expected.get("draws/mask/labels")) is not None:
        draws.masked = Masked(expected["draws/mask/input_ids"], labels != -100, labels, torch.tensor(0.0))
    objective.begin_step()
    phase = Phase(alpha=recording.config["alpha"], itc_only=False, tem=False)
    return objective(batch, phase, torch.Generator().manual_seed(0), draws)


def test_losses_gradients_and_queues(recording: Recording) -> None:
    objective, expected = objective_of(recording), recording.expected
    step = replayed(recording, objective)
    for ours, theirs in {"itc": "ita", "itm": "itm", "mlm": "mlm"}.items():
        if f"losses/{theirs}" in expected:
            close(step.terms[ours].detach(), expected[f"losses/{theirs}"])

    step.total.backward()
    parameters = dict(objective.student.named_parameters())
    gradients = {name.removeprefix("grads/"): grad for name, grad in expected.items() if name.startswith("grads/")}
    assert gradients
    for name, wanted in plain_names(gradients)[0].items():
        ours = our_name(name, objective.student.config.text_layers)
        assert ours is not None
        actual = parameters[ours].grad
        assert actual is not None
        close(actual, wanted, atol=1e-4)
        torch.testing.assert_close(actual, wanted, atol=1e-6, rtol=1e-3)  # many gradients are below 1e-4

    close(objective.image_queue.T, expected["queues_after/image_queue"])
    close(objective.text_queue.T, expected["queues_after/text_queue"])
    size = len(objective.person_queue)
    assert int(objective.enqueued) % size == int(expected["queues_after/queue_ptr"])
    if "queues_after/idx_queue" in expected:
        assert torch.equal(objective.person_queue, expected["queues_after/idx_queue"][0])


@pytest.mark.parametrize("name", WITH_EVALUATION)
def test_evaluation_scores_and_ranking(name: str) -> None:
    evaluation = load_file(DATA / name / "evaluation.safetensors")
    model = read(name).converted.model
    with evaluating(model):
        image = model.encode_image(evaluation["eval/images"])
        text = model.encode_text(evaluation["eval/ids"], evaluation["eval/mask"])
    images: ImageSet = ImageSet(image.feature, image.tokens)
    texts: TextSet = pack_texts(text, evaluation["eval/mask"])
    for direction, sides in {"t2i": (text.feature, image.feature), "i2t": (image.feature, text.feature)}.items():
        wanted = evaluation[f"eval/score_{direction}"]
        k = int((wanted[0] != OUTSIDE).sum())
        scores = score_matrix(model, texts, images, direction, k, batch_size=4)
        close(scores, wanted, atol=1e-4)
        candidates = top_k(*sides, k)[1]
        order = (sides[0] @ sides[1].T).argsort(dim=1, descending=True, stable=True)
        ranking = reranked(order, candidates, scores.gather(1, candidates), tail="reference")
        assert torch.equal(ranking, wanted.argsort(dim=1, descending=True, stable=True))
