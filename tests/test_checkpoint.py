"""Model folders and checkpoints: the same bytes back, and one clear error for whatever is broken or foreign."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import agatool
from agatool.checkpoint import checkpoints, load, read_tensors, save_checkpoint, save_model
from agatool.errors import CheckpointError, DiskError

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tiny_run: Path, tmp_path: Path) -> Path:
    """A model folder to break."""
    return Path(shutil.copytree(tiny_run / "best", tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert caught.value.exit_code == 4
    assert caught.value.hint
    assert len(caught.value.message) < 1000
    return caught.value.message


# --- what is whole ---


def test_saved_and_loaded_is_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    model = agatool.load(folder)
    assert not model.training
    save_model(tmp_path / "again", model, (folder / "README.md").read_text())
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "config.json", WEIGHTS, "tokenizer.json"]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_loading_draws_no_random_numbers(folder: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_by_any_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert load(".").config == load(str(folder)).config


def test_half_precision_weights_become_float(folder: Path) -> None:
    edit_weights(
        folder, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items() if t.is_floating_point()})
    )
    assert {p.dtype for p in load(folder).parameters()} == {torch.float32}


def test_the_model_card_says_what_it_is(tiny_run: Path) -> None:
    card = (tiny_run / "last" / "README.md").read_text()
    for fact in ("data set: sample", "preset: tiny", "scratch", "step 8 of 8", "attention", "personal"):
        assert fact in card


# --- what is broken ---


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "noise", "folder"])
def test_a_damaged_file(folder: Path, name: str, damage: str) -> None:
    file = folder / name
    whole = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "missing":
        file.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "noise": b"\x80\xff\0" * 999}[damage])
    assert str(folder) in refused(folder)


def test_no_folder_at_all(tmp_path: Path) -> None:
    assert "not a model folder" in refused(tmp_path / "nowhere")
    assert "not a model folder" in refused(tmp_path)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ('{"model_type": "bert", "hidden_size": 768}', "not the configuration of an agatool model"),
        ("[]", "not the configuration"),
        ("3", "not the configuration"),
        ('{"format": 2}', "not the configuration"),
        ("[" * 100_000, "broken"),
        ('{"a":' * 100_000, "broken"),
        ('{"format": 1, "text_width": "wide"}', "broken: text_width"),
        ('{"format": 1, "hidden_size": 768}', "broken: hidden_size: there is no such key"),
    ],
)
def test_a_configuration_that_is_not_ours(folder: Path, raw: str, says: str) -> None:
    (folder / "config.json").write_text(raw)
    message = refused(folder)
    assert says in message
    assert "pydantic" not in message


@pytest.mark.parametrize(
    "changes",
    [
        {"text_heads": 7}, {"image_heads": 7}, {"patch": 12}, {"image_size": [0, 16]}, {"image_std": [0, 1, 1]},
        {"image_model": "no_such_vit"}, {"image_model": "resnet18"}, {"image_depth": 10**9}, {"text_width": 10**30},
        {"vocab_size": 10**6, "text_mlp": 2**20}, {"text_layers": -1}, {"max_positions": 10},
    ],
)  # fmt: skip
def test_sizes_that_cannot_be(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    refused(folder)


def test_weights_of_another_shape(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"itm_head.weight": torch.zeros(3, 24)}))
    assert "1 of another shape (itm_head.weight)" in refused(folder)


def test_weights_too_few_and_too_many(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["itm_head.w"] = tensors.pop("itm_head.weight")

    edit_weights(folder, change)
    message = refused(folder)
    assert "1 missing (itm_head.weight)" in message
    assert "1 unknown (itm_head.w)" in message


def test_a_file_that_lies_about_its_size(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    refused(folder)
    (folder / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + b"{}")
    refused(folder)


def test_a_tokenizer_larger_than_the_model(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["newcomer"] = len(vocabulary) + 5
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "different models" not in refused(folder)  # that is the hint
    assert "tokenizer has" in refused(folder)


@pytest.mark.parametrize("raw", ["[" * 100_000, "{}", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'])
def test_a_tokenizer_that_is_none(folder: Path, raw: str) -> None:
    (folder / "tokenizer.json").write_text(raw)
    refused(folder)


def test_a_pickle_is_not_opened(folder: Path) -> None:
    torch.save({"a": torch.zeros(3)}, folder / WEIGHTS)
    assert WEIGHTS in refused(folder)


# --- saving ---


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((1000,), value), "b.scale": torch.tensor(value), "n": torch.tensor([1, 2])}


def save(folder: Path, step: int, keep: int = 2) -> None:
    save_checkpoint(folder, step, tensors(step), tensors(-step), {"new": ["w"]}, keep)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100):
        save(tmp_path, step)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-10", "step-100"]  # by number, not by name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-100"]
    assert json.loads((tmp_path / "step-100" / "state.json").read_text()) == {"step": 100, "new": ["w"]}
    for name, value in read_tensors(tmp_path / "step-100" / WEIGHTS).items():
        assert torch.equal(value, tensors(100)[name])


def test_half_a_checkpoint_is_none_and_goes(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-1" / "state.json").unlink()  # what a kill while pruning leaves
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-٣").mkdir()
    assert checkpoints(tmp_path) == []
    save(tmp_path, 2, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-2"]
    assert not (tmp_path / "step-1").exists()
    assert (tmp_path / "step-notes").exists()


def test_a_full_disk_leaves_the_former(tiny_run: Path, folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    save(tmp_path / "checkpoints", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(DiskError, match="Cannot write"):
            save_model(folder, model, "card")
        with pytest.raises(DiskError, match="Cannot write"):
            save(tmp_path / "checkpoints", 2, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "model"]
