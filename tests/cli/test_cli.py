"""`aga` as a user meets it: what it prints where, what it says to mistakes, which exit code it leaves."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from agatool import __version__
from agatool.cli import app
from agatool.data.annotations import DATASETS
from agatool.data.prepare import Prepared
from tests.conftest import TINY, assert_same_run, contents, press

HEAVY = ("torch", "torchvision", "timm", "transformers", "tokenizers", "pandas", "numpy", "matplotlib", "PIL", "scipy")
SETTINGS = [part for override in TINY for part in ("--set", override)]
COMMANDS = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGATOOL_DATA", raising=False)
    monkeypatch.delenv("AGATOOL_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def train(sample: Prepared) -> list[str]:
    """The words of a short training."""
    return ["train", "--data", str(sample.folder), "--init", "scratch", *SETTINGS]


def aga(*words: object) -> Any:
    """Run `aga` in this process; a traceback that a user would see fails the test."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(code: int, *words: object) -> str:
    """stderr of a command that must fail: one message and one hint, nothing on stdout."""
    result = aga(*words)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(re.findall(r"^error:", result.stderr, re.M)) == 1, result.stderr
    assert len(re.findall(r"^hint:", result.stderr, re.M)) == 1, result.stderr
    return str(result.stderr)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# --- help ---


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)


