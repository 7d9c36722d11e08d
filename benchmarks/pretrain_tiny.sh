#!/usr/bin/env bash
# Makes agatool/weights/tiny: 8,000 synthetic people of another seed than the sample's, from scratch. Stop it with
# Ctrl-C and run it again: it continues where it was. About two hours on one CPU core.
set -euo pipefail
run=runs/pretrain-tiny

aga prepare --dataset sample --identities 8000 --seed 1 --out data/pretrain
if [ -e "$run/config.toml" ]; then
    aga train --resume --out "$run"
else
    aga train --dataset sample --data data/pretrain --init scratch --seed 1 --max-steps 7200 \
        --mask attention --no-tem --set masking.ratio=0.25 --set objective.itc_only=0.2917 \
        --set eval.every=2 --set eval.rerank=8 --set train.checkpoint_every=200 --out "$run"
fi
rm -rf agatool/weights/tiny
mkdir -p agatool/weights
cp -r "$run/best" agatool/weights/tiny
