#!/usr/bin/env bash
# What `make demo` does: train on icons with planted copies, measure what was memorized, then count
# how often the model returns the icons by itself; what was planted and is too rare to count is split.
set -euo pipefail
options=("$@")
.venv/bin/invmm-train experiment=demo_model
.venv/bin/invmm experiment=demo "${options[@]}"
.venv/bin/invmm experiment=demo measurement=free_sampling run_dir=results/demo/counted "${options[@]}"
.venv/bin/invmm experiment=demo measurement=probability run_dir=results/demo/split \
    measurement.max_samples=3072 dataset.take=null "dataset.ids=$(.venv/bin/python experiments/demo/rare.py)" "${options[@]}"
.venv/bin/python experiments/demo/plot.py