LOADED = f"""
import atexit, sys
atexit.register(lambda: print("HEAVY", *(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr))
from agatool.cli import main
main()
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0), ([], 0), (["--version"], 0), (["train", "--help"], 0), (["eval", "-h"], 0),
        (["train", "--epochs", "0"], 2), (["train", "--no-such-option"], 2), (["no-such-command"], 2),
    ],
)  # fmt: skip
def test_help_and_argument_errors_import_nothing_heavy(words: list[str], code: int) -> None:
    done = python(LOADED, *words)
    assert done.returncode == code, done.stderr
    assert "\nHEAVY\n" in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr


def test_importing_agatool_imports_nothing_heavy() -> None:
    done = python(f"import sys, agatool; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert done.stdout.strip() == "[]"


def test_help_lists_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "agatool", "--help"], capture_output=True, text=True)
    assert set(COMMANDS) >= {"prepare", "train", "eval", "convert"}
    for name in COMMANDS:
        assert re.search(rf"^│ {name}\s+\w", done.stdout, re.M), name
    assert aga("--help").exit_code == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_examples_that_parse(command: str) -> None:
    text = aga(command, "--help").stdout
    assert "Examples:" in text
    group: Any = typer.main.get_command(app)
    examples = re.findall(rf"^\s*(aga {command}\b.*)$", group.commands[command].help or "", re.M)
    assert examples
    for line in examples:
        words = shlex.split(line, comments=True)[2:]
        group.commands[command].make_context(command, words)  # raises for an option that is not there


def test_version() -> None:
    result = aga("--version")
    assert result.stdout == f"aga {__version__}\n"


# --- training and evaluating ---


def test_training(here: Path, train: list[str], tiny_run: Path) -> None:
    result = aga(*train, "--out", "run")
    assert result.exit_code == 0, result.output
    assert "t2i cosine" in result.stdout
    assert re.search(r"R@1 .*\d+\.\d \[\d+\.\d-\d+\.\d\]", result.stdout)  # a row is a line
    assert "Training 5" in result.stderr
    assert "Training" not in result.stdout
    assert "run/metrics.csv" in result.stderr
    assert_same_run(here / "run", tiny_run, evaluated=True)


def test_training_quietly_and_as_json(here: Path, train: list[str]) -> None:
    result = aga(*train, "--max-steps", 1, "--set", "eval.bootstrap=0", "--json", "--quiet")
    assert result.stderr == ""
    document = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["folder"] == "runs/sample"
    assert {row["metric"] for row in document["metrics"]} == {"R@1", "R@5", "R@10", "mAP", "mINP"}
    assert document["metrics"][0]["low"] is None  # no resamples, no interval
    assert (here / "runs" / "sample" / "metrics.csv").is_file()


def test_print_config_can_be_given_back(here: Path, train: list[str]) -> None:
    shown = aga(*train, "--set", "data.dataset='x[red]y'", "--set", "masking.ratio=0.3", "--print-config")
    config = tomllib.loads(shown.stdout)
    assert (config["masking"]["ratio"], config["data"]["dataset"]) == (0.3, "x[red]y")
    Path("run.toml").write_text(shown.stdout)
    assert aga("train", "--config", "run.toml", "--print-config").stdout == shown.stdout
    assert files(here) == {"run.toml"}


def test_prepared_data_says_its_own_name(here: Path, sample: Prepared) -> None:
    assert aga("prepare", "--dataset", "rstpreid", "--root", sample.folder / "raw", "-q").exit_code == 0
    shown = aga("train", "--data", "data/rstpreid", "--print-config").stdout
    assert 'dataset = "rstpreid"' in shown
    assert 'init = "scratch"' in shown


def test_dry_run_writes_nothing(here: Path, train: list[str], sample: Prepared) -> None:
    before = files(sample.folder)
    result = aga(*train, "--dry-run")
    assert result.exit_code == 0, result.output
    for figure in ("parameters", "GFLOP", "memory", "minutes, without validation"):
        assert figure in result.stdout
    assert files(here) == set()
    assert files(sample.folder) == before


def test_dry_run_with_few_or_accumulated_steps(here: Path, train: list[str]) -> None:
    for extra in (["--max-steps", 1], ["--set", "train.accumulate=3"]):
        assert aga(*train, "--dry-run", *extra).exit_code == 0


def test_stopped_and_resumed(here: Path, train: list[str], tiny_run: Path, at_step: Callable[..., None]) -> None:
    at_step(5, press(signal.SIGINT))
    said = refused(130, *train, "--out", "runs/mine")
    assert "Stopped after step 5 of 8; everything is saved" in said
    command = re.search(r"Continue with: aga (.*)", said)
    assert command is not None
    assert aga(*command[1].split()).exit_code == 0  # what the hint says, as it says it
    assert_same_run(here / "runs" / "mine", tiny_run, evaluated=True)


def test_resume_finds_the_newest_run(here: Path, train: list[str], at_step: Callable[..., None]) -> None:
    at_step(1, press(signal.SIGTERM))
    refused(143, *train, "--max-steps", 2)
    assert "no run to resume" in refused(2, "train", "--resume", "--dataset", "cuhk-pedes")
    result = aga("train", "--resume", "--dataset", "sample", "--max-steps", 3)
    assert result.exit_code == 0
    assert "steps 1 to 3" in result.stderr


def test_evaluating(here: Path, tiny_run: Path) -> None:
    run = Path(shutil.copytree(tiny_run, here / "run"))
    for name in ("metrics.csv", "queries.csv"):
        (run / name).unlink()
    result = aga("eval", "--checkpoint", "run")
    assert result.exit_code == 0, result.output
    for name in ("metrics.csv", "queries.csv"):  # what training wrote
        assert (run / name).read_bytes() == (tiny_run / name).read_bytes()
    assert contents(run, ("best/*", "train_log.csv")) == contents(tiny_run, ("best/*", "train_log.csv"))


def test_evaluating_another_way(here: Path, tiny_run: Path) -> None:
    words = [
        "eval",
        "--checkpoint",
        tiny_run / "last",
        "--split",
        "val",
        "--rerank",
        0,
        "--direction",
        "i2t",
        "--out",
        "here",
    ]
    document = json.loads(aga(*words, "--json").stdout)
    assert {(row["direction"], row["stage"]) for row in document["metrics"]} == {("i2t", "cosine")}
    queries = pd.read_csv("here/queries.csv")
    assert len(queries) == 8  # the images of val
    assert aga(*words, "--tail", "reference", "-q").output == ""
    assert json.loads(Path("here/evaluation.json").read_text())["config"]["eval"]["tail"] == "reference"


def test_evaluating_on_another_data_set(here: Path, tiny_run: Path, sample: Prepared) -> None:
    """Cross-domain; the sample is in RSTPReid's own layout, so it can play that part."""
    before = contents(tiny_run, ("*",))
    words = [
        "eval",
        "--checkpoint",
        tiny_run,
        "--dataset",
        "RSTPReid",
        "--root",
        sample.folder / "raw",
        "--out",
        "cross",
    ]
    result = aga(*words)
    assert result.exit_code == 0, result.output
    assert (here / "data" / "rstpreid" / "dataset.json").is_file()
    metrics = pd.read_csv("cross/metrics.csv")
    assert set(metrics["direction"]) == {"t2i", "i2t"}
    assert contents(tiny_run, ("*",)) == before


