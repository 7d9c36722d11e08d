#!/usr/bin/env bash
# Makes agatool/weights/tiny: 8,000 synthetic people of another seed than the sample's, in two trainings. Stop it with
# Ctrl-C and run it again: it continues where it was. About two and a half hours of CPU.
set -euo pipefail
common=(--dataset sample --data data/pretrain --mask attention --no-tem --set masking.ratio=0.25
    --set eval.every=2 --set eval.rerank=8 --set train.checkpoint_every=200)

part() {
    local run=$1
    shift
    if [ -e "$run/config.toml" ]; then
        aga train --resume --out "$run"
    else
        aga train "${common[@]}" "$@" --out "$run"
    fi
}

aga prepare --dataset sample --identities 8000 --seed 1 --out data/pretrain
part runs/pretrain-1 --init scratch --seed 1 --max-steps 7200 --set objective.itc_only=0.2917
part runs/pretrain-2 --init runs/pretrain-1/best --seed 2 --max-steps 3400 \
    --set train.lr=7e-4 --set train.head_lr=7e-4 --set train.warmup=0.06
rm -rf agatool/weights/tiny
mkdir -p agatool/weights
cp -r runs/pretrain-2/best agatool/weights/tiny
