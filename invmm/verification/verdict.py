"""Whether a record holds, given what was recomputed and drawn afresh.

What "holds" means is the verifier's to say (`Rules`), not the record's. A record of a replicated
image holds if all of this is true:
1. its search asked for no less than the rules do;
2. its score is the KL of the distribution that is saved beside it, and every other number that
   follows from the distribution and the count is what follows;
3. fresh samples do not refute it. A search looks until one check passes, so that a distribution
   whose true rate is 0.7 passes "8 of 8" sooner or later; that is luck, and no forgery. Refuted is
   what no rate explains: for each rate r the chance of so few fresh replicas, times the chance of
   passing at least once in all looks, is at most alpha. An honest record is refuted with a
   probability of at most alpha, whatever its rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from scipy.stats import binom

from invmm.engine.criterion import Passing
from invmm.inversion.confirmation import Confirmation
from invmm.probability.certificate import clopper_pearson, log_p_certified, lower_rate

_RELATIVE = 1e-6
_SINGLE = 1e-7
"""Nats per dimension: what single precision loses of terms near 1, whatever their sum."""
_RATES = np.linspace(0, 1, 2001)
_TESTS = 3
"""Of one record: too few fresh replicas for its status, too few and too many for its count."""


class Verdict(StrEnum):
    """What a verification says of a record."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNVERIFIED = "cannot be verified"
    NO_SCORE = "no score"


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a verifier asks of a run.

    Attributes:
        threshold: smallest similarity of a replica, at least.
        rate: share of the samples of a check that must replicate, at least, in (0, 1].
        num_samples: of a check, at least.
        looks: checks of an image, at most.
        confidence: that an honest run is not refuted, all its records together.
    """

    threshold: float
    rate: float = 0.9
    num_samples: int = 8
    looks: int = 1000
    confidence: float = 0.95

    def refuse(self, passing: Passing, threshold: float) -> None:
        """Refuses a run that asked for less.

        Args:
            passing: what it asked of an image that used up its budget.
            threshold: of a replica.

        Raises:
            ValueError: naming the value, and the option that accepts it.
        """
        for what, value, option, limit, is_enough in (
            ("a threshold of", threshold, "threshold", self.threshold, threshold >= self.threshold),
            ("a rate of", passing.rate, "rate", self.rate, passing.rate >= self.rate),
            (
                "samples of a check:",
                passing.num_samples,
                "samples",
                self.num_samples,
                passing.num_samples >= self.num_samples,
            ),
            (
                "checks of an image:",
                passing.looks,
                "checks",
                self.looks,
                passing.looks <= self.looks,
            ),
        ):
            if not is_enough:
                bound, kind = ("at most", "max") if option == "checks" else ("at least", "min")
                raise ValueError(
                    f"the run was judged by {what} {value:g}, this verification asks for {bound} "
                    f"{limit:g}; --{kind}-{option} {value:g} accepts it"
                )

    def alpha(self, num_records: int) -> float:
        """Probability with which one test may refute an honest record of a run of so many."""
        return (1 - self.confidence) / max(num_records, 1) / _TESTS

    def fresh_samples(self, num_records: int) -> int:
        """The fewest fresh samples, in steps of 32, that tell a rate of one half from nine tenths.

        They refute "58 of 64 at one of four looks" in 95 % of the records whose true rate is one
        half.
        """
        claimed = Passing(count=58, num_samples=64, looks=4, confidence=0.95, is_recorded=True)
        count = 64
        while True:
            likely = int(binom.ppf(0.95, count, 0.5))
            if chance_at_most(likely, count, claimed) <= self.alpha(num_records):
                return count
            count += 32


def chance_at_most(fresh: int, drawn: int, passing: Passing) -> float:
    """The largest chance, over all rates, of passing and of at most so many fresh replicas.

    Args:
        fresh: replicas among the fresh samples.
        drawn: fresh samples.
        passing: at least `count` of `num_samples` at one of `looks` checks.
    """
    few = binom.cdf(fresh, drawn, _RATES)
    return _largest(few, binom.sf(passing.count - 1, passing.num_samples, _RATES), passing.looks)


def chance_at_least(fresh: int, drawn: int, recorded: Passing) -> float:
    """As `chance_at_most`, for at most `count` recorded and at least so many fresh ones."""
    many = binom.sf(fresh - 1, drawn, _RATES)
    return _largest(many, binom.cdf(recorded.count, recorded.num_samples, _RATES), recorded.looks)


def _largest(fresh: np.ndarray, at_one_look: np.ndarray, looks: int) -> float:
    with np.errstate(divide="ignore"):
        at_any = -np.expm1(looks * np.log1p(-at_one_look))
    return float((fresh * at_any).max())


def combined(product: float) -> float:
    """The chance that two independent p-values have so small a product (Fisher)."""
    return product * (1 - math.log(product)) if product > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the record of a replicated image says.

    Attributes:
        score: nats per latent dimension.
        score_nats: summed over them.
        rate: share of the samples that replicated.
        count: of the samples that replicated.
        num_samples: of which the count is one.
        looks: checks that the count was selected from; 1 for samples drawn after the search.
        confidence: of the interval of the recorded rate, looks included.
        log_p_certified: None without a certificate.
        rate_interval: as recorded, None without fresh samples.
    """

    score: float
    score_nats: float
    rate: float
    count: int
    num_samples: int
    looks: int
    confidence: float
    log_p_certified: float | None
    rate_interval: tuple[float, float] | None

    @classmethod
    def of(cls, record: Mapping[str, Any], passing: Passing, num_confirm: int) -> Claim:
        """Reads the record of an image with a score.

        Args:
            record: from `read_records`.
            passing: what its search asked for.
            num_confirm: fresh samples that its run drew of what it found.

        Raises:
            ValueError: numbers are missing or none.
        """
        columns = record["columns"]
        drawn = num_confirm or passing.num_samples
        try:
            count, interval = passing.count, None
            if num_confirm:
                count = columns["confirm_passed"]
                interval = float(columns["rate_low"]), float(columns["rate_high"])
                said = columns["confirm_drawn"], columns["confirm_confidence"]
                if said != (drawn, passing.confidence):
                    raise ValueError(
                        f"its fresh samples are {said[0]} at a confidence of {said[1]}, those of "
                        f"its config {drawn} at {passing.confidence}"
                    )
            certified = columns.get("log_p_certified")
            claim = cls(
                score=float(record["score"]),
                score_nats=float(record["score_nats"]),
                rate=float(record["replication_rate"]),
                count=int(count),
                num_samples=int(drawn),
                looks=passing.looks if passing.is_recorded else 1,
                confidence=passing.confidence,
                log_p_certified=None if certified is None else float(certified),
                rate_interval=interval,
            )
        except (TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"its record.json is incomplete: {error}") from error
        for name in ("score", "score_nats", "rate", "log_p_certified"):
            value = getattr(claim, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"its {name} is {value}")
        if not 0 <= claim.count <= claim.num_samples:
            raise ValueError(f"its count is {claim.count} of {claim.num_samples}")
        return claim

    @property
    def interval(self) -> tuple[float, float]:
        """Exact interval of the rate, with the recorded confidence."""
        return clopper_pearson(self.count, self.num_samples, self.confidence)

    def faults(
        self, fresh: Confirmation, num_dimensions: int, passing: Passing, alpha: float
    ) -> list[str]:
        """Why the record does not hold, one line each; none if it does.

        Args:
            fresh: from samples that had no part in the record.
            num_dimensions: of a latent.
            passing: what its search asked for.
            alpha: of each test.
        """
        return [
            *self._unequal(fresh.kl_nats, num_dimensions),
            *self._refuted(fresh, passing, alpha),
        ]

    def _unequal(self, kl_nats: float, num_dimensions: int) -> list[str]:
        """Numbers that are not what the distribution and the count say."""
        found = []
        for name, claimed, kl, rounding in (
            ("score", self.score, kl_nats / num_dimensions, _SINGLE),
            ("score_nats", self.score_nats, kl_nats, _SINGLE * num_dimensions),
        ):
            if not math.isclose(claimed, kl, rel_tol=_RELATIVE, abs_tol=rounding):
                found.append(f"{name} is {claimed:.6g}, the KL of the saved distribution {kl:.6g}")
        if not math.isclose(self.rate, self.count / self.num_samples, rel_tol=_RELATIVE):
            found.append(
                f"replication_rate is {self.rate:.6g}, its count {self.count} of {self.num_samples}"
            )
        if self.rate_interval and not np.allclose(self.rate_interval, self.interval, rtol=1e-6):
            found.append(f"its interval is {self.rate_interval}, that of its count {self.interval}")
        if self.rate_interval:
            least = lower_rate(self.count, self.num_samples, self.confidence)
            proven = log_p_certified(kl_nats, least)
            claimed = -math.inf if self.log_p_certified is None else self.log_p_certified
            if not math.isclose(claimed, proven, rel_tol=1e-5, abs_tol=1e-5):
                found.append(
                    f"log_p_certified is {self.log_p_certified}, its count proves {proven:.6g}"
                )
        return found

    def _refuted(self, fresh: Confirmation, passing: Passing, alpha: float) -> list[str]:
        drawn = f"{fresh.count} of {fresh.num_samples} fresh samples replicate"
        if chance_at_most(fresh.count, fresh.num_samples, passing) <= alpha:
            return [
                f"{drawn}; a search that asks for {passing.count} of {passing.num_samples} at one "
                f"of {passing.looks} looks would not have passed"
            ]
        recorded = Passing(
            count=self.count,
            num_samples=self.num_samples,
            looks=self.looks,
            confidence=self.confidence,
            is_recorded=True,
        )
        for chance in (chance_at_most, chance_at_least):
            if combined(chance(fresh.count, fresh.num_samples, recorded)) <= alpha:
                return [f"{drawn}, recorded are {self.counted}: these are not of one rate"]
        return []

    @property
    def counted(self) -> str:
        """The recorded count, for a table."""
        checks = f", {self.looks} checks" if self.looks > 1 else ""
        return f"{self.count} of {self.num_samples}{checks}"


def unfound(fresh: Confirmation, passing: Passing) -> tuple[Verdict, list[str]]:
    """What fresh samples say of an image that is recorded as NOT_REPLICATED."""
    if fresh.rate < passing.rate:
        return Verdict.NO_SCORE, []
    return Verdict.UNVERIFIED, [
        f"it is recorded as NOT_REPLICATED, and {fresh.count} of {fresh.num_samples} fresh samples "
        "of its distribution replicate"
    ]
