#!/usr/bin/env bash
# A text-to-image model with planted copies, and its icons under three prompts.
set -euo pipefail
options=("$@")
measure() {
    .venv/bin/invmm experiment=text_demo prompt="$1" run_dir="results/text_demo/$1" \
        "${@:2}" "${options[@]}"
}
.venv/bin/invmm-train experiment=text_demo_model
measure caption
measure empty 'sampler.guidance_scales=[1]' # guidance away from the prompt itself is none
measure learned
.venv/bin/python experiments/text_demo/plot.py
