"""The errors a user can cause: one message, one hint, one exit code each."""

from __future__ import annotations

# Exit codes of the `aga` command (documented in docs/cli.md).
OK, USAGE, DATA, CHECKPOINT, NON_FINITE, DISK, MEMORY = 0, 2, 3, 4, 5, 6, 7
INTERRUPTED, TERMINATED = 130, 143


class AgatoolError(Exception):
    """What went wrong, and in `hint` the next thing to do; the CLI shows both and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(AgatoolError):
    """An option or a configuration value that cannot be meant."""

    exit_code = USAGE


class DataError(AgatoolError):
    """A data set, image, caption or table that is missing, broken or hostile."""

    exit_code = DATA


class CheckpointError(AgatoolError):
    """A model folder or weights file that is missing, broken or does not fit."""

    exit_code = CHECKPOINT


class NonFiniteError(AgatoolError):
    """A loss became NaN or infinite; training stopped before the optimiser step."""

    exit_code = NON_FINITE


class DiskError(AgatoolError):
    """Writing failed: disk full, read-only or no permission."""

    exit_code = DISK


class OutOfMemoryError(AgatoolError):
    """The machine or the GPU has too little memory for this setting."""

    exit_code = MEMORY


class StoppedError(AgatoolError):
    """The user (Ctrl-C) or the system (SIGTERM) asked to stop; everything worth keeping is saved."""

    def __init__(self, message: str, hint: str = "", exit_code: int = INTERRUPTED) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code
