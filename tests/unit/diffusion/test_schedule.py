"""Forward process and conversions."""

from __future__ import annotations

import pytest
import torch
from worlds import LINEAR, IdealNetwork, linear_schedule

from invmm.diffusion.schedule import NoiseSchedule


def test_alphas_follow_the_textbook_product():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    expected = torch.cumprod(1 - betas, 0).float()
    torch.testing.assert_close(linear_schedule().alphas_cumprod, expected, atol=1e-6, rtol=1e-5)


def test_scaled_linear_is_the_square_of_a_line_of_roots():
    config = {**LINEAR, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    expected = torch.cumprod(1 - roots**2, 0).float()
    found = NoiseSchedule.from_config(config).alphas_cumprod
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_converts_to_the_same_clean_latents_and_noise(prediction_type):
    network = IdealNetwork(prediction_type)
    noisy = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 1, 99, 400, 700, 999])
    output = network.predict(noisy, timesteps, None)
    clean = network.schedule.clean_latents(output, noisy, timesteps)
    noise = network.schedule.noise(output, noisy, timesteps)
    expected = network.clean_latents(noisy, timesteps)
    torch.testing.assert_close(clean, expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(
        network.schedule.add_noise(clean, noise, timesteps), noisy, atol=1e-4, rtol=1e-4
    )


def test_add_noise_broadcasts_one_image_over_the_batch():
    schedule = linear_schedule()
    clean = torch.full((1, 1, 2, 2), 0.5)
    noise = torch.ones(2, 1, 2, 2)
    timesteps = torch.tensor([0, 999])
    noisy = schedule.add_noise(clean, noise, timesteps)
    alpha = schedule.alphas_cumprod[timesteps]
    expected = alpha.sqrt() * 0.5 + (1 - alpha).sqrt()
    torch.testing.assert_close(noisy[:, 0, 0, 0], expected)


def test_timesteps_are_uniform_and_belong_to_the_generator():
    schedule = linear_schedule()
    drawn = schedule.draw_levels(20_000, torch.Generator().manual_seed(1))
    again = schedule.draw_levels(20_000, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)
    counts = torch.bincount(drawn // 100, minlength=10)
    assert (counts - 2000).abs().max() < 5 * 2000**0.5


def test_unknown_prediction_type_names_the_supported_ones():
    with pytest.raises(ValueError, match="flow is not supported; use one of epsilon"):
        NoiseSchedule.from_config({**LINEAR, "prediction_type": "flow"})


COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
UNCUT = {
    "linear": LINEAR,
    "stable diffusion": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    },
    "latent diffusion": {
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "beta_schedule": "scaled_linear",
    },
    "few": {"num_train_timesteps": 20, "beta_start": 0.05, "beta_end": 0.9},
    "velocity": {**COSINE, "prediction_type": "v_prediction"},
    "flow": {"num_train_timesteps": 1000, "shift": 3.0},
}


@pytest.mark.parametrize("betas", UNCUT)
def test_levels_are_drawn_by_the_weights_themselves_unless_one_would_take_them_all(betas):
    schedule = NoiseSchedule.from_config(UNCUT[betas])
    assert schedule.draw_weights is schedule.clean_latents_weights
    drawn = schedule.draw_levels(1000, torch.Generator().manual_seed(0), by_weight=True)
    weights = (schedule.noise_scales / schedule.signals).square()
    if schedule.prediction_type != "epsilon":
        weights = schedule.noise_scales.square()
    expected = torch.multinomial(weights, 1000, True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("count", [1000, 100, 4000])
def test_no_level_of_a_cosine_schedule_takes_all_draws_and_expectations_are_kept(count):
    schedule = NoiseSchedule.from_config({**COSINE, "num_train_timesteps": count})
    probabilities = (schedule.draw_weights / schedule.draw_weights.sum()).double()
    most = 50 / count
    assert probabilities.max().item() == pytest.approx(most, rel=1e-4)
    # The share of a level times its weight is that of a uniform draw, level by level.
    uniform = torch.full((count,), 1 / count, dtype=torch.float64)
    torch.testing.assert_close(
        probabilities * schedule.importance_weights, uniform, rtol=1e-4, atol=0
    )
    whole = schedule.clean_latents_weights.double()
    uncut = schedule.draw_weights == schedule.clean_latents_weights
    assert uncut.sum() >= count - 1 / most
    # What is not cut keeps its proportions, and what is cut is the largest.
    assert whole[~uncut].min() >= whole[uncut].max()
    drawn = schedule.draw_levels(20_000, torch.Generator().manual_seed(0), by_weight=True)
    share = (drawn == count - 1).double().mean().item()
    assert share == pytest.approx(most, abs=5 * (most / 20_000) ** 0.5)


@pytest.mark.parametrize("num_dominant", [1, 2, 5])
def test_the_levels_that_dominate_are_cut_to_the_share_that_is_allowed(num_dominant):
    """However many they are; the limit by bisection."""
    betas = [1e-4] * (1000 - num_dominant) + [0.9999] + [0.3] * (num_dominant - 1)
    schedule = NoiseSchedule.from_config({**COSINE, "trained_betas": betas})
    whole, low, high = schedule.clean_latents_weights.double(), 0.0, 1e12
    for _ in range(200):
        middle = (low + high) / 2
        is_above = middle > 0.05 * whole.clamp(max=middle).sum().item()
        low, high = (low, middle) if is_above else (middle, high)
    assert (whole > low).sum() == num_dominant
    torch.testing.assert_close(
        schedule.draw_weights.double(), whole.clamp(max=low), rtol=1e-5, atol=0
    )


def test_the_mean_over_levels_drawn_by_weight_is_that_over_all():
    schedule = NoiseSchedule.from_config(COSINE)
    values = 1 + torch.arange(1000) / 250 * (torch.arange(1000) % 7 == 0)
    drawn = schedule.draw_levels(400_000, torch.Generator().manual_seed(2), by_weight=True)
    levels = drawn[drawn >= 500]
    found = (schedule.importance_weights[levels] * values[levels]).sum() / len(drawn)
    expected = values[500:].mean() / 2
    assert found.item() == pytest.approx(expected.item(), rel=0.02)


def test_a_flow_goes_in_a_straight_line_and_its_velocity_gives_both_ends():
    """Of shift 3, whose noise levels are 3 s / (1 + 2 s) for s from 1/1000 to 1."""
    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
    }
    schedule = NoiseSchedule.from_config(config)
    even = torch.arange(1, 1001) / 1000
    sigmas = 3 * even / (1 + 2 * even)
    torch.testing.assert_close(schedule.noise_scales, sigmas, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(schedule.signals, 1 - sigmas, atol=1e-6, rtol=1e-5)
    timesteps = torch.tensor([250.0, 900.0])
    clean, noise = torch.randn(2, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    noisy = schedule.add_noise(clean, noise, timesteps)
    at = torch.tensor([0.25, 0.9]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(noisy, (1 - at) * clean + at * noise)
    velocity = noise - clean
    torch.testing.assert_close(
        schedule.clean_latents(velocity, noisy, timesteps), clean, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        schedule.noise(velocity, noisy, timesteps), noise, atol=1e-5, rtol=1e-5
    )
