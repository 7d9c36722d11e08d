"""Training: resuming gives the same bytes, stopping saves, NaN stops before the update, odd data does not crash."""

from __future__ import annotations

import csv
import json
import math
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from agatool.checkpoint import checkpoints
from agatool.config import RunConfig, plan_run
from agatool.data.prepare import Prepared
from agatool.errors import CheckpointError, DataError, DiskError, NonFiniteError, StoppedError, UsageError
from agatool.machine import pick_device
from agatool.train import LOG_COLUMNS, RunLog, open_run, parameter_groups, run, train_model
from tests.conftest import STEPS, STEPS_PER_EPOCH, assert_same_run, contents, press, resume

Config = Callable[..., RunConfig]
AtStep = Callable[[int, Callable[[], Any]], None]


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def steps(config: RunConfig, sample: Prepared, count: int) -> list[dict[str, Any]]:
    """The log rows of the first steps; nothing is written."""
    trainer = open_run(config, sample, Path("/nowhere"), resume=False)
    trainer.start_batches(range(count * config.train.accumulate))
    return [trainer.run_step() for _ in range(count)]


# --- a run from start to end ---


def test_what_a_run_leaves(tiny_run: Path) -> None:
    names = {path.name for path in tiny_run.iterdir()}
    expected = {"best", "last", "checkpoints", "config.toml", "tokenizer.json", "train_log.csv", "validation.csv"}
    assert expected | {"curves.png", "metrics.csv", "queries.csv", "report.html"} <= names
    assert not [name for name in names if name.startswith(".")]
    steps = [path.name for path in checkpoints(tiny_run / "checkpoints")]
    assert steps == ["step-6", f"step-{STEPS}"]  # the newest two of 3, 4, 6, 8
    metrics = pd.read_csv(tiny_run / "metrics.csv")
    assert list(metrics.columns) == ["direction", "stage", "metric", "value", "low", "high"]
    assert len(metrics) == 2 * 2 * 5
    assert metrics["value"].between(0, 100).all()
    assert (metrics["low"] <= metrics["high"]).all()


def test_the_log(tiny_run: Path) -> None:
    log = pd.read_csv(tiny_run / "train_log.csv")
    assert tuple(log.columns) == LOG_COLUMNS
    assert log["step"].tolist() == list(range(1, STEPS + 1))
    assert log["epoch"].tolist() == [0] * STEPS_PER_EPOCH + [1] * STEPS_PER_EPOCH
    assert log[["loss", "itc", "lr", "gradient_norm", "temperature"]].notna().all(axis=None)
    assert log["itm"].isna().tolist() == [True] * 2 + [False] * 6  # objective.itc_only is a quarter
    assert log["tem_replaced"].notna().sum() == 5  # tem.warmup is 0.3
    lr = log["lr"].tolist()
    assert max(lr) == pytest.approx(0.003, rel=0.1)
    assert lr[-1] < lr[-2] < lr[-3]  # cosine
    validation = pd.read_csv(tiny_run / "validation.csv")
    assert validation["step"].tolist() == [4, 4, 8, 8]
    assert validation["stage"].tolist() == ["cosine", "reranked"] * 2


def test_best_is_the_best_on_val(sample: Prepared, tiny_config: Config, tmp_path: Path) -> None:
    """Validation after every step: best/ is the first of those with the highest R@1, then mAP."""
    seen: dict[int, bytes] = {}
    config = tiny_config("train.batch_size=64", "train.epochs=6", "train.keep=9", "train.lr=0.03", "train.head_lr=0.03")
    train_model(config, sample, tmp_path / "run")
    for folder in checkpoints(tmp_path / "run" / "checkpoints"):
        seen[int(folder.name[5:])] = (folder / "model.safetensors").read_bytes()
    final = [row for row in rows(tmp_path / "run" / "validation.csv") if row["stage"] == "reranked"]
    assert len(final) == len(seen) == 6
    scores = {int(row["step"]): (float(row["R@1"]), float(row["mAP"])) for row in final}
    winner = max(scores, key=lambda step: (scores[step], -step))
    best = load_file(tmp_path / "run" / "best" / "model.safetensors")
    chosen = load_file(tmp_path / "run" / "checkpoints" / f"step-{winner}" / "model.safetensors")
    assert all(torch.equal(best[name], chosen[name]) for name in best)
    assert len(set(scores.values())) > 1, "the run is too dull to tell"


def test_the_same_seed_gives_the_same_bytes(
    sample: Prepared, tiny_config: Config, tiny_run: Path, tmp_path: Path
) -> None:
    torch.manual_seed(99)  # whatever was drawn before
    run(tiny_config(), sample, tmp_path / "again")
    assert_same_run(tmp_path / "again", tiny_run, evaluated=True)
    other = steps(tiny_config("train.seed=1"), sample, 1)[0]
    assert f"{other['loss']:.6g}" != rows(tiny_run / "train_log.csv")[0]["loss"]


