"""The training loop: steps, non-finite guard, validation, checkpoints, resume."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from agatool import console
from agatool.checkpoint import (
    checkpoints,
    load,
    load_state,
    pack_optimizer,
    read_tensors,
    save_checkpoint,
    save_model,
    unpack_optimizer,
)
from agatool.config import EvalConfig, RunConfig, read_toml, to_toml
from agatool.convert import new_model
from agatool.data.prepare import Prepared
from agatool.data.sampling import TrainingData, stream_seed
from agatool.errors import DataError, DiskError, NonFiniteError, StoppedError, UsageError
from agatool.files import read_json, write_json, write_text
from agatool.html_report import write_report
from agatool.interop import Start, start_model
from agatool.machine import StopFlag, memory_errors, pick_device, use_bf16
from agatool.model import PersonSearchModel
from agatool.objective import Objective, Phase, StepLosses
from agatool.report import curves_png, evaluation_record, metric_table, write_csv
from agatool.retrieval import Direction, Evaluation, evaluate
from agatool.runs import clear
from agatool.tokenization import load_tokenizer

LOG_COLUMNS = (
    "step", "epoch", "lr", "alpha", "loss", "itc", "itm", "mlm", "itm_accuracy", "mlm_accuracy", "masked_ratio",
    "temperature", "gradient_norm", "tem_replaced", "tem_same", "tem_probability",
)  # fmt: skip
VALIDATION_COLUMNS = ("step", "epoch", "stage", "R@1", "R@5", "R@10", "mAP", "mINP")


def parameter_groups(model: nn.Module, new: set[str], lr: float, head_lr: float, decay: float) -> list[dict[str, Any]]:
    """Four groups: new or pretrained, with weight decay or (biases and 1-D) without. Order is the model's."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((name in new, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": members, "lr": head_lr if is_new else lr, "weight_decay": decay if decays else 0.0}
        for (is_new, decays), members in sorted(groups.items())
    ]


