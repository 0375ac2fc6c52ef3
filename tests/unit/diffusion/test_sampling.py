"""Samplers on Gaussian data, where the ideal denoiser makes the answer exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from worlds import IdealNetwork, MicroNetwork

from invmm.diffusion.sampling import Sampler, draw
from invmm.diffusion.schedule import NoiseSchedule

NOISE = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
SEEDS = (11, 12, 13, 14, 15)


def run(network, noise: Tensor = NOISE, seeds=None, **options) -> Tensor:
    return draw(
        lambda latents, timesteps: network.predict(latents, timesteps, None),
        noise,
        sampler=Sampler(**options),
        schedule=network.schedule,
        seeds=seeds,
    )


def ddim_by_hand(network, noise: Tensor, steps: int) -> Tensor:
    """DDIM with eta 0 and trailing steps, from the formula alone."""
    alphas = network.schedule.alphas_cumprod
    visited = [999 - round(1000 / steps) * k for k in range(steps)]
    latents = noise
    for now, after in zip(visited, [*visited[1:], None], strict=True):
        clean = network.clean_latents(latents, torch.full((len(noise),), now))
        if after is None:
            return clean
        direction = (latents - alphas[now].sqrt() * clean) / (1 - alphas[now]).sqrt()
        latents = alphas[after].sqrt() * clean + (1 - alphas[after]).sqrt() * direction
    raise AssertionError


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_ddim_equals_the_formula(prediction_type, steps):
    network = IdealNetwork(prediction_type)
    found = run(network, scheduler="ddim", num_inference_steps=steps)
    expected = ddim_by_hand(network, NOISE, steps)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [("ddim", 1000), ("dpmsolver", 100), ("euler", 1000), ("heun", 100), ("unipc", 100)],
)
def test_deterministic_samplers_follow_the_probability_flow(scheduler, steps):
    """For data N(m, s^2) the flow maps the noise e to m + s * e."""
    network = IdealNetwork(mean=0.2, std=0.3)
    found = run(network, scheduler=scheduler, num_inference_steps=steps)
    assert (found - (0.2 + 0.3 * NOISE)).abs().max() < 0.01


@pytest.mark.parametrize(("scheduler", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_stochastic_samplers_draw_from_the_data(scheduler, eta):
    network = IdealNetwork(mean=0.2, std=0.3)
    noise = torch.randn(300, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    found = run(network, noise, range(300), scheduler=scheduler, eta=eta, num_inference_steps=250)
    assert found.mean().item() == pytest.approx(0.2, abs=0.015)
    assert found.std().item() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(("scheduler", "eta"), [("ddpm", 0.0), ("ddim", 0.5)])
def test_a_row_depends_on_its_own_seed_only(scheduler, eta):
    network = MicroNetwork()
    noise = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"scheduler": scheduler, "eta": eta, "num_inference_steps": 5}
    whole = run(network, noise, SEEDS, **options)
    other = run(network, noise, (1, 2, 13, 3, 4), **options)
    assert torch.equal(whole[2], other[2])
    assert not torch.equal(whole[1], other[1])


def test_a_stochastic_sampler_without_seeds_is_refused():
    with pytest.raises(ValueError, match="one seed a row"):
        run(MicroNetwork(), torch.randn(2, 3, 8, 8), scheduler="ddpm", num_inference_steps=5)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver", "euler", "heun", "unipc"])
def test_gradients_reach_the_noise(scheduler):
    network = IdealNetwork()
    noise = NOISE.clone().requires_grad_()
    run(network, noise, SEEDS, scheduler=scheduler, num_inference_steps=5).sum().backward()
    assert noise.grad is not None
    assert (noise.grad.abs() > 1e-6).all()


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver", "euler", "heun", "unipc"])
def test_counted_evaluations(scheduler):
    network = MicroNetwork()
    sampler = Sampler(scheduler=scheduler, num_inference_steps=10)
    run(network, torch.randn(5, 3, 8, 8), SEEDS, scheduler=scheduler, num_inference_steps=10)
    assert len(network.calls) == sampler.num_evaluations


def test_clipping_keeps_the_last_prediction_in_range():
    network = IdealNetwork(mean=0.9, std=1.0)
    free = run(network, scheduler="ddim", num_inference_steps=10)
    clipped = run(network, scheduler="ddim", num_inference_steps=10, clip_sample=True)
    assert free.max() > 1
    assert clipped.max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "euler", "eta": 0.5}, r"sampler.eta=0.5 has no meaning"),
        ({"scheduler": "unipc", "clip_sample": True}, r"sampler.clip_sample=true is not possible"),
    ],
)
def test_options_a_scheduler_does_not_have_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**options)


@pytest.mark.parametrize(
    ("steps", "message"), [(1200, "at most 1000"), (30, "does not divide .* use 25")]
)
def test_steps_the_schedule_cannot_take_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        Sampler(num_inference_steps=steps).check_steps(1000)


COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "rescale_betas_zero_snr": True}  # fmt: skip
BETA_SAMPLERS = ["ddim", "ddpm", "dpmsolver", "euler", "heun", "unipc"]
SPACINGS = ["trailing", "leading", "linspace"]


@pytest.mark.parametrize("scheduler", BETA_SAMPLERS)
def test_a_start_at_no_signal_is_refused_for_noise_predictors_only(scheduler):
    epsilon = NoiseSchedule.from_config({**COSINE, "prediction_type": "epsilon"})
    velocity = NoiseSchedule.from_config({**COSINE, "prediction_type": "v_prediction"})
    for spacing in ("trailing", "linspace"):
        sampler = Sampler(scheduler=scheduler, timestep_spacing=spacing)
        match = rf"timestep_spacing={spacing} starts at timestep 999, .* use sampler\.timestep_spac"
        with pytest.raises(ValueError, match=match):
            sampler.check_schedule(epsilon)
        sampler.check_schedule(velocity)
        sampler.check_schedule(MicroNetwork().schedule)
    leading = Sampler(scheduler=scheduler, timestep_spacing="leading")
    leading.check_schedule(epsilon)
    every = replace(leading, num_inference_steps=1000)
    # Steps that leave no room between them: two of the samplers then stay at timestep 0.
    message = (
        r"num_inference_steps=1000 (starts at timestep 999, .* use "
        r"sampler\.num_inference_steps=500 or less$|with .* starts at timestep 0, )"
    )
    with pytest.raises(ValueError, match=message):
        every.check_schedule(epsilon)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_noise_levels_of_a_flow(shift):
    """S t / (1 + (s - 1) t) for t in whole steps (trailing) or down to the smallest trained."""
    flow = NoiseSchedule.from_config({"num_train_timesteps": 1000, "shift": shift})
    smallest = shift / 1000 / (1 + (shift - 1) / 1000)
    for spacing, times in (("trailing", [1, 0.75, 0.5, 0.25]),
                           ("linspace", np.linspace(1, smallest, 4))):  # fmt: skip
        sampler = Sampler(scheduler="flow_euler", num_inference_steps=4, timestep_spacing=spacing)
        expected = [shift * t / (1 + (shift - 1) * t) for t in times]
        found = sampler.build(flow).sigmas
        assert found.tolist() == pytest.approx([*expected, 0], abs=1e-6)


def test_a_start_where_the_image_would_be_seen_already_is_refused():
    """Leading timesteps begin a whole step early; of one step nothing is left."""
    linear = MicroNetwork().schedule
    for steps in (2, 50):
        Sampler(timestep_spacing="leading", num_inference_steps=steps).check_schedule(linear)
    for prediction_type in ("epsilon", "v_prediction"):
        schedule = NoiseSchedule.from_config({**COSINE, "prediction_type": prediction_type})
        with pytest.raises(ValueError, match=r"num_inference_steps=1 with .* use .*=trailing"):
            Sampler(timestep_spacing="leading", num_inference_steps=1).check_schedule(schedule)


@pytest.mark.parametrize(
    ("prediction_type", "spacing"),
    [*(("v_prediction", spacing) for spacing in SPACINGS), ("sample", "trailing")],
)
@pytest.mark.parametrize("scheduler", BETA_SAMPLERS)
def test_zero_terminal_snr_holds_in_each_sampler(scheduler, prediction_type, spacing):
    network = IdealNetwork(prediction_type)
    network.schedule = NoiseSchedule.from_config({**ZERO_SNR, "prediction_type": prediction_type})
    options = {"scheduler": scheduler, "timestep_spacing": spacing, "num_inference_steps": 200}
    sampler = Sampler(**options)
    sampler.check_schedule(network.schedule)
    built = sampler.build(network.schedule)
    torch.testing.assert_close(
        built.alphas_cumprod, network.schedule.alphas_cumprod, atol=1e-6, rtol=0
    )
    found = run(network, NOISE, SEEDS, **options)
    if scheduler == "ddpm":
        assert (found - 0.2).abs().max() < 5 * 0.3
    else:  # the flow of the probabilities, as far as 200 steps follow it
        assert (found - (0.2 + 0.3 * NOISE)).abs().max() < 0.05


@pytest.mark.parametrize("scheduler", BETA_SAMPLERS)
def test_betas_without_a_formula_of_the_samplers_are_those_of_the_model(scheduler):
    """Only DDPMScheduler knows sigmoid betas."""
    from diffusers import DDPMScheduler

    schedule = NoiseSchedule.from_config({"beta_schedule": "sigmoid", "num_train_timesteps": 200})
    own = DDPMScheduler(beta_schedule="sigmoid", num_train_timesteps=200)
    built = Sampler(scheduler=scheduler).build(schedule)
    assert torch.equal(built.alphas_cumprod, own.alphas_cumprod)
