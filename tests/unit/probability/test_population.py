"""Levels, moves and intervals, each against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import t
from torch import Tensor

from invmm.diffusion.sampling import Sampler
from invmm.probability.estimate import Ladder, combine, one_in
from invmm.probability.population import SMALLEST_STEP, Draws, Population, next_level

SAMPLER = Sampler(num_inference_steps=1)
STOCHASTIC = Sampler(scheduler="ddpm", num_inference_steps=2)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def height(draws: Draws) -> Tensor:
    return draws.noise.flatten(1)[:, 0]


def population(count: int = 64, *, goal: float = 9.0, **changes) -> Population:
    draws = Draws.from_prior(count, (1, 2, 2), SAMPLER, rng())
    options = {
        "num_particles": count, "num_kept": count // 4, "step": 0.5, "target_acceptance": 0.35,
        **changes,
    }  # fmt: skip
    return Population(lambda rows: draws[rows], height(draws), goal=goal, **options)


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
    ([0.1, 0.5, 0.5, 0.5], 0.5),  # tied at the goal: they are replicas
    ([0.5, 0.5, 0.5, 0.5], 0.5),
])  # fmt: skip
def test_next_level_by_hand(similarities, expected):
    level = next_level(torch.tensor(similarities), current=0.0, goal=0.5, num_kept=2)
    assert level == pytest.approx(expected)


def test_survivors_are_copied_equally_often():
    climbing = population(10, num_kept=3)
    climbing.raise_level()
    assert climbing.passed == [(3, 10)]
    survivors = climbing.similarities.topk(3).values.tolist()
    climbing.resample(rng())
    copies = sorted(climbing.similarities.tolist().count(value) for value in survivors)
    assert copies == [3, 3, 4]
    assert torch.equal(climbing.similarities, height(climbing.draws))


def test_a_few_of_many_free_samples_become_the_particles():
    climbing = population(1000, num_particles=20, num_kept=5)
    free = climbing.similarities
    climbing.raise_level()
    assert climbing.passed == [(5, 1000)]
    assert climbing.levels == [free.topk(6).values[-1].item()]
    climbing.resample(rng())
    assert len(climbing.draws) == len(climbing.similarities) == 20
    assert {*climbing.similarities.tolist()} == {*free.topk(5).values.tolist()}
    proposals = climbing.propose(SAMPLER, rng(1))
    climbing.decide(proposals, height(proposals))
    climbing.raise_level()
    assert climbing.passed == [(5, 1000), (5, 20)]
    climbing.resample(rng(2))
    assert torch.equal(climbing.similarities, height(climbing.draws))
    assert climbing.similarities.min().item() > climbing.levels[-1]


# Ties ---------------------------------------------------------------------------------------


def tied(*similarities: float, **changes) -> Population:
    """Particles of given similarities, of which two are to live on."""
    draws = Draws.from_prior(len(similarities), (1, 2, 2), SAMPLER, rng())
    options = {
        "num_particles": len(similarities), "num_kept": 2, "step": 0.5, "target_acceptance": 0.35,
    }  # fmt: skip
    return Population(
        lambda rows: draws[rows], torch.tensor(similarities), goal=0.5, **options, **changes
    )


def moved(climbing: Population, *similarities: float) -> None:
    """One round, with one move of the particles to these similarities."""
    climbing.resample(rng())
    climbing.decide(climbing.propose(SAMPLER, rng(1)), torch.tensor(similarities))
    climbing.settle()
    climbing.raise_level()


def test_what_is_at_a_level_fails_and_what_is_at_the_goal_passes():
    climbing = tied(0.1, 0.2, 0.2, 0.25)
    climbing.raise_level()
    assert climbing.levels == [pytest.approx(0.2)]
    assert climbing.passed == [(1, 4)]
    moved(climbing, 0.2, 0.5, 0.5, 0.5)  # the first stays where it was
    assert climbing.similarities.tolist() == [0.25, 0.5, 0.5, 0.5]
    assert climbing.reached
    assert climbing.passed == [(1, 4), (3, 4)]


def test_rounds_of_tied_particles_are_counted_with_the_level_that_follows():
    climbing = tied(0.125, 0.125, 0.125, 0.125)
    climbing.raise_level()
    moved(climbing, 0.125, 0.125, 0.125, 0.125)
    assert climbing.levels == [-2, -2]
    assert climbing.passed == []
    moved(climbing, 0.125, 0.125, 0.125, 0.25)
    assert climbing.levels == [-2, -2, 0.125]
    assert climbing.passed == [(1, 4 + 4 + 4)]
    # Four copies of one particle. Moves that are refused show nothing new; others do.
    for _ in range(3):
        moved(climbing, 0.0, 0.0, 0.0, 0.125)
    assert climbing.acceptances == [1, 1, 0, 0, 0]
    assert climbing.levels[2:] == [0.125, 0.125, 0.125, 0.125]
    assert climbing.passed == [(1, 12)]
    moved(climbing, 0.25, 0.25, 0.0, 0.0)
    moved(climbing, 0.5, 0.5, 0.5, 0.5)
    assert climbing.passed == [(1, 12), (4, 4 + 4)]
    assert climbing.reached


def test_a_ladder_stalls_where_no_move_is_short_enough():
    climbing = population(step=2 * SMALLEST_STEP)
    climbing.raise_level()
    climbing.resample(rng())
    for stalled in (False, False, True):
        assert climbing.stalled is stalled
        climbing.decide(climbing.propose(SAMPLER, rng(1)), torch.full((64,), -9.0))


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
    climbing.resample(rng())
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


def ladder(*survivors: int, reached: bool = True) -> Ladder:
    """Levels that so many of 100 particles passed."""
    return Ladder(passed=[(count, 100) for count in survivors], reached=reached)


def test_a_ladder_multiplies_its_shares():
    mixed = Ladder(passed=[(16, 512), (8, 64)], reached=True)
    assert mixed.log_p == pytest.approx(math.log(1 / 256))
    # (1 - f) / (f N) of both levels
    assert mixed.relative_variance == pytest.approx((31 / 32) / 16 + (7 / 8) / 8)


def test_one_repeat_has_the_interval_expected_beforehand():
    estimate = combine([ladder(25, 50)])
    assert estimate.log_p == pytest.approx(math.log(0.125))
    half_width = t.ppf(0.975, 4) * math.sqrt(3 * (3 / 100 + 1 / 100))
    assert estimate.log_p_low == pytest.approx(math.log(0.125) - half_width)
    assert estimate.log_p_high == pytest.approx(math.log(0.125) + half_width)


def test_the_spread_of_repeats_is_weighed_against_what_was_expected():
    """Four degrees of freedom of prior and one of two repeats."""
    spread = combine([ladder(25, 40), ladder(25, 10)])
    assert spread.log_p == pytest.approx(math.log(0.0625))
    expected = 3 * (0.03 + (0.015 + 0.09) / 2)
    squares = math.log(4) ** 2 / 2
    half_width = t.ppf(0.975, 5) * math.sqrt((4 * expected + squares) / 5 / 2)
    assert spread.log_p_low == pytest.approx(math.log(0.0625) - half_width)
    assert spread.log_p_high == pytest.approx(min(0, math.log(0.0625) + half_width))
    close = combine([ladder(25, 50)] * 2)
    half_width = t.ppf(0.975, 5) * math.sqrt(4 * 3 * 0.04 / 5 / 2)
    assert close.log_p_high == pytest.approx(math.log(0.125) + half_width)
    assert combine([ladder(98), ladder(99)]).log_p_high == 0  # p is at most 1


def test_a_stuck_repeat_counts_as_nothing_below_and_as_its_bound_above():
    estimate = combine([ladder(25, 50), ladder(20, reached=False)])
    assert estimate.num_reached == 1
    assert estimate.log_p == pytest.approx(math.log(0.125 / 2))
    # one of two reached a replica: 1/1 - 1/2
    half_width = t.ppf(0.975, 4) * math.sqrt(3 * 0.04 + 0.5)
    assert estimate.log_p_low == pytest.approx(math.log(0.125 / 2) - half_width)
    assert estimate.log_p_high == pytest.approx(min(0, math.log(0.325 / 2) + half_width))


def test_without_a_replica_only_the_bound_is_known():
    estimate = combine([ladder(25, 20, reached=False)] * 2)
    assert (estimate.log_p, estimate.log_p_low, estimate.num_reached) == (None, None, 0)
    half_width = t.ppf(0.975, 5) * math.sqrt(4 * 3 * 0.07 / 5 / 2)
    assert estimate.log_p_high == pytest.approx(math.log(0.05) + half_width)


def test_tiny_probabilities_stay_on_the_log_scale():
    deep = ladder(*[25] * 2000)
    assert combine([deep, deep]).log_p == pytest.approx(2000 * math.log(0.25))


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="0 repeats"):
        combine([])


@pytest.mark.parametrize(("log_p", "expected"), [
    (math.log(1 / 1234), 1230), (0.0, 1), (-2000.0, None), (None, None),
])  # fmt: skip
def test_one_in_has_three_digits(log_p, expected):
    assert one_in(log_p) == expected
