"""What all commands share: the app, option types, and errors that become a message, a hint and an exit code."""

import functools
import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from agatool.errors import INTERRUPTED, MEMORY, AgatoolError, DiskError

DATA, MODELS, WORDS, SEARCH = "Data", "Models", "Words", "Search"

app = typer.Typer(
    name="aga",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Text-based person search with Attention-Guided Alignment.\n\n"
    "Try it: [bold]aga train --dataset sample[/] trains and evaluates on synthetic people, on any machine.",
)


class Preset(StrEnum):
    """Model sizes."""

    tiny = "tiny"
    small = "small"
    base = "base"


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    """In what to compute."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Mask(StrEnum):
    """Which words are masked."""

    attention = "attention"
    random = "random"
    content = "content"


class Direction(StrEnum):
    """Who searches whom."""

    t2i = "t2i"
    i2t = "i2t"
    both = "both"


class Score(StrEnum):
    """What the candidates are re-ranked by."""

    posterior = "posterior"
    itm = "itm"


class Tail(StrEnum):
    """The order past the re-ranked candidates."""

    itc = "itc"
    reference = "reference"


def reporting(command: Callable[..., None]) -> Callable[..., None]:
    """Turn every expected failure into one message, one hint and its exit code (docs/cli.md)."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from agatool import console

        console.configure(kwargs.get("quiet", False))
        try:
            command(*args, **kwargs)
        except AgatoolError as error:
            _leave(error, error.message, error.hint, error.exit_code)
        except KeyboardInterrupt as error:
            _leave(error, "Interrupted", "", INTERRUPTED)
        except BrokenPipeError:  # `aga ... | head`: the reader has what it wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(0) from None
        except MemoryError as error:
            _leave(error, "Out of memory", "Use smaller batches or images.", MEMORY)
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            reason = error.strerror or str(error)
            _leave(error, f"{reason}{where}", "Check the path, its permissions and free space.", DiskError.exit_code)

    return wrapped


def _leave(error: BaseException, message: str, hint: str, code: int) -> None:
    if os.environ.get("AGATOOL_DEBUG") == "1":
        raise error
    from agatool import console

    console.error(message, hint)
    raise typer.Exit(code)


Dataset = Annotated[
    str,
    typer.Option(
        "--dataset",
        "-d",
        help="sample, cuhk-pedes, icfg-pedes, rstpreid, rasa, ufine6926 or custom.",
        rich_help_panel="Data",
    ),
]
DataDir = Annotated[
    Path | None, typer.Option("--data", help="Prepared folder; default data/NAME.", rich_help_panel="Data")
]
Root = Annotated[
    Path | None,
    typer.Option(help="Raw data set folder; prepared first if need be. Default $AGATOOL_DATA/NAME.",
                 rich_help_panel="Data"),
]  # fmt: skip
Checkpoint = Annotated[
    Path | None, typer.Option(help="Model folder, run folder or weights file; default the newest run.")
]
IndexCheckpoint = Annotated[
    Path | None, typer.Option("--checkpoint", help="Model folder or run; default the index's own, else the newest run.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No messages, no tables, no progress.")]
Json = Annotated[bool, typer.Option("--json", help="The result as one JSON document on stdout.")]
DeviceOption = Annotated[Device, typer.Option(help="auto is CUDA where there is one.", rich_help_panel="Machine")]
PrecisionOption = Annotated[
    Precision, typer.Option(help="auto is bf16 on CUDA, fp32 on a CPU.", rich_help_panel="Machine")
]
