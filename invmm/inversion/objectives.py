"""Losses of a noise distribution that fall as its draws come closer to producing the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from annotated_types import Ge
from torch import Tensor

from invmm.engine.outcomes import Evaluations
from invmm.engine.protocols import Setting, Target
from invmm.engine.requests import Denoise
from invmm.inversion.noise import GaussianNoise
from invmm.inversion.soft_prompt import FixedPrompt, SoftPrompt


@runtime_checkable
class Objective(Protocol):
    """A stochastic loss of a noise distribution and a prompt."""

    async def __call__(
        self,
        noise: GaussianNoise,
        prompt: FixedPrompt | SoftPrompt,
        target: Target,
        setting: Setting,
        rng: torch.Generator,
    ) -> Tensor:
        """A scalar with gradients to the parameters of both."""
        ...

    def evaluations(self) -> Evaluations:
        """Network evaluations of one step."""
        ...


@dataclass(frozen=True, kw_only=True)
class DenoisingObjective:
    """Squared error of the clean latents predicted from noisy ones (paper, eq. of P).

    The noise of the forward process is drawn from q. The error is that of the clean latents, not
    of the noise: for a noise predictor this weighs timesteps by (1 - alpha-bar) / alpha-bar, so
    that nearly all of the loss comes from the last tenth of them. On a rectified flow the timesteps
    are uniform over the shifted sigmas, as published for Stable Diffusion 3.

    Attributes:
        batch_size: noises per step, each with a timestep of its own (paper: 32 DDPM, 16 else).
        timesteps: "uniform" is published. "importance" draws timesteps in proportion to that weight
            and divides errors by their probability: the same expectation from far fewer noises
            (ours).
    """

    batch_size: Annotated[int, Ge(1)] = 16
    timesteps: Literal["uniform", "importance"] = "uniform"

    async def __call__(
        self,
        noise: GaussianNoise,
        prompt: FixedPrompt | SoftPrompt,
        target: Target,
        setting: Setting,
        rng: torch.Generator,
    ) -> Tensor:
        """The mean over the batch and the latent dimensions."""
        schedule, latents = setting.schedule, target.latents
        by_weight = self.timesteps == "importance"
        levels = schedule.draw_levels(self.batch_size, rng, by_weight=by_weight)
        timesteps = schedule.timesteps[levels].to(latents.device)
        noisy = schedule.add_noise(latents, noise.draw(self.batch_size, rng), timesteps)
        condition = await prompt.rows(self.batch_size, rng)
        prediction = await Denoise(noisy, timesteps, condition)
        errors = (prediction.clean_latents - latents).square()
        if not by_weight:
            return errors.mean()
        weights = schedule.importance_weights[levels].to(latents.device)
        return (weights * errors.flatten(1).mean(1)).mean()

    def evaluations(self) -> Evaluations:
        """One evaluation per noise, forwards and backwards."""
        return Evaluations(forward=self.batch_size, backward=self.batch_size)
