"""Combines independent repeats of multilevel splitting into one probability and its interval.

Legend: factor f -> the conditional probability of a level (Au & Beck 2001); their product is p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
"""Confidence of all intervals."""
CORRELATION = 3.0
"""Expected ratio of a repeat's variance to that with independent particles (ours: measured 1.3 on
half-spaces and balls, 1.8 on a union of three half-spaces, 3 on the demo's icons)."""
PRIOR_FREEDOM = 4
"""Weight of this expectation against the observed spread, in degrees of freedom (ours)."""


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """The levels of one repeat.

    Attributes:
        passed: per level, the number of particles that passed it (at least 1) and of all.
        reached: whether the last level is the threshold of a replica.
    """

    passed: Sequence[tuple[int, int]]
    reached: bool

    @property
    def log_p(self) -> float:
        """Log of the probability of the last level: of p if reached, else an upper bound."""
        return sum(math.log(survivors / total) for survivors, total in self.passed)

    @property
    def relative_variance(self) -> float:
        """Of the product, for independent levels and particles (delta method)."""
        return sum(1 / survivors - 1 / total for survivors, total in self.passed)


@dataclass(frozen=True, kw_only=True)
class ProbabilityEstimate:
    """log p with its 95 % interval, in nats; censored if no repeat reached a replica.

    Attributes:
        log_p: None if censored.
        log_p_low: lower end of the interval; None if censored.
        log_p_high: upper end, at most 0; if censored, an upper bound of log p.
        num_reached: repeats that reached a replica.
    """

    log_p: float | None
    log_p_low: float | None
    log_p_high: float
    num_reached: int


def combine(ladders: Sequence[Ladder]) -> ProbabilityEstimate:
    """The mean of p over repeats, and an interval on the log scale.

    The variance of log p is that between the repeats, shrunk towards an expected one, since a few
    repeats tell little about their own spread. The expected variance is that of independent
    particles by the delta method, sum (1 - f) / (f N), times `CORRELATION`, because copies of a
    particle are correlated. The interval is Student's, with the degrees of freedom of both.

    A repeat that did not reach a replica counts as p = 0 in the mean. The share of repeats that
    reached one adds to the variance like the factor of one more level. In the upper end of the
    interval, a repeat that did not reach a replica counts with its upper bound.

    Args:
        ladders: of independent repeats.

    Raises:
        ValueError: no repeats.
    """
    from scipy.stats import t

    if not ladders:
        raise ValueError("0 repeats estimate nothing; use at least 1")
    total = len(ladders)
    reached = [ladder.log_p for ladder in ladders if ladder.reached]
    counted = reached or [ladder.log_p for ladder in ladders]
    mean = sum(counted) / len(counted)
    squares = sum((value - mean) ** 2 for value in counted)
    expected = CORRELATION * sum(ladder.relative_variance for ladder in ladders) / total
    freedom = PRIOR_FREEDOM + len(counted) - 1
    variance = (PRIOR_FREEDOM * expected + squares) / freedom
    of_mean = variance / len(counted) + 1 / len(counted) - 1 / total
    half_width = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(of_mean)
    bound = _log_mean_exp([ladder.log_p for ladder in ladders], total)
    high = min(0.0, bound + half_width)
    if not reached:
        return ProbabilityEstimate(log_p=None, log_p_low=None, log_p_high=high, num_reached=0)
    log_p = _log_mean_exp(reached, total)
    return ProbabilityEstimate(
        log_p=log_p, log_p_low=log_p - half_width, log_p_high=high, num_reached=len(reached)
    )


def _log_mean_exp(values: Sequence[float], count: int) -> float:
    """log(sum(exp(values)) / count), without leaving the log scale."""
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values) / count)


def one_in(log_p: float | None) -> float | None:
    """1 / p to three digits; None if p is unknown or 1 / p exceeds double precision."""
    try:
        return None if log_p is None else float(f"{math.exp(-log_p):.3g}")
    except OverflowError:
        return None
