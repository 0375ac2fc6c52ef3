"""The certificate: exact where p can be written down, safe where it cannot."""

from __future__ import annotations

import math

import pytest
from scipy.stats import binom, norm

from invmm.probability.certificate import (
    bernoulli_divergence,
    clopper_pearson,
    log_p_certified,
    lower_rate,
    tightness,
)


def smaller_root(kl_nats: float, rate: float) -> float:
    """By bisection on p itself, which serves while p does not underflow."""
    low, high = 0.0, rate
    for _ in range(2000):
        middle = (low + high) / 2
        if bernoulli_divergence(rate, middle) > kl_nats:
            low = middle
        else:
            high = middle
    return high


# Rates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("successes", "trials"), [(1, 8), (7, 8), (3, 200), (50, 64)])
def test_interval_ends_leave_exactly_their_tails(successes, trials):
    low, high = clopper_pearson(successes, trials)
    assert binom.sf(successes - 1, trials, low) == pytest.approx(0.025)
    assert binom.cdf(successes, trials, high) == pytest.approx(0.025)
    lower = lower_rate(successes, trials)
    assert binom.sf(successes - 1, trials, lower) == pytest.approx(0.05)
    assert low < lower < successes / trials < high


def test_intervals_of_nothing_and_of_everything_have_closed_forms():
    assert clopper_pearson(0, 20) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert clopper_pearson(20, 20) == (pytest.approx(0.025 ** (1 / 20)), 1.0)
    assert lower_rate(0, 20) == 0.0
    assert lower_rate(8, 8) == pytest.approx(0.05 ** (1 / 8))
    assert lower_rate(8, 8, confidence=0.5) == pytest.approx(0.5 ** (1 / 8))


# Divergence ---------------------------------------------------------------------------------


def test_divergence_by_hand_and_at_its_ends():
    assert bernoulli_divergence(0.5, 0.25) == pytest.approx(0.5 * math.log(4 / 3))
    assert bernoulli_divergence(0.3, 0.3) == pytest.approx(0, abs=1e-15)
    assert bernoulli_divergence(1, 1e-9) == pytest.approx(9 * math.log(10))
    assert bernoulli_divergence(0, 0.75) == pytest.approx(math.log(4))
    assert bernoulli_divergence(0.5, 0) == bernoulli_divergence(0.5, 1) == math.inf
    assert bernoulli_divergence(0, 0) == bernoulli_divergence(1, 1) == 0


def test_tightness_is_one_at_the_optimum():
    assert tightness(bernoulli_divergence(0.9, 1e-4), 0.9, 1e-4) == pytest.approx(1)
    assert tightness(2 * math.log(1000), 1, 1e-3) == pytest.approx(2)


# Certificate --------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.5, 0.9, 0.999, 1 - 1e-9])
@pytest.mark.parametrize("kl_nats", [1e-6, 1e-3, 0.1, 1.0, 6.0, 60.0])
def test_certificate_is_the_root_and_never_above_it(kl_nats, rate):
    certified = log_p_certified(kl_nats, rate)
    if (kl_nats + 0.7) / rate < 700:  # else p underflows
        root = math.log(smaller_root(kl_nats, rate))
        assert certified == pytest.approx(root, rel=1e-6, abs=1e-6)
        assert certified <= root + 1e-15
    assert certified < math.log(rate)


@pytest.mark.parametrize("rate", [0.02, 0.5, 0.8, 0.9999])
@pytest.mark.parametrize("kl_nats", [1e-8, 0.05, 3.0, 700.0, 1e5])
def test_certificate_against_fifty_digits(kl_nats, rate):
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(50):
        r, low = mpmath.mpf(rate), mpmath.mpf(-(kl_nats + 1) / rate)
        high = mpmath.log(r)
        for _ in range(200):
            log_p = (low + high) / 2
            rest = mpmath.log1p(-mpmath.exp(log_p))
            excess = r * (mpmath.log(r) - log_p) + (1 - r) * (mpmath.log1p(-r) - rest) - kl_nats
            low, high = (log_p, high) if excess > 0 else (low, log_p)
        certified = log_p_certified(kl_nats, rate)
        assert certified <= low
        assert certified == pytest.approx(float(low), rel=1e-9, abs=1e-6)


