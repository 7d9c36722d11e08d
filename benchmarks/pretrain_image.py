"""Teaches `tiny`'s image encoder to name rendered people's attributes, as ImageNet starts an encoder of photos.

python benchmarks/pretrain_image.py data/pretrain runs/pretrain-image writes image_encoder.safetensors, for
`aga train --init scratch --image-weights`. Stop it with Ctrl-C and run it again: it continues at its last checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
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
from agatool.config import build_config
from agatool.convert import new_model
from agatool.data.images import decode_image, eval_transform, to_tensor
from agatool.data.prepare import Prepared, load_prepared
from agatool.data.sampling import TrainingData
from agatool.model import ImageEncoder, evaluating
from agatool.tokenization import load_tokenizer

STEPS, BATCH, LEARNING_RATE, SEED, CHECKPOINT_EVERY = 5000, 64, 2e-3, 3, 500
MOST_VALUES = 30  # a column with more (a name, a number) is no class


class AttributeReader(nn.Module):
    """The encoder with two linear readers: of [CLS], and of all patches, so that each place learns what it shows."""

    def __init__(self, encoder: ImageEncoder, width: int, sizes: list[int]) -> None:
        super().__init__()
        self.encoder, self.sizes = encoder, sizes
        rows, columns = encoder.grid
        self.of_class = nn.Linear(width, sum(sizes))
        self.of_patches = nn.Linear(rows * columns * width, sum(sizes))

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Images [B, 3, height, width] -> logits [B, values] of each attribute, as either reader says."""
        tokens = self.encoder(images)
        readings = self.of_class(tokens[:, 0]), self.of_patches(tokens[:, 1:].flatten(1))
        return list(readings[0].split(self.sizes, 1)), list(readings[1].split(self.sizes, 1))


def attributes(prepared: Prepared) -> tuple[list[str], list[int], dict[int, Tensor]]:
    """Names, numbers of values, and for each person of the prepared data the value's number, [attributes]."""
    truth = pd.read_csv(prepared.image_root.parent / "truth" / "identities.csv", na_filter=False, dtype=str)
    truth = truth.set_index("id").drop(columns=["split", "twin_of", "twin_attribute"])
    truth = truth[[name for name in truth if 1 < truth[name].nunique() <= MOST_VALUES]]
    codes = truth.apply(lambda column: column.astype("category").cat.codes)
    identity = prepared.images["path"].str.extract(r"(\d+)_c")[0].astype(int).astype(str)
    values = torch.tensor(codes.loc[identity].to_numpy(copy=True), dtype=torch.long)
    sizes = [int(count) for count in truth.nunique()]
    return list(truth), sizes, dict(zip(prepared.images["person_id"], values, strict=True))


def loss(reading: list[Tensor], target: Tensor) -> Tensor:
    """Cross-entropy, mean over the attributes; `target` is [B, attributes]."""
    return torch.stack([F.cross_entropy(logits, target[:, k]) for k, logits in enumerate(reading)]).mean()


def accuracy(reader: AttributeReader, prepared: Prepared, of_person: dict[int, Tensor], data: TrainingData) -> Tensor:
    """[attributes]: how often [CLS] tells the value, on val."""
    images, _ = prepared.split("val")
    model, right = data.model, []
    with evaluating(reader):
        for part in range(0, len(images), 256):
            rows = images.iloc[part : part + 256]
            pixels = [to_tensor(decode_image(prepared.image_root / path), model.image_size) for path in rows["path"]]
            reading, _ = reader(eval_transform(torch.stack(pixels), model.image_mean, model.image_std))
            target = torch.stack([of_person[person] for person in rows["person_id"]])
            right.append(torch.stack([logits.argmax(1) for logits in reading], 1) == target)
    return torch.cat(right).float().mean(0)


def main(folder: Path, out: Path) -> None:
    """Train to the last step, write the encoder and print what it tells."""
    prepared, config = load_prepared(folder), build_config({}, preset="tiny")
    tokenizer = load_tokenizer(prepared.tokenizer, config.model.text)
    data = TrainingData(prepared, tokenizer, config.model, config.data, BATCH, SEED)
    names, sizes, of_person = attributes(prepared)
    torch.manual_seed(SEED)
    encoder = new_model(config.model.model_copy(update={"vocab_size": tokenizer.vocab_size}), SEED).image_encoder
    reader = AttributeReader(encoder, config.model.image_width, sizes)
    decays = [p for p in reader.parameters() if p.ndim > 1], [p for p in reader.parameters() if p.ndim <= 1]
    groups = [{"params": decays[0]}, {"params": decays[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=0.02, fused=True)
    schedule = CosineLRScheduler(
        optimizer, t_initial=STEPS, lr_min=1e-5, warmup_t=STEPS // 10, warmup_lr_init=1e-5, t_in_epochs=False
    )
    done = 0
    if found := checkpoints(out):
        load_state(reader, read_tensors(found[-1] / "model.safetensors"), found[-1])
        unpack_optimizer(optimizer, read_tensors(found[-1] / "trainer.safetensors"))
        done = int(found[-1].name.removeprefix("step-"))
    with console.progress("naming attributes", STEPS, done) as task:
        for step, batch in enumerate(data.batches(range(done, STEPS)), done + 1):
            schedule.step_update(step - 1)
            target = torch.stack([of_person[int(person)] for person in batch.persons])
            of_class, of_patches = (loss(reading, target) for reading in reader(batch.images))
            optimizer.zero_grad()
            (of_class + of_patches).backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            task.advance(1, f"loss {of_class.item():.3f}")
            if step % CHECKPOINT_EVERY == 0:
                save_checkpoint(out, step, reader.state_dict(), pack_optimizer(optimizer), {}, keep=1)
    save_tensors(out / "image_encoder.safetensors", encoder.vit.state_dict())
    told = accuracy(reader, prepared, of_person, data).tolist()
    rows = [[name, f"{100 * value:.1f}"] for name, value in zip(names, told, strict=True)]
    console.table("Attributes told from [CLS] on val, percent right", ["attribute", "right"], rows)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
