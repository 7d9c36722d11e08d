"""Run folders: which model a command means, which folder it may take, what an evaluation fills in."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from agatool.config import build_config, to_toml
from agatool.errors import CheckpointError, UsageError
from agatool.runs import SHIPPED, claim, clear, evaluation_plan, find_model, fresh_run, is_model, newest_run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_run(name: str, dataset: str = "sample", age: int = 0, models: tuple[str, ...] = ("best", "last")) -> Path:
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    config = build_config({"data": {"dataset": dataset, "dir": f"data/{dataset}"}, "eval": {"rerank": 7}})
    (folder / "config.toml").write_text(to_toml(config))
    os.utime(folder / "config.toml", (1e9 - age, 1e9 - age))
    for model in models:
        (folder / model).mkdir()
        (folder / model / "config.json").touch()
        (folder / model / "model.safetensors").touch()
    return folder


# --- which model ---


def test_the_newest_run(here: Path) -> None:
    assert newest_run() is None
    make_run("ratio25", age=10)
    newest = make_run("sample-2", age=5)
    make_run("sample", age=20)
    (here / "runs" / "eval-x").mkdir()  # no run
    assert newest_run() == newest
    os.utime("runs/sample/config.toml")
    assert newest_run() == Path("runs/sample")


def test_the_newest_run_of_a_data_set(here: Path) -> None:
    make_run("cuhk-pedes", "cuhk-pedes", age=30)
    make_run("mine", "cuhk-pedes", age=20)
    make_run("cuhk-pedes-2", "sample", age=5)  # the folder's name says nothing
    broken = make_run("broken", "cuhk-pedes")
    (broken / "config.toml").write_text("[[[")
    assert newest_run("cuhk-pedes") == Path("runs/mine")
    assert newest_run("rstpreid") is None


def test_what_a_checkpoint_may_be(here: Path) -> None:
    run = make_run("sample")
    assert find_model(None) == find_model(run) == run / "best"
    assert find_model(run / "last") == run / "last"
    shutil.rmtree(run / "best")
    assert find_model(run) == run / "last"
    (here / "ALBEF.pth").touch()
    assert find_model(here / "ALBEF.pth") == here / "ALBEF.pth"


def test_a_model_that_a_kill_moved_aside(here: Path) -> None:
    run = make_run("sample")
    (run / "best").rename(run / ".best.agatool-old")
    assert find_model(run) == run / "best"
    assert is_model(run / "best")


def test_without_any_run_the_shipped_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_model(None) == SHIPPED
    make_run("sample", models=())  # has not saved anything yet
    assert find_model(None) == SHIPPED
    assert "ships" in capsys.readouterr().err


def test_what_is_no_checkpoint(here: Path) -> None:
    started = make_run("sample", models=())
    with pytest.raises(CheckpointError, match="no saved model yet"):
        find_model(started)
    for path in (here / "nowhere", here, Path("."), Path("..")):
        with pytest.raises(CheckpointError, match="not a model folder or a run") as caught:
            find_model(path)
        assert "runs/NAME" in caught.value.hint


# --- which folder ---


def test_fresh_names(here: Path) -> None:
    assert fresh_run("sample") == Path("runs/sample")
    make_run("sample")
    assert fresh_run("sample") == Path("runs/sample-2")
    make_run("sample-2")
    Path("runs/sample-3").mkdir()  # empty is free
    Path("runs/sample-3/.config.toml.abcdefgh.toml").touch()  # all that a kill left
    assert fresh_run("sample") == Path("runs/sample-3")
    claim(Path("runs/sample-3"), resume=False, overwrite=False)


@pytest.mark.parametrize(("resume", "overwrite"), [(False, False), (True, False), (False, True)])
def test_claiming_what_is_free_or_not_a_run(here: Path, resume: bool, overwrite: bool) -> None:
    (here / "empty").mkdir()
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter1.tex").write_text("years of work")
    (here / "file").write_text("mine")
    for name in ("new", "empty"):
        if resume:
            with pytest.raises(UsageError, match="no run to resume"):
                claim(here / name, resume, overwrite)
        else:
            claim(here / name, resume, overwrite)
    for name in ("thesis", "file"):
        with pytest.raises(UsageError):
            claim(here / name, resume, overwrite)
    assert (here / "thesis" / "chapter1.tex").read_text() == "years of work"
    assert (here / "file").read_text() == "mine"


def test_claiming_a_run(here: Path) -> None:
    run = make_run("sample")
    with pytest.raises(UsageError, match="not empty") as caught:
        claim(run, resume=False, overwrite=False)
    assert "--resume" in caught.value.hint
    assert "--overwrite" in caught.value.hint
    claim(run, resume=True, overwrite=False)
    claim(run, resume=False, overwrite=True)
    assert is_model(run / "best")  # not removed before the new run is sure to start


def test_clearing_follows_no_link(here: Path) -> None:
    run = make_run("sample")
    (here / "precious").mkdir()
    (here / "precious" / "a.txt").touch()
    (run / "link").symlink_to(here / "precious")
    (run / "file-link").symlink_to(here / "precious" / "a.txt")
    clear(run)
    assert list(run.iterdir()) == []
    assert (here / "precious" / "a.txt").exists()


# --- what an evaluation fills in ---


def test_evaluation_of_a_run_on_its_own_data(here: Path) -> None:
    run = make_run("mine", "rstpreid")
    plan = evaluation_plan(run / "best", None, None, "test", {"rerank": None}, None)
    assert (plan.dataset, plan.data, plan.out) == ("rstpreid", Path("data/rstpreid"), run)
    assert plan.config.rerank == 7  # the run's
    assert evaluation_plan(run / "best", None, None, "test", {"rerank": 0}, None).config.rerank == 0
    assert evaluation_plan(run / "best", None, None, "val", {}, None).out == run / "eval-rstpreid-val"
    assert evaluation_plan(run / "best", None, None, "val", {}, here / "out").out == here / "out"


def test_evaluation_on_other_data_leaves_the_runs_files_alone(here: Path) -> None:
    run = make_run("mine", "rstpreid")
    other = evaluation_plan(run / "best", "CUHK-PEDES", None, "test", {}, None)
    assert (other.dataset, other.data) == ("cuhk-pedes", Path("data/cuhk-pedes"))
    assert other.out == run / "eval-cuhk-pedes-test"
    elsewhere = evaluation_plan(run / "best", None, here / "small", "test", {}, None)
    assert elsewhere.data == here / "small"
    assert elsewhere.out != run
    shipped = evaluation_plan(SHIPPED, None, None, "test", {}, None)
    assert shipped.dataset == "sample"
    assert shipped.out.is_relative_to("runs")