def test_certificate_has_its_limits():
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert log_p_certified(1e5, 0.8) == pytest.approx(-(1e5 + entropy) / 0.8, rel=1e-12)
    assert log_p_certified(1e5, 1) == -1e5
    assert log_p_certified(0, 1) == 0
    assert log_p_certified(0, 0.3) == math.log(0.3)
    assert log_p_certified(3, 0) == -math.inf


def test_certificate_falls_with_the_divergence_and_rises_with_the_rate():
    by_kl = [log_p_certified(kl, 0.7) for kl in (0, 1e-9, 0.01, 1, 50, 1e3, 1e5)]
    assert by_kl == sorted(by_kl, reverse=True)
    by_rate = [log_p_certified(20, rate) for rate in (0, 1e-6, 0.1, 0.5, 0.9, 0.999999, 1)]
    assert by_rate == sorted(by_rate)
    assert len({*by_kl}) == len({*by_rate}) == 7


def test_certificate_never_exceeds_a_known_probability():
    """A half-space e > a of probability 1e-3, and every Gaussian of a grid as q."""
    log_p = math.log(1e-3)
    edge = norm.isf(1e-3)
    certified, sensitive, shortcut = {}, [], []
    for mean in [edge * i / 20 for i in range(41)]:
        for deviation in [0.05 * i for i in range(1, 31)]:
            rate = norm.sf((edge - mean) / deviation)
            kl = 0.5 * (mean**2 + deviation**2 - 1) - math.log(deviation)
            certified[mean, deviation] = log_p_certified(kl, rate)
            if rate >= 0.5:  # the prior itself, at rate p, certifies p trivially
                sensitive.append(certified[mean, deviation])
                shortcut.append(-kl)
    assert max(certified.values()) <= log_p + 1e-12
    assert 0.5 < log_p - max(sensitive) < 0.7
    # The grid can tell: the shortcut exp(-K) claims more than there is.
    assert max(shortcut) > log_p + 1


# Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "message"), [
    (lambda: clopper_pearson(1, 0), "trials=0 .* at least 1"),
    (lambda: clopper_pearson(5, 4), r"successes=5 must lie in \[0, trials=4\]"),
    (lambda: lower_rate(-1, 4), "successes=-1"),
    (lambda: lower_rate(1, 4, confidence=95), r"confidence=95 must lie in \(0, 1\)"),
    (lambda: lower_rate(1, 4, confidence=-0.5), r"confidence=-0.5 must lie in \(0, 1\)"),
    (lambda: lower_rate(1, 4, confidence=0.0), r"confidence=0.0 must lie in \(0, 1\)"),
    (lambda: lower_rate(1, 4, confidence=1.0), r"confidence=1.0 must lie in \(0, 1\)"),
    (lambda: bernoulli_divergence(1.5, 0.5), "r=1.5 is no rate"),
    (lambda: bernoulli_divergence(0.5, math.nan), "p=nan is no rate"),
    (lambda: log_p_certified(-1e-9, 0.5), "kl_nats=-1e-09 is no divergence"),
    (lambda: log_p_certified(math.inf, 0.5), "kl_nats=inf"),
    (lambda: log_p_certified(math.nan, 0.5), "kl_nats=nan"),
    (lambda: log_p_certified(1, 2), "rate=2 is no rate"),
    (lambda: tightness(1, 0.5, 0), "needs 0 < p < rate"),
    (lambda: tightness(1, 0.1, 0.2), "rate=0.1 with p=0.2"),
])  # fmt: skip
def test_nonsense_is_refused_with_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
