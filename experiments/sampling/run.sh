#!/usr/bin/env bash
# Distributions found under one sampler, replayed under others, beside what these return by themselves;
# then what a text-to-image model returns at several guidance scales.
set -euo pipefail
options=("$@")
.venv/bin/invmm-train experiment=demo_model
.venv/bin/invmm-train experiment=text_demo_model

measure() { # NAME OVERRIDE...
    .venv/bin/invmm experiment=sampling run_dir="results/sampling/$1" "${@:2}" "${options[@]}"
}
measure trajectory inversion=trajectory

under() { # NAME REPLAYED FREE OVERRIDE...
    measure "replay_$1" measurement=replay measurement.source=results/sampling/trajectory \
        measurement.num_samples="$2" "${@:4}"
    measure "free_$1" measurement=free_sampling measurement.num_samples="$3" "${@:4}"
}
under ddim_20 64 512
under ddim_eta_half 64 512 sampler.eta=0.5
under ddim_eta_one 64 512 sampler.eta=1
for sampler in ddpm dpmsolver euler unipc; do
    under "$sampler" 64 512 sampler="$sampler" sampler.num_inference_steps=20
done
under heun 64 256 sampler=heun sampler.num_inference_steps=20 # two evaluations a step
under ddim_10 64 512 sampler.num_inference_steps=10
under ddim_50 64 512 sampler.num_inference_steps=50
under ddim_100 64 256 sampler.num_inference_steps=100
under ddim_200 32 128 sampler.num_inference_steps=200

guided() { # SCALE OVERRIDE...
    .venv/bin/invmm experiment=text_demo run_dir="results/sampling/guidance_$1" \
        'dataset.take={duplicated:15,single:8,held_out:8}' measurement=free_sampling "${@:2}" "${options[@]}"
}
guided 0 prompt=empty 'sampler.guidance_scales=[1]' measurement.num_samples=512 # all of the caption left out
for scale in 1 2 3 5 7; do
    guided "$scale" "sampler.guidance_scales=[$scale]" measurement.num_samples=16 measurement.block_size=16
done
.venv/bin/python experiments/sampling/plot.py
