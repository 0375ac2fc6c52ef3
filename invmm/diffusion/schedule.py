"""The forward process, and the clean latents and noise that a network's output implies.

Legend: signal -> sqrt(alpha-bar_t), or 1 - sigma_t of a rectified flow; noise_scale ->
sqrt(1 - alpha-bar_t), or sigma_t; clean_latents -> x_0; noisy_latents -> x_t; noise -> epsilon.
Outputs of all prediction types are converted here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from invmm.diffusion.scheduler_config import (
    FLOW_SCHEDULERS,
    ZERO_TERMINAL_SNR,
    class_of,
    resolved,
    scheduler_class,
    shown,
)

_Read = TypeVar("_Read")
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]

_MAX_OVERSAMPLING = 50.0
"""Largest probability of a noise level under `draw_weights`, in multiples of 1 / T (ours)."""
_ROUNDING = 1e-6
_BETAS_WITHOUT_SIGNAL = (
    "the betas leave no signal at the last timestep, where a predicted noise "
    "(prediction_type=epsilon) does not determine the image; check num_train_timesteps, beta_start "
    "and beta_end"
)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """x_t = signal_t * x_0 + noise_scale_t * noise, and the quantity that the network predicts.

    Attributes:
        signals: (T,) float32, falling from about 1 to about 0.
        noise_scales: (T,) float32, rising from about 0 to about 1.
        timesteps: (T,) the network's input at each noise level: 0 to T - 1, or T * sigma_t of a
            rectified flow.
        prediction_type: what the network was trained to output.
        trained: the diffusers scheduler keys (`TRAINED_KEYS` or `FLOW_KEYS`) from which any
            sampler is built. Betas are stored as numbers, since no scheduler class knows every
            beta_schedule.
    """

    signals: Tensor
    noise_scales: Tensor
    timesteps: Tensor
    prediction_type: PredictionType
    trained: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The trained schedule of a diffusers scheduler config.

        Args:
            config: of a scheduler. Without `_class_name`, its keys are read as those of
                `DDPMScheduler`, or of a rectified flow if `shift` is among them.

        Raises:
            ValueError: the schedule cannot be read exactly (see `scheduler_config`), a beta is not
                between 0 and 1, or a noise predictor has no signal at the last timestep.
        """
        keys = resolved(config)
        if class_of(config) in FLOW_SCHEDULERS:
            sigmas = scheduler_class(FLOW_SCHEDULERS[0])(**keys).sigmas.float().flip(0)
            return cls(1 - sigmas, sigmas, sigmas * len(sigmas), "flow", keys)
        formula = {key: keys[key] for key in ("beta_start", "beta_end", "beta_schedule")}
        length = {"num_train_timesteps": keys["num_train_timesteps"]}
        options = {**length, **formula, "trained_betas": keys["trained_betas"]}
        try:
            betas = scheduler_class(class_of(config))(**options).betas
        except NotImplementedError:
            raise ValueError(
                f"beta_schedule={keys['beta_schedule']} is unknown to {class_of(config)}; use "
                "linear, scaled_linear or squaredcos_cap_v2, as the model was trained"
            ) from None
        except (TypeError, RuntimeError) as error:
            values = ", ".join(f"{key}={shown(options[key])}" for key in options)
            raise ValueError(
                f"{values[:200]} give no betas; use numbers between 0 and 1, as it was trained"
            ) from error
        if not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"the betas reach from {betas.min():.3g} to {betas.max():.3g}; each must lie "
                "between 0 and 1, check beta_start, beta_end and trained_betas"
            )
        trained = {
            **length,
            "trained_betas": betas.tolist(),
            "rescale_betas_zero_snr": bool(keys.get("rescale_betas_zero_snr")),
            "prediction_type": keys["prediction_type"],
        }
        alphas_cumprod = scheduler_class("DDPMScheduler")(**trained).alphas_cumprod.float()
        schedule = cls(
            alphas_cumprod.sqrt(),
            (1 - alphas_cumprod).sqrt(),
            torch.arange(len(alphas_cumprod)),
            keys["prediction_type"],
            trained,
        )
        if not schedule.clean_latents_weights.sum().isfinite():
            is_rescaled = keys.get("rescale_betas_zero_snr")
            raise ValueError(ZERO_TERMINAL_SNR if is_rescaled else _BETAS_WITHOUT_SIGNAL)
        return schedule

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """The trained schedule of a diffusers scheduler object.

        Raises:
            ValueError: as `from_config`; its class is not diffusers' own; or its noise levels are
                not those of its config.
        """
        name = type(scheduler).__name__
        schedule = cls.from_config({**getattr(scheduler, "config", {}), "_class_name": name})
        if type(scheduler) is not scheduler_class(name):
            raise ValueError(f"this {name} is not diffusers' own; use a scheduler of diffusers")
        if schedule.is_flow:  # compared by shift, as sampling overwrites the sigmas
            key = cure = "shift"
            expected = torch.tensor([float(schedule.trained["shift"])])
            actual = torch.tensor([float(vars(scheduler).get("_shift", expected))])
        else:
            key, cure = "alphas_cumprod", "trained_betas"
            actual, expected = scheduler.alphas_cumprod.cpu().float(), schedule.alphas_cumprod
        if actual.shape != expected.shape or not (actual - expected).abs().max() <= _ROUNDING:
            raise ValueError(
                f"the {key} of the {name} is not what its config says; make the scheduler anew "
                f"with {cure}= instead of changing it"
            )
        return schedule

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
        """(T,) squared error of the predicted clean latents per squared error of the raw output."""
        return {
            "epsilon": (self.noise_scales / self.signals).square(),
            "v_prediction": self.noise_scales.square(),
            "flow": self.noise_scales.square(),
            "sample": torch.ones_like(self.signals),
        }[self.prediction_type]

    @cached_property
    def draw_weights(self) -> Tensor:
        """(T,) unnormalised probabilities with which `draw_levels` draws noise levels by weight.

        These are `clean_latents_weights`, clamped so that no level is drawn more than 50 times as
        often as by a uniform draw. Linear and scaled-linear betas stay below 20 times and are not
        clamped; with cosine betas, whose alpha-bar ends at 2e-9, the last level alone would take
        99.8 % of the draws. `importance_weights` are computed from the clamped probabilities, so
        expectations stay unbiased: a clamped level is drawn less often, but each draw counts more.
        """
        weights, max_share = self.clean_latents_weights, _MAX_OVERSAMPLING / len(self.signals)
        descending, _ = weights.double().sort(descending=True)
        if max_share >= 1 or descending[0] <= max_share * descending.sum():
            return weights
        rest = descending.sum() - descending.cumsum(0)
        # With the k largest weights at a common limit c: c = max_share * (k * c + rest[k - 1]).
        counts = torch.arange(1, min(len(descending), int(1 / max_share)))
        limits = max_share * rest[counts - 1] / (1 - max_share * counts)
        fits = limits >= descending[counts]
        limit = limits[fits][0] if fits.any() else descending[-1]
        return weights.clamp(max=limit.item())

    @cached_property
    def importance_weights(self) -> Tensor:
        """(T,) factors on losses that keep their mean unbiased under draws by `draw_weights`."""
        return self.draw_weights.mean() / self.draw_weights

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
            count: how many.
            rng: a generator on the CPU.
            by_weight: draw in proportion to `draw_weights`, not uniformly.
        """
        if by_weight:
            return torch.multinomial(self.draw_weights, count, True, generator=rng)
        return torch.randint(self.num_train_timesteps, (count,), generator=rng)


def read_scheduler(source: str, read: Callable[[], _Read]) -> _Read:
    """Returns `read()`; any exception that it raises becomes one line.

    Args:
        source: the model that the scheduler belongs to, for messages.
        read: reads a scheduler's config or object.

    Raises:
        ValueError: in place of any exception, since foreign configs raise all kinds.
    """
    try:
        return read()
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"the noise schedule of {source} is unusable: {reason}") from error


def schedule_of(pipeline: Any) -> NoiseSchedule:
    """The trained schedule of a diffusers pipeline in memory.

    Raises:
        ValueError: see `NoiseSchedule.from_scheduler`.
    """
    scheduler = pipeline.scheduler
    return read_scheduler("the pipeline in memory", lambda: NoiseSchedule.from_scheduler(scheduler))


@dataclass(frozen=True, eq=False)
class Prediction:
    """A network's output, and what is needed to compute clean latents or noise from it.

    Attributes:
        output: (B, C, H, W) raw output.
        noisy_latents: (B, C, H, W) the network's input.
        timesteps: (B,) the network's timestep input.
        schedule: the trained schedule with the prediction type.
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
