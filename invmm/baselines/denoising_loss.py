"""The training loss of an image at chosen noise levels (Carlini et al. 2023).

Legend: noise -> epsilon; noisy -> x_t; timesteps -> t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, MinLen

from invmm.baselines.membership import check_timesteps, constant_cost, network_timesteps, scored
from invmm.diffusion.sampling import Sampler
from invmm.diffusion.schedule import NoiseSchedule
from invmm.engine.criterion import ReplicationCriterion
from invmm.engine.outcomes import CostRange, Outcome
from invmm.engine.protocols import Setting, Target, Use, refuse_searched_prompt
from invmm.engine.requests import Denoise


@dataclass(frozen=True, kw_only=True)
class DenoisingLoss:
    """Mean of (epsilon - epsilon_theta(x_t, t))^2 over timesteps, noises and latent dimensions.

    All images and timesteps use the same noises, so that scores differ by the images alone. The
    model is conditioned on the image's own prompt or label, without guidance. The losses of all
    timesteps and noises are kept in the record as `losses`.

    Attributes:
        timesteps: noise levels t, counted from 0.
        num_noises: draws of epsilon that the loss is averaged over.
        seed: of these noises.
    """

    timesteps: Annotated[Sequence[Annotated[int, Ge(0)]], MinLen(1)] = (100,)
    num_noises: Annotated[int, Ge(1)] = 32
    seed: Annotated[int, Ge(0)] = 0

    def check(self, use: Use) -> None:
        """See `Measurement`: the model has the noise levels."""
        refuse_searched_prompt(self, use)
        self.check_schedule(use.schedule())

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """Refuses a model without these noise levels.

        Raises:
            ValueError: naming the key, the value and the cure.
        """
        check_timesteps("measurement.timesteps", self.timesteps, schedule)

    async def __call__(self, target: Target, setting: Setting, rng: torch.Generator) -> Outcome:
        """See `Measurement`; the image's own generator is not used."""
        schedule = setting.schedule
        self.check_schedule(schedule)
        shared = torch.Generator().manual_seed(self.seed)
        shape = (self.num_noises, *target.latents.shape[1:])
        noise = torch.randn(shape, generator=shared).to(target.latents)
        losses = []
        for timestep in self.timesteps:
            timesteps = network_timesteps(timestep, noise, schedule)
            noisy = schedule.add_noise(target.latents, noise, timesteps)
            prediction = await Denoise(noisy, timesteps, target.rows(self.num_noises))
            losses.append((prediction.noise - noise).square().flatten(1).mean(1))
        all_losses = torch.stack(losses)
        return scored(all_losses.mean(), {"losses": all_losses.cpu()})

    def cost(self, sampler: Sampler, criterion: ReplicationCriterion) -> CostRange:
        """See `Measurement`."""
        return constant_cost(len(self.timesteps) * self.num_noises)
