"""What a training run would cost: real steps, measured; `aga train --dry-run` prints it."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from agatool.config import RunConfig
from agatool.data.prepare import Prepared
from agatool.machine import memory_errors
from agatool.train import Trainer, open_run


def estimate(config: RunConfig, prepared: Prepared) -> list[list[str]]:
    """Run two steps of each kind that the run has, write nothing -> rows (what, figure). Raises what training would."""
    whole, whole_flops = 0.0, 0
    with memory_errors("Lower --batch-size or choose a smaller --preset."):
        trainer = open_run(config, prepared, Path(), resume=False)
        for last, steps in _kinds(trainer):
            trainer.step = last
            first, flops = _timed_step(trainer, count=True)
            trainer.step = last
            seconds, _ = _timed_step(trainer, count=False)
            whole, whole_flops = whole + seconds * steps, whole_flops + flops * steps
    parameters = sum(p.numel() for p in trainer.model.parameters())
    return [
        ["parameters (trainable)", f"{parameters:,}"],
        ["pairs in train", f"{len(trainer.data):,}"],
        ["steps", f"{trainer.total_steps:,} ({trainer.steps_per_epoch:,} an epoch)"],
        ["GFLOP per full step, forward and backward", f"{flops / 1e9:,.1f}"],
        ["seconds for a full step", f"{seconds:.2f} (the first took {first:.2f})"],
        ["peak memory", _peak_memory(trainer.device)],
        ["whole training", f"about {_duration(whole)}, without validation, on {trainer.device}"],
        ["whole training, TFLOP", f"{whole_flops / 1e12:,.0f}"],
    ]


def _kinds(trainer: Trainer) -> list[tuple[int, int]]:
    """The last step and the number of steps of each kind that costs alike; full steps come last."""
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for step in range(trainer.total_steps):
        phase = trainer.phase(step)
        kinds.setdefault((phase.half_size, phase.itc_only), []).append(step)
    return [(steps[-1], len(steps)) for steps in kinds.values()]


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"


def _timed_step(trainer: Trainer, count: bool) -> tuple[float, int]:
    accumulate = trainer.config.train.accumulate
    first = trainer.step * accumulate
    trainer.start_batches(range(first, first + accumulate))
    started = time.perf_counter()
    if not count:
        trainer.run_step()
        return time.perf_counter() - started, 0
    with FlopCounterMode(display=False) as counter:
        trainer.run_step()
    return time.perf_counter() - started, counter.get_total_flops()


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB on the GPU"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
