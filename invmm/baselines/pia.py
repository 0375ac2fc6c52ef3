"""PIA and PIAN: compare the noise predicted for an image at timesteps 0 and t (Kong et al. 2024).

Legend: noise -> epsilon_theta(x_0, 0); noisy -> x_t made with it; timestep -> t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge

from invmm.baselines.membership import check_timesteps, constant_cost, network_timesteps, scored
from invmm.diffusion.sampling import Sampler
from invmm.diffusion.schedule import NoiseSchedule
from invmm.engine.criterion import ReplicationCriterion
from invmm.engine.outcomes import CostRange, Outcome
from invmm.engine.protocols import Setting, Target, Use, refuse_searched_prompt
from invmm.engine.requests import Denoise


@dataclass(frozen=True, kw_only=True)
class PIA:
    """Mean over latent dimensions of |epsilon_theta(x_0, 0) - epsilon_theta(x_t, t)|^4.

    x_t is the image with epsilon_theta(x_0, 0) added as its noise. The model is conditioned on the
    image's own prompt or label, without guidance.

    Attributes:
        timestep: noise level t, counted from 0.
        normalised: PIAN, which scales epsilon_theta(x_0, 0) to the mean absolute value of Gaussian
            noise.
    """

    timestep: Annotated[int, Ge(1)] = 200
    normalised: bool = False

    def check(self, use: Use) -> None:
        """See `Measurement`: the model has the noise levels."""
        refuse_searched_prompt(self, use)
        self.check_schedule(use.schedule())

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """Refuses a model without this noise level.

        Raises:
            ValueError: naming the key, the value and the cure.
        """
        check_timesteps("measurement.timestep", [self.timestep], schedule)

    async def __call__(self, target: Target, setting: Setting, rng: torch.Generator) -> Outcome:
        """See `Measurement`; nothing is random."""
        schedule, latents = setting.schedule, target.latents
        self.check_schedule(schedule)
        at_zero = network_timesteps(0, latents, schedule)
        noise = (await Denoise(latents, at_zero, target.rows(1))).noise
        if self.normalised:
            noise = noise * (math.sqrt(2 / math.pi) / noise.abs().mean())
        timesteps = network_timesteps(self.timestep, latents, schedule)
        noisy = schedule.add_noise(latents, noise, timesteps)
        prediction = await Denoise(noisy, timesteps, target.rows(1))
        return scored((noise - prediction.noise).pow(4).mean())

    def cost(self, sampler: Sampler, criterion: ReplicationCriterion) -> CostRange:
        """See `Measurement`."""
        return constant_cost(2)
