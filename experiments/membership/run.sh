#!/usr/bin/env bash
# Scores of memorization and of membership, on the demo's model and 72 of its icons.
set -euo pipefail
options=("$@")
.venv/bin/invmm-train experiment=demo_model
measure() {
    .venv/bin/invmm experiment=membership run_dir="results/membership/$1" "${@:2}" "${options[@]}"
}
measure counted measurement=free_sampling measurement.num_samples=4096 seed=1
for inversion in trajectory adaptive; do
    measure "$inversion" "inversion=$inversion" 'dataset.take={duplicated:12,single:12,held_out:12}'
done
for score in denoising_loss secmi pia pian; do
    measure "$score" "measurement=$score"
done
.venv/bin/python experiments/membership/plot.py
