#!/usr/bin/env bash
# Three trainings that plant other icons each, and what they return by number of copies.
set -euo pipefail
options=("$@")
printf '%s\n' 0 1 2 | xargs -P 2 -I{} .venv/bin/invmm-train experiment=duplication_model 'seed={}' # two at a time
for seed in 0 1 2; do
    measure() { # MEASUREMENT OVERRIDE...
        .venv/bin/invmm experiment=duplication "dataset.seed=$seed" \
            run_dir="results/duplication/$1_$seed" "${@:2}" "${options[@]}"
    }
    measure counted measurement=free_sampling measurement.num_samples=4096 dataset.take=null \
        "seed=$((1000 * (seed + 1)))" # no block of draws in common
    measure trajectory inversion=trajectory "seed=$seed"
    measure adaptive inversion=adaptive "seed=$seed"
done
.venv/bin/python experiments/duplication/plot.py
