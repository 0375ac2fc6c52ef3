"""The forward process and the conversions between what networks predict.

Legend: alphas_cumprod -> alpha-bar_t; signal -> sqrt(alpha-bar_t);
noise_scale -> sqrt(1 - alpha-bar_t); clean_latents -> x_0; noisy_latents -> x_t; noise -> epsilon.
All models that predict something else than the noise are converted here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]

TRAINED_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
"""Keys of a diffusers scheduler config that belong to the trained model, not to a sampler."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """x_t = signal_t * x_0 + noise_scale_t * noise, and what the network predicts of it.

    Attributes:
        alphas_cumprod: (T,) float32, falling from about 1 to about 0.
        prediction_type: what the network was trained to output.
        trained: the diffusers scheduler keys (`TRAINED_KEYS`) from which any sampler is built.
    """

    alphas_cumprod: Tensor
    prediction_type: PredictionType
    trained: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Reads the trained schedule out of any diffusers scheduler config.

        Raises:
            ValueError: the prediction type is not supported.
        """
        from diffusers import DDPMScheduler

        trained = {key: config[key] for key in TRAINED_KEYS if config.get(key) is not None}
        prediction_type = trained.setdefault("prediction_type", "epsilon")
        if prediction_type not in get_args(PredictionType):
            raise ValueError(
                f"prediction_type={prediction_type} is not supported; "
                f"use one of {', '.join(get_args(PredictionType))}"
            )
        alphas_cumprod = DDPMScheduler(**trained).alphas_cumprod
        return cls(alphas_cumprod.float(), prediction_type, trained)

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of noise levels the model was trained on."""
        return len(self.alphas_cumprod)

    @cached_property
    def clean_latents_weights(self) -> Tensor:
        """(T,) what an error of the noise counts as an error of the clean latents: (1 - a) / a."""
        return (1 - self.alphas_cumprod) / self.alphas_cumprod

    @cached_property
    def importance_weights(self) -> Tensor:
        """(T,) what keeps expectations if timesteps are drawn by `clean_latents_weights`."""
        return self.clean_latents_weights.mean() / self.clean_latents_weights

    @cached_property
    def _scales(self) -> Tensor:
        """(2, T) signal and noise_scale of every timestep."""
        return torch.stack([self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()])

    def scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) integer timesteps -> signal and noise_scale, each (B, 1, 1, 1) on their device."""
        if self._scales.device != timesteps.device:  # once, not at every step
            self.__dict__["_scales"] = self._scales.to(timesteps.device)
        signal, noise_scale = self._scales[:, timesteps].reshape(2, -1, 1, 1, 1)
        return signal, noise_scale

    def add_noise(self, clean_latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noisy latents x_t at timesteps (B,); clean_latents broadcasts over the batch."""
        signal, noise_scale = self.scales(timesteps)
        return signal * clean_latents + noise_scale * noise

    def clean_latents(self, output: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents x_0 that the network's output implies, (B, C, H, W)."""
        signal, noise_scale = self.scales(timesteps)
        if self.prediction_type == "epsilon":
            return (noisy_latents - noise_scale * output) / signal
        if self.prediction_type == "v_prediction":
            return signal * noisy_latents - noise_scale * output
        return output

    def noise(self, output: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that the network's output implies, (B, C, H, W)."""
        signal, noise_scale = self.scales(timesteps)
        if self.prediction_type == "epsilon":
            return output
        if self.prediction_type == "v_prediction":
            return signal * output + noise_scale * noisy_latents
        return (noisy_latents - signal * output) / noise_scale

    def draw_timesteps(self, count: int, rng: torch.Generator) -> Tensor:
        """(count,) timesteps, uniform over all noise levels, on the generator's device."""
        return torch.randint(self.num_train_timesteps, (count,), generator=rng, device=rng.device)


@dataclass(frozen=True, eq=False)
class Prediction:
    """A network's output together with what is needed to read it.

    Attributes:
        output: (B, C, H, W) raw output.
        noisy_latents: (B, C, H, W) what the network saw.
        timesteps: (B,).
        schedule: what the output means.
    """

    output: Tensor
    noisy_latents: Tensor
    timesteps: Tensor
    schedule: NoiseSchedule

    @property
    def clean_latents(self) -> Tensor:
        """(B, C, H, W) x_0."""
        return self.schedule.clean_latents(self.output, self.noisy_latents, self.timesteps)

    @property
    def noise(self) -> Tensor:
        """(B, C, H, W) epsilon."""
        return self.schedule.noise(self.output, self.noisy_latents, self.timesteps)
