#!/usr/bin/env bash
# One training, six checkpoints: what each of them returns, and what the inversions find in it.
set -euo pipefail
options=("$@")
.venv/bin/invmm-train experiment=training_steps_model
measure() { # MEASUREMENT CHECKPOINT OVERRIDE...
    .venv/bin/invmm experiment=training_steps "model.path=$2" \
        run_dir="results/training_steps/$1_${2##*_}" "${@:3}" "${options[@]}"
}
for model in results/training_steps/model/step_*; do
    measure counted "$model" measurement=free_sampling measurement.num_samples=2048 seed=1 \
        dataset.take=null
    # From where planted icons begin to come back, and in two repeats: for time.
    if ((10#${model##*_} >= 400)); then
        measure splitting "$model" measurement=probability measurement.bank_size=1024 \
            measurement.repeats=2 'dataset.take={duplicated:5,single:0,held_out:0}'
    fi
    measure trajectory "$model" inversion=trajectory
    measure adaptive "$model" inversion=adaptive
done
.venv/bin/python experiments/training_steps/plot.py
