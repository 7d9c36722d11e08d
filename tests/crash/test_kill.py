"""kill -9 at any moment of a run: best/ and last/ are whole, and --resume ends in the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agatool.checkpoint import checkpoints, load
from agatool.config import RunConfig
from agatool.data.prepare import Prepared
from agatool.runs import claim, is_model
from agatool.train import train_model
from tests.conftest import TINY, assert_same_run, resume

WRITES = ("open", "os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def die_at(moment: int, work: Callable[[], Any], folder: Path) -> bool:
    """Do `work` in a child that is killed just before its write number `moment` below `folder`; whether it was."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event not in WRITES or not str(arguments[0]).startswith(str(folder)):
                return
            if event == "open" and not arguments[2] & CHANGING:
                return
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def assert_nothing_broken(folder: Path) -> None:
    """Every model and checkpoint that is there can be opened."""
    for name in ("best", "last"):
        if is_model(folder / name):
            load(folder / name)
    for checkpoint in checkpoints(folder / "checkpoints"):
        assert sorted(path.name for path in checkpoint.iterdir()) == [
            "model.safetensors", "state.json", "trainer.safetensors",
        ]  # fmt: skip


def run_on(config: RunConfig, sample: Prepared, folder: Path) -> None:
    """What the user types after a kill: --resume, or the command anew where there is no run yet."""
    if (folder / "config.toml").is_file():
        resume(folder, sample)
    else:
        train_model(config, sample, folder)


SLOW = pytest.mark.slow
MOMENTS = [  # of the 187 writes of this run
    pytest.param(5, id="before config.toml is there"),
    pytest.param(20, id="before validation.csv is there", marks=SLOW),
    pytest.param(34, id="half of the first checkpoint", marks=SLOW),
    pytest.param(54, id="before the second checkpoint is renamed into place"),
    pytest.param(76, id="before the first best is renamed into place", marks=SLOW),
    pytest.param(100, id="best and last written, validation.csv not"),
    pytest.param(118, id="while an old checkpoint is removed"),
    pytest.param(158, id="between the two renames of best"),
    pytest.param(159, id="before the former best is removed", marks=SLOW),
    pytest.param(183, id="between the two renames of last", marks=SLOW),
    pytest.param(187, id="before the last line of validation.csv"),
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed(
    sample: Prepared, tiny_config: Callable[..., RunConfig], tiny_run: Path, tmp_path: Path, moment: int
) -> None:
    folder = tmp_path / "run"
    assert die_at(moment, lambda: train_model(tiny_config(), sample, folder), folder)
    assert_nothing_broken(folder)
    run_on(tiny_config(), sample, folder)
    assert_same_run(folder, tiny_run)
    assert not list(folder.rglob("*agatool-*"))


@pytest.mark.slow
def test_killed_again_and_again(
    sample: Prepared, tiny_config: Callable[..., RunConfig], tiny_run: Path, tmp_path: Path
) -> None:
    """A machine that never lives long still finishes, at every third write of what is left."""
    folder, moments = tmp_path / "run", random.Random(0)
    for _ in range(40):
        if not die_at(moments.randint(10, 45), lambda: run_on(tiny_config(), sample, folder), folder):
            break
        assert_nothing_broken(folder)
    run_on(tiny_config(), sample, folder)
    assert_same_run(folder, tiny_run)


def test_killed_while_replacing_a_run(
    sample: Prepared, tiny_config: Callable[..., RunConfig], tiny_run: Path, tmp_path: Path
) -> None:
    """--overwrite: what is left is a run folder that can be overwritten again."""
    for moment in (1, 4, 12, 25):
        folder = Path(shutil.copytree(tiny_run, tmp_path / f"run{moment}"))
        assert die_at(moment, lambda: train_model(tiny_config(), sample, folder), folder)  # noqa: B023
        claim(folder, resume=False, overwrite=True)
    train_model(tiny_config(), sample, folder)
    assert_same_run(folder, tiny_run)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_real_process(sample: Prepared, tiny_run: Path, tmp_path: Path, number: signal.Signals) -> None:
    """The command itself, signalled from outside, at moments that nobody chose."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "agatool", "train", "--data", str(sample.folder), "--init", "scratch"]
    command += [part for override in TINY for part in ("--set", override)] + ["--out", str(folder)]
    for seconds in (0.05, 0.1, 0.3):
        again = ["--resume"] if (folder / "config.toml").is_file() else []
        process = subprocess.Popen(command + again, env=environment, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        said = next((line for line in process.stderr if line.startswith("Training")), "")  # waits until it does
        time.sleep(seconds)
        process.send_signal(number)
        said += process.communicate()[1]
        assert "Traceback" not in said
        # Of itself or by the signal, in which case a shell says 128 + its number: 137, 130, 143.
        assert process.returncode in (0, -number, 128 + number), said
        assert ("everything is saved" in said) == (f"aga train --resume --out {folder}" in said)
        assert_nothing_broken(folder)
    subprocess.run([*command, "--resume"], env=environment, check=True, capture_output=True)
    assert_same_run(folder, tiny_run)
