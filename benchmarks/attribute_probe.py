"""What a model's image feature gives away of the rendered people: a linear probe for each attribute.

python benchmarks/attribute_probe.py agatool/weights/tiny data/sample prints, attribute by attribute, how often a linear
reading of the feature (trained on the train split, judged on test) is right, beside the commonest value's share.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import agatool
from agatool import console
from agatool.data.prepare import Prepared, load_prepared
from agatool.encoding import encode_images

ATTRIBUTES = (
    "gender", "hair_length", "hair_color", "top_type", "top_color", "top_pattern", "bottom_type", "bottom_color",
    "shoe_type", "shoe_color", "bag_type", "bag_color", "hat_type", "glasses",
)  # fmt: skip
EPOCHS, BATCH, LEARNING_RATE = 30, 512, 3e-3


def features(model: agatool.PersonSearchModel, prepared: Prepared, split: str) -> Tensor:
    """[N, E], in the order of images.csv."""
    images, _ = prepared.split(split)
    return encode_images(model, [prepared.image_root / path for path in images["path"]], 128).features.float()


def labels(prepared: Prepared, split: str) -> pd.DataFrame:
    """The attributes of each image's person, from the file name's identity."""
    truth = pd.read_csv(prepared.image_root.parent / "truth" / "identities.csv", na_filter=False, dtype=str)
    images, _ = prepared.split(split)
    identity = images["path"].str.extract(r"(\d+)_c")[0].astype(int).astype(str)
    return truth.set_index("id").loc[identity, list(ATTRIBUTES)]


def probe(train: Tensor, train_labels: pd.Series, test: Tensor, test_labels: pd.Series) -> tuple[float, float]:
    """Accuracy of a linear reading on test, and the share of the commonest value there."""
    values = sorted(set(train_labels))
    known = test_labels.isin(values).to_numpy()
    target = torch.tensor([values.index(value) for value in train_labels])
    reader = nn.Linear(train.shape[1], len(values))
    optimizer = torch.optim.AdamW(reader.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(reader(train[rows]), target[rows]).backward()
            optimizer.step()
    with torch.inference_mode():
        said = [values[index] for index in reader(test).argmax(1).tolist()]
    right = (pd.Series(said).to_numpy() == test_labels.to_numpy()) & known
    return float(right.mean()), float(test_labels.value_counts(normalize=True).iloc[0])


def main(model_folder: Path, data: Path) -> None:
    """Print the table."""
    torch.manual_seed(0)
    model, prepared = agatool.load(model_folder), load_prepared(data)
    train, test = features(model, prepared, "train"), features(model, prepared, "test")
    mean, spread = train.mean(0), train.std(0)
    train, test = (train - mean) / spread, (test - mean) / spread
    train_labels, test_labels = labels(prepared, "train"), labels(prepared, "test")
    rows = []
    for name in ATTRIBUTES:
        right, commonest = probe(train, train_labels[name], test, test_labels[name])
        rows.append([name, f"{100 * right:.1f}", f"{100 * commonest:.1f}"])
    console.table("Linear probe of the image feature, percent right", ["attribute", "right", "commonest value"], rows)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
