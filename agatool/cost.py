"""What a training run would cost: one real step, measured; `aga train --dry-run` prints it."""

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
    """Run two full-objective steps, write nothing -> rows (what, figure). Raises what training would."""
    with memory_errors("Lower --batch-size or choose a smaller --preset."):
        trainer = open_run(config, prepared, Path(), resume=False)
        trainer.step = trainer.total_steps - 1  # past every warm-up: all terms are on
        first, flops = _timed_step(trainer, count=True)
        trainer.step -= 1
        seconds, _ = _timed_step(trainer, count=False)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    hours = seconds * trainer.total_steps / 3600
    return [
        ["parameters (trainable)", f"{parameters:,}"],
        ["pairs in train", f"{len(trainer.data):,}"],
        ["steps", f"{trainer.total_steps:,} ({trainer.steps_per_epoch:,} an epoch)"],
        ["GFLOP per step, forward and backward", f"{flops / 1e9:,.1f}"],
        ["seconds for a step", f"{seconds:.2f} (the first took {first:.2f})"],
        ["peak memory", _peak_memory(trainer.device)],
        ["whole training", f"about {hours:.1f} hours, without validation, on {trainer.device}"],
        ["whole training, EFLOP", f"{flops * trainer.total_steps / 1e18:.3f}"],
    ]


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
