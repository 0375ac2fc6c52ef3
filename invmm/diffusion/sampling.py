"""Drawing from a diffusion model: any diffusers scheduler, from given noise.

The schedulers are diffusers' own. They are built explicitly: given the config of another scheduler,
`from_config` silently turns clipping on and changes the timestep spacing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le, MinLen
from torch import Tensor

from invmm.diffusion.guidance import is_guided
from invmm.diffusion.schedule import NoiseSchedule
from invmm.diffusion.schedulers import SCHEDULERS, Scheduler, SchedulerName, Spacing
from invmm.faults import Refusal

_SMALLEST_FIRST_ALPHA, _LARGEST_FIRST_ALPHA = 1e-5, 0.5
_NO_SIGNAL_ALPHA = 2**-24
"""Replaces an alpha-bar of 0 in those of diffusers' samplers that divide by sqrt(alpha-bar)."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Which scheduler turns noise into images, and how.

    Attributes:
        scheduler: of the table in `invmm.diffusion.schedulers`; dpmsolver is DPM-Solver++ 2M, and
            flow_euler and flow_heun are for models trained on a rectified flow.
        num_inference_steps: denoising steps (Heun evaluates the network twice in most of them).
        eta: noise that DDIM adds, 0 (none) to 1 (as much as DDPM).
        timestep_spacing: which of the training timesteps are visited; "trailing" starts at the
            last one, as the published code does. On a rectified flow, "linspace" ends at the
            smallest sigma, as the pipeline of Stable Diffusion 3 does, "trailing" a whole step
            before 0.
        clip_sample: clip the predicted clean latents to [-1, 1] at each step.
        guidance_scales: scales of classifier-free guidance for a conditional model; an image counts
            as replicated if any of them replicates it (paper: 1 to 7). A scale of 1 or less
            evaluates the network once a step, a greater one twice.

    Raises:
        ValueError: an option that the scheduler does not have.
    """

    scheduler: SchedulerName = "ddim"
    num_inference_steps: Annotated[int, Ge(1)] = 50
    eta: Annotated[float, Ge(0), Le(1)] = 0.0
    timestep_spacing: Spacing = "trailing"
    clip_sample: bool = False
    guidance_scales: Annotated[Sequence[Annotated[float, Ge(0)]], MinLen(1)] = (1.0,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance_scales", tuple(map(float, self.guidance_scales)))
        named = f"sampler.scheduler={self.scheduler}"
        if self.scheduler not in SCHEDULERS:
            raise Refusal(f"{named} is none of {', '.join(SCHEDULERS)}", "sampler.scheduler")
        if self.eta and not self.facts.takes_eta:
            raise Refusal(
                f"sampler.eta={self.eta} has no meaning for {named}; use sampler=ddim or "
                "sampler.eta=0",
                "sampler.eta",
                "sampler.scheduler",
            )
        if self.clip_sample and not self.facts.can_clip:
            able = ", ".join(name for name, facts in SCHEDULERS.items() if facts.can_clip)
            raise Refusal(
                f"sampler.clip_sample=true is not possible with {named}; use one of {able} or "
                "sampler.clip_sample=false",
                "sampler.clip_sample",
                "sampler.scheduler",
            )
        if self.timestep_spacing not in self.facts.spacings:
            raise Refusal(
                f"sampler.timestep_spacing={self.timestep_spacing} has no meaning for {named}; use "
                f"{' or '.join(self.facts.spacings)}",
                "sampler.timestep_spacing",
                "sampler.scheduler",
            )

    @property
    def facts(self) -> Scheduler:
        """What is known of the scheduler."""
        return SCHEDULERS[self.scheduler]

    @property
    def is_stochastic(self) -> bool:
        """Whether the sampler draws noise of its own."""
        return self.facts.is_stochastic or self.eta > 0

    @property
    def num_evaluations(self) -> int:
        """Network evaluations for one sample without guidance."""
        return (self.num_inference_steps - 1) * self.facts.evaluations + 1

    def evaluations_at(self, guidance_scale: float) -> int:
        """Network evaluations for one sample at a guidance scale."""
        return self.num_evaluations * (2 if is_guided(guidance_scale) else 1)

    def check_steps(self, num_train_timesteps: int) -> None:
        """Refuses a number of steps that a model trained on T noise levels cannot take.

        Raises:
            ValueError: naming the key, the value and the cure.
        """
        steps, total = self.num_inference_steps, num_train_timesteps
        if steps > total:
            raise Refusal(
                f"sampler.num_inference_steps={steps} exceeds the model's {total} training "
                f"timesteps; use at most {total}",
                "sampler.num_inference_steps",
            )
        if self.facts.must_divide and total % steps:
            divisors = [count for count in range(1, total + 1) if total % count == 0]
            near = min(divisors, key=lambda count: abs(count - steps))
            raise Refusal(
                f"sampler.num_inference_steps={steps} does not divide the model's {total} "
                f"training timesteps, as DDIM needs; use {near}",
                "sampler.num_inference_steps",
            )

    def check_kind(self, prediction_type: str) -> None:
        """Refuses a flow sampler for a model that is no rectified flow, and the reverse.

        Raises:
            ValueError: naming the key, the value and the cure.
        """
        if (prediction_type == "flow") != self.facts.samples_flows:
            cure, kind = (
                ("ddim", "noise")
                if self.facts.samples_flows
                else ("flow_euler", "a rectified flow")
            )
            raise Refusal(
                f"sampler.scheduler={self.scheduler} cannot draw from a model trained on {kind}; "
                f"use sampler={cure}",
                "sampler.scheduler",
            )

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """Refuses a first timestep from which pure noise cannot be denoised.

        Raises:
            ValueError: naming the key, the value and the cure: at the first timestep the model
                expects latents in which the image dominates, or a noise predictor has so little
                signal that dividing by it overflows.
        """
        self.check_kind(schedule.prediction_type)
        if schedule.is_flow:
            return
        first = round(self.build(schedule).timesteps[0].item())
        alpha, last_alpha = schedule.alphas_cumprod[[first, -1]].tolist()
        steps, spacing = self.num_inference_steps, self.timestep_spacing
        where = f"starts at timestep {first}, where alpha-bar is {alpha:.1e}"
        if alpha > _LARGEST_FIRST_ALPHA > last_alpha:
            raise Refusal(
                f"sampler.num_inference_steps={steps} with sampler.timestep_spacing={spacing} "
                f"{where}, but sampling begins with pure noise; use "
                "sampler.timestep_spacing=trailing",
                "sampler.num_inference_steps",
                "sampler.timestep_spacing",
            )
        if schedule.prediction_type != "epsilon" or alpha >= _SMALLEST_FIRST_ALPHA:
            return
        key, cure = f"timestep_spacing={spacing}", "sampler.timestep_spacing=leading"
        if spacing == "leading":
            key = f"num_inference_steps={steps}"
            cure = f"sampler.num_inference_steps={max(steps // 2, 1)} or less"
        raise Refusal(
            f"sampler.{key} {where}, and dividing by its square root makes errors explode; "
            f"use {cure}",
            "sampler.timestep_spacing",
            "sampler.num_inference_steps",
        )

    def build(self, schedule: NoiseSchedule) -> Any:
        """A fresh diffusers scheduler on the trained schedule, its timesteps set."""
        import diffusers

        self.check_kind(schedule.prediction_type)
        if schedule.is_flow:
            scheduler = getattr(diffusers, self.facts.class_name)(**schedule.trained)
            steps = self.num_inference_steps
            if self.timestep_spacing == "linspace":
                scheduler.set_timesteps(steps)
            else:
                sigmas = [1 - index / steps for index in range(steps)]
                scheduler.set_timesteps(sigmas=sigmas)
            return scheduler
        facts, trained = self.facts, schedule.trained
        options = {
            **(trained if facts.rescales_betas else _rescaled(trained)),
            **facts.fixed,
            "timestep_spacing": self.timestep_spacing,
        }
        if facts.can_clip:
            options["clip_sample"] = self.clip_sample
        scheduler = getattr(diffusers, facts.class_name)(**options)
        scheduler.set_timesteps(self.num_inference_steps)
        return scheduler


def _rescaled(trained: Mapping[str, Any]) -> dict[str, Any]:
    """Trained keys with rescaled betas, for a class without the key `rescale_betas_zero_snr`."""
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    keys = dict(trained)
    if keys.pop("rescale_betas_zero_snr"):
        betas = rescale_zero_terminal_snr(torch.tensor(keys["trained_betas"])).double()
        betas[-1] = 1 - _NO_SIGNAL_ALPHA / (1 - betas[:-1]).prod()
        keys["trained_betas"] = betas.tolist()
    return keys


def draw(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    *,
    sampler: Sampler,
    schedule: NoiseSchedule,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Runs a sampler; gradients flow from the result to the noise if they are enabled.

    Args:
        predict: (latents (B, C, H, W), timesteps (B,)) -> raw network output.
        noise: (B, C, H, W) in units of the prior's standard deviation.
        sampler: scheduler and steps.
        schedule: the trained schedule.
        seeds: one per row, for stochastic samplers; a row's result depends on its own seed only.

    Returns:
        (B, C, H, W) clean latents.

    Raises:
        ValueError: a stochastic sampler without seeds.
    """
    scheduler = sampler.build(schedule)
    options: dict[str, Any] = {}
    if sampler.is_stochastic:
        if seeds is None or len(seeds) != len(noise):
            raise ValueError(f"sampler {sampler.scheduler} draws noise: give one seed a row")
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    if sampler.facts.takes_eta:
        options["eta"] = sampler.eta
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda latents, timestep: latents)
    for timestep in scheduler.timesteps:
        model_input = scale(latents, timestep)
        timesteps = timestep.to(latents.device).expand(len(latents))
        output = predict(model_input, timesteps)
        latents = scheduler.step(output, timestep, latents, **options).prev_sample
    return latents