@dataclass
class RunLog:
    """A CSV that is appended to and, on resume, cut back to what the checkpoint knows."""

    path: Path
    columns: tuple[str, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def start(self, keep_until: int) -> None:
        """Keep the rows of steps up to `keep_until`; begin the file with its header."""
        kept: list[list[str]] = []
        if keep_until and self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                for row in list(csv.reader(file))[1:]:
                    if len(row) == len(self.columns) and row[0].isdecimal() and int(row[0]) <= keep_until:
                        kept.append(row)
        lines = [",".join(row) for row in [list(self.columns), *kept]]
        write_text(self.path, "\n".join(lines) + "\n")

    def add(self, row: dict[str, Any]) -> None:
        """Remember a row; `flush` writes it."""
        self.rows.append(row)

    def flush(self) -> None:
        """Append the remembered rows and force them to disk. Raises DiskError."""
        if not self.rows:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                for row in self.rows:
                    file.write(",".join(_cell(row.get(column)) for column in self.columns) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DiskError(f"Cannot write {self.path}: {error.strerror}", "Free some space, then --resume.") from error
        self.rows.clear()

    def read(self) -> list[dict[str, str]]:
        """All rows on disk."""
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def _check_half_size(share: float, model: PersonSearchModel) -> None:
    (height, width), patch = model.config.image_size, model.image_encoder.patch
    if share and (height % (2 * patch) or width % (2 * patch)):
        raise UsageError(
            f"data.half_size: half of {height} x {width} pixels is no multiple of the patch, {patch} pixels",
            "Set data.half_size=0, or another model.image_size.",
        )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class Trainer:
    """One run: the objective, its optimiser and its folder."""

    def __init__(self, config: RunConfig, prepared: Prepared, start: Start, folder: Path) -> None:
        self.config = config.model_copy(update={"model": start.model.config})  # the weights decide the sizes
        self.prepared, self.folder = prepared, folder
        train = config.train
        self.device = pick_device(train.device)
        self.bf16 = use_bf16(self.device, train.precision)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        model, self.new = start.model, start.new
        _check_half_size(config.data.half_size, model)
        self.tokenizer = model.tokenizer
        self.data = TrainingData(prepared, self.tokenizer, model.config, config.data, train.batch_size, train.seed)
        self.objective = Objective(model, self.tokenizer, config.objective, config.masking, config.tem)
        if start.teacher is not None:
            load_state(self.objective.teacher, start.teacher, folder)
        self.objective.to(self.device).train()
        groups = parameter_groups(model, start.new, train.lr, train.head_lr, train.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.steps_per_epoch = max(1, self.data.batches_per_epoch // train.accumulate)
        self.total_steps = train.max_steps or train.epochs * self.steps_per_epoch
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=max(1, self.total_steps),
            lr_min=train.min_lr,
            warmup_t=round(train.warmup * self.total_steps),
            warmup_lr_init=train.min_lr,
            t_in_epochs=False,
            k_decay=train.k_decay,
        )
        self.step = 0
        self.log = RunLog(folder / "train_log.csv", LOG_COLUMNS)
        self.validation = RunLog(folder / "validation.csv", VALIDATION_COLUMNS)

    @property
    def model(self) -> Any:
        """The student."""
        return self.objective.student

    def phase(self, step: int) -> Phase:
        """What of the objective is on at `step`."""
        objective, done = self.config.objective, step / self.total_steps
        ramp = objective.alpha_ramp_epochs * self.steps_per_epoch
        alpha = objective.alpha * min(1.0, step / ramp if ramp else 1.0)
        tem = self.config.tem.enabled and done >= self.config.tem.warmup
        return Phase(alpha, done < objective.itc_only, tem, done < self.config.data.half_size)

    def start_batches(self, micro_steps: range) -> None:
        """From where `run_step` takes its batches."""
        self._batches = self.data.batches(micro_steps)

    def run_step(self) -> dict[str, Any]:
        """One optimiser step over `accumulate` batches -> its log row. Raises NonFiniteError before the update."""
        torch.manual_seed(stream_seed(self.config.train.seed, self.step, 1))  # dropout
        self.schedule.step_update(self.step)
        self.objective.begin_step()
        self.optimizer.zero_grad(set_to_none=True)
        accumulate, phase = self.config.train.accumulate, self.phase(self.step)
        rows = []
        for micro in range(self.step * accumulate, (self.step + 1) * accumulate):
            generator = torch.Generator().manual_seed(stream_seed(self.config.train.seed, micro, 2))
            batch = next(self._batches).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                losses = self.objective(batch, phase, generator)
            rows.append(self._figures(losses))
            (losses.total / accumulate).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip).item()
        if not math.isfinite(norm):
            self._stop_non_finite("gradient norm")
        self.optimizer.step()
        mean = {key: sum(row[key] for row in rows) / accumulate for key in rows[0]}
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        epoch = self.step // self.steps_per_epoch
        self.step += 1
        return {"step": self.step, "epoch": epoch, "lr": lr, "alpha": phase.alpha, "gradient_norm": norm, **mean}

    def _figures(self, losses: StepLosses) -> dict[str, float]:
        """All figures of a batch in one transfer from the device; the guard against NaN."""
        named = {"loss": losses.total, **losses.terms, **losses.report}
        values = torch.stack([value.detach().float().reshape(()) for value in named.values()]).tolist()
        figures = dict(zip(named, values, strict=True))
        for name in ("itc", "itm", "mlm", "loss"):
            if not math.isfinite(figures.get(name, 0.0)):
                self._stop_non_finite(f"{name} loss")
        return figures

    def _stop_non_finite(self, what: str) -> None:
        self.log.flush()  # shows how it came to this
        raise NonFiniteError(
            f"The {what} is not finite at step {self.step + 1}; stopped before the optimiser step",
            "Lower train.lr or train.head_lr, or use --precision fp32; --resume starts from the last checkpoint.",
        )

    def fit(self, stop: StopFlag) -> None:
        """Train to the last step, validating and saving on the way; StoppedError after a save when asked to stop."""
        self.log.start(self.step)
        self.validation.start(self.step)
        accumulate = self.config.train.accumulate
        micro_steps = range(self.step * accumulate, self.total_steps * accumulate)
        self.start_batches(micro_steps)
        self._validate_if_due()
        started, first = time.monotonic(), self.step
        with console.progress("training", self.total_steps, self.step) as task:
            while self.step < self.total_steps:
                row = self.run_step()
                self.log.add(row)
                rate = (self.step - first) * self.config.train.batch_size * accumulate / (time.monotonic() - started)
                task.advance(1, f"epoch {row['epoch'] + 1} loss {row['loss']:.3f} {rate:.0f} images/s")
                self._after_step(stop)

    def _after_step(self, stop: StopFlag) -> None:
        every = self.config.train.checkpoint_every
        ends = self.step % self.steps_per_epoch == 0 or self.step == self.total_steps
        if ends or stop.code is not None or (every and self.step % every == 0):
            self.save()
        if stop.code is None:
            self._validate_if_due()
        if stop.code is not None:  # perhaps since validation began
            self.save_model("last")
            raise StoppedError(
                f"Stopped after step {self.step} of {self.total_steps}; everything is saved",
                f"Continue with: aga train --resume --out {self.folder}",
                stop.code,
            )

    def _validate_if_due(self) -> None:
        """Validate at an epoch's end (or at the last step), once: a resumed run makes up for what a kill cut off."""
        epoch, within = divmod(self.step, self.steps_per_epoch)
        last = self.step == self.total_steps
        due = self.step > 0 and (last or (within == 0 and epoch % self.config.eval.every == 0))
        if not due or any(int(row["step"]) == self.step for row in self.validation.read()):
            return
        quick = self.config.eval.model_copy(update={"bootstrap": 0})
        outcome = evaluate(self.model, self.tokenizer, self.prepared, "val", quick, ("t2i",), self.bf16)
        self.objective.train()
        for stage in dict.fromkeys(row.stage for row in outcome.metrics):
            figures = {row.metric: float(row.value) for row in outcome.metrics if row.stage == stage}
            self.validation.add({"step": self.step, "epoch": epoch, "stage": stage, **figures})
            told = " ".join(f"{name} {value:.1f}" for name, value in figures.items())
            console.info(f"epoch {epoch} step {self.step} val {stage}: {told}")
        if self._is_best():
            self.save_model("best")
        self.save_model("last")
        self.validation.flush()

    def _is_best(self) -> bool:
        """Whether the row to be written beats all former ones: R@1, then mAP, of the final stage on val."""
        new = self.validation.rows[-1]
        score = (float(_cell(new["R@1"])), float(_cell(new["mAP"])))
        former = [row for row in self.validation.read() if row["stage"] == new["stage"]]
        return all(score > (float(row["R@1"]), float(row["mAP"])) for row in former)

    def save(self) -> None:
        """A resumable checkpoint; the log is on disk before it."""
        self.log.flush()
        state = self.objective.state_dict()
        student = {name[8:]: value for name, value in state.items() if name.startswith("student.")}
        trainer = {name: value for name, value in state.items() if not name.startswith("student.")}
        trainer.update(pack_optimizer(self.optimizer))
        keep = self.config.train.keep
        save_checkpoint(self.folder / "checkpoints", self.step, student, trainer, {"new": sorted(self.new)}, keep)

    def save_model(self, name: str) -> None:
        """Write the student as the model folder `name` of the run."""
        save_model(self.folder / name, self.model, model_card(self))

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint. Raises CheckpointError where it is damaged or of another model."""
        tensors = read_tensors(checkpoint / "trainer.safetensors")
        student = read_tensors(checkpoint / "model.safetensors")
        state = {name: value for name, value in tensors.items() if not name.startswith("optimizer.")}
        state.update({f"student.{name}": value for name, value in student.items()})
        load_state(self.objective, state, checkpoint)
        unpack_optimizer(self.optimizer, tensors)
        self.step = int(checkpoint.name.removeprefix("step-"))


def model_card(trainer: Trainer) -> str:
    """README.md of a model folder: what it is, what it was trained on, how to use it."""
    config, size = trainer.config, sum(p.numel() for p in trainer.model.parameters())
    height, width = trainer.model.config.image_size
    return f"""# agatool model

A text-based person search model ({size:,} parameters, images {height} x {width}) trained with agatool.

- data set: {config.data.dataset}
- preset: {config.preset}, started from: {config.train.init}
- step {trainer.step} of {trainer.total_steps}, seed {config.train.seed}
- masking: {config.masking.strategy} at ratio {config.masking.ratio}, TEM {"on" if config.tem.enabled else "off"}

Open it with `agatool.load(folder)` or give it to any command as `--checkpoint folder`. Images of people are personal
data: use the model only where you may lawfully do so.
"""


def open_run(config: RunConfig, prepared: Prepared, folder: Path, resume: bool) -> Trainer:
    """A trainer at its first step, or where the run in `folder` stopped; writes nothing yet."""
    found = checkpoints(folder / "checkpoints") if resume else []
    start = _resumed_start(config, found[-1]) if found else start_model(config, prepared.tokenizer)
    if "val" not in set(prepared.images["split"]):
        raise DataError(f"{prepared.folder} has no val split", "Prepare it again; a val split is held out of train.")
    trainer = Trainer(config, prepared, start, folder)
    if found:
        trainer.resume(found[-1])
    return trainer


def _resumed_start(config: RunConfig, checkpoint: Path) -> Start:
    """The run's model without the weights it once started from, which may be gone; `Trainer.resume` fills it."""
    model = new_model(config.model)
    model.tokenizer = load_tokenizer(checkpoint.parent.parent / "tokenizer.json", config.model.text)
    return Start(model, set(read_json(checkpoint / "state.json")["new"]), None)


MEMORY_HINT = "Lower --batch-size, or raise train.accumulate to make up for it."


def train_model(config: RunConfig, prepared: Prepared, folder: Path, resume: bool = False) -> Trainer:
    """Train in `folder` (already claimed) to the last step; a run there is continued with `resume`, else replaced.

    Raises StoppedError after saving when asked to stop, NonFiniteError, DiskError, OutOfMemoryError, DataError.
    """
    with memory_errors(MEMORY_HINT):
        trainer = open_run(config, prepared, folder, resume)
        folder.mkdir(parents=True, exist_ok=True)
        if not resume and (folder / "config.toml").is_file():
            clear(folder)  # as late as this: whatever is wrong has been said by now
        write_text(folder / "config.toml", to_toml(trainer.config))  # first: with it the folder can be resumed
        trainer.tokenizer.save(folder / "tokenizer.json")
        size = sum(p.numel() for p in trainer.model.parameters())
        console.info(
            f"Training {size:,} parameters on {len(trainer.data):,} pairs of {prepared.name}, on {trainer.device}: "
            f"steps {trainer.step} to {trainer.total_steps}, batch {config.train.batch_size}, into {folder}"
        )
        with StopFlag() as stop:
            trainer.fit(stop)
    return trainer


def run(config: RunConfig, prepared: Prepared, folder: Path, resume: bool = False) -> Evaluation:
    """`train_model`, then draw the curves and evaluate the best model on the test split. Raises what that raises."""
    trainer = train_model(config, prepared, folder, resume)
    curves_png(folder / "curves.png", pd.read_csv(trainer.log.path), pd.read_csv(trainer.validation.path))
    split = "test" if "test" in set(prepared.images["split"]) else "val"
    with memory_errors(MEMORY_HINT):
        best = load(folder / "best").to(trainer.device)
        outcome = evaluate(best, best.tokenizer, prepared, split, config.eval, bf16=trainer.bf16)
    used = trainer.config.model_dump(mode="json", exclude_none=True)
    write_evaluation(folder, outcome, prepared, split, "best", _machine(trainer.device, trainer.bf16), used)
    return outcome


def evaluate_model(
    model: PersonSearchModel,
    model_folder: Path,
    prepared: Prepared,
    split: str,
    config: EvalConfig,
    directions: Sequence[Direction],
    device: str,
    precision: str,
    out: Path,
) -> Evaluation:
    """`aga eval`: evaluate `model`, opened from `model_folder`, on a split; the CSVs and the report go into `out`."""
    target = pick_device(device)
    bf16 = use_bf16(target, precision)
    with memory_errors("Lower --batch-size."):
        outcome = evaluate(model.to(target), model.tokenizer, prepared, split, config, directions, bf16)
    stored = model_folder.parent / "config.toml"
    in_run = model_folder.is_dir() and stored.is_file()
    trained = read_toml(stored) if in_run else {"model": model.config.model_dump(mode="json", exclude_none=True)}
    used = {**trained, "eval": config.model_dump(mode="json")}
    write_evaluation(out, outcome, prepared, split, model_folder.name, _machine(target, bf16), used)
    return outcome


def _machine(device: torch.device, bf16: bool) -> str:
    return f"{device.type}, {'bf16' if bf16 else 'fp32'}"


def write_evaluation(
    folder: Path, outcome: Evaluation, prepared: Prepared, split: str, model: str, device: str, config: dict[str, Any]
) -> None:
    """metrics.csv, queries.csv, evaluation.json (what they were made from), and report.html, made from the three."""
    write_csv(folder / "metrics.csv", metric_table(outcome.metrics))
    write_csv(folder / "queries.csv", outcome.queries, decimals=6)
    record = evaluation_record(folder, prepared.folder, prepared.info, split, model, device, config)
    write_json(folder / "evaluation.json", record)
    write_report(folder)
