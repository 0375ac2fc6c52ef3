"""Whether a record holds, given what was recomputed and drawn afresh.

A record holds if all of this is true:
1. its score is the KL of the distribution that is saved beside it;
2. its count of replicas and the fresh one may come from one rate. The count was selected: a search
   checks until one check is passed, so that a distribution whose true rate is 0.7 passes
   "8 of 8" sooner or later. The interval of the recorded rate is therefore widened for the number
   of looks (Bonferroni), and the record is refuted only if all of it lies above the fresh interval.
   A true record is refuted with a probability of at most 5 %;
3. its certificate, if it has one, claims no more than its own count proves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from invmm.inversion.confirmation import CONFIDENCE, Confirmation
from invmm.probability.certificate import clopper_pearson, log_p_certified, lower_rate

_RELATIVE = 1e-6
_SINGLE = 1e-7
"""Nats per dimension: what single precision loses of terms near 1, whatever their sum."""


class Verdict(StrEnum):
    """What a verification says of a record."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNVERIFIED = "cannot be verified"
    NO_SCORE = "no score"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the record of a replicated image says.

    Attributes:
        score: nats per latent dimension.
        score_nats: summed over them.
        rate: share of the samples that replicated.
        count: of the samples that replicated.
        num_samples: of which the count is one.
        looks: checks that were made until one was passed; 1 for samples drawn after the search.
        confidence: of the interval of the recorded rate, looks included.
        log_p_certified: None without a certificate.
    """

    score: float
    score_nats: float
    rate: float
    count: int
    num_samples: int
    looks: int
    confidence: float
    log_p_certified: float | None

    @classmethod
    def of(cls, record: Mapping[str, Any], *, num_samples: int, looks: int) -> Claim:
        """Reads the record of an image with a score.

        Args:
            record: from `read_records`.
            num_samples: of a check, all of which replicated; what was confirmed after the search
                takes its place.
            looks: checks made in the search, at any guidance scale.

        Raises:
            ValueError: numbers are missing.
        """
        columns = record["columns"]
        count, confidence = num_samples, 1 - (1 - CONFIDENCE) / looks
        try:
            if "confirm_drawn" in columns:
                count, num_samples = columns["confirm_passed"], columns["confirm_drawn"]
                looks, confidence = 1, columns.get("confirm_confidence", CONFIDENCE)
            return cls(
                score=float(record["score"]),
                score_nats=float(record["score_nats"]),
                rate=float(record["replication_rate"]),
                count=int(count),
                num_samples=int(num_samples),
                looks=looks,
                confidence=float(confidence),
                log_p_certified=columns.get("log_p_certified"),
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"its record.json is incomplete: {error}") from error

    @property
    def interval(self) -> tuple[float, float]:
        """Exact interval of the rate, widened for all looks."""
        return clopper_pearson(self.count, self.num_samples, self.confidence)

    def faults(self, fresh: Confirmation, num_dimensions: int) -> list[str]:
        """Why the record does not hold, one line each; none if it does.

        Args:
            fresh: from samples that had no part in the record.
            num_dimensions: of a latent.
        """
        found = []
        kl_nats = fresh.kl_nats
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
        low, high = self.interval[0], fresh.interval[1]
        if low > high:
            best = f" at the best of {self.looks} checks" if self.looks > 1 else ""
            found.append(
                f"{self.count} of {self.num_samples}{best} takes a rate of at least {low:.3f}, and "
                f"{fresh.count} of {fresh.num_samples} fresh ones one of at most {high:.3f}"
            )
        if self.log_p_certified is not None:
            proven = log_p_certified(
                kl_nats, lower_rate(self.count, self.num_samples, self.confidence)
            )
            if self.log_p_certified > proven + _RELATIVE * abs(proven):
                found.append(
                    f"log_p_certified is {self.log_p_certified:.6g}, its count proves {proven:.6g}"
                )
        return found

    @property
    def counted(self) -> str:
        """The recorded count, for a table."""
        checks = f", {self.looks} checks" if self.looks > 1 else ""
        return f"{self.count} of {self.num_samples}{checks}"
