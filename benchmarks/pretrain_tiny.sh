#!/usr/bin/env bash
# Makes agatool/weights/tiny from 8,000 synthetic people of another seed than the sample's: first the image encoder learns
# to name what they wear, then the whole model trains. Stop it with Ctrl-C and run it again: it continues where it was.
set -euo pipefail
run=runs/pretrain
image=runs/pretrain-image

aga prepare --dataset sample --identities 8000 --seed 1 --out data/pretrain
[ -e $image/image_encoder.safetensors ] || python benchmarks/pretrain_image.py data/pretrain $image
if [ -e $run/config.toml ]; then
    aga train --resume --out $run
else
    aga train --dataset sample --data data/pretrain --out $run --init scratch --seed 1 --max-steps 8800 \
        --image-weights $image/image_encoder.safetensors --mask attention --no-tem --set masking.ratio=0.25 \
        --set objective.itc_only=0.14 --set objective.queue_size=4096 --set train.warmup=0.05 \
        --set train.lr=5e-4 --set train.head_lr=1e-3 --set train.min_lr=1e-5 --set train.k_decay=1 --set data.half_size=0 \
        --set train.checkpoint_every=200 --set eval.every=2 --set eval.rerank=8
fi
rm -rf agatool/weights/tiny
mkdir -p agatool/weights
cp -r $run/best agatool/weights/tiny
