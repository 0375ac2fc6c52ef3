#!/usr/bin/env bash
# What `make demo` does: train on icons with planted copies, then measure what was memorized.
set -euo pipefail
.venv/bin/invmm-train experiment=demo_model
.venv/bin/invmm experiment=demo
