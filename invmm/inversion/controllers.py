"""Controllers of the weight of the KL divergence in the loss of a search.

A controller is a pure step on immutable state. Legend: value -> lambda; increment -> delta;
tolerance -> ksi; reconstruction -> P; KL divergence -> R.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Protocol, runtime_checkable

from annotated_types import Ge, Gt


@dataclass(frozen=True, kw_only=True)
class KLWeight:
    """State of a controller.

    Attributes:
        value: the weight of the KL in the loss of the next step.
        previous: the mean loss at the previous check.
    """

    value: float
    previous: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of all steps so far, oldest first.

    Attributes:
        reconstruction: P.
        total: P + lambda * R.
    """

    reconstruction: Sequence[float]
    total: Sequence[float]


@runtime_checkable
class KLWeightController(Protocol):
    """Chooses the KL weight of each step."""

    def init(self) -> KLWeight:
        """The state before the first step."""
        ...

    def update(self, state: KLWeight, losses: Losses | None = None) -> KLWeight:
        """The state after a step.

        Args:
            state: before.
            losses: only at steps that a replication check follows; between checks they stay
                unread, so that the host does not wait for the device.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class AdaptiveKLWeight:
    """Raises the weight while the loss falls and halves it where progress stalls (paper, Alg. 1).

    Attributes:
        initial: weight of the first step (paper: 1).
        increment: added per step (paper: 1e-4 for DDPM, 5e-4 for LDM, 1e-3 for Stable Diffusion).
        tolerance: smallest drop of the mean loss between checks that counts as progress (1e-3).
        window: steps over which that mean is taken (release: 100).
        progress: the loss that has to fall. It is the reconstruction in the paper and in the
            released DDPM script. The other four scripts (LDM, Stable Diffusion 1, 2 and 3) judge
            the total, since they add the KL to the reconstruction in place.
    """

    initial: Annotated[float, Ge(0)] = 1.0
    increment: Annotated[float, Ge(0)] = 1e-4
    tolerance: Annotated[float, Ge(0)] = 1e-3
    window: Annotated[int, Ge(1)] = 100
    progress: Literal["reconstruction", "total"] = "reconstruction"

    def init(self) -> KLWeight:
        """Starts at `initial`; the first check never halves."""
        return KLWeight(value=self.initial)

    def update(self, state: KLWeight, losses: Losses | None = None) -> KLWeight:
        """One step of the schedule; see `KLWeightController.update`."""
        if losses is None:
            return replace(state, value=state.value + self.increment)
        judged = losses.reconstruction if self.progress == "reconstruction" else losses.total
        recent = judged[-self.window :]
        now = math.fsum(recent) / len(recent)
        stalled = state.previous - now < self.tolerance
        value = state.value / 2 if stalled else state.value + self.increment
        return KLWeight(value=value, previous=now)


@dataclass(frozen=True, kw_only=True)
class FixedKLWeight:
    """Keeps the weight constant: the ablation of the adaptive schedule.

    Attributes:
        value: the weight.
    """

    value: Annotated[float, Gt(0)] = 1.0

    def init(self) -> KLWeight:
        """Starts at `value`."""
        return KLWeight(value=self.value)

    def update(self, state: KLWeight, losses: Losses | None = None) -> KLWeight:
        """Changes nothing; see `KLWeightController.update`."""
        return state
