"""From the factors of independent repeats to one probability and its interval.

Legend: factor -> the conditional probability of a level (Au & Beck 2001); their product is p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
"""Of all intervals."""
CORRELATION = 3.0
"""Variance of a repeat over that of independent particles, as expected beforehand (ours: 1.3 on
half-spaces and balls, 1.8 on a union of three half-spaces, 3 on the demo's icons)."""
PRIOR_FREEDOM = 4
"""Degrees of freedom that this expectation counts for (ours)."""


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """The levels of one repeat.

    Attributes:
        passed: of each level, how many particles passed it (1 at least), and out of how many.
        reached: whether the last level is that of a replica.
    """

    passed: Sequence[tuple[int, int]]
    reached: bool

    @property
    def log_p(self) -> float:
        """Log of the probability of the last level: p itself if reached, a bound if not."""
        return sum(math.log(survivors / total) for survivors, total in self.passed)

    @property
    def relative_variance(self) -> float:
        """Of the product, as if levels and particles were independent (delta method)."""
        return sum(1 / survivors - 1 / total for survivors, total in self.passed)


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

    The variance of log p is that between the repeats, shrunk towards `CORRELATION` times what the
    delta method gives for independent particles, sum (1 - f) / (f N): a few repeats tell little
    about their own spread, and copies of a particle are correlated. Student's t has the degrees of
    freedom of both. A repeat that did not reach a replica counts as p = 0, reaching one as a level
    of its own; in the upper end it counts at its bound.

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
    """1 / p to three digits; None where it is unknown or beyond double precision."""
    try:
        return None if log_p is None else float(f"{math.exp(-log_p):.3g}")
    except OverflowError:
        return None
