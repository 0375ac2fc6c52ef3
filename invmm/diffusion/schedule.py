"""The forward process and the conversions between what networks predict.

Legend: signal -> sqrt(alpha-bar_t), or 1 - sigma_t of a rectified flow; noise_scale ->
sqrt(1 - alpha-bar_t), or sigma_t; clean_latents -> x_0; noisy_latents -> x_t; noise -> epsilon.
All models that predict something else than the noise are converted here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]

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


FLOW_KEYS = ("num_train_timesteps", "shift")
"""The same of a rectified flow."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """x_t = signal_t * x_0 + noise_scale_t * noise, and what the network predicts of it.

    Attributes:
        signals: (T,) float32, falling from about 1 to about 0.
        noise_scales: (T,) float32, rising from about 0 to about 1.
        timesteps: (T,) what the network is told at each noise level: 0 to T - 1, or T * sigma_t
            of a rectified flow.
        prediction_type: what the network was trained to output.
        trained: the diffusers scheduler keys (`TRAINED_KEYS` or `FLOW_KEYS`) from which any
            sampler is built.
    """

    signals: Tensor
    noise_scales: Tensor
    timesteps: Tensor
    prediction_type: PredictionType
    trained: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Reads the trained schedule out of any diffusers scheduler config.

        Raises:
            ValueError: the prediction type is not supported.
        """
        if "shift" in config:  # only schedulers of rectified flows have it
            return cls._flow(config)
        from diffusers import DDPMScheduler

        trained = {key: config[key] for key in TRAINED_KEYS if config.get(key) is not None}
        prediction_type = trained.setdefault("prediction_type", "epsilon")
        known = [name for name in get_args(PredictionType) if name != "flow"]
        if prediction_type not in known:
            raise ValueError(
                f"prediction_type={prediction_type} is not supported; use one of {', '.join(known)}"
            )
        alphas_cumprod = DDPMScheduler(**trained).alphas_cumprod.float()
        return cls(
            alphas_cumprod.sqrt(),
            (1 - alphas_cumprod).sqrt(),
            torch.arange(len(alphas_cumprod)),
            prediction_type,
            trained,
        )

    @classmethod
    def _flow(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        from diffusers import FlowMatchEulerDiscreteScheduler

        if config.get("use_dynamic_shifting"):
            raise ValueError(
                "use_dynamic_shifting=true is not supported; give the shift for this image size "
                "in scheduler_config.json, with use_dynamic_shifting=false"
            )
        trained = {key: config[key] for key in FLOW_KEYS if config.get(key) is not None}
        scheduler: Any = FlowMatchEulerDiscreteScheduler(**trained)
        sigmas = scheduler.sigmas.float().flip(0)
        return cls(1 - sigmas, sigmas, sigmas * len(sigmas), "flow", trained)

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of noise levels the model was trained on."""
        return len(self.signals)

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) alpha-bar, the squared signals."""
        return self.signals.square()

    @property
    def is_flow(self) -> bool:
        """Whether the model was trained on a rectified flow."""
        return self.prediction_type == "flow"

    @cached_property
    def clean_latents_weights(self) -> Tensor:
        """(T,) what a squared error of the network's output counts as one of the clean latents."""
        return {
            "epsilon": (self.noise_scales / self.signals).square(),
            "v_prediction": self.noise_scales.square(),
            "flow": self.noise_scales.square(),
            "sample": torch.ones_like(self.signals),
        }[self.prediction_type]

    @cached_property
    def importance_weights(self) -> Tensor:
        """(T,) what keeps expectations if timesteps are drawn by `clean_latents_weights`."""
        return self.clean_latents_weights.mean() / self.clean_latents_weights

    @cached_property
    def _scales(self) -> Tensor:
        """(2, T) signal and noise_scale of every noise level."""
        return torch.stack([self.signals, self.noise_scales])

    def scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) timesteps -> signal and noise_scale, each (B, 1, 1, 1) on their device."""
        if self.is_flow:
            sigmas = (timesteps / self.num_train_timesteps).float().reshape(-1, 1, 1, 1)
            return 1 - sigmas, sigmas
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
        if self.is_flow:
            return noisy_latents - noise_scale * output
        return output

    def noise(self, output: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that the network's output implies, (B, C, H, W)."""
        signal, noise_scale = self.scales(timesteps)
        if self.prediction_type == "epsilon":
            return output
        if self.prediction_type == "v_prediction":
            return signal * output + noise_scale * noisy_latents
        if self.is_flow:
            return noisy_latents + signal * output
        return (noisy_latents - signal * output) / noise_scale

    def draw_levels(self, count: int, rng: torch.Generator, *, by_weight: bool = False) -> Tensor:
        """(count,) indices of noise levels, on the CPU.

        Args:
            count: of levels.
            rng: on the CPU.
            by_weight: in proportion to `clean_latents_weights`, not uniform.
        """
        if by_weight:
            return torch.multinomial(self.clean_latents_weights, count, True, generator=rng)
        return torch.randint(self.num_train_timesteps, (count,), generator=rng)


@dataclass(frozen=True, eq=False)
class Prediction:
    """A network's output together with what is needed to read it.

    Attributes:
        output: (B, C, H, W) raw output.
        noisy_latents: (B, C, H, W) what the network saw.
        timesteps: (B,) as the network was told.
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
