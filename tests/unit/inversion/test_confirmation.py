"""Fresh samples of a frozen distribution: against a straight loop, and where p is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy.fft import idctn
from scipy.optimize import brentq
from scipy.stats import binomtest, norm
from torch import Tensor
from worlds import (
    ConditionalNetwork,
    Direction,
    MicroNetwork,
    PixelWorld,
    ddim,
    linear_schedule,
    make_conditional_target,
    make_setting,
    make_target,
)

from invmm.engine.engine import Engine
from invmm.engine.outcomes import Outcome, Status
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job
from invmm.inversion.confirmation import Confirmation, confirm, exact_kl
from invmm.inversion.noise import GaussianNoise


def confirmed(network, noise, target, setting, seed=5, **options) -> Confirmation:
    """As the engine draws it."""
    found = []
    options = {"num_samples": 32, "guidance_scale": 1.0, **options}

    async def measurement() -> Outcome:
        rng = torch.Generator().manual_seed(seed)
        found.append(await confirm(noise, target, setting, rng, **options))
        return Outcome(status=Status.REPLICATED)

    engine = Engine(network, Direction(), EngineSettings())
    [(_, outcome)] = engine.run([Job("it", measurement)])
    assert outcome.error is None
    return found[0]


def distribution(shape: tuple[int, ...], seed: int = 0) -> GaussianNoise:
    generator = torch.Generator().manual_seed(seed)
    mean, log_variance = torch.randn(2, 1, *shape, generator=generator)
    return GaussianNoise(0.5 * mean, 0.3 * log_variance - 1)


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_the_count_is_that_of_a_straight_loop(basis):
    network = MicroNetwork()
    target, noise = make_target(network), distribution(network.latent_shape)
    normal = torch.randn(32, *network.latent_shape, generator=torch.Generator().manual_seed(5))
    draws = (noise.mean + (noise.log_variance / 2).exp() * normal).detach()
    if basis == "dct":
        draws = torch.from_numpy(idctn(draws.numpy(), axes=(2, 3), norm="ortho"))
    pixels = ddim(lambda x, t: network.predict(x, t, None), draws, network.schedule).clamp(-1, 1)
    similarities = torch.cosine_similarity(pixels.flatten(1), target.pixels.flatten()[None])
    threshold = similarities.sort().values[12:14].mean().item()  # 19 of 32 reach it
    found = confirmed(network, noise, target, make_setting(network, threshold=threshold),
                      basis=basis)  # fmt: skip
    torch.testing.assert_close(found.check.similarities, similarities, atol=1e-5, rtol=0)
    assert (found.count, found.num_samples) == (19, 32)


def test_guidance_and_the_images_own_condition():
    network = ConditionalNetwork()
    target, noise = make_conditional_target(network), distribution(network.latent_shape)
    draws = noise.draw(32, torch.Generator().manual_seed(5)).detach()
    own, blank = target.rows(32), target.negative_rows(32)

    def guided(latents: Tensor, timesteps: Tensor) -> Tensor:
        away = network.predict(latents, timesteps, blank)
        return away + 3 * (network.predict(latents, timesteps, own) - away)

    pixels = ddim(guided, draws, network.schedule).clamp(-1, 1)
    similarities = torch.cosine_similarity(pixels.flatten(1), target.pixels.flatten()[None])
    setting = make_setting(network, guidance_scales=(1.0, 3.0))
    found = confirmed(network, noise, target, setting, guidance_scale=3.0)
    torch.testing.assert_close(found.check.similarities, similarities, atol=1e-5, rtol=0)
    assert found.check.guidance_scale == 3.0


def test_stochastic_samplers_draw_from_the_same_source():
    network = MicroNetwork()
    target, noise = make_target(network), distribution(network.latent_shape)
    setting = make_setting(network, eta=1.0)
    once, again = (confirmed(network, noise, target, setting) for _ in range(2))
    other = confirmed(network, noise, target, setting, seed=6)
    assert torch.equal(once.check.similarities, again.check.similarities)
    assert not torch.equal(once.check.similarities, other.check.similarities)


def test_the_interval_and_the_certificate():
    network = MicroNetwork()
    found = confirmed(
        network, distribution(network.latent_shape), make_target(network),
        make_setting(network, threshold=-1.0), num_samples=20, confidence=0.9,
    )  # fmt: skip
    check = replace(found.check, replicas=17)
    found = Confirmation(check=check, kl_nats=30.0, confidence=0.9)
    expected = binomtest(17, 20).proportion_ci(0.9, method="exact")
    assert found.interval == pytest.approx((expected.low, expected.high))
    low = binomtest(17, 20, alternative="greater").proportion_ci(0.9, method="exact").low

    def excess(log_p: float) -> float:
        rest = math.log1p(-math.exp(log_p))
        return low * (math.log(low) - log_p) + (1 - low) * (math.log(1 - low) - rest) - 30

    columns = found.columns()
    assert columns["log_p_certified"] == pytest.approx(brentq(excess, -200, math.log(low)))
    assert (columns["confirm_passed"], columns["confirm_drawn"]) == (17, 20)
    assert columns["confirm_confidence"] == 0.9
    nothing = Confirmation(check=replace(check, replicas=0), kl_nats=30.0)
    assert nothing.columns()["log_p_certified"] is None
    assert nothing.interval[0] == 0


def test_the_divergence_is_that_of_double_precision():
    """Where single precision has lost half of it: a thousandth of the prior's deviation."""
    variance = torch.full((1, 3, 8, 8), 1e-3)
    expected = 0.5 * (math.expm1(float(variance[0, 0, 0, 0])) - float(variance[0, 0, 0, 0]))
    assert exact_kl(GaussianNoise(0 * variance, variance)) == pytest.approx(expected, rel=1e-9)


class HalfSpace(PixelWorld):
    """Drawn in one step: the image of seed 0 if the first coordinate is above an edge."""

    def __init__(self, edge: float) -> None:
        super().__init__(linear_schedule("sample"))
        self.image, self.edge = make_target(self).latents, edge

    def predict(self, latents: Tensor, timesteps: Tensor, condition: object) -> Tensor:
        return torch.where(latents[:, :1, :1, :1] > self.edge, self.image, -self.image)


@pytest.mark.parametrize("p", [0.1, 1e-3, 1e-5])
def test_a_certificate_never_contradicts_a_known_probability(p):
    """Distributions that move the one coordinate which counts, and certify from 256 samples."""
    network, edge = HalfSpace(norm.isf(p)), norm.isf(p)
    setting = make_setting(network, num_inference_steps=1)
    certified = []
    for mean in (0.7 * edge, edge, edge + 0.6, 1.5 * edge):
        for deviation in (0.25, 0.5, 1.0):
            noise = GaussianNoise(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))
            with torch.no_grad():
                noise.mean[0, 0, 0, 0] = mean
                noise.log_variance[0, 0, 0, 0] = 2 * math.log(deviation)
            found = confirmed(network, noise, make_target(network), setting, num_samples=256)
            assert abs(found.rate - norm.sf((edge - mean) / deviation)) < 0.12
            certified.append(found.log_p_certified)
    assert max(certified) <= math.log(p)
    assert max(certified) > math.log(p) - 2  # and the best of them says much
