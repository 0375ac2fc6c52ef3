"""The noise distribution and its divergence."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from invmm.inversion.noise import GaussianNoise, kl_to_standard_normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_equals_torch_distributions(dtype):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 3, 5, 5, generator=generator, dtype=dtype) * 2
    log_variance = torch.randn(4, 3, 5, 5, generator=generator, dtype=dtype)
    q = Normal(mean, (0.5 * log_variance).exp())
    expected = kl_divergence(q, Normal(torch.zeros_like(mean), torch.ones_like(mean)))
    found = kl_to_standard_normal(mean, log_variance)
    torch.testing.assert_close(found, expected.flatten(1).mean(1))


def test_kl_is_zero_at_the_prior_and_positive_elsewhere():
    noise = GaussianNoise.prior(torch.ones(1, 3, 4, 4))
    assert noise.kl().item() == 0
    for mean, log_variance in ((1e-2, 0.0), (0.0, 1e-2), (0.0, -1e-2)):
        one = torch.ones(1, 1, 1, 1)
        moved = GaussianNoise(mean * one, log_variance * one)
        assert moved.kl().item() > 0


def test_kl_gradient():
    mean = torch.randn(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    log_variance = torch.randn(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kl_to_standard_normal, (mean, log_variance))


def test_draws_have_the_moments_and_belong_to_the_generator():
    noise = GaussianNoise(torch.full((1, 1, 2, 2), 0.7), torch.full((1, 1, 2, 2), -1.0))
    draws = noise.draw(50_000, torch.Generator().manual_seed(0))
    assert torch.equal(draws, noise.draw(50_000, torch.Generator().manual_seed(0)))
    assert draws.mean().item() == pytest.approx(0.7, abs=0.01)
    assert draws.var().item() == pytest.approx(torch.tensor(-1.0).exp().item(), abs=0.01)


def test_draws_carry_the_reparametrised_gradient():
    noise = GaussianNoise(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.4))
    draws = noise.draw(3, torch.Generator().manual_seed(0))
    draws.sum().backward()
    assert noise.mean.grad.item() == 3
    assert noise.log_variance.grad.item() == pytest.approx(0.5 * draws.sum().item())
