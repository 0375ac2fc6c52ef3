#!/usr/bin/env bash
# Times the engine on a model of the demo's size; nothing else should be running.
set -euo pipefail
.venv/bin/python experiments/bench/bench.py
