"""What makes a noise distribution sensitive: losses that fall as its draws lead to the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import torch
from annotated_types import Ge
from torch import Tensor

from invmm.engine.outcomes import Evaluations
from invmm.engine.protocols import Setting, Target
from invmm.engine.requests import Denoise
from invmm.inversion.noise import GaussianNoise


@runtime_checkable
class Objective(Protocol):
    """A stochastic loss of a noise distribution."""

    async def __call__(
        self, noise: GaussianNoise, target: Target, setting: Setting, rng: torch.Generator
    ) -> Tensor:
        """A scalar with gradients to the noise's parameters."""
        ...

    def evaluations(self) -> Evaluations:
        """Network evaluations of one step."""
        ...


@dataclass(frozen=True, kw_only=True)
class DenoisingObjective:
    """Squared error of the clean latents predicted from noisy ones (paper, eq. of P).

    The noises of the forward process come from q, the timesteps are uniform, and the error is
    that of the clean latents, not of the noise: its weight grows with the noise level.

    Attributes:
        batch_size: noises, each with a timestep of its own, per step (paper: 32 DDPM, 16 else).
    """

    batch_size: Annotated[int, Ge(1)] = 16

    async def __call__(
        self, noise: GaussianNoise, target: Target, setting: Setting, rng: torch.Generator
    ) -> Tensor:
        """The mean over the batch and the latent dimensions."""
        timesteps = setting.schedule.draw_timesteps(self.batch_size, rng).to(target.latents.device)
        noises = noise.draw(self.batch_size, rng)
        noisy = setting.schedule.add_noise(target.latents, noises, timesteps)
        prediction = await Denoise(noisy, timesteps, target.rows(self.batch_size))
        return (prediction.clean_latents - target.latents).square().mean()

    def evaluations(self) -> Evaluations:
        """One evaluation a noise, forwards and backwards."""
        return Evaluations(forward=self.batch_size, backward=self.batch_size)
