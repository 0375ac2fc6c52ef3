#!/usr/bin/env bash
# One setting of the inversion after the other, on the demo's model and icons.
set -euo pipefail
options=("$@")
.venv/bin/invmm-train experiment=demo_model
variant() {
    .venv/bin/invmm experiment=ablation run_dir="results/ablation/$1" "${@:2}" "${options[@]}"
}

variant counted 'dataset.take=null' measurement=free_sampling measurement.num_samples=4096 seed=1

variant base
variant lambda_fixed_1 inversion=fixed
variant lambda_fixed_0.1 inversion=fixed inversion.kl_weight.value=0.1
variant lambda0_0.1 inversion.kl_weight.initial=0.1
variant lambda0_10 inversion.kl_weight.initial=10
variant delta_0 inversion.kl_weight.increment=0
variant delta_1e-3 inversion.kl_weight.increment=1e-3
variant ksi_1e-4 inversion.kl_weight.tolerance=1e-4
variant ksi_1e-2 inversion.kl_weight.tolerance=1e-2
variant progress_total inversion.kl_weight.progress=total
variant check_every_10 inversion.check_every=10
variant check_every_50 inversion.check_every=50
variant batch_16 inversion.objective.batch_size=16
variant uniform inversion.objective.timesteps=uniform
variant uniform_batch_16 inversion.objective.timesteps=uniform inversion.objective.batch_size=16
variant beta_0.4 replication.threshold=0.4
variant beta_0.6 replication.threshold=0.6
variant learning_rate_0.03 inversion.learning_rate=0.03

variant trajectory inversion=trajectory
variant trajectory_pixel inversion=trajectory inversion.basis=pixel inversion.bandwidth=2
variant trajectory_coordinate inversion=trajectory inversion.step_size=coordinate
variant trajectory_no_shrink inversion=trajectory inversion.num_shrinks=0
variant trajectory_no_kl inversion=trajectory inversion.kl_weight=0
variant trajectory_10_steps inversion=trajectory inversion.sampler_steps=10
.venv/bin/python experiments/ablation/plot.py