def test_a_run_can_be_given_again_by_its_own_configuration(tiny_run: Path, tiny_config: Config) -> None:
    config = plan_run({}, tiny_run / "config.toml")
    assert config.model_copy(update={"model": None}) == tiny_config().model_copy(update={"model": None})
    assert config.model.vocab_size < 1000  # that of the data's vocabulary


# --- stopping and resuming ---


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([1], id="before any checkpoint was due"),
        pytest.param([6], id="in the middle of an epoch"),
        pytest.param([4], id="at an epoch's end, before validation"),
        pytest.param([8], id="after the last step, before validation"),
        pytest.param([2, 3, 7], id="again and again"),
    ],
)
def test_resuming_gives_the_same_bytes(
    sample: Prepared, tiny_config: Config, tiny_run: Path, tmp_path: Path, at_step: AtStep, steps: list[int]
) -> None:
    folder = tmp_path / "run"
    for number, step in enumerate(steps):
        at_step(step, press(signal.SIGINT))
        with pytest.raises(StoppedError, match=f"after step {step} of 8; everything is saved") as caught:
            resume(folder, sample) if number else train_model(tiny_config(), sample, folder)
        assert caught.value.exit_code == 130
        assert caught.value.hint == f"Continue with: aga train --resume --out {folder}"
        assert (folder / "last" / "model.safetensors").is_file()
        assert len(rows(folder / "train_log.csv")) == step
    resume(folder, sample)
    assert_same_run(folder, tiny_run)


def test_resuming_with_accumulation_and_threads(
    sample: Prepared, tiny_config: Config, tmp_path: Path, at_step: AtStep
) -> None:
    config = tiny_config("train.accumulate=2", "train.batch_size=8", "data.workers=2", "data.erase=0.5", "eval.every=2")
    train_model(config, sample, tmp_path / "whole")
    at_step(5, press(signal.SIGTERM))
    with pytest.raises(StoppedError) as caught:
        train_model(config, sample, tmp_path / "parts")
    assert caught.value.exit_code == 143
    resume(tmp_path / "parts", sample)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "parts" / "validation.csv")] == ["8", "8"]


