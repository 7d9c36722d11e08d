"""Search at scale: a million made-up features on disk, exact cosine queries, time and memory; and the hint's errors.

python benchmarks/search_scale.py scale [--images 1000000] [--width 256]
python benchmarks/search_scale.py hint --data data/sample [--checkpoint runs/sample]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from agatool.checkpoint import load, save_tensors
from agatool.data.prepare import find_data
from agatool.encoding import encode_images, encode_texts
from agatool.files import contained, write_json
from agatool.hint import made_up_scores
from agatool.index import FORMAT, described, open_index
from agatool.report import write_csv
from agatool.retrieval import top_k
from agatool.runs import find_model

QUERIES, K = 20, 128
SHARES = (0.2, 0.5, 0.8)  # of made-up descriptions that fit as well


def make_index(folder: Path, images: int, width: int) -> None:
    """An index of random unit vectors, every tenth a copy of an earlier one so that scores tie."""
    folder.mkdir(parents=True)
    features = F.normalize(torch.randn(images, width, generator=torch.Generator().manual_seed(0)), dim=1)
    features[10::10] = features[:-10:10].clone()
    save_tensors(folder / "embeddings.safetensors", {"embeddings": features})
    names = [f"camera{number % 8}/{number:07}.jpg" for number in range(images)]
    hashes = [f"{number:064x}" for number in range(images)]
    write_csv(folder / "images.csv", pd.DataFrame({"path": names, "sha256": hashes, "size": 1, "mtime_ns": 1}))
    info = {"format": FORMAT, "root": str(folder), "model": "", "fingerprint": "", "made_up": [0.5]}
    write_json(folder / "index.json", {**info, "files": described(folder)})


def query(folder: Path, threads: int) -> dict[str, float]:
    """Open the index and ask: seconds and the process's peak memory."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    index = open_index(folder)
    opened = time.perf_counter() - started
    width = index.embeddings.shape[1]
    queries = F.normalize(torch.randn(QUERIES, width, generator=torch.Generator().manual_seed(1)), dim=1)
    seconds = []
    for row in queries.split(1):
        started = time.perf_counter()
        top_k(row, index.embeddings, K)
        seconds.append(time.perf_counter() - started)
    # Not getrusage: its maximum counts the parent's memory in, which made the index.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1024**2
    return {"open": opened, "first": seconds[0], "median": float(np.median(seconds[1:])), "max": max(seconds[1:]),
            "peak_gib": peak}  # fmt: skip


def check(folder: Path) -> None:
    """The answers against brute force: a stable sort of every score, and the same sums in double precision."""
    features = open_index(folder).embeddings
    queries = F.normalize(torch.randn(QUERIES, features.shape[1], generator=torch.Generator().manual_seed(1)), dim=1)
    for row in queries.split(1):
        scores, rows = top_k(row, features, K)
        wanted = (row @ features.T).sort(dim=1, descending=True, stable=True)
        assert torch.equal(rows, wanted.indices[:, :K])
        assert torch.equal(scores, wanted.values[:, :K])
        double = np.concatenate([part.double().numpy() @ row[0].double().numpy() for part in features.split(100_000)])
        last = np.partition(double, -K)[-K]
        assert (double[rows[0].numpy()] >= last - 1e-6).all()
    print(f"{QUERIES} queries equal brute force exactly, ties included")


def scale(images: int, width: int) -> None:
    """Build once, then measure in fresh processes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "index"
        make_index(folder, images, width)
        print(f"{images:,} images, width {width}: {(folder / 'embeddings.safetensors').stat().st_size / 1e9:.2f} GB")
        for threads in (1, 2):
            command = [sys.executable, __file__, "query", str(folder), "--threads", str(threads)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{threads} threads: opened in {found['open']:.2f} s, peak memory {found['peak_gib']:.2f} GiB;")
            print(f"  first query {found['first']:.3f} s, median {found['median']:.3f} s, most {found['max']:.3f} s")
        check(folder)


def hint(data: Path, checkpoint: Path | None, seeds: int = 5) -> None:
    """How often "probably not in this gallery" is right: captions of people in the gallery and of people held out."""
    prepared = find_data("sample", data)
    images, captions = prepared.split("test")
    model = load(find_model(checkpoint))
    paths = [contained(prepared.image_root, path) for path in images["path"]]
    gallery = encode_images(model, paths, 64, keep_bytes=0).features
    texts = encode_texts(model, model.tokenizer, captions["caption"].tolist(), 64).features
    person_of = images.set_index("image_id")["person_id"]
    described_person = captions["image_id"].map(person_of).to_numpy()
    people = images["person_id"].unique()
    print("gallery  share of made-up  said of people held out  said of people in it  right at 1 : 1")
    for part in (0.5, 0.1):
        rates = []
        for seed in range(seeds):
            kept = np.random.default_rng(seed).permutation(people)[: max(1, round(part * len(people)))]
            features = gallery[torch.from_numpy(images["person_id"].isin(kept).to_numpy())]
            made_up = made_up_scores(model, features)
            best = top_k(texts, features, 1)[0][:, 0].double().numpy()
            as_good = 1 - np.searchsorted(made_up, best) / len(made_up)
            here = np.isin(described_person, kept)
            rates.append([(as_good[~here] >= share, as_good[here] >= share) for share in SHARES])
        for place, share in enumerate(SHARES):
            out, inside = (np.mean([rate[place][side].mean() for rate in rates]) for side in (0, 1))
            right = out / (out + inside) if out + inside else float("nan")
            print(f"{len(features):7,}  {share:16.0%}  {out:23.1%}  {inside:20.1%}  {right:14.0%}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    scaling = commands.add_parser("scale")
    scaling.add_argument("--images", type=int, default=1_000_000)
    scaling.add_argument("--width", type=int, default=256)
    asking = commands.add_parser("query")
    asking.add_argument("folder", type=Path)
    asking.add_argument("--threads", type=int, default=2)
    hinting = commands.add_parser("hint")
    hinting.add_argument("--data", type=Path, default=Path("data/sample"))
    hinting.add_argument("--checkpoint", type=Path)
    given = parser.parse_args()
    if given.command == "scale":
        scale(given.images, given.width)
    elif given.command == "query":
        print(json.dumps(query(given.folder, given.threads)))
    else:
        hint(given.data, given.checkpoint)


if __name__ == "__main__":
    main()
