"""The machine a command runs on: device, precision, running out of memory, being asked to stop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import torch

from agatool import console
from agatool.errors import INTERRUPTED, TERMINATED, OutOfMemoryError, UsageError


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises UsageError when CUDA is asked for and not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but PyTorch sees no GPU here", "Use --device cpu.")
    return torch.device(name)


def use_bf16(device: torch.device, precision: str) -> bool:
    """bfloat16 on a GPU unless told otherwise; float32 on a CPU, where bfloat16 is far slower."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


@contextlib.contextmanager
def memory_errors(hint: str) -> Iterator[None]:
    """Running out of memory becomes one message with a way out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(
            f"Out of memory: {str(error).splitlines()[0] if str(error) else 'host'}", hint
        ) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise OutOfMemoryError("Out of memory on this machine", hint) from error


class StopFlag:
    """Ctrl-C and SIGTERM ask the loop to save and stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.code: int | None = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.code is not None:
            raise KeyboardInterrupt
        self.code = INTERRUPTED if number == signal.SIGINT else TERMINATED
        console.info("Stopping after this step; press Ctrl-C again to stop at once.")

    def __enter__(self) -> StopFlag:
        self._former = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
