#!/usr/bin/env bash
# What `make demo-short` does: the commands of the demo on a model of fewer steps and on six icons,
# then a verification of what they leave. It shows that everything works, not what is memorized.
set -euo pipefail
folder=results/demo_short
few=("model.path=$folder/model/final" 'dataset.take={duplicated: 4, single: 1, held_out: 1}')
.venv/bin/invmm-train experiment=demo_model training.num_steps=600 "run_dir=$folder/model"
.venv/bin/invmm experiment=demo "${few[@]}" inversion.num_steps=100 "run_dir=$folder" | tee "$folder/output"
.venv/bin/invmm experiment=demo "${few[@]}" measurement=free_sampling measurement.num_samples=128 \
    "run_dir=$folder/counted"
.venv/bin/invmm-verify "$folder" --model "$folder/model/final" \
    --expect "$(sed -n 's/^root hash.*: //p' "$folder/output")"
