"""Levels, moves and intervals, each against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from invmm.diffusion.sampling import Sampler
from invmm.probability.certificate import clopper_pearson
from invmm.probability.estimate import Ladder, combine
from invmm.probability.population import SMALLEST_STEP, Draws, Population, next_level

SAMPLER = Sampler(num_inference_steps=1)
STOCHASTIC = Sampler(scheduler="ddpm", num_inference_steps=2)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def height(draws: Draws) -> Tensor:
    return draws.noise.flatten(1)[:, 0]


def population(count: int = 64, *, goal: float = 9.0, **changes) -> Population:
    draws = Draws.from_prior(count, (1, 2, 2), SAMPLER, rng())
    options = {"num_kept": count // 4, "step": 0.5, "target_acceptance": 0.35, **changes}
    return Population(draws, height(draws), goal=goal, **options)


# Levels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("similarities", "expected"), [
    ([0.1, 0.2, 0.3, 0.4], 0.2),  # the best of the two that fail
    ([0.4, 0.1, 0.2, 0.3], 0.2),
    ([0.1, 0.2, 0.5, 0.6], 0.2),  # two replicas, but as many are to live on: one level more
    ([0.1, 0.5, 0.6, 0.9], 0.5),  # three: they are counted
    ([0.1, 0.7, 0.8, 0.9], 0.5),  # never above the goal
    ([0.1, 0.2, 0.2, 0.3], 0.2),  # tied across the border: they fail together
    ([0.1, 0.3, 0.3, 0.3], 0.1),  # the best are tied: they live on together
    ([0.1, 0.1, 0.1, 0.9], 0.1),
    ([0.1, 0.1, 0.1, 0.1], 0.0),  # nobody is better: it stays
])  # fmt: skip
def test_next_level_by_hand(similarities, expected):
    level = next_level(torch.tensor(similarities), current=0.0, goal=0.5, num_kept=2)
    assert level == pytest.approx(expected)


def test_survivors_are_copied_equally_often():
    climbing = population(10, num_kept=3)
    climbing.raise_level()
    assert climbing.factors == [0.3]
    survivors = climbing.similarities.topk(3).values.tolist()
    climbing.resample(rng())
    copies = sorted(climbing.similarities.tolist().count(value) for value in survivors)
    assert copies == [3, 3, 4]
    assert torch.equal(climbing.similarities, height(climbing.draws))


# Moves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.1, 0.7, 1.0])
def test_moves_leave_the_prior_invariant(step):
    draws = Draws.from_prior(4000, (1, 2, 2), SAMPLER, rng())
    moved = draws.moved_towards(Draws.from_prior(4000, (1, 2, 2), SAMPLER, rng(1)), step)
    assert moved.noise.mean().item() == pytest.approx(0, abs=0.03)
    assert moved.noise.std().item() == pytest.approx(1, abs=0.02)
    correlation = (draws.noise * moved.noise).mean().item()
    assert correlation == pytest.approx(math.sqrt(1 - step**2), abs=0.03)


def test_seeds_are_proposed_anew_and_kept_with_the_noise_they_were_accepted_with():
    draws = Draws.from_prior(6, (1, 2, 2), STOCHASTIC, rng())
    proposal = draws.moved_towards(Draws.from_prior(6, (1, 2, 2), STOCHASTIC, rng(1)), 0.5)
    assert not set(draws.seeds.tolist()) & set(proposal.seeds.tolist())
    mask = torch.tensor([True, False] * 3)
    mixed = draws.replaced_where(mask, proposal)
    for row, accepted in enumerate(mask.tolist()):
        source = proposal if accepted else draws
        assert mixed.seeds[row] == source.seeds[row]
        assert torch.equal(mixed.noise[row], source.noise[row])
    assert Draws.from_prior(3, (1, 2, 2), SAMPLER, rng()).seeds.tolist() == [0, 0, 0]


def test_moves_below_the_level_are_refused_and_the_step_adapts():
    climbing = population()
    climbing.raise_level()
    climbing.resample(rng())
    before = climbing.draws
    proposals = climbing.propose(SAMPLER, rng(1))
    stays = height(proposals) > climbing.levels[-1]
    climbing.decide(proposals, height(proposals))
    assert 0 < stays.sum() < 64
    assert torch.equal(climbing.draws.noise[stays], proposals.noise[stays])
    assert torch.equal(climbing.draws.noise[~stays], before.noise[~stays])
    assert torch.equal(climbing.similarities, height(climbing.draws))
    share = stays.double().mean().item()
    assert climbing.step == pytest.approx(0.5 * math.exp(share - 0.35))
    climbing.decide(proposals, torch.full((64,), -9.0))
    climbing.settle()
    assert climbing.step == pytest.approx(0.5 * math.exp(share - 0.7))
    assert climbing.acceptances == [share / 2]


def test_the_step_stays_in_its_range():
    climbing = population()
    climbing.raise_level()
    proposals = climbing.propose(SAMPLER, rng(1))
    for similarity, end in ((9.0, 1.0), (-9.0, SMALLEST_STEP)):
        for _ in range(40):
            climbing.decide(proposals, torch.full((64,), similarity))
        assert climbing.step == end


def test_particles_at_a_level_follow_the_truncated_normal():
    """E[x | x > a] = phi(a) / Phi(-a) for the moved particles of many levels at once."""
    climbing = population(4000, goal=1.0, num_kept=1000)
    climbing.raise_level()
    climbing.resample(rng())
    for seed in range(8):
        proposals = climbing.propose(SAMPLER, rng(100 + seed))
        climbing.decide(proposals, height(proposals))
    edge = climbing.levels[0]
    density = math.exp(-(edge**2) / 2) / math.sqrt(2 * math.pi)
    tail = math.erfc(edge / math.sqrt(2)) / 2
    assert climbing.similarities.mean().item() == pytest.approx(density / tail, abs=0.03)
    # the other coordinates are free
    others = climbing.draws.noise.flatten(1)[:, 1:]
    assert others.std().item() == pytest.approx(1, abs=0.03)


# Intervals ----------------------------------------------------------------------------------


def ladder(*factors: float, reached: bool = True) -> Ladder:
    return Ladder(factors=factors, num_particles=100, reached=reached)


def test_one_repeat_has_the_delta_interval():
    estimate = combine([ladder(0.25, 0.5)])
    assert estimate.log_p == pytest.approx(math.log(0.125))
    half_width = 1.959964 * math.sqrt(3 / 100 + 1 / 100)
    assert estimate.log_p_low == pytest.approx(math.log(0.125) - half_width)
    assert estimate.log_p_high == pytest.approx(math.log(0.125) + half_width)


def test_spread_repeats_have_students_interval_and_close_ones_the_delta_interval():
    spread = combine([ladder(0.25, 0.4), ladder(0.25, 0.1)])
    assert spread.log_p == pytest.approx(math.log(0.0625))
    half_width = 12.7062 * math.log(4) / 2
    assert spread.log_p_low == pytest.approx(math.log(0.0625) - half_width, rel=1e-4)
    assert spread.log_p_high == 0  # p is at most 1
    close = combine([ladder(0.25, 0.5)] * 2)
    half_width = 1.959964 * math.sqrt(0.04 / 2)
    assert close.log_p_high == pytest.approx(math.log(0.125) + half_width)


def test_a_stuck_repeat_counts_as_nothing_below_and_as_its_bound_above():
    estimate = combine([ladder(0.25, 0.5), ladder(0.2, reached=False)])
    assert estimate.num_reached == 1
    assert estimate.log_p == pytest.approx(math.log(0.125 / 2))
    half_width = 1.959964 * math.sqrt((0.04 + 0.04) / 4)
    assert estimate.log_p_low == pytest.approx(math.log(0.125 / 2) - half_width)
    assert estimate.log_p_high == pytest.approx(math.log(0.325 / 2) + half_width)


def test_without_a_replica_only_the_bound_is_known():
    estimate = combine([ladder(0.25, 0.2, reached=False), ladder(0.25, reached=False)])
    assert (estimate.log_p, estimate.log_p_low, estimate.num_reached) == (None, None, 0)
    half_width = 1.959964 * math.sqrt((0.03 + 0.04 + 0.03) / 4)
    assert estimate.log_p_high == pytest.approx(math.log(0.15) + half_width)


def test_a_single_level_is_a_count_with_its_exact_interval():
    estimate = combine([ladder(0.3), ladder(0.4)])
    assert estimate.log_p == pytest.approx(math.log(0.35))
    ends = [math.exp(estimate.log_p_low), math.exp(estimate.log_p_high)]
    assert ends == pytest.approx(clopper_pearson(70, 200))
    assert combine([ladder(1.0)]).log_p == 0
    assert combine([ladder(1.0)]).log_p_low == pytest.approx(math.log(0.025) / 100)


def test_tiny_probabilities_stay_on_the_log_scale():
    deep = ladder(*[0.25] * 2000)
    assert combine([deep, deep]).log_p == pytest.approx(2000 * math.log(0.25))


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="0 repeats"):
        combine([])
