"""What every model recipe can tell and do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from invmm.diffusion.schedule import NoiseSchedule
from invmm.models.cost import CallCost
from invmm.models.execution import Execution, LoadedNetwork


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What is known of a model from its JSON files alone.

    Attributes:
        family: for example "pixel".
        latent_shape: (C, H, W).
        image_size: side of the square images that it draws, in pixels.
        num_train_timesteps: T.
        prediction_type: what the network predicts.
        weight_bytes: size of the weight files; None if they are not on this machine.
        prompts: options of the config group `prompt` that it understands.
        latent_scale: factor from an autoencoder's latents to the denoiser's; None without one.
    """

    family: str
    latent_shape: tuple[int, int, int]
    image_size: int
    num_train_timesteps: int
    prediction_type: str
    weight_bytes: int | None
    prompts: tuple[str, ...] = ("none",)
    latent_scale: float | None = None


@runtime_checkable
class ModelRecipe(Protocol):
    """How to get a model."""

    def describe(self) -> ModelInfo:
        """Reads JSON only; raises ValueError for what cannot be measured."""
        ...

    def schedule(self) -> NoiseSchedule:
        """The noise schedule that the model was trained with."""
        ...

    def call_cost(self, rows: int, execution: Execution) -> CallCost:
        """Of a call of so many rows with gradients; loads no weights."""
        ...

    def load(self, device: torch.device) -> LoadedNetwork:
        """The frozen model on its device."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """File name -> SHA-256 of every weight file."""
        ...

    def settings(self) -> dict[str, str]:
        """Name -> SHA-256 of all else that decides what the model computes: configs, words."""
        ...
