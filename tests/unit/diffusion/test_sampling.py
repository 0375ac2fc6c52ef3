"""Samplers on Gaussian data, where the ideal denoiser makes the answer exact."""

from __future__ import annotations

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


def test_a_start_at_no_signal_is_refused_for_noise_predictors_only():
    cosine = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
    epsilon = NoiseSchedule.from_config({**cosine, "prediction_type": "epsilon"})
    velocity = NoiseSchedule.from_config({**cosine, "prediction_type": "v_prediction"})
    with pytest.raises(ValueError, match=r"use sampler\.timestep_spacing=leading"):
        Sampler().check_schedule(epsilon)
    Sampler(timestep_spacing="leading").check_schedule(epsilon)
    Sampler().check_schedule(velocity)
    Sampler().check_schedule(MicroNetwork().schedule)
