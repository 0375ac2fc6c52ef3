"""Checks of a rate against those that draw everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from worlds import (
    ConditionalNetwork,
    Direction,
    MicroNetwork,
    make_conditional_target,
    make_setting,
    make_target,
)

from invmm.engine import check as check_module
from invmm.engine.check import Check, check_replication, compare, deciding_failures
from invmm.engine.criterion import Passing
from invmm.engine.engine import Engine
from invmm.engine.outcomes import Outcome, Status
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job


def checked(network, target, setting, noise: Tensor, lowest_rate: float, scales=(1.0,)) -> Check:
    """As the engine answers it."""
    found = []

    async def measurement() -> Outcome:
        rng = torch.Generator().manual_seed(5)
        options = {"lowest_rate": lowest_rate, "guidance_scales": scales}
        rows = target.rows(len(noise))
        found.append(await check_replication(noise, rows, target, setting, rng, **options))
        return Outcome(status=Status.REPLICATED)

    engine = Engine(network, Direction(), EngineSettings())
    [(_, outcome)] = engine.run([Job("it", measurement)])
    assert outcome.error is None
    return found[0]


def normal(count: int, network) -> Tensor:
    return torch.randn(count, *network.latent_shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_decision_is_that_of_all_samples(eta):
    network = MicroNetwork()
    target, noise = make_target(network), normal(16, network)

    def at(threshold: float) -> Check:
        setting = make_setting(network, threshold=threshold, eta=eta)
        return checked(network, target, setting, noise, 0.8)

    everything = at(-1.0).similarities
    assert len(everything) == 16
    thresholds = [2.0, *everything.sort(descending=True).values.tolist()]
    for count, threshold in enumerate(thresholds):  # so many replicate; 13 of 16 are needed
        found = at(threshold)
        drawn = len(found.similarities)
        assert found.passed == (count >= 13)
        assert torch.equal(found.similarities, everything[:drawn])
        assert len(found.pixels) == drawn
        assert drawn in (4, 8, 16)
        failures = (everything[:drawn] < threshold).sum()
        assert failures >= 4 or drawn == 16
        full = checked(
            network, target, make_setting(network, threshold=threshold, eta=eta, early_exit=False),
            noise, 0.8,
        )  # fmt: skip
        assert (full.passed, full.replicas) == (found.passed, count)
        assert torch.equal(full.similarities, everything)
    assert len(at(2.0).similarities) == 4


def test_the_scale_that_passes_ends_the_check_else_the_highest_rate_counts():
    network = ConditionalNetwork()
    target, noise = make_conditional_target(network), normal(8, network)
    scales = (1.0, 3.0)
    full = [
        checked(network, target, make_setting(network, threshold=-1.0), noise, 1.0, (scale,))
        for scale in scales
    ]
    worse, better = sorted(full, key=lambda check: check.best)
    threshold = (worse.best + better.best) / 2  # reached at one scale only, by some samples
    setting = make_setting(network, threshold=threshold)
    reached = (better.similarities >= threshold).double().mean().item()
    assert 0 < reached < 1
    for order in (scales, scales[::-1]):
        failed = checked(network, target, setting, noise, reached + 0.1, order)
        assert (failed.passed, failed.guidance_scale) == (False, better.guidance_scale)
        passed = checked(network, target, setting, noise, reached, order)
        assert (passed.passed, passed.guidance_scale) == (True, better.guidance_scale)
    setting = make_setting(network, threshold=-1.0)
    assert checked(network, target, setting, noise, 1.0, scales[::-1]).guidance_scale == 3.0


@pytest.mark.parametrize(
    ("lowest_rate", "seen", "closest"),
    [
        (0.5, {1.0: (4, 0.6), 3.0: (3, 0.9)}, 1.0),  # the rate counts
        (0.5, {1.0: (4, 0.6), 3.0: (4, 0.9)}, 3.0),  # of equal rates the similarity
        (1.0, {1.0: (4, 0.6), 3.0: (3, 0.9)}, 3.0),  # where one failure decides, that alone
    ],
)
def test_what_came_closest(lowest_rate, seen, closest, monkeypatch):
    """Scale -> replicas of ten samples, and the highest similarity."""

    async def scripted(scale, *others) -> Check:
        replicas, best = seen[scale]
        return Check(torch.linspace(0, best, 10), torch.zeros(10, 3, 4, 4), replicas, False, scale)

    monkeypatch.setattr(check_module, "_check_at", scripted)
    network = MicroNetwork()
    for order in ((1.0, 3.0), (3.0, 1.0)):
        target, noise = make_target(network), normal(10, network)
        found = checked(network, target, make_setting(network), noise, lowest_rate, order)
        assert found.guidance_scale == closest


@pytest.mark.parametrize(
    ("num_samples", "lowest_rate", "expected"),
    [(32, 0.92, 3), (32, 1.0, 1), (10, 0.9, 2), (10, 0.7, 4), (4, 0.5, 3), (32, 0.01, 32)],
)
def test_failures_that_decide(num_samples, lowest_rate, expected):
    assert deciding_failures(num_samples, lowest_rate) == expected


@pytest.mark.parametrize("lacks", ["condition", "negative"])
def test_guidance_without_what_it_needs_is_one_line(lacks):
    network = ConditionalNetwork()
    target = replace(make_conditional_target(network, 0), **{lacks: None})

    async def measurement() -> Outcome:
        noise, setting = torch.zeros(2, *network.latent_shape), make_setting(network)
        await compare(noise, target.rows(2), None, target, setting, guidance_scale=3.0)
        return Outcome(status=Status.REPLICATED)

    [(_, outcome)] = Engine(network, Direction(), EngineSettings()).run([Job("it", measurement)])
    assert outcome.status is Status.FAILED
    assert "guidance at scale 3.0 needs a condition and its negative" in outcome.error


def test_the_rate_asked_for_is_a_share():
    assert [
        Passing(count=count, num_samples=64, looks=4, confidence=0.95, is_recorded=True).rate
        for count in (1, 58, 64)
    ] == [1 / 64, 58 / 64, 1]
