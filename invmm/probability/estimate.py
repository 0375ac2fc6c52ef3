"""From the factors of independent repeats to one probability and its interval.

Legend: factor -> the conditional probability of a level (Au & Beck 2001); their product is p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from invmm.probability.certificate import clopper_pearson

CONFIDENCE = 0.95
"""Of all intervals."""


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """The levels of one repeat.

    Attributes:
        factors: share of the particles that passed each level, in (0, 1].
        num_particles: N.
        reached: whether the last level is that of a replica.
    """

    factors: Sequence[float]
    num_particles: int
    reached: bool

    @property
    def log_p(self) -> float:
        """Log of the probability of the last level: p itself if reached, a bound if not."""
        return sum(map(math.log, self.factors))

    @property
    def relative_variance(self) -> float:
        """Of the product, as if levels and particles were independent (delta method)."""
        return sum((1 - f) / (f * self.num_particles) for f in self.factors)


@dataclass(frozen=True, kw_only=True)
class ProbabilityEstimate:
    """log p with its 95 % interval, in nats; censored if no repeat reached a replica.

    Attributes:
        log_p: None if censored.
        log_p_low: None if censored.
        log_p_high: at most 0; the only thing known if censored.
        num_reached: repeats that did reach a replica.
    """

    log_p: float | None
    log_p_low: float | None
    log_p_high: float
    num_reached: int


def combine(ladders: Sequence[Ladder]) -> ProbabilityEstimate:
    """The mean of p over repeats, and an interval on the log scale.

    A repeat that did not reach a replica counts as p = 0 in the estimate and at its bound in the
    upper end. The interval is the wider of two: Student's t on the spread of log p over the
    repeats that reached one (two at least), and the binomial delta method, 1.96
    sqrt(sum (1 - f) / (f N) / repeats), which alone is too narrow because copies of a particle
    are correlated. Where all repeats ended at their first level, p is a plain count and the
    interval that of Clopper & Pearson.

    Args:
        ladders: of independent repeats with equally many particles.

    Raises:
        ValueError: no repeats.
    """
    from scipy.stats import norm, t

    if not ladders:
        raise ValueError("0 repeats estimate nothing; use at least 1")
    reached = [ladder.log_p for ladder in ladders if ladder.reached]
    if len(reached) == len(ladders) and all(len(ladder.factors) == 1 for ladder in ladders):
        return _counted(ladders)
    quantile = (1 + CONFIDENCE) / 2
    variance = sum(ladder.relative_variance for ladder in ladders) / len(ladders)
    half_width = float(norm.ppf(quantile)) * math.sqrt(variance / len(ladders))
    if len(reached) >= 2:
        mean = sum(reached) / len(reached)
        spread = sum((value - mean) ** 2 for value in reached) / (len(reached) - 1)
        by_repeats = float(t.ppf(quantile, len(reached) - 1)) * math.sqrt(spread / len(reached))
        half_width = max(half_width, by_repeats)
    bound = _log_mean_exp([ladder.log_p for ladder in ladders], len(ladders))
    high = min(0.0, bound + half_width)
    if not reached:
        return ProbabilityEstimate(log_p=None, log_p_low=None, log_p_high=high, num_reached=0)
    log_p = _log_mean_exp(reached, len(ladders))
    return ProbabilityEstimate(
        log_p=log_p, log_p_low=log_p - half_width, log_p_high=high, num_reached=len(reached)
    )


def _counted(ladders: Sequence[Ladder]) -> ProbabilityEstimate:
    trials = sum(ladder.num_particles for ladder in ladders)
    successes = sum(round(ladder.factors[0] * ladder.num_particles) for ladder in ladders)
    low, high = clopper_pearson(successes, trials, CONFIDENCE)
    return ProbabilityEstimate(
        log_p=math.log(successes / trials),
        log_p_low=math.log(low),
        log_p_high=math.log(high),
        num_reached=len(ladders),
    )


def _log_mean_exp(values: Sequence[float], count: int) -> float:
    """log(sum(exp(values)) / count), without leaving the log scale."""
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values) / count)
