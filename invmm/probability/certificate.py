"""The lower bound that a replicating noise distribution proves for the replication probability.

By data processing, a distribution q at KL(q || N(0, I)) = K whose samples replicate at rate r
satisfies d(r || p) <= K, with p the rate under the prior: p is at least the smaller root of
d(r || p) = K (ours). This holds for the sampler, guidance scale and prompts that r was counted
with, if r is a lower bound from samples drawn after q was frozen. All logarithms are natural; K is
summed over latent dimensions, so that exp(-K) underflows and only log p is ever computed.

Legend: kl_nats -> K; rate -> r; bernoulli_divergence -> d(r || p).
"""

from __future__ import annotations

import math

_ROUNDING = 16 * 2.0**-52
"""Generous bound on the relative error of d(r || p) in double precision, so that log p is never
too high."""


def clopper_pearson(
    successes: float, trials: float, confidence: float = 0.95
) -> tuple[float, float]:
    """Exact two-sided interval of a binomial rate (Clopper & Pearson 1934).

    Args:
        successes: in [0, trials].
        trials: at least 1; the effective number, not a whole one, if trials are dependent.
        confidence: in (0, 1).

    Returns:
        The lower and upper end, in [0, 1].

    Raises:
        ValueError: an argument outside its range.
    """
    from scipy.stats import beta

    _check_counts(successes, trials, confidence)
    tail = (1 - confidence) / 2
    failures = trials - successes
    low = float(beta.ppf(tail, successes, failures + 1)) if successes else 0.0
    high = float(beta.isf(tail, successes + 1, failures)) if failures > 0 else 1.0
    return low, high


def lower_rate(successes: int, trials: int, confidence: float = 0.95) -> float:
    """Exact one-sided lower bound of a binomial rate; the r that a certificate may use.

    Args:
        successes: in [0, trials], of samples drawn after q was frozen.
        trials: at least 1.
        confidence: in (0, 1).

    Returns:
        In [0, 1); 0 without a success.

    Raises:
        ValueError: an argument outside its range.
    """
    from scipy.stats import beta

    _check_counts(successes, trials, confidence)
    if successes == 0:
        return 0.0
    return float(beta.ppf(1 - confidence, successes, trials - successes + 1))


def bernoulli_divergence(r: float, p: float) -> float:
    """d(r || p) = r log(r / p) + (1 - r) log((1 - r) / (1 - p)): least KL of a q with rate r.

    Args:
        r: rate under q, in [0, 1].
        p: rate under the prior, in [0, 1].

    Returns:
        Nats, at least 0; infinite for p = 0 < r or p = 1 > r.

    Raises:
        ValueError: a rate outside [0, 1].
    """
    _check_rate("r", r)
    _check_rate("p", p)
    log_p = math.log(p) if p > 0 else -math.inf
    log_rest = math.log1p(-p) if p < 1 else -math.inf
    return _divergence(r, log_p, log_rest)


def log_p_certified(kl_nats: float, rate: float) -> float:
    """The logarithm of the smallest p that is possible given a distribution of this KL and rate.

    Solved by bisection in log p, on the side where the divergence is at least K, so the result
    is never above the root. For small p it is -(K + H(r)) / r, with H the binary entropy; for
    r = 1 exactly -K. The shortcut exp(-K) is wrong for every other rate.

    Args:
        kl_nats: K = KL(q || N(0, I)) summed over latent dimensions, in nats.
        rate: r, the lower end of q's replication rate (`lower_rate`), in [0, 1].

    Returns:
        log p in [-inf, 0]; -inf for rate 0, which certifies nothing.

    Raises:
        ValueError: a negative or infinite KL, or a rate outside [0, 1].
    """
    if not 0 <= kl_nats < math.inf:
        raise ValueError(f"kl_nats={kl_nats} is no divergence; give a finite one of at least 0")
    _check_rate("rate", rate)
    if rate == 0:
        return -math.inf
    if rate == 1:
        return 0.0 - kl_nats
    if kl_nats == 0:
        return math.log(rate)
    divergence = kl_nats + _ROUNDING * (kl_nats + 1)
    # d(r || p) > -H(r) - r log p, so its root lies above that of the right-hand side.
    low = -(divergence - _negative_entropy(rate)) / rate
    high = math.log(rate)
    while low < (middle := low + (high - low) / 2) < high:
        if _divergence(rate, middle, _log_complement(middle)) >= divergence:
            low = middle
        else:
            high = middle
    return low


def tightness(kl_nats: float, rate: float, p: float) -> float:
    """The ratio of a distribution's KL to the least possible one: K / d(r || p).

    Args:
        kl_nats: K, summed over latent dimensions, in nats.
        rate: r, its replication rate, above p.
        p: the replication rate under the prior, above 0.

    Returns:
        1 at the optimum; below 1 only through errors of r and p.

    Raises:
        ValueError: r is not above p, or p is 0, so that no least KL above 0 exists.
    """
    _check_rate("rate", rate)
    _check_rate("p", p)
    if not 0 < p < rate:
        raise ValueError(
            f"rate={rate} with p={p} has no least divergence above 0; tightness needs 0 < p < rate"
        )
    return kl_nats / bernoulli_divergence(rate, p)


def _divergence(r: float, log_p: float, log_rest: float) -> float:
    """d(r || p) from log p and log(1 - p); terms of weight 0 vanish, whatever their logarithm."""
    of_hits = r * log_p if r > 0 else 0.0
    of_rest = (1 - r) * log_rest if r < 1 else 0.0
    return max(0.0, _negative_entropy(r) - of_hits - of_rest)


def _negative_entropy(r: float) -> float:
    """-H(r) = r log r + (1 - r) log(1 - r), in [-log 2, 0]."""
    return sum(part * math.log(part) for part in (r, 1 - r) if part > 0)


def _log_complement(log_p: float) -> float:
    """log(1 - p) without cancellation at either end (Maechler 2012)."""
    if log_p > -math.log(2):
        return math.log(-math.expm1(log_p))
    return math.log1p(-math.exp(log_p))


def _check_rate(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is no rate; give one in [0, 1]")


def _check_counts(successes: float, trials: float, confidence: float) -> None:
    if trials < 1:
        raise ValueError(f"trials={trials} says nothing about a rate; draw at least 1 sample")
    if not 0 <= successes <= trials:
        raise ValueError(f"successes={successes} must lie in [0, trials={trials}]")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie in (0, 1); the usual one is 0.95")
