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
from invmm.engine.check import check_replication
from invmm.engine.criterion import ReplicationCriterion
from invmm.engine.outcomes import Evaluations, NonFiniteError, Outcome
from invmm.engine.protocols import Setting, Target
from invmm.engine.requests import Minimise
from invmm.inversion.controllers import KLWeightController
from invmm.inversion.noise import GaussianNoise
from invmm.inversion.objectives import Objective
from invmm.inversion.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """InvMM of one image; the score is the KL of the first distribution that passes a check.

    Attributes:
        objective: what makes the noise sensitive.
        kl_weight: how strongly normality is asked for.
        num_steps: budget of optimiser steps.
        learning_rate: of Adam (paper: 0.1).
        check_every: optimiser steps between replication checks.
        check_prior: check the untouched prior first, so that an image which the model returns
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
            raise ValueError(
                f"inversion.num_steps={self.num_steps} never reaches a replication check; use at "
                f"least inversion.check_every={self.check_every}"
            )

    async def __call__(self, target: Target, setting: Setting, rng: torch.Generator) -> Outcome:
        """Runs the search; see `Measurement`."""
        noise = GaussianNoise.prior(target.latents)
        optimizer = torch.optim.Adam(noise.parameters(), lr=self.learning_rate)
        weight = self.kl_weight.init()
        trace = Trace(noise)
        try:
            for step in range(self.num_steps + 1):
                if step > 0:
                    loss, kl = await self.objective(noise, target, setting, rng), noise.kl()
                    total = loss + weight.value * kl
                    await Minimise(total)
                    optimizer.step()
                    optimizer.zero_grad()
                    trace.stepped(loss=loss.item(), kl=kl.item(), kl_weight=weight.value)
                    weight = self.kl_weight.update(
                        weight,
                        reconstruction=loss.item(),
                        total=total.item(),
                        check=self._checks_at(step),
                    )
                if self._checks_at(step):
                    draws = noise.draw(setting.criterion.num_samples, rng).detach()
                    check = await check_replication(draws, target, setting, rng)
                    trace.checked(check)
                    if check.passed:
                        return trace.replicated()
        except NonFiniteError as error:
            return trace.diverged(error)
        return trace.not_replicated()

    def worst_case(self, sampler: Sampler, criterion: ReplicationCriterion) -> Evaluations:
        """Evaluations of an image that never replicates and never exits a check early."""
        step = self.objective.evaluations()
        num_checks = sum(map(self._checks_at, range(self.num_steps + 1)))
        samples = num_checks * criterion.num_samples * sampler.num_evaluations
        return Evaluations(
            forward=self.num_steps * step.forward + samples,
            backward=self.num_steps * step.backward,
        )

    def _checks_at(self, step: int) -> bool:
        return step % self.check_every == 0 if step else self.check_prior
