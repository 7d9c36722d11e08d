"""What wins over what in a configuration, what its errors say, and that it survives TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from agatool.config import PRESETS, ModelConfig, build_config, explain, parse_override, plan_run, read_toml, to_toml
from agatool.errors import UsageError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --- precedence ---


def test_preset_file_option_set(tmp_path: Path) -> None:
    """The same key given in every place; each place in turn is the strongest that is left."""
    file = write(tmp_path / "run.toml", "[eval]\nrerank = 2\nbatch_size = 2\nbootstrap = 2\n")
    given = {"eval.batch_size": 3, "eval.bootstrap": 3, "train.seed": None}
    config = plan_run({"preset": "tiny", **given}, file, ["eval.bootstrap=4"])
    assert config.eval.tail == "itc"  # from nowhere: the default
    assert PRESETS["tiny"]["eval"]["rerank"] != 2
    assert (config.eval.rerank, config.eval.batch_size, config.eval.bootstrap) == (2, 3, 4)
    assert config.train.seed == 0  # an option left out is no option


def test_the_last_set_wins() -> None:
    config = plan_run({}, overrides=["train.lr=0.5", "train.lr=0.25", "model.text.max_tokens=32"])
    assert config.train.lr == 0.25
    assert config.model.text.max_tokens == 32
    assert config.model.text_width == PRESETS["tiny"]["model"]["text_width"]  # its neighbours stay


def test_a_file_chooses_the_preset_unless_an_option_does(tmp_path: Path) -> None:
    file = write(tmp_path / "run.toml", 'preset = "base"')
    assert plan_run({}, file).model.image_size == (384, 384)
    assert plan_run({"preset": "small"}, file).model.image_size == (224, 112)


def test_resuming_starts_from_the_stored_configuration(tmp_path: Path) -> None:
    stored = write(tmp_path / "config.toml", "[train]\nlr = 0.5\nseed = 5\n")
    config = plan_run({"train.seed": 6}, stored=stored)
    assert (config.train.lr, config.train.seed) == (0.5, 6)


def test_derived_values() -> None:
    assert plan_run({}).data.dir == "data/sample"
    rstpreid = plan_run({"data.dataset": "rstpreid"})
    assert (rstpreid.data.dir, rstpreid.train.init) == ("data/rstpreid", "scratch")
    assert plan_run({"data.dataset": "rstpreid", "data.dir": "elsewhere"}).data.dir == "elsewhere"
    # The shipped weights fit the tiny model as it is, and know the sample's people.
    assert plan_run({}).train.init == "shipped"
    assert plan_run({}, overrides=["train.lr=0.1"]).train.init == "shipped"
    assert plan_run({}, overrides=["model.text_layers=1"]).train.init == "scratch"
    assert plan_run({"preset": "small"}).train.init == "scratch"
    assert plan_run({"train.text_model": "some-bert"}).train.init == "scratch"
    assert plan_run({"train.init": "here.pth"}).train.init == "here.pth"


def test_from_scratch_what_the_user_says_still_wins() -> None:
    scratch, shipped = plan_run({"train.init": "scratch"}), plan_run({})
    assert scratch.train.epochs > shipped.train.epochs
    told = plan_run({"train.init": "scratch", "train.epochs": 1}, overrides=["objective.itc_only=0.1"])
    assert (told.train.epochs, told.objective.itc_only) == (1, 0.1)


# --- round trip ---


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip(preset: str, tmp_path: Path) -> None:
    config = plan_run({"preset": preset, "train.max_steps": 7}, overrides=["data.dir=ä \"b\" 'c' \\d", "train.lr=1e-7"])
    file = write(tmp_path / "config.toml", to_toml(config))
    assert plan_run({}, file) == config
    assert plan_run({}, stored=file) == config
    assert to_toml(plan_run({}, file)) == file.read_text()


@pytest.mark.parametrize("preset", ["small", "base"])
def test_what_a_preset_sets_can_be_taken_back(preset: str, tmp_path: Path) -> None:
    """A converted model may have no timm name and no word limit, whatever the preset says."""
    overrides = ["model.image_model=none", "model.text.max_words=none", "train.max_steps=none"]
    config = plan_run({"preset": preset, "train.max_steps": 3}, overrides=overrides)
    assert (config.model.image_model, config.model.text.max_words, config.train.max_steps) == (None, None, None)
    file = write(tmp_path / "config.toml", to_toml(config))
    assert plan_run({}, file) == config


@given(
    lr=st.floats(1e-12, 1e3), ratio=st.floats(0.001, 0.999), text=st.text(st.characters(exclude_categories=["Cs"])),
    size=st.tuples(st.integers(1, 2000), st.integers(1, 2000)), flag=st.booleans(),
)  # fmt: skip
def test_any_values_round_trip(lr: float, ratio: float, text: str, size: tuple[int, int], flag: bool) -> None:
    changes = {"train": {"lr": lr}, "masking": {"ratio": ratio}, "data": {"dir": text, "cache": flag}}
    config = build_config({**changes, "model": {"image_size": list(size)}})
    assert build_config(tomllib.loads(to_toml(config))) == config


# --- errors ---


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.learning_rate=1", "train.learning_rate: there is no such key"),
        ("trian.lr=1", "trian: there is no such key"),
        ("train.lr=fast", "train.lr: .*number.*'fast'"),
        ("train.lr=-1", "train.lr: .*greater than 0"),
        ("train.lr=nan", "train.lr"),
        ("train.lr=", "train.lr"),
        ("train.epochs=1.5", "train.epochs: .*integer"),
        ("data.flip=2", "data.flip: .*less than or equal to 1"),
        ("data.cache=maybe", "data.cache: .*boolean"),
        ("masking.strategy=best", "masking.strategy: .*'attention', 'random' or 'content'"),
        ("model.image_size=128", "model.image_size"),
        ("model.image_size=[128,0]", "model.image_size.1: .*greater than or equal to 1"),
        ("model.image_heads=5", "model: image_width 96 is no multiple of image_heads 5"),
        ("model.text_heads=5", "model: text_width 96 is no multiple of text_heads 5"),
        ("model.max_positions=40", "model: text.max_tokens 72 exceeds max_positions 40"),
        ("model.image_std=[1,0,1]", "model.image_std.1: .*greater than 0"),
        ("model.text_layers=1000000000", "model.text_layers: .*less than or equal to"),
        ("data.dir=[" + "9," * 1000 + "]", "data.dir"),
    ],
)
def test_a_wrong_value_is_named(override: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        plan_run({}, overrides=[override])
    assert caught.value.message.startswith("Configuration key ")
    assert "--print-config" in caught.value.hint
    assert len(caught.value.message) < 200
    assert "\n" not in caught.value.message
    assert "pydantic" not in caught.value.message


@pytest.mark.parametrize("override", ["lr=1", "train.lr", "", "=", ".=1", "train.=1", ".lr=1", "train..lr=1"])
def test_an_override_of_the_wrong_form(override: str) -> None:
    with pytest.raises(UsageError, match=r"not section\.key=value") as caught:
        parse_override(override)
    assert "--set" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("1e-3", 0.001), ("true", True), ("[1,2]", [1, 2]), ("'a=b'", "a=b"), ("a b", "a b"), ("=", "="),
     ("[" * 100_000, "[" * 100_000), ("9" * 5000, "9" * 5000)],
)  # fmt: skip
def test_override_values(text: str, value: Any) -> None:
    parsed = parse_override(f" data.dir = {text}")
    assert parsed["data"]["dir"] == value


@pytest.mark.parametrize(
    "raw",
    [b"[train", b"\xff\xfe", b"a = 1\na = 2", b"a = " + b"[" * 100_000, b"a = " + b"9" * 5000, b"\0"],
)
def test_broken_toml(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(raw)
    with pytest.raises(UsageError, match=r"run\.toml is not valid TOML") as caught:
        read_toml(tmp_path / "run.toml")
    assert caught.value.exit_code == 2


def test_no_toml(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UsageError, match="Cannot read"):
            read_toml(path)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        ({"preset": "huge"}, "Unknown preset 'huge'"),
        ({"preset": []}, "Unknown preset"),
        ({"train": 3}, "train: "),
        ({"model": {"text": "long"}}, "model.text: "),
        ({"data": {"dir": {"a": 1}}}, "data.dir: "),
        ({"extra": {}}, "extra: there is no such key"),
    ],
)
def test_a_file_of_the_wrong_shape(layer: dict[str, Any], says: str, tmp_path: Path) -> None:
    file = write(tmp_path / "run.toml", tomli_w.dumps(layer))
    with pytest.raises(UsageError, match=says):
        plan_run({}, file)


def test_explain_is_one_short_line_for_hostile_values() -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate({"text_width": "x" * 10_000})
    assert len(explain(caught.value)) < 200
    with pytest.raises(ValidationError) as caught:
        ModelConfig(image_heads=7)
    assert explain(caught.value) == "image_width 96 is no multiple of image_heads 7"
