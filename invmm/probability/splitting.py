"""Multilevel splitting: how rarely the prior itself returns an image (Au & Beck 2001).

p = P[similarity(sampler(e), x0) >= beta] for e ~ N(0, I) is a product of conditional
probabilities, each large enough to be counted: of reaching the next level of similarity from the
one before. It needs neither gradients nor the inside of the model.

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
from invmm.engine.outcomes import CostRange, Evaluations, Outcome, Status
from invmm.engine.protocols import Setting, Target
from invmm.engine.requests import Embed, Sample
from invmm.probability.estimate import Ladder, ProbabilityEstimate, combine
from invmm.probability.population import Draws, Population

NUM_SHOWN = 8
"""Closest samples that an outcome shows, as many as a check of the paper draws."""


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """The replication probability of one image; the score is -log p per latent dimension.

    Over all noise distributions that always replicate the image, -log p is the least KL from the
    prior; InvMM is the least over diagonal Gaussians only. So the score (`invmm_star`) is on the
    scale of InvMM, and its ideal (ours).

    The seed of a stochastic sampler is a coordinate of the particle beside its noise; see
    `Draws.moved_towards`. Where seeds decide (DDPM, DDIM with eta near 1) few moves are accepted,
    and estimates scatter by nats: trust the interval, or use a smaller eta.

    p is unbiased but for the adaptation of h; its logarithm lies a little low on average. The
    repeats are independent from their free samples on. Columns beside the score:

    - log_p, log_p_low, log_p_high: nats, with the 95 % interval of `combine`; if censored, only
      log_p_high, below which p lies.
    - one_in: 1 / p, the draws that one replica takes on average.
    - num_levels: of the longest repeat; num_reached: repeats that reached replicas.
    - highest_level: similarity above which some repeat's particles live.
    - acceptance: share of all moves accepted.

    Attributes:
        num_particles: of one repeat.
        level_probability: share of the particles that reaches the next level (Au & Beck: 0.1).
        moves: Crank-Nicolson moves of every particle at a level.
        initial_step: h of the first move, from 0 (stays) to 1 (forgets); adapted at every move.
        target_acceptance: share of accepted moves that h is adapted to.
        max_levels: budget of levels that are moved at; p is censored if it does not suffice.
        repeats: independent runs, whose spread gives the interval. Two tell little about their
            own spread (Student's t multiplies it by 12.7, for four by 3.2).

    Raises:
        ValueError: a level would keep no particle.
    """

    num_particles: Annotated[int, Ge(2)] = 128
    level_probability: Annotated[float, Gt(0), Lt(1)] = 0.25
    moves: Annotated[int, Ge(1)] = 3
    initial_step: Annotated[float, Gt(0), Le(1)] = 0.5
    target_acceptance: Annotated[float, Gt(0), Lt(1)] = 0.35
    max_levels: Annotated[int, Ge(1)] = 20
    repeats: Annotated[int, Ge(1)] = 2

    def __post_init__(self) -> None:
        if self._num_kept < 1:
            raise ValueError(
                f"measurement.level_probability={self.level_probability} keeps none of "
                f"measurement.num_particles={self.num_particles}; use at least "
                f"measurement.num_particles={math.ceil(1 / self.level_probability)}"
            )

    async def __call__(self, target: Target, setting: Setting, rng: torch.Generator) -> Outcome:
        """Runs all repeats side by side; see `Measurement`."""
        size, sampler = self.num_particles, setting.sampler
        closest = _Closest(target, setting, only_guidance_scale(sampler))
        free = Draws.from_prior(self.repeats * size, target.latents.shape[1:], sampler, rng)
        similarities = await closest.see(free)
        populations = [
            self._population(draws, own, setting.criterion)
            for draws, own in zip(free.split(size), similarities.split(size), strict=True)
        ]
        for level in range(self.max_levels + 1):
            for population in populations:
                if not population.reached:
                    population.raise_level()
            climbing = [population for population in populations if not population.reached]
            if not climbing or level == self.max_levels:
                break
            for population in climbing:
                population.resample(rng)
            for _ in range(self.moves):
                proposals = [population.propose(sampler, rng) for population in climbing]
                similarities = await closest.see(Draws.joined(proposals))
                parts = similarities.split(size)
                for population, proposal, own in zip(climbing, proposals, parts, strict=True):
                    population.decide(proposal, own)
            for population in climbing:
                population.settle()
        return _outcome(populations, closest, dimensions=target.latents[0].numel())

    def cost(self, sampler: Sampler, criterion: ReplicationCriterion) -> CostRange:
        """See `Measurement`; fewest: the first level suffices."""
        of_sample = sampler.evaluations_at(only_guidance_scale(sampler))
        first = self.repeats * self.num_particles * of_sample
        most = (1 + self.max_levels * self.moves) * first
        return CostRange(
            fewest=Evaluations(forward=first, sampler=first),
            most=Evaluations(forward=most, sampler=most),
        )

    @property
    def _num_kept(self) -> int:
        return int(self.level_probability * self.num_particles)

    def _population(
        self, draws: Draws, similarities: Tensor, criterion: ReplicationCriterion
    ) -> Population:
        return Population(
            draws,
            similarities,
            goal=criterion.threshold,
            num_kept=self._num_kept,
            step=self.initial_step,
            target_acceptance=self.target_acceptance,
        )


class _Closest:
    """Asks for samples and remembers those that came closest to the image."""

    def __init__(self, target: Target, setting: Setting, guidance_scale: float) -> None:
        self.target, self.setting, self.guidance_scale = target, setting, guidance_scale
        self.similarities: list[float] = []
        self.pixels: list[Tensor] = []

    async def see(self, draws: Draws) -> Tensor:
        """(B,) similarities to the image of what is sampled from the draws, on the CPU."""
        count = len(draws)
        latents = await Sample(
            draws.noise.to(self.target.latents),
            self.setting.sampler,
            self.target.rows(count),
            tuple(draws.seeds.tolist()),
            self.guidance_scale,
            self.target.negative_rows(count),
        )
        embedding = await Embed(latents)
        similarities = (embedding.vectors @ self.target.embedding).float().cpu()
        best, rows = similarities.topk(min(NUM_SHOWN, count))
        values = [*self.similarities, *best.tolist()]
        pixels = [*self.pixels, *embedding.pixels[rows.to(embedding.pixels.device)].cpu()]
        order = sorted(range(len(values)), key=lambda row: -values[row])[:NUM_SHOWN]
        self.similarities = [values[row] for row in order]
        self.pixels = [pixels[row] for row in order]
        return similarities


def _outcome(populations: Sequence[Population], closest: _Closest, *, dimensions: int) -> Outcome:
    estimate = combine(
        [
            Ladder(
                factors=population.factors,
                num_particles=len(population.similarities),
                reached=population.reached,
            )
            for population in populations
        ]
    )
    acceptances = [value for population in populations for value in population.acceptances]
    first = populations[0]
    nats = None if estimate.log_p is None else 0.0 - estimate.log_p
    return Outcome(
        status=_status(estimate),
        score=None if nats is None else nats / dimensions,
        score_nats=nats,
        best_similarity=closest.similarities[0],
        curves={"level": first.levels, "acceptance": first.acceptances},
        samples=torch.stack(closest.pixels),
        columns={
            "log_p": estimate.log_p,
            "log_p_low": estimate.log_p_low,
            "log_p_high": estimate.log_p_high,
            "one_in": one_in(estimate.log_p),
            "num_levels": max(len(population.levels) for population in populations),
            "num_reached": estimate.num_reached,
            "highest_level": max(-1.0, *(population.levels[-1] for population in populations)),
            "acceptance": sum(acceptances) / len(acceptances) if acceptances else None,
        },
    )


def _status(estimate: ProbabilityEstimate) -> Status:
    """An estimate proves that a sample replicates; without one, p is censored, not 0."""
    return Status.CENSORED if estimate.log_p is None else Status.ESTIMATED


def one_in(log_p: float | None) -> float | None:
    """1 / p to three digits; None where it is unknown or beyond double precision."""
    try:
        return None if log_p is None else float(f"{math.exp(-log_p):.3g}")
    except OverflowError:
        return None


def only_guidance_scale(sampler: Sampler) -> float:
    """The probability is that of one way to use the model.

    Raises:
        ValueError: several ways are asked for.
    """
    if len(sampler.guidance_scales) > 1:
        scales = ", ".join(f"{scale:g}" for scale in sampler.guidance_scales)
        raise ValueError(
            f"sampler.guidance_scales=[{scales}] leaves open which probability is meant; use one, "
            f"as sampler.guidance_scales=[{sampler.guidance_scales[0]:g}]"
        )
    return sampler.guidance_scales[0]