# --- mistakes ---


@pytest.mark.parametrize("name", ["rstpreid", "CUHK-PEDES", "icfg_pedes", "ufine6926", "rasa", "custom"])
@pytest.mark.parametrize("command", ["train", "prepare", "eval"])
def test_no_data_says_where_to_get_it(here: Path, tiny_run: Path, command: str, name: str) -> None:
    extra = ["--checkpoint", tiny_run] if command == "eval" else []
    said = refused(3, command, "--dataset", name, *extra)
    form = DATASETS[name.lower().replace("_", "-")]
    assert form.source in said
    assert form.tree in said
    assert f"aga prepare --dataset {name.lower().replace('_', '-')} --root RAW" in said
    assert files(here) == set()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config", "none.toml"], "Cannot read none.toml"),
        (["--config", "broken.toml"], "not valid TOML"),
        (["--set", "train.lrr=1"], "train.lrr: there is no such key"),
        (["--set", "train.lr=fast"], "train.lr"),
        (["--set", "lr"], "section.key=value"),
        (["--set", "model.image_heads=5"], "image_heads"),
        (["--set", "model.image_size=[30,16]"], "image_size"),
        (["--set", "model.patch=10", "--set", "model.image_size=[30,20]"], "power of two"),
        (["--set", "model.image_model=resnet18"], "plain ViT"),
        (["--image-model", "no_such_vit"], "no_such_vit"),
        (["--resume"], "no run to resume"),
        (["--resume", "--out", "full"], "no run to resume"),
        (["--out", "full"], "not empty"),
        (["--out", "full", "--overwrite"], "not a run folder"),
        (["--out", "broken.toml"], "is a file"),
        (["--device", "cuda"], "no GPU"),
    ],
)
def test_wrong_words_to_train(here: Path, train: list[str], words: list[str], says: str) -> None:
    Path("broken.toml").write_text("[[[")
    (here / "full").mkdir()
    (here / "full" / "thesis.txt").write_text("years of work")
    before = files(here)
    assert says in refused(2, *train, *words)
    assert files(here) - {"runs", "runs/sample"} == before
    assert Path("full/thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_an_unknown_data_set(here: Path, command: str) -> None:
    said = refused(2, command, "--dataset", "imagenet")
    assert "Unknown data set 'imagenet'" in said
    assert all(name in said for name in DATASETS)
    assert files(here) == set()


def test_an_occupied_run_folder(here: Path, train: list[str], tiny_run: Path) -> None:
    shutil.copytree(tiny_run, here / "run")
    said = refused(2, *train, "--out", "run")
    assert "--resume" in said
    assert "--overwrite" in said
    refused(4, *train, "--out", "run", "--overwrite", "--init", "nowhere")
    refused(3, "train", "--dataset", "rstpreid", "--out", "run", "--overwrite")
    assert_same_run(here / "run", tiny_run)  # a run is replaced when the new one can start, not before
    assert aga(*train, "--out", "run", "--overwrite", "--max-steps", 1).exit_code == 0
    assert not (here / "run" / "checkpoints" / "step-8").exists()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--checkpoint", "nowhere"], 4, "not a model folder or a run"),
        (["--checkpoint", "."], 4, "not a model folder or a run"),
        (["--split", "none"], 3, "no split 'none'"),
        (["--data", "nowhere", "--dataset", "rstpreid"], 3, "No prepared data set at nowhere"),
        (["--dataset", "imagenet"], 2, "Unknown data set 'imagenet'"),
        (["--device", "cuda"], 2, "no GPU"),
    ],
)
def test_wrong_words_to_eval(here: Path, tiny_run: Path, words: list[str], code: int, says: str) -> None:
    checkpoint = [] if "--checkpoint" in words else ["--checkpoint", tiny_run]
    assert says in refused(code, "eval", *checkpoint, *words)


