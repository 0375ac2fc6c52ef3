"""Trajectory inversion: gradients reach the noise through all steps of a sampler (ours).

The published loss denoises one noise level at a time, which only hints at the image that a noise
leads to. Here a short sampler runs from the noise itself, and its samples are compared with the
image. The search starts at the prior and takes small steps until a check passes. Then it shrinks
the distribution towards the prior for as long as checks pass, and scores the distribution nearest
to the prior that fresh samples confirm.

Legend: noise -> q = N(mu, sigma^2); loss -> the error of the samples; kl -> R; kl_weight -> lambda;
sampler_steps -> K; batch_size -> B.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le, Len, Lt
from torch import Tensor

from invmm.diffusion.sampling import Sampler
from invmm.diffusion.schedule import NoiseSchedule
from invmm.engine.check import Check, check_replication, deciding_failures, starting_with
from invmm.engine.criterion import Passing, ReplicationCriterion
from invmm.engine.outcomes import CostRange, Evaluations, NonFiniteError, Outcome
from invmm.engine.protocols import Setting, Target, Use, refuse_searched_prompt
from invmm.engine.requests import Minimise, Sample
from invmm.faults import Refusal
from invmm.inversion.confirmation import Basis, Confirmation, confirm, from_basis
from invmm.inversion.frequency import low_frequencies
from invmm.inversion.noise import GaussianNoise
from invmm.inversion.optimizer import Adam
from invmm.inversion.trace import Trace

_ALL_FREQUENCIES = 2.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """A frozen distribution and its fresh samples.

    Attributes:
        noise: the distribution.
        confirmation: the replicas counted among its fresh samples.
        is_confirmed: whether their rate suffices.
    """

    noise: GaussianNoise
    confirmation: Confirmation
    is_confirmed: bool


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """InvMM of one image by gradients through a short sampler, with a confirmed rate (ours).

    Attributes:
        num_steps: largest number of optimiser steps. The search ends with the first distribution
            that is confirmed, so an image near the prior takes only a few.
        batch_size: noises per step.
        sampler_steps: of the short sampler that is differentiated, DDIM or, for a rectified flow,
            Euler. Memory grows with it: the graphs of all its steps are held for
            `engine.rows_sample` rows.
        learning_rate: of Adam, for the mean (in units of the prior's standard deviation) and for
            the log-variance. Noise in the gradients adds KL in proportion to the square of the
            learning rate, so more and smaller steps find distributions nearer to the prior.
        betas: of Adam.
        step_size: "shared" divides the gradient of the mean by one root mean square over all
            coordinates, and that of the log-variance by another. "coordinate" uses one for each
            coordinate, as Adam does; it moves coordinates without influence as far as the others,
            which adds to the KL.
        basis: coordinates in which the distribution is diagonal: "pixel", the entries of the
            latents, as published, or "dct", the orthonormal frequencies of each channel.
        bandwidth: frequencies (i, j) of a (H, W) plane move only if i / H + j / W is below it;
            2 moves all of them. The others keep the prior and add no KL.
        kl_weight: weight of the KL (nats per dimension) beside the error.
        check_every: optimiser steps between checks.
        num_check: samples of a check; fewer if the first ones decide it.
        candidate_rate: share of them that must replicate to pass.
        shrink: factor on the mean and the log-variance in each step back towards the prior.
        num_shrinks: largest number of steps back; each follows a check that passed.
        num_confirmations: how many distributions may be tested with `replication.num_confirm` fresh
            samples each (a look), those nearest to the prior first. If all candidates of a step
            fail, the search goes on. Intervals are widened for so many looks (Bonferroni).
        confirmed_rate: share of the fresh samples that must replicate in a look. The true rate may
            be lower: 58 of 64 in the best of four looks prove 0.77 or more (95 %).
        confidence: of the rate's interval and the certificate, over all looks together.
        check_prior: check the prior before the first step, so that an image which the model returns
            anyway scores 0.

    Raises:
        ValueError: no check would ever be reached, or a bandwidth without a frequency basis.
    """

    num_steps: Annotated[int, Ge(1)] = 96
    batch_size: Annotated[int, Ge(1)] = 8
    sampler_steps: Annotated[int, Ge(1)] = 5
    learning_rate: Annotated[float, Gt(0)] = 0.025
    betas: Annotated[Sequence[Annotated[float, Ge(0), Lt(1)]], Len(2, 2)] = (0.9, 0.99)
    step_size: Literal["shared", "coordinate"] = "shared"
    basis: Basis = "dct"
    bandwidth: Annotated[float, Gt(0), Le(_ALL_FREQUENCIES)] = 1.0
    kl_weight: Annotated[float, Ge(0)] = 0.5
    check_every: Annotated[int, Ge(1)] = 6
    num_check: Annotated[int, Ge(1)] = 32
    candidate_rate: Annotated[float, Gt(0), Le(1)] = 0.92
    shrink: Annotated[float, Gt(0), Lt(1)] = 0.85
    num_shrinks: Annotated[int, Ge(0)] = 4
    num_confirmations: Annotated[int, Ge(1)] = 4
    confirmed_rate: Annotated[float, Gt(0), Le(1)] = 0.9
    confidence: Annotated[float, Gt(0), Lt(1)] = 0.95
    check_prior: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.num_steps < self.check_every:
            raise Refusal(
                f"inversion.num_steps={self.num_steps} never reaches a replication check; use at "
                f"least inversion.check_every={self.check_every}",
                "inversion.num_steps",
                "inversion.check_every",
            )
        if self.basis == "pixel" and self.bandwidth != _ALL_FREQUENCIES:
            raise Refusal(
                f"inversion.bandwidth={self.bandwidth} has no meaning for inversion.basis=pixel; "
                f"use inversion.bandwidth={_ALL_FREQUENCIES:g} or inversion.basis=dct",
                "inversion.bandwidth",
                "inversion.basis",
            )

    async def __call__(self, target: Target, setting: Setting, rng: torch.Generator) -> Outcome:
        """Runs the search; see `Measurement`.

        Raises:
            ValueError: the model cannot be sampled in so many steps, or no fresh samples are asked
                for.
        """
        self.check_criterion(setting.criterion)
        noise = GaussianNoise.prior(target.latents)
        optimizer = Adam(noise.parameters(), self._moved(noise), self.betas, self.step_size)
        short = self.short_sampler(setting)
        scale = setting.sampler.guidance_scales[0]
        looks: list[Look] = []
        trace = Trace(noise)
        trace.curves["rate"] = []
        trace.curves["rate_step"] = trace.curves["similarity_step"]
        try:
            for step in range(self.num_steps + 1):
                if step > 0:
                    loss, kl = await self._loss(noise, target, short, scale, rng), noise.kl()
                    await Minimise(loss + self.kl_weight * kl)
                    optimizer.step(self.learning_rate)
                    trace.stepped(loss=loss, kl=kl, kl_weight=self.kl_weight)
                if not self._checks_at(step):
                    continue
                trace.read()
                scales = starting_with(scale, setting.sampler.guidance_scales)
                check = await self._check(noise, scales, target, setting, rng)
                trace.checked(check)
                trace.curves["rate"].append(check.rate)
                scale = check.guidance_scale
                if not check.passed:
                    continue
                num_shrinks = self.num_shrinks if step else 0  # nothing is nearer than the prior
                candidates = await self._shrunk(noise, num_shrinks, scale, target, setting, rng)
                remaining = self.num_confirmations - len(looks)
                for candidate in reversed(candidates[-remaining:]):
                    looks.append(await self._look(candidate, scale, target, setting, rng))
                    if looks[-1].is_confirmed:
                        return self._outcome(trace, looks)
                if len(looks) == self.num_confirmations:
                    break
            trace.read()
        except NonFiniteError as error:
            with suppress(NonFiniteError):
                trace.read()  # a sample may have ended it before the losses were read
            return trace.diverged(error)
        return self._outcome(trace, looks)

    def check(self, use: Use) -> None:
        """See `Measurement`: fresh samples must confirm, and its few steps suit the model."""
        refuse_searched_prompt(self, use)
        self.check_criterion(use.criterion)
        self.short_of(use.sampler, use.schedule())

    def check_criterion(self, criterion: ReplicationCriterion) -> None:
        """Refuses a criterion without fresh samples.

        Raises:
            ValueError: naming the key, the value and the cure.
        """
        if criterion.num_confirm == 0:
            raise Refusal(
                "replication.num_confirm=0 leaves inversion=trajectory nothing to confirm; use 64",
                "replication.num_confirm",
            )

    def short_sampler(self, setting: Setting) -> Sampler:
        """The differentiated sampler of a setting; see `short_of`."""
        return self.short_of(setting.sampler, setting.schedule)

    def short_of(self, sampler: Sampler, schedule: NoiseSchedule) -> Sampler:
        """The sampler that the search differentiates: `sampler` with few steps and without noise.

        Args:
            sampler: of the checks.
            schedule: of the model.

        Raises:
            ValueError: the model cannot be sampled in `sampler_steps` steps.
        """
        total, steps, is_flow = schedule.num_train_timesteps, self.sampler_steps, schedule.is_flow
        if steps > total or (not is_flow and total % steps):
            raise Refusal(
                f"inversion.sampler_steps={steps} does not divide the model's {total} training "
                "timesteps; use a divisor of them",
                "inversion.sampler_steps",
            )
        scheduler = "flow_euler" if is_flow else "ddim"
        short = replace(sampler, scheduler=scheduler, num_inference_steps=steps, eta=0.0)
        try:
            short.check_schedule(schedule)
        except ValueError as error:
            raise ValueError(f"with inversion.sampler_steps={steps}, {error}") from None
        return short

    def cost(self, sampler: Sampler, criterion: ReplicationCriterion) -> CostRange:
        """See `Measurement`; the differentiated evaluations count as the sampler's too."""
        checks = self._checks_until(self.num_steps)
        by_scale = [sampler.evaluations_at(scale) for scale in sampler.guidance_scales]

        def with_scale(of_sample: int, num_check: int, confirmations: int) -> Evaluations:
            per_step = of_sample // sampler.num_evaluations  # 2 with guidance, else 1
            searched = self.num_steps * self.batch_size * self.sampler_steps * per_step
            checked = checks * num_check * sum(by_scale)
            confirmed = self.num_shrinks * num_check + criterion.num_confirm
            forward = searched + checked + confirmations * confirmed * of_sample
            return Evaluations(forward=forward, backward=searched, sampler=forward)

        fewest = deciding_failures(self.num_check, self.candidate_rate)
        return CostRange(
            fewest=with_scale(min(by_scale), fewest if criterion.early_exit else self.num_check, 0),
            most=with_scale(max(by_scale), self.num_check, self.num_confirmations),
        )

    def passing(self, criterion: ReplicationCriterion, num_scales: int, steps: int) -> Passing:
        """See `Searching`: in one look, enough of the fresh samples replicate."""
        count = criterion.num_confirm
        return Passing(
            count=count + 1 - deciding_failures(count, self.confirmed_rate),
            num_samples=count,
            looks=self.num_confirmations,
            confidence=self._confidence,
            is_recorded=True,
        )

    @property
    def _confidence(self) -> float:
        """Confidence of one look such that all looks together have `confidence` (Bonferroni)."""
        return 1 - (1 - self.confidence) / self.num_confirmations

    def _checks_at(self, step: int) -> bool:
        return step % self.check_every == 0 if step else self.check_prior

    def _checks_until(self, step: int) -> int:
        """Number of checks up to this step."""
        return step // self.check_every + self.check_prior

    def _moved(self, noise: GaussianNoise) -> Tensor:
        """(H, W) mask: 1 for the coordinates that may move, 0 for the others."""
        height, width = noise.mean.shape[-2:]
        return low_frequencies(height, width, self.bandwidth).to(noise.mean)

    async def _loss(
        self,
        noise: GaussianNoise,
        target: Target,
        sampler: Sampler,
        guidance_scale: float,
        rng: torch.Generator,
    ) -> Tensor:
        """Root mean square error of each sample's latents, averaged over the batch.

        A mean of squares would be dominated by a few samples that are far off, at the expense of
        those that the next steps could turn into replicas.
        """
        count = self.batch_size
        draws = from_basis(noise.draw(count, rng), self.basis)
        rows, negative = target.rows(count), target.negative_rows(count)
        latents = await Sample(draws, sampler, rows, None, guidance_scale, negative)
        errors = (latents.float() - target.latents.float()).flatten(1)
        return torch.linalg.vector_norm(errors, dim=1).mean() / errors.shape[1] ** 0.5

    async def _check(
        self,
        noise: GaussianNoise,
        guidance_scales: Sequence[float],
        target: Target,
        setting: Setting,
        rng: torch.Generator,
    ) -> Check:
        """See `num_check` and `candidate_rate`."""
        draws = from_basis(noise.draw(self.num_check, rng).detach(), self.basis)
        return await check_replication(
            draws,
            target.rows(self.num_check),
            target,
            setting,
            rng,
            guidance_scales=guidance_scales,
            lowest_rate=self.candidate_rate,
        )

    async def _shrunk(
        self,
        noise: GaussianNoise,
        num_shrinks: int,
        guidance_scale: float,
        target: Target,
        setting: Setting,
        rng: torch.Generator,
    ) -> list[GaussianNoise]:
        """Frozen copies of the distribution that passed and of its steps back that pass too."""
        passed = [GaussianNoise(noise.mean, noise.log_variance)]
        for _ in range(num_shrinks):
            nearer = GaussianNoise(*(self.shrink * value for value in passed[-1].parameters()))
            check = await self._check(nearer, [guidance_scale], target, setting, rng)
            if not check.passed:
                break
            passed.append(nearer)
        return passed

    async def _look(
        self,
        noise: GaussianNoise,
        guidance_scale: float,
        target: Target,
        setting: Setting,
        rng: torch.Generator,
    ) -> Look:
        confirmation = await confirm(
            noise,
            target,
            setting,
            rng,
            num_samples=setting.criterion.num_confirm,
            guidance_scale=guidance_scale,
            basis=self.basis,
            confidence=self._confidence,
        )
        is_confirmed = confirmation.rate >= self.confirmed_rate
        return Look(noise=noise, confirmation=confirmation, is_confirmed=is_confirmed)

    def _outcome(self, trace: Trace, looks: Sequence[Look]) -> Outcome:
        """The outcome of the confirmed look, else of the one with the highest rate, else of q."""
        if not looks:
            outcome = trace.not_replicated()
            return replace(outcome, columns={**outcome.columns, "basis": self.basis})
        look = max(looks, key=lambda look: look.confirmation.rate)
        confirmation = look.confirmation
        trace.noise, trace.closest = look.noise, confirmation.check
        outcome = trace.replicated() if look.is_confirmed else trace.not_replicated()
        return replace(
            outcome,
            replication_rate=confirmation.rate,
            best_similarity=max(confirmation.check.best, *trace.curves["similarity"]),
            columns={**outcome.columns, "basis": self.basis, **confirmation.columns()},
        )
