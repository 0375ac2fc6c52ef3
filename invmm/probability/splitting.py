"""Multilevel splitting: the probability that the prior returns an image (Au & Beck 2001).

p = P[similarity(sampler(e), x0) >= beta] for e ~ N(0, I) is a product of conditional
probabilities, each large enough to be counted: that of reaching the next level of similarity from
the one before. It needs neither gradients nor access to the inside of the model.

Legend: num_particles -> N; level_probability -> p0; initial_step -> h; the criterion's threshold
-> beta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from invmm.diffusion.sampling import Sampler
from invmm.engine.criterion import ReplicationCriterion
from invmm.engine.outcomes import CostRange, Outcome, Status
from invmm.engine.protocols import Setting, Target, Use
from invmm.faults import Refusal
from invmm.probability.bank import (
    NUM_SHOWN,
    Bank,
    Closest,
    DrawnBank,
    check_bank_use,
    sampling_cost,
)
from invmm.probability.estimate import Ladder, ProbabilityEstimate, combine, one_in
from invmm.probability.free_sampling import counted
from invmm.probability.population import Draws, Population


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """The replication probability of one image; the score is -log p per latent dimension.

    Over all noise distributions that always replicate the image, -log p is the least KL from the
    prior; InvMM is the least over diagonal Gaussians only. So the score (`invmm_star`) is on the
    scale of InvMM, and its ideal (ours).

    First a bank of free samples is drawn. If it holds enough replicas, p is counted. Otherwise the
    bank is divided equally among the repeats. Each begins with the closest samples of its part, as
    many as survive a level, and climbs from there. So repeats are independent, and their spread
    includes the variance of the bank. Repeats share one budget: one that has reached replicas, or
    can no longer move, leaves the rest to the others. If the budget ends before any repeat has
    reached replicas, those in the bank are counted, however few.

    Without a prompt, or with the empty prompt or one fixed label, all images share one bank; it
    costs each of them little, but their errors are correlated.

    The seed of a stochastic sampler is a coordinate of the particle beside its noise; see
    `Draws.moved_towards`. If seeds decide much of a sample (DDPM, DDIM with eta near 1), few moves
    are accepted, and estimates scatter by nats: trust the interval, or use a smaller eta.

    The estimate of p is biased upwards: by a few percent, because levels and h adapt to the
    particles, and by up to a tenth more if about `min_count` replicas are expected, because the
    bank also decides between counting and splitting. The estimate of log p is a little too low on
    average. Columns beside the score:

    - method: "counted" or "split".
    - log_p, log_p_low, log_p_high: nats, with the 95 % interval, exact if counted, else that of
      `combine`; if censored, only log_p_high, an upper bound of log p.
    - one_in: 1 / p, the draws that one replica takes on average.
    - count, num_free_samples: replicas in the bank, and its size.
    - num_levels: of the longest repeat; num_reached: repeats that reached replicas.
    - highest_level: the highest threshold of similarity that any repeat has passed.
    - acceptance: share of all moves accepted.

    Attributes:
        bank_size: free samples of a bank that images with the same condition share.
        own_bank_size: free samples of the bank of an image that has a condition of its own.
        block_size: free samples drawn at a time; processes that share a bank divide it in such
            blocks.
        min_count: least number of replicas in the bank for which p is counted.
        num_particles: of one repeat.
        level_probability: share of the particles that reaches the next level (Au & Beck: 0.1).
        moves: Crank-Nicolson moves of every particle at a level.
        initial_step: h of the first move, from 0 (stays) to 1 (independent of where it was);
            adapted at every move.
        target_acceptance: share of accepted moves that h is adapted to.
        max_samples: budget of the moves of all repeats, for one image, beside its bank; a level
            of a repeat takes `moves` times `num_particles`. p is censored if it does not suffice.
        repeats: independent runs, whose spread goes into the interval.

    Raises:
        ValueError: a level would keep no particle, a bank is too small to begin with, or the
            budget does not suffice for one level.
    """

    bank_size: Annotated[int, Ge(1)] = 2048
    own_bank_size: Annotated[int, Ge(1)] = 256
    block_size: Annotated[int, Ge(1)] = 128
    min_count: Annotated[int, Ge(1)] = 10
    num_particles: Annotated[int, Ge(2)] = 32
    level_probability: Annotated[float, Gt(0), Lt(1)] = 0.5
    moves: Annotated[int, Ge(1)] = 2
    initial_step: Annotated[float, Gt(0), Le(1)] = 0.5
    target_acceptance: Annotated[float, Gt(0), Lt(1)] = 0.35
    max_samples: Annotated[int, Ge(1)] = 10240
    repeats: Annotated[int, Ge(1)] = 4

    def __post_init__(self) -> None:
        if self._num_kept < 1:
            raise Refusal(
                f"measurement.level_probability={self.level_probability} keeps none of "
                f"measurement.num_particles={self.num_particles}; use at least "
                f"measurement.num_particles={math.ceil(1 / self.level_probability)}",
                "measurement.level_probability",
                "measurement.num_particles",
            )
        least = max(self.repeats * self.num_particles, self.min_count)
        for name in ("bank_size", "own_bank_size"):
            if (size := getattr(self, name)) < least:
                raise Refusal(
                    f"measurement.{name}={size} is too small for measurement.repeats="
                    f"{self.repeats} of measurement.num_particles={self.num_particles} and "
                    f"measurement.min_count={self.min_count}; use at least {least}",
                    f"measurement.{name}",
                    "measurement.repeats",
                    "measurement.num_particles",
                    "measurement.min_count",
                )
        if self.max_samples < (least := self._round_size(self.repeats)):
            raise Refusal(
                f"measurement.max_samples={self.max_samples} is too small for one level of "
                f"measurement.repeats={self.repeats} with measurement.moves={self.moves} of "
                f"measurement.num_particles={self.num_particles}; use at least {least}",
                "measurement.max_samples",
                "measurement.repeats",
                "measurement.moves",
                "measurement.num_particles",
            )

    def bank(self, seed: int, shape: tuple[int, ...], sampler: Sampler) -> Bank:
        """See `BankMeasurement`."""
        return self._bank(self.bank_size, seed, shape, sampler)

    def check(self, use: Use) -> None:
        """See `Measurement`."""
        check_bank_use(self, use)

    async def __call__(self, target: Target, setting: Setting, rng: torch.Generator) -> Outcome:
        """Draws a bank for this image alone, then counts or splits; see `Measurement`."""
        seed = int(torch.randint(2**62, (), generator=rng))
        bank = self._bank(
            self.own_bank_size, seed, tuple(target.latents.shape[1:]), setting.sampler
        )
        return await self.from_bank(await bank.drawn(target, setting), target, setting, rng)

    async def from_bank(
        self, drawn: DrawnBank, target: Target, setting: Setting, rng: torch.Generator
    ) -> Outcome:
        """Counts, or climbs with all repeats side by side; see `BankMeasurement`."""
        sampler, goal = setting.sampler, setting.criterion.threshold
        free_similarities = drawn.similarities(target)
        closest = await drawn.closest(target, setting)
        count = int((free_similarities >= goal).sum())
        if count >= self.min_count:
            return counted(free_similarities, closest, target, setting)
        populations = [
            self._population(drawn.bank, rows, free_similarities[rows], goal)
            for rows in torch.arange(len(free_similarities)).tensor_split(self.repeats)
        ]
        climbing, budget = populations, self.max_samples
        while True:
            for population in climbing:
                population.raise_level()
            climbing = [each for each in climbing if not each.reached and not each.stalled]
            budget -= self._round_size(len(climbing))
            if not climbing or budget < 0:
                break
            for population in climbing:
                population.resample(rng)
            for _ in range(self.moves):
                proposals = [population.propose(sampler, rng) for population in climbing]
                similarities = await closest.see(Draws.joined(proposals))
                parts = similarities.split(self.num_particles)
                for population, proposal, own in zip(climbing, proposals, parts, strict=True):
                    population.decide(proposal, own)
            for population in climbing:
                population.settle()
        if count and not any(population.reached for population in populations):
            return counted(free_similarities, closest, target, setting)
        return _outcome(populations, closest, free_similarities, target, setting)

    def cost(self, sampler: Sampler, criterion: ReplicationCriterion) -> CostRange:
        """See `Measurement`; fewest: the bank holds enough replicas to count."""
        return self.cost_from_bank(sampler) + sampling_cost(self.own_bank_size, sampler)

    def cost_from_bank(self, sampler: Sampler) -> CostRange:
        """See `BankMeasurement`; fewest: the bank holds enough replicas to count."""
        shown = sampling_cost(NUM_SHOWN, sampler)
        return CostRange(fewest=shown, most=shown + sampling_cost(self.max_samples, sampler))

    @property
    def _num_kept(self) -> int:
        return int(self.level_probability * self.num_particles)

    def _round_size(self, repeats: int) -> int:
        """Samples that this number of repeats draws for the moves of one level."""
        return repeats * self.moves * self.num_particles

    def _bank(self, size: int, seed: int, shape: tuple[int, ...], sampler: Sampler) -> Bank:
        return Bank(
            seed=seed, num_samples=size, block_size=self.block_size, shape=shape, sampler=sampler
        )

    def _population(
        self, bank: Bank, rows: Tensor, similarities: Tensor, goal: float
    ) -> Population:
        return Population(
            lambda picked: bank.draws_of(rows[picked]),
            similarities,
            goal=goal,
            num_particles=self.num_particles,
            num_kept=self._num_kept,
            step=self.initial_step,
            target_acceptance=self.target_acceptance,
        )


def _outcome(
    populations: Sequence[Population],
    closest: Closest,
    free_similarities: Tensor,
    target: Target,
    setting: Setting,
) -> Outcome:
    estimate = combine(
        [Ladder(passed=population.passed, reached=population.reached) for population in populations]
    )
    acceptances = [value for population in populations for value in population.acceptances]
    first = populations[0]
    replicas = (free_similarities >= setting.criterion.threshold).nonzero()[:, 0]
    nats = None if estimate.log_p is None else 0.0 - estimate.log_p
    return Outcome(
        status=_status(estimate),
        score=None if nats is None else nats / target.latents[0].numel(),
        score_nats=nats,
        best_similarity=closest.similarities[0],
        curves={"level": first.levels, "acceptance": first.acceptances},
        tensors={"replicas": replicas},
        samples=closest.samples,
        columns={
            "method": "split",
            "log_p": estimate.log_p,
            "log_p_low": estimate.log_p_low,
            "log_p_high": estimate.log_p_high,
            "one_in": one_in(estimate.log_p),
            "count": len(replicas),
            "num_free_samples": len(free_similarities),
            "num_levels": max(len(population.levels) for population in populations),
            "num_reached": estimate.num_reached,
            "highest_level": max(-1.0, *(population.levels[-1] for population in populations)),
            "acceptance": sum(acceptances) / len(acceptances) if acceptances else None,
        },
    )


def _status(estimate: ProbabilityEstimate) -> Status:
    """ESTIMATED if some sample replicated; else p is CENSORED, since it need not be 0."""
    return Status.CENSORED if estimate.log_p is None else Status.ESTIMATED
