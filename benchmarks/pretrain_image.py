"""Teaches `tiny`'s image encoder to name rendered people's attributes and parts, as ImageNet starts one of photos.

python benchmarks/pretrain_image.py data/pretrain runs/pretrain-image writes image_encoder.safetensors, for
`aga train --init scratch --image-weights`. Stop it with Ctrl-C and run it again: it continues at its last checkpoint.

Shapes: B images, A attributes, P patches, K parts, C colours.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from agatool import console
from agatool.checkpoint import (
    checkpoints,
    load_state,
    pack_optimizer,
    read_tensors,
    save_checkpoint,
    save_tensors,
    unpack_optimizer,
)
from agatool.config import ModelConfig, build_config
from agatool.convert import new_model
from agatool.data.figure import COLOR_OF, PARTS
from agatool.data.images import decode_image, eval_transform, to_tensor, train_transform
from agatool.data.prepare import Prepared, load_prepared
from agatool.data.sampling import stream_seed
from agatool.model import ImageEncoder, evaluating

STEPS, BATCH, LEARNING_RATE, SEED, CHECKPOINT_EVERY = 9000, 64, 4e-3, 3, 500
FLIP, SHIFT = 0.5, 0.05
PATCH_WEIGHT = 0.5
MOST_VALUES = 30  # a column with more (a name, a number) is no class


class Crops:
    """A split's images and part masks in memory, and what its persons look like."""

    def __init__(self, prepared: Prepared, split: str, model: ModelConfig) -> None:
        truth = prepared.image_root.parent / "truth"
        paths, _ = prepared.split(split)
        self.model = model

        def image(path: str) -> Tensor:
            return to_tensor(decode_image(prepared.image_root / path), model.image_size)

        def mask(path: str) -> Tensor:
            return torch.from_numpy(np.array(Image.open((truth / "parts" / path).with_suffix(".png"))))

        with ThreadPoolExecutor() as pool:
            self.images = torch.stack(list(pool.map(image, paths["path"])))
            self.masks = torch.stack(list(pool.map(mask, paths["path"])))
        looks = pd.read_csv(truth / "identities.csv", na_filter=False, dtype=str).set_index("id")
        looks = looks.drop(columns=["split", "twin_of", "twin_attribute"])
        looks = looks[[name for name in looks if 1 < looks[name].nunique() <= MOST_VALUES]]
        self.names, self.sizes = list(looks), [int(count) for count in looks.nunique()]
        identity = paths["path"].str.extract(r"(\d+)_c")[0].astype(int).astype(str)
        codes = looks.apply(lambda column: column.astype("category").cat.codes)
        self.attributes = torch.tensor(codes.loc[identity].to_numpy(copy=True), dtype=torch.long)  # [images, A]
        columns = [COLOR_OF.get(part, "") for part in PARTS]
        self.colors = sorted({value for name in set(columns) - {""} for value in looks[name]} - {"none"})
        code = {color: number for number, color in enumerate(self.colors)}
        self.part_colors = torch.tensor(  # [images, K], -1 for a part without a colour's name
            [[code.get(row[name], -1) if name else -1 for name in columns] for _, row in looks.loc[identity].iterrows()]
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalised images, attributes [B, A], shares of the parts [B, P, K] and main colours [B, P] of a step."""
        epoch, number = divmod(step, len(self.images) // BATCH)
        order = np.random.default_rng([SEED, epoch]).permutation(len(self.images))
        chosen = torch.from_numpy(order[number * BATCH : (number + 1) * BATCH])

        def varied(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
            generator = torch.Generator().manual_seed(stream_seed(SEED, step, 0))  # masks move with their images
            return train_transform(pixels, generator, mean, std, flip=FLIP, pad=SHIFT, erase=0.0)

        images = varied(self.images[chosen], self.model.image_mean, self.model.image_std)
        masks = varied(self.masks[chosen, None].repeat(1, 3, 1, 1), (0.0,) * 3, (1 / 255,) * 3)[:, 0].round().long()
        shares = part_shares(masks, self.model.patch)
        seen = shares.clone()
        seen[..., 0] *= 0.5  # half a patch of background is not what the patch is about
        return images, self.attributes[chosen], shares, self.part_colors[chosen].gather(1, seen.argmax(2))


def part_shares(masks: Tensor, patch: int) -> Tensor:
    """Masks [B, height, width] -> the share of each part in each patch, [B, P, K]; every second pixel counts."""
    cells = masks[:, ::2, ::2].unflatten(1, (-1, patch // 2)).unflatten(3, (-1, patch // 2)).transpose(2, 3)
    return F.one_hot(cells.flatten(3).flatten(1, 2), len(PARTS)).float().mean(2)


class Reader(nn.Module):
    """The encoder with two linear readers: of [CLS], for the person, and of each patch, for what the patch shows."""

    def __init__(self, encoder: ImageEncoder, width: int, sizes: list[int], colors: int) -> None:
        super().__init__()
        self.encoder, self.sizes = encoder, sizes
        self.of_class = nn.Linear(width, sum(sizes))
        self.of_patch = nn.Linear(width, len(PARTS) + colors)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Images -> logits of each attribute [B, values], of parts [B, P, K] and of colours [B, P, C]."""
        tokens = self.encoder(images)
        patches = self.of_patch(tokens[:, 1:])
        return list(self.of_class(tokens[:, 0]).split(self.sizes, 1)), *patches.tensor_split([len(PARTS)], -1)


def losses(reader: Reader, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy: mean over the attributes; and over the patches, of parts plus colours."""
    images, attributes, shares, colors = batch
    person, part, color = reader(images)
    of_class = torch.stack([F.cross_entropy(logits, attributes[:, k]) for k, logits in enumerate(person)]).mean()
    of_parts = -(shares * F.log_softmax(part, -1)).sum(-1).mean()
    return of_class, of_parts + F.cross_entropy(color.flatten(0, 1), colors.flatten(), ignore_index=-1)


def accuracy(reader: Reader, crops: Crops) -> Tensor:
    """[A]: how often [CLS] tells the value."""
    right = []
    with evaluating(reader):
        for images, attributes in zip(crops.images.split(256), crops.attributes.split(256), strict=True):
            person, *_ = reader(eval_transform(images, crops.model.image_mean, crops.model.image_std))
            right.append(torch.stack([logits.argmax(1) for logits in person], 1) == attributes)
    return torch.cat(right).float().mean(0)


def main(folder: Path, out: Path) -> None:
    """Train to the last step, write the encoder and print what it tells."""
    prepared, config = load_prepared(folder), build_config({}, preset="tiny").model
    crops = Crops(prepared, "train", config)
    torch.manual_seed(SEED)
    encoder = new_model(config, SEED).image_encoder
    reader = Reader(encoder, config.image_width, crops.sizes, len(crops.colors))
    decays = [p for p in reader.parameters() if p.ndim > 1], [p for p in reader.parameters() if p.ndim <= 1]
    groups = [{"params": decays[0]}, {"params": decays[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=0.02, fused=True)
    schedule = CosineLRScheduler(
        optimizer, t_initial=STEPS, lr_min=1e-5, warmup_t=STEPS // 20, warmup_lr_init=1e-5, t_in_epochs=False
    )
    done = 0
    if found := checkpoints(out):
        load_state(reader, read_tensors(found[-1] / "model.safetensors"), found[-1])
        unpack_optimizer(optimizer, read_tensors(found[-1] / "trainer.safetensors"))
        done = int(found[-1].name.removeprefix("step-"))
    with console.progress("naming attributes", STEPS, done) as task:
        for step in range(done, STEPS):
            schedule.step_update(step)
            of_class, of_patches = losses(reader, crops.batch(step))
            optimizer.zero_grad()
            (of_class + PATCH_WEIGHT * of_patches).backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            task.advance(1, f"person {of_class.item():.3f} patches {of_patches.item():.3f}")
            if (step + 1) % CHECKPOINT_EVERY == 0:
                save_checkpoint(out, step + 1, reader.state_dict(), pack_optimizer(optimizer), {}, keep=1)
    save_tensors(out / "image_encoder.safetensors", encoder.vit.state_dict())
    told = accuracy(reader, Crops(prepared, "val", config)).tolist()
    rows = [[name, f"{100 * value:.1f}"] for name, value in zip(crops.names, told, strict=True)]
    console.table("Attributes told from [CLS] on val, percent right", ["attribute", "right"], rows)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
