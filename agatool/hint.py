"""Is the person in this gallery at all? A description is compared with made-up ones, which fit nobody in particular.

Shape suffixes: M made-up descriptions, N images, E shared space.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from torch import Tensor

from agatool.data.captioning import describe
from agatool.data.synthetic import VALUES, SampleSpec, people
from agatool.encoding import encode_texts
from agatool.model import PersonSearchModel
from agatool.retrieval import top_k

MADE_UP = 200  # descriptions; a share of them is good to about 3 percent
ABSENT = 0.5  # "probably not here" where at least this share of the made-up descriptions fits as well
_SEED = 20_240_229  # of the invented people; none of the sample data set's
_BATCH = 64
_ALWAYS = frozenset({"hair", "face", "top", "inner", "logo", "bottom", "shoes"})
_IF_WORN = {"hat": "hat_type", "glasses": "glasses", "scarf": "scarf_color", "bag": "bag_type",
            "umbrella": "umbrella_color", "phone": "phone"}  # fmt: skip


@cache
def made_up_descriptions(count: int = MADE_UP) -> tuple[str, ...]:
    """Descriptions of invented people in the sample data set's language, always the same."""
    invented = people(SampleSpec(train=count, val=0, test=0, seed=_SEED))
    texts = []
    for person in invented:
        worn = {part for part, attribute in _IF_WORN.items() if person.attributes[attribute] != "none"}
        rng = np.random.default_rng([_SEED, person.id])
        texts.append(describe(person.attributes, _ALWAYS | worn, "front", VALUES, 0.0, rng)[0])
    return tuple(texts)


def made_up_scores(model: PersonSearchModel, gallery: Tensor, bf16: bool = False) -> np.ndarray:
    """The best cosine of each made-up description in `gallery` [N, E], ascending: [M], or [0] for a model that
    cannot read text."""
    if model.tokenizer.is_placeholder:
        return np.empty(0)
    texts = encode_texts(model, model.tokenizer, made_up_descriptions(), _BATCH, bf16)
    return np.sort(top_k(texts.features, gallery, 1)[0][:, 0].double().numpy())


def share_as_good(made_up: np.ndarray, best: float) -> float | None:
    """Share of the made-up descriptions [M] whose best cosine is at least `best`; None without any."""
    return float(np.mean(made_up >= best)) if len(made_up) else None
