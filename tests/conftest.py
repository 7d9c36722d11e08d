"""Shared by the tests: one thread, one small prepared sample, and one short run on it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from agatool import console
from agatool.config import RunConfig, plan_run
from agatool.data.prepare import Prepared, prepare_sample
from agatool.data.synthetic import SampleSpec, write_sample
from agatool.train import Trainer, run, train_model

torch.set_num_threads(1)  # same bytes need the same number of threads
settings.register_profile("agatool", deadline=None)  # a busy machine is no failure
settings.load_profile("agatool")

SPEC = SampleSpec(train=16, val=4, test=4, images=2, captions=2, height=64, width=32)
STEPS, STEPS_PER_EPOCH = 8, 4
# The tiny preset cut down to milliseconds a step: 64 pairs, two epochs, checkpoints after steps 3, 4, 6 and 8.
TINY = (
    "model.image_size=[32,16]", "model.image_width=24", "model.image_depth=1", "model.text_width=24",
    "model.text_mlp=24", "model.text_layers=1", "model.fusion_layers=1", "model.embed_dim=16", "model.dropout=0.1",
    "objective.queue_size=24", "objective.itc_only=0.25", "tem.warmup=0.3", "train.batch_size=16", "train.epochs=2",
    "train.checkpoint_every=3", "train.warmup=0.1", "train.lr=0.003", "train.head_lr=0.003", "eval.rerank=4",
    "eval.bootstrap=20", "eval.every=1",
)  # fmt: skip
# What of a run is the same bytes for the same seed, interrupted or not; the last two come from evaluating it.
TRAINED = (
    "best/*", "last/*", f"checkpoints/step-{STEPS}/*", "train_log.csv", "validation.csv", "config.toml",
    "tokenizer.json",
)  # fmt: skip
EVALUATED = ("metrics.csv", "queries.csv")


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The sample data set: 16 train, 4 val and 4 test persons, 2 images each, 2 captions an image. Read only."""
    folder = tmp_path_factory.mktemp("sample") / "data"
    write_sample(folder / "raw", SPEC, workers=1)
    return prepare_sample(folder, SPEC)


@pytest.fixture(scope="session")
def tiny_config(sample: Prepared) -> Callable[..., RunConfig]:
    """`tiny_config("train.lr=1")` is the configuration of a short run on `sample`."""

    def build(*overrides: str) -> RunConfig:
        given = {"data.dir": str(sample.folder), "train.init": "scratch"}
        return plan_run(given, overrides=[*TINY, *overrides])

    return build


@pytest.fixture(scope="session")
def tiny_run(sample: Prepared, tiny_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run(tiny_config(), sample, folder)
    return folder


def resume(folder: Path, sample: Prepared) -> Trainer:
    """What `aga train --resume` does, without the evaluation."""
    return train_model(plan_run({}, stored=folder / "config.toml"), sample, folder, resume=True)


def contents(folder: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """Relative path -> bytes of the files that match."""
    files = [file for pattern in patterns for file in folder.glob(pattern) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def assert_same_run(folder: Path, reference: Path, evaluated: bool = False) -> None:
    """The two run folders hold the same bytes; names the files that differ."""
    patterns = TRAINED + EVALUATED if evaluated else TRAINED
    ours, theirs = contents(folder, patterns), contents(reference, patterns)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert len(ours) == 15 + 2 * evaluated


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """`at_step(5, action)` has `action` happen once, right after the next training step 5."""
    original = Trainer.run_step

    def plan(step: int, action: Callable[[], Any]) -> None:
        def run_step(self: Trainer) -> dict[str, Any]:
            row = original(self)
            if self.step == step:
                monkeypatch.setattr(Trainer, "run_step", original)
                action()
            return row

        monkeypatch.setattr(Trainer, "run_step", run_step)

    return plan


def press(number: signal.Signals) -> Callable[[], None]:
    """An action for `at_step`: this process gets a signal."""
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _talkative() -> None:
    """What a `-q` of an earlier test left behind ends here."""
    console.configure()
