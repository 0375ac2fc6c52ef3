#!/usr/bin/env bash
# Times the engine on the demo's model; nothing else should be running.
set -euo pipefail
.venv/bin/invmm-train experiment=demo_model
.venv/bin/python experiments/bench/bench.py "$@"
