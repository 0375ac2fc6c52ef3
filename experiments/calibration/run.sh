#!/usr/bin/env bash
# Every estimator against counted probabilities, on a model with 40 planted icons.
set -euo pipefail
options=("$@")
.venv/bin/invmm-train experiment=calibration_model
measure() {
    .venv/bin/invmm experiment=calibration run_dir="results/calibration/$1" "${@:2}" "${options[@]}"
}
# progress=total, as in the recorded run; the preset now judges progress by the reconstruction.
published=(inversion=paper_ddpm inversion.objective.batch_size=16 inversion.kl_weight.progress=total)
take() { echo "dataset.take={duplicated:$1,single:$2,held_out:$3}"; }

# The truth: the seed differs from that of every bank below.
measure counted measurement=free_sampling measurement.num_samples=20480 seed=1000
# The budget of the recorded run, which went twelve levels of 256 samples up at most.
measure splitting measurement=probability measurement.max_samples=3072 "$(take 40 2 2)"
measure trajectory inversion=trajectory "$(take 40 4 8)"
measure published "${published[@]}" "$(take 16 2 2)"
for seed in 1 2; do
    measure "published_seed_$seed" "${published[@]}" "$(take 12 0 0)" "seed=$seed"
done
.venv/bin/python experiments/calibration/plot.py
