#!/usr/bin/env bash
# What `make demo-short` does: the commands of the demo on a model of fewer steps and on six icons,
# then a verification of what they leave. It shows that everything works, not what is memorized: at
# a threshold of 0.3 so young a model replicates something.
set -euo pipefail
folder=results/demo_short
few=("model.path=$folder/model/final" 'dataset.take={duplicated: 4, single: 1, held_out: 1}'
    replication.threshold=0.3)
.venv/bin/invmm-train experiment=demo_model training.num_steps=600 "run_dir=$folder/model"
.venv/bin/invmm experiment=demo "${few[@]}" inversion=trajectory inversion.num_steps=48 \
    "run_dir=$folder" | tee "$folder/output"
.venv/bin/invmm experiment=demo "${few[@]}" measurement=free_sampling measurement.num_samples=128 \
    "run_dir=$folder/counted"
.venv/bin/invmm-verify "$folder" --model "$folder/model/final" --min-threshold 0.3 \
    --expect "$(sed -n 's/^root hash.*: //p' "$folder/output")"