def test_a_broken_model_and_broken_data(here: Path, tiny_run: Path, sample: Prepared) -> None:
    model = Path(shutil.copytree(tiny_run / "best", here / "model"))
    (model / "model.safetensors").write_bytes(b"\x80\x04")
    data = ["--data", sample.folder, "--dataset", "sample"]
    assert "model.safetensors" in refused(4, "eval", "--checkpoint", model, *data)
    assert "model.safetensors" in refused(4, "train", "--init", model, "--data", sample.folder)
    Path("empty.pth").touch()
    assert "empty.pth" in refused(4, "eval", "--checkpoint", "empty.pth", *data)
    prepared = Path(shutil.copytree(sample.folder, here / "data"))
    (prepared / "raw" / "imgs" / sample.images["path"].iloc[-1]).write_bytes(b"\xff\xd8 no more")
    assert "Cannot read image" in refused(
        3, "eval", "--checkpoint", tiny_run, "--data", prepared, "--dataset", "sample"
    )


def test_a_loss_that_explodes(here: Path, train: list[str]) -> None:
    words = ["--set", "train.lr=1e30", "--set", "train.head_lr=1e30", "--set", "train.warmup=0"]
    said = refused(5, *train, *words)
    assert re.search(r"The (itc|itm|mlm) loss is not finite at step 2", said)


@pytest.mark.parametrize("words", [["--epochs", "0"], ["--batch-size", "x"], ["--preset", "huge"], ["--nothing"]])
def test_argument_errors(here: Path, words: list[str]) -> None:
    result = aga("train", *words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words[0] in result.stderr
    assert files(here) == set()


def test_debugging_shows_the_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGATOOL_DEBUG", "1")
    result = CliRunner().invoke(app, ["eval", "--checkpoint", "nowhere"])
    assert type(result.exception).__name__ == "CheckpointError"


def test_preparing_the_sample(here: Path) -> None:
    words = ["prepare", "--identities", 8, "--images", 1, "--out", "small"]
    first = aga(*words)
    assert first.exit_code == 0, first.output
    assert re.search(r"train .*6 .*6 .*12", first.stdout)
    assert "nothing to do" in aga(*words).stderr
    assert aga(*words, "-q").output == ""
    assert "identities" in aga("prepare", "--identities", 3).stderr


# --- visualize-attention ---


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--captions", "c.json", "--query", 3], "--captions and --query do not go together"),
        (["--image", "x.png", "--text", "a man", "--measure"], "--image and --measure do not go together"),
        (["--text", "a man"], "--image and --text go together"),
    ],
)
def test_wrong_words_to_visualize_attention(here: Path, words: list[str], says: str) -> None:
    assert says in refused(2, "visualize-attention", *words)


def test_a_wrong_layer_leaves_the_former_pictures(here: Path, tiny_run: Path, sample: Prepared) -> None:
    words = ["visualize-attention", "--checkpoint", tiny_run, "--data", sample.folder, "--count", 1, "--out", "maps"]
    document = json.loads(aga(*words, "--json").stdout)
    assert document["pairs"][0]["words"]
    before = files(here / "maps")
    assert "--layer 9" in refused(2, *words, "--overwrite", "--method", "attention", "--layer", 9)
    assert files(here / "maps") == before
