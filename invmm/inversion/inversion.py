"""The inversion: from the prior to the nearest noise distribution that replicates an image.

Algorithm 1 of the paper. Legend: noise -> q = N(mu, sigma^2); loss -> P; kl -> R; weight -> lambda;
check_every -> C; the criterion's num_samples -> N and threshold -> beta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt

from invmm.diffusion.sampling import Sampler
from invmm.engine.check import check_replication, starting_with
from invmm.engine.criterion import Passing, ReplicationCriterion
from invmm.engine.outcomes import CostRange, Evaluations, NonFiniteError, Outcome
from invmm.engine.protocols import Setting, Target, Use
from invmm.engine.requests import Minimise
from invmm.faults import Refusal
from invmm.inversion.confirmation import CONFIDENCE, Confirmation, confirm
from invmm.inversion.controllers import KLWeightController
from invmm.inversion.noise import GaussianNoise
from invmm.inversion.objectives import Objective
from invmm.inversion.soft_prompt import prompt_of
from invmm.inversion.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """InvMM of one image; the score is the KL of the first distribution that passes a check.

    Attributes:
        objective: the loss that moves the noise distribution towards replicating the image.
        kl_weight: controller of the weight of the KL from the prior in the loss.
        num_steps: largest number of optimiser steps.
        learning_rate: of Adam (paper: 0.1).
        check_every: optimiser steps between replication checks.
        check_prior: check the prior before the first step, so that an image which the model returns
            anyway scores 0. The release does not (ours).

    Raises:
        ValueError: no check would ever be reached.
    """

    objective: Objective
    kl_weight: KLWeightController
    num_steps: Annotated[int, Ge(1)] = 2000
    learning_rate: Annotated[float, Gt(0)] = 0.1
    check_every: Annotated[int, Ge(1)] = 50
    check_prior: bool = True

    def __post_init__(self) -> None:
        if self.num_steps < self.check_every:
            raise Refusal(
                f"inversion.num_steps={self.num_steps} never reaches a replication check; use at "
                f"least inversion.check_every={self.check_every}",
                "inversion.num_steps",
                "inversion.check_every",
            )

    def check(self, use: Use) -> None:
        """See `Measurement`: it can be used with all that a model can."""

    async def __call__(self, target: Target, setting: Setting, rng: torch.Generator) -> Outcome:
        """Runs the search; see `Measurement`."""
        noise, prompt = GaussianNoise.prior(target.latents), prompt_of(target)
        moved = [*noise.parameters(), *prompt.parameters()]
        optimizer = torch.optim.Adam(moved, lr=self.learning_rate, fused=True)
        weight = self.kl_weight.init()
        trace = Trace(noise, prompt)
        try:
            for step in range(self.num_steps + 1):
                check_due = self._checks_at(step)
                if step > 0:
                    loss = await self.objective(noise, prompt, target, setting, rng)
                    kl = noise.kl()
                    await Minimise(loss + weight.value * kl)
                    optimizer.step()
                    optimizer.zero_grad()
                    trace.stepped(loss=loss, kl=kl, kl_weight=weight.value)
                    weight = self.kl_weight.update(weight, trace.read() if check_due else None)
                if check_due:
                    count = setting.criterion.num_samples
                    scales = starting_with(trace.closest_scale, setting.sampler.guidance_scales)
                    draws = noise.draw(count, rng).detach()
                    rows = await prompt.check_rows(count, rng)
                    check = await check_replication(
                        draws, rows, target, setting, rng, guidance_scales=scales
                    )
                    trace.checked(check)
                    if check.passed:
                        return trace.replicated(await self._confirm(trace, target, setting, rng))
            trace.read()
        except NonFiniteError as error:
            return trace.diverged(error)
        return trace.not_replicated()

    async def _confirm(
        self, trace: Trace, target: Target, setting: Setting, rng: torch.Generator
    ) -> Confirmation | None:
        """Fresh samples of the distribution that passed; they change no score."""
        if not (num_samples := setting.criterion.num_confirm):
            return None
        scale = trace.closest_scale
        assert scale is not None
        return await confirm(
            trace.noise,
            trace.prompt.conditioned(target),
            setting,
            rng,
            num_samples=num_samples,
            guidance_scale=scale,
        )

    def cost(self, sampler: Sampler, criterion: ReplicationCriterion) -> CostRange:
        """See `Measurement`."""
        step = self.objective.evaluations()
        checks = self._checks_until(self.num_steps)
        of_sample = sum(map(sampler.evaluations_at, sampler.guidance_scales))

        def with_samples(count: int) -> Evaluations:
            drawn = checks * count * of_sample
            return Evaluations(
                forward=self.num_steps * step.forward + drawn,
                backward=self.num_steps * step.backward,
                sampler=drawn,
            )

        count = criterion.num_samples
        return CostRange(
            fewest=with_samples(1 if criterion.early_exit else count), most=with_samples(count)
        )

    def passing(self, criterion: ReplicationCriterion, num_scales: int, steps: int) -> Passing:
        """See `Searching`: in one check, all samples replicate at one guidance scale."""
        checks = self._checks_until(min(steps, self.num_steps))
        count = criterion.num_samples
        return Passing(
            count=count,
            num_samples=count,
            looks=checks * num_scales,
            confidence=CONFIDENCE,
            is_recorded=criterion.num_confirm == 0,
        )

    def _checks_at(self, step: int) -> bool:
        return step % self.check_every == 0 if step else self.check_prior

    def _checks_until(self, step: int) -> int:
        """Number of checks up to this step."""
        return step // self.check_every + self.check_prior