def test_resuming_a_finished_run_changes_nothing(
    sample: Prepared, tiny_config: Config, tiny_run: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    resume(folder, sample)
    assert_same_run(folder, tiny_run)


def test_a_log_that_a_kill_cut_off(sample: Prepared, tiny_run: Path, tmp_path: Path) -> None:
    """Half a row, and rows after the last checkpoint, are written anew."""
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints" / "step-8")
    with (folder / "train_log.csv").open("ab") as log, (folder / "validation.csv").open("ab") as validation:
        log.write(b"9,2,0.00")
        validation.write(b"9")
    resume(folder, sample)
    assert_same_run(folder, tiny_run)


@pytest.mark.parametrize("tail", [b"7,1,0.00", b"7", b"\n\n", b"4" * 5000 + b"\n", b"\0" * 512, "²,1,1\n".encode()])
def test_broken_rows_are_dropped(tmp_path: Path, tail: bytes) -> None:
    log = RunLog(tmp_path / "log.csv", ("step", "loss", "note"))
    log.start(0)
    for step in range(1, 8):
        log.add({"step": step, "loss": step / 3})
    log.flush()
    whole = (tmp_path / "log.csv").read_bytes()
    assert whole.startswith(b"step,loss,note\n1,0.333333,\n2,0.666667,\n")
    with (tmp_path / "log.csv").open("ab") as file:
        file.write(tail)
    log.start(5)
    assert (tmp_path / "log.csv").read_bytes() == b"".join(whole.splitlines(keepends=True)[:6])
    log.start(0)
    assert log.read() == []


def test_what_kills_leave_behind(sample: Prepared, tiny_config: Config, tiny_run: Path, tmp_path: Path) -> None:
    """The states between two renames and two files, put together by hand; tests/crash kills for real."""
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints" / "step-8")
    (folder / "checkpoints" / "step-4").mkdir()  # half pruned
    (folder / "checkpoints" / ".step-8.agatool-abcd1234").mkdir()  # half written
    (folder / "best").rename(folder / ".best.agatool-old")  # between the two renames
    shutil.copytree(folder / "last", folder / ".last.agatool-old")  # before the old one went
    (folder / "metrics.csv").unlink()
    resume(folder, sample)
    assert_same_run(folder, tiny_run)
    left = [str(path.relative_to(folder)) for path in folder.rglob("*agatool-*")]
    assert left == []
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-6", "step-8"]


def test_resuming_needs_neither_the_starting_weights_nor_a_checkpoint(
    sample: Prepared, tiny_config: Config, tiny_run: Path, tmp_path: Path, at_step: AtStep
) -> None:
    start = Path(shutil.copytree(tiny_run / "best", tmp_path / "start"))
    config = tiny_config(f"train.init={start}", "train.max_steps=3")
    train_model(config, sample, tmp_path / "whole")
    at_step(2, press(signal.SIGINT))
    with pytest.raises(StoppedError):
        train_model(config, sample, tmp_path / "run")
    shutil.rmtree(start)
    resume(tmp_path / "run", sample)
    names = ("train_log.csv", "best/*", "last/*")
    assert contents(tmp_path / "run", names) == contents(tmp_path / "whole", names)
    # Killed before the first checkpoint: from the beginning.
    early = tmp_path / "early"
    early.mkdir()
    shutil.copy(tiny_run / "config.toml", early)
    resume(early, sample)
    assert_same_run(early, tiny_run)


def test_a_damaged_checkpoint_is_said_and_left(
    sample: Prepared, tiny_config: Config, tiny_run: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    file = folder / "checkpoints" / "step-8" / "trainer.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"step-8.trainer\.safetensors"):
        resume(folder, sample)
    with pytest.raises(CheckpointError, match="does not fit"):
        train_model(
            tiny_config("model.embed_dim=8"), sample, Path(shutil.copytree(tiny_run, tmp_path / "other")), resume=True
        )


def test_a_new_run_replaces_the_old_one_only_when_it_starts(
    sample: Prepared, tiny_config: Config, tiny_run: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    with pytest.raises(CheckpointError):
        train_model(tiny_config("train.init=nowhere"), sample, folder)
    assert_same_run(folder, tiny_run)
    (folder / "old.txt").touch()
    train_model(tiny_config("train.max_steps=1"), sample, folder)
    assert not (folder / "old.txt").exists()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-1"]
    assert len(rows(folder / "train_log.csv")) == 1


def test_a_second_ctrl_c_stops_at_once(sample: Prepared, tiny_config: Config, tmp_path: Path, at_step: AtStep) -> None:
    before = signal.getsignal(signal.SIGINT)

    def twice() -> None:
        press(signal.SIGINT)()
        press(signal.SIGINT)()

    at_step(2, twice)
    with pytest.raises(KeyboardInterrupt):
        train_model(tiny_config(), sample, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_during_the_last_validation(
    sample: Prepared, tiny_config: Config, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not be forgotten because no step follows."""
    from agatool import train

    original = train.evaluate

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        press(signal.SIGINT)()
        return original(*args, **kwargs)

    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints" / "step-8")
    monkeypatch.setattr(train, "evaluate", evaluate)
    with pytest.raises(StoppedError, match="after step 8 of 8"):
        resume(folder, sample)
    monkeypatch.undo()
    resume(folder, sample)
    assert_same_run(folder, tiny_run)


# --- what goes wrong ---


def test_a_loss_that_explodes(sample: Prepared, tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config("train.lr=1e30", "train.head_lr=1e30", "train.warmup=0")
    with pytest.raises(
        NonFiniteError, match=r"The (itc|itm|mlm) loss is not finite at step 2; .* before the optim"
    ) as caught:
        train_model(config, sample, tmp_path / "run")
    assert caught.value.exit_code == 5
    assert "train.lr" in caught.value.hint
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert [row["step"] for row in rows(tmp_path / "run" / "train_log.csv")] == ["1"]  # shows how it came to this


@pytest.mark.parametrize(
    ("weight", "term"), [("itm_head.weight", "itm"), ("mlm_bias", "mlm"), ("text_proj.weight", "itc")]
)
def test_a_nan_names_its_term_and_changes_nothing(
    sample: Prepared, tiny_config: Config, tiny_run: Path, tmp_path: Path, weight: str, term: str
) -> None:
    broken = Path(shutil.copytree(tiny_run / "best", tmp_path / "model"))
    tensors = load_file(broken / "model.safetensors")
    tensors[weight][..., 0] = math.nan
    save_file(tensors, broken / "model.safetensors")
    config = tiny_config(f"train.init={broken}", "objective.itc_only=0")
    trainer = open_run(config, sample, tmp_path / "run", resume=False)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.start_batches(range(1))
    with pytest.raises(NonFiniteError, match=f"The {term} loss is not finite at step 1"):
        trainer.run_step()
    after = trainer.model.state_dict()
    for name, value in before.items():
        if "running_" not in name and "num_batches" not in name:  # of a conv stem, not the optimiser's business
            assert torch.equal(value, after[name]) or name == weight, name
    assert trainer.optimizer.state_dict()["state"] == {}
    assert not (tmp_path / "run").exists()


@pytest.fixture
def full_disk() -> Iterator[Callable[[], None]]:
    """An action that makes the disk full for every file of more than 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_good_checkpoint(
    sample: Prepared,
    tiny_config: Config,
    tiny_run: Path,
    tmp_path: Path,
    at_step: AtStep,
    full_disk: Callable[[], None],
) -> None:
    folder = tmp_path / "run"
    at_step(5, full_disk)
    with pytest.raises(DiskError, match=r"Cannot write .*step-6") as caught:
        train_model(tiny_config(), sample, folder)
    assert caught.value.exit_code == 6
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step-3", "step-4"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    resume(folder, sample)
    assert_same_run(folder, tiny_run)


def test_no_gpu_where_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(UsageError, match="no GPU"):
        pick_device("cuda")


# --- odd data ---


def test_no_val_split(sample: Prepared, tiny_config: Config, tmp_path: Path) -> None:
    rest = replace(sample, images=sample.images[sample.images["split"] != "val"])
    with pytest.raises(DataError, match="no val split") as caught:
        train_model(tiny_config(), rest, tmp_path / "run")
    assert "Prepare it again" in caught.value.hint


def test_no_test_split(sample: Prepared, tiny_config: Config, tmp_path: Path) -> None:
    rest = replace(sample, images=sample.images[sample.images["split"] != "test"])
    outcome = run(tiny_config("train.max_steps=1"), rest, tmp_path / "run")
    assert len(outcome.queries) == 16 + 8  # of val


@pytest.mark.parametrize("batch", [1, 2, 64, 1000])
def test_any_batch_size(sample: Prepared, tiny_config: Config, batch: int) -> None:
    log = steps(tiny_config(f"train.batch_size={batch}", "objective.itc_only=0", "data.half_size=0"), sample, 2)
    assert all(math.isfinite(row["loss"]) for row in log)


def test_one_identity_only(sample: Prepared, tiny_config: Config) -> None:
    """No negatives: the matching term is left out instead of crashing."""
    images = sample.images
    one = images[(images["split"] != "train") | (images["person_id"] == images["person_id"][0])]
    captions = sample.captions[sample.captions["image_id"].isin(one["image_id"])]
    log = steps(tiny_config("objective.itc_only=0"), replace(sample, images=one, captions=captions), 3)
    assert {row["itm"] for row in log} == {0.0}
    assert all(row["mlm"] > 0 for row in log)


@pytest.mark.parametrize("queue", [0, 5, 1000])
def test_any_queue(sample: Prepared, tiny_config: Config, queue: int) -> None:
    log = steps(tiny_config(f"objective.queue_size={queue}", "objective.itc_only=0"), sample, 3)
    assert all(math.isfinite(row["loss"]) for row in log)


def test_accumulated_steps_are_counted_as_one(sample: Prepared, tiny_config: Config, tmp_path: Path) -> None:
    trainer = open_run(tiny_config("train.accumulate=3"), sample, tmp_path, resume=False)
    assert (trainer.data.batches_per_epoch, trainer.steps_per_epoch, trainer.total_steps) == (4, 1, 2)
    trainer = open_run(tiny_config("train.accumulate=9"), sample, tmp_path, resume=False)
    assert (trainer.steps_per_epoch, trainer.total_steps) == (1, 2)


def test_training_learns(sample: Prepared, tiny_config: Config) -> None:
    config = tiny_config("train.epochs=12", "train.lr=0.005", "train.head_lr=0.005", "objective.itc_only=1")
    losses = [row["itc"] for row in steps(config, sample, 48)]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


# --- the optimiser's groups, and the schedule's phases ---


def test_parameter_groups(sample: Prepared, tiny_config: Config, tmp_path: Path) -> None:
    model = open_run(tiny_config(), sample, tmp_path, resume=False).model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, {"itm_head.weight", "itm_head.bias"}, lr=1.0, head_lr=2.0, decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len(names)
    for group in groups:
        for parameter in group["params"]:
            assert (group["lr"] == 2.0) == names[id(parameter)].startswith("itm_head")
            assert (group["weight_decay"] > 0) == (parameter.ndim > 1)


def test_phases(sample: Prepared, tiny_config: Config, tmp_path: Path) -> None:
    trainer = open_run(tiny_config("objective.alpha=0.4"), sample, tmp_path, resume=False)
    phases = [trainer.phase(step) for step in range(STEPS)]
    assert [phase.alpha for phase in phases] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4])  # over one epoch
    assert [phase.itc_only for phase in phases] == [True] * 2 + [False] * 6
    assert [phase.tem for phase in phases] == [False] * 3 + [True] * 5


def test_checkpoints_are_safetensors_and_json_only(tiny_run: Path) -> None:
    suffixes = {path.suffix for path in (tiny_run / "checkpoints").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}
    state = json.loads((tiny_run / "checkpoints" / "step-8" / "state.json").read_text())
    assert state["step"] == 8
