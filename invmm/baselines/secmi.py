"""SecMI: how well a step of deterministic inversion is undone (Duan et al. 2023, the t-error).

Legend: latents -> x~_t; higher -> phi_theta(x~_t, t), one step up; returned ->
psi_theta(phi_theta(x~_t, t), t), the step back down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from invmm.baselines.membership import check_timesteps, constant_cost, network_timesteps, scored
from invmm.diffusion.sampling import Sampler
from invmm.diffusion.schedule import NoiseSchedule
from invmm.engine.criterion import ReplicationCriterion
from invmm.engine.outcomes import CostRange, Outcome
from invmm.engine.protocols import Setting, Target, Use, refuse_searched_prompt
from invmm.engine.requests import Denoise
from invmm.faults import Refusal


@dataclass(frozen=True, kw_only=True)
class SecMI:
    """Mean over latent dimensions of (x~_t - psi(phi(x~_t, t), t))^2.

    The latents of the image are taken as those at timestep 0; DDIM inversion (on a rectified flow:
    Euler) leads from there up to t. The model is conditioned on the image's own prompt or label,
    without guidance.

    Attributes:
        timestep: t, a multiple of the step (paper: 100).
        step: timesteps from one noise level to the next (paper: 10).

    Raises:
        ValueError: the timestep is no multiple of the step.
    """

    timestep: Annotated[int, Ge(1)] = 100
    step: Annotated[int, Ge(1)] = 10

    def __post_init__(self) -> None:
        if self.timestep % self.step:
            nearest = max(1, round(self.timestep / self.step)) * self.step
            raise Refusal(
                f"measurement.timestep={self.timestep} is not reached in steps of "
                f"measurement.step={self.step}; use measurement.timestep={nearest}",
                "measurement.timestep",
                "measurement.step",
            )

    def check(self, use: Use) -> None:
        """See `Measurement`: the model has the noise levels."""
        refuse_searched_prompt(self, use)
        self.check_schedule(use.schedule())

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """Refuses a model without these noise levels.

        Raises:
            ValueError: naming the key, the value and the cure.
        """
        key = "measurement.timestep + measurement.step"
        check_timesteps(key, [self.timestep + self.step], schedule)

    async def __call__(self, target: Target, setting: Setting, rng: torch.Generator) -> Outcome:
        """See `Measurement`; nothing is random."""
        schedule = setting.schedule
        self.check_schedule(schedule)

        async def moved(latents: Tensor, start: int, end: int) -> Tensor:
            """One deterministic step between two noise levels, up or down."""
            before, after = (network_timesteps(t, latents, schedule) for t in (start, end))
            prediction = await Denoise(latents, before, target.rows(1))
            return schedule.add_noise(prediction.clean_latents, prediction.noise, after)

        latents = target.latents
        for start in range(0, self.timestep, self.step):
            latents = await moved(latents, start, start + self.step)
        higher = await moved(latents, self.timestep, self.timestep + self.step)
        returned = await moved(higher, self.timestep + self.step, self.timestep)
        return scored((returned - latents).square().mean())

    def cost(self, sampler: Sampler, criterion: ReplicationCriterion) -> CostRange:
        """See `Measurement`."""
        return constant_cost(self.timestep // self.step + 2)
