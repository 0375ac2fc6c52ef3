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
