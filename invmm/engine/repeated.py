"""The same measurement several times on each image: one score of a search scatters by chance."""

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
    """Ends as the median of independent repeats, the lower of the two middle ones if even.

    Repeats are ordered by score, those without one behind by falling similarity. The image has all
    that the median repeat found, and columns of its own:

    - repeats: how many; num_found: those with a score.
    - score_low, score_high: the least and the largest score found.

    A repeat that diverges ends the image as DIVERGED, an error in one as FAILED.

    Attributes:
        measurement: what is repeated.
        repeats: how often, at least 1.
    """

    measurement: Measurement
    repeats: int

    def check(self, use: Use) -> None:
        """See `Measurement`."""
        self.measurement.check(use)

    async def __call__(self, target: Target, setting: Setting, rng: torch.Generator) -> Outcome:
        """One repeat after the other, each with randomness of its own; see `Measurement`."""
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
        """See `Searching`: one of the checks of any repeat."""
        one = cast(Searching, self.measurement).passing(criterion, num_scales, steps)
        return replace(one, looks=one.looks * self.repeats)


def median(outcomes: list[Outcome]) -> Outcome:
    """The outcome of the median repeat, with the range of all; see `Repeated`."""

    def standing(outcome: Outcome) -> tuple[bool, float]:
        if outcome.score is not None:
            return False, outcome.score
        return True, -(outcome.best_similarity or 0.0)

    middle = sorted(outcomes, key=standing)[(len(outcomes) - 1) // 2]
    found = [outcome.score for outcome in outcomes if outcome.score is not None]
    own = {
        "repeats": len(outcomes),
        "num_found": len(found),
        "score_low": min(found, default=None),
        "score_high": max(found, default=None),
    }
    return replace(middle, columns={**middle.columns, **own})


def _generator(rng: torch.Generator, repeat: int) -> torch.Generator:
    """The randomness of a repeat, whatever the repeats before it drew."""
    digest = hashlib.sha256(f"{rng.initial_seed()}:repeat {repeat}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
