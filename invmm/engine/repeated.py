"""Repeats a measurement on each image, since the score of a single search scatters by chance."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import cast

import torch

from invmm.diffusion.sampling import Sampler
from invmm.engine.criterion import Passing, ReplicationCriterion
from invmm.engine.outcomes import CostRange, Outcome, Status
from invmm.engine.protocols import Measurement, Searching, Setting, Target, Use


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """Repeats a measurement independently; the outcome is that of the median repeat.

    Repeats are ordered by score; those without a score come last, by falling similarity. If their
    number is even, the lower of the two middle ones is taken. These columns are added:

    - repeats: their number; num_found: how many have a score.
    - score_low, score_high: the smallest and the largest score.

    A repeat that diverges ends the image as DIVERGED, an error in one as FAILED.

    Attributes:
        measurement: repeated on each image.
        repeats: their number, at least 1.
    """

    measurement: Measurement
    repeats: int

    def check(self, use: Use) -> None:
        """See `Measurement`."""
        self.measurement.check(use)

    async def __call__(self, target: Target, setting: Setting, rng: torch.Generator) -> Outcome:
        """Runs the repeats in turn, each with a generator of its own; see `Measurement`."""
        outcomes = []
        for repeat in range(self.repeats):
            outcome = await self.measurement(target, setting, _generator(rng, repeat))
            if outcome.status is Status.DIVERGED:
                error = f"repeat {repeat + 1} of {self.repeats}: {outcome.error}"
                return replace(outcome, error=error)
            outcomes.append(outcome)
        return median(outcomes)

    def cost(self, sampler: Sampler, criterion: ReplicationCriterion) -> CostRange:
        """See `Measurement`."""
        return self.measurement.cost(sampler, criterion) * self.repeats

    def passing(self, criterion: ReplicationCriterion, num_scales: int, steps: int) -> Passing:
        """See `Searching`: any check of any repeat may have passed."""
        single = cast(Searching, self.measurement).passing(criterion, num_scales, steps)
        return replace(single, looks=single.looks * self.repeats)


def median(outcomes: list[Outcome]) -> Outcome:
    """The outcome of the median repeat, with the range of all; see `Repeated`."""

    def standing(outcome: Outcome) -> tuple[bool, float]:
        if outcome.score is not None:
            return False, outcome.score
        return True, -(outcome.best_similarity or 0.0)

    middle = sorted(outcomes, key=standing)[(len(outcomes) - 1) // 2]
    scores = [outcome.score for outcome in outcomes if outcome.score is not None]
    columns = {
        "repeats": len(outcomes),
        "num_found": len(scores),
        "score_low": min(scores, default=None),
        "score_high": max(scores, default=None),
    }
    return replace(middle, columns={**middle.columns, **columns})


def _generator(rng: torch.Generator, repeat: int) -> torch.Generator:
    """The generator of a repeat, which does not depend on what earlier repeats drew."""
    digest = hashlib.sha256(f"{rng.initial_seed()}:repeat {repeat}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
