"""Shared by the membership scores: noise levels, costs and outcomes.

A timestep t is the index of one of the T noise levels that the model was trained on, counted from
the smallest; on a rectified flow that level is the t-th sigma. Network outputs are converted to the
noise and the clean latents that they imply, so the formulas hold for all prediction types.
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
        key: config key that gives them.
        timesteps: counted from 0.
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


def network_timesteps(timestep: int, latents: Tensor, schedule: NoiseSchedule) -> Tensor:
    """(B,) timestep input of the network at a noise level, for latents (B, C, H, W)."""
    return schedule.timesteps[timestep].to(latents.device).expand(len(latents))


def constant_cost(evaluations: int) -> CostRange:
    """The cost of a score that takes the same number of evaluations for every image."""
    cost = Evaluations(forward=evaluations)
    return CostRange(fewest=cost, most=cost)


def scored(score: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Outcome:
    """The outcome of a membership score; the lower, the more like a training image.

    Args:
        score: scalar, a mean over latent dimensions.
        tensors: arrays to keep in the record.

    Raises:
        NonFiniteError: the score is not finite.
    """
    value = score.item()
    if not math.isfinite(value):
        raise NonFiniteError(f"the score is {value}")
    return Outcome(status=Status.SCORED, score=value, tensors=tensors or {})
