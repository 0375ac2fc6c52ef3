"""What the membership scores share: noise levels, and how a score ends.

A timestep t is the index of one of the T noise levels that the model was trained on, from the
smallest; of a rectified flow the level is the t-th sigma. Whatever the network outputs is converted
to the noise and the clean latents that it implies, which makes the formulas hold for all models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from invmm.diffusion.schedule import NoiseSchedule
from invmm.engine.outcomes import CostRange, Evaluations, NonFiniteError, Outcome, Status
from invmm.faults import Refusal


def check_timesteps(key: str, timesteps: Sequence[int], schedule: NoiseSchedule) -> None:
    """Refuses noise levels that a model does not have.

    Args:
        key: config key that asked for them.
        timesteps: from 0.
        schedule: of the model.

    Raises:
        ValueError: naming the key, the value and the cure.
    """
    total = schedule.num_train_timesteps
    if max(timesteps) >= total:
        raise Refusal(
            f"{key} reaches timestep {max(timesteps)} of a model with {total}, counted from 0; "
            f"use at most {total - 1}",
            key,
        )


def told_at(timestep: int, latents: Tensor, schedule: NoiseSchedule) -> Tensor:
    """(B,) what the network is told at a noise level, one a row of the latents (B, C, H, W)."""
    return schedule.timesteps[timestep].to(latents.device).expand(len(latents))


def constant_cost(evaluations: int) -> CostRange:
    """Of a score that takes the same evaluations for every image."""
    cost = Evaluations(forward=evaluations)
    return CostRange(fewest=cost, most=cost)


def scored(score: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Outcome:
    """The outcome of a membership score; the lower, the more like a training image.

    Args:
        score: scalar, a mean over latent dimensions.
        tensors: what it was computed from.

    Raises:
        NonFiniteError: the score is not finite.
    """
    value = score.item()
    if not math.isfinite(value):
        raise NonFiniteError(f"the score is {value}")
    return Outcome(status=Status.SCORED, score=value, tensors=tensors or {})
