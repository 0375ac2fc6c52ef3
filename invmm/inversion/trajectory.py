"""The tight inversion: the noise distribution is moved by what its draws are denoised to (ours).

The published loss looks at one noise level at a time and only suggests where a noise leads; here
a short sampler is run from the noise itself, gradients through all of its steps. The path starts at
the prior and is walked in small steps until a check is passed; then the distribution is drawn back
towards the prior for as long as it passes, and the nearest that fresh samples confirm is scored.

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
from invmm.inversion.confirmation import Basis, Confirmation, confirm, in_pixels
from invmm.inversion.frequency import low_frequencies
from invmm.inversion.noise import GaussianNoise
from invmm.inversion.optimizer import Adam
from invmm.inversion.trace import Trace

_ALL_FREQUENCIES = 2.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """A frozen distribution, and what fresh samples say of it.

    Attributes:
        noise: frozen.
        found: the count.
        is_confirmed: its rate suffices.
    """

    noise: GaussianNoise
    found: Confirmation
    is_confirmed: bool


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """InvMM of one image by the samples themselves; the score is that of a confirmed rate (ours).

    Attributes:
        num_steps: optimiser steps at most. The search ends with the first distribution that is
            confirmed, so that an image near to the prior costs a few of them.
        batch_size: noises per step.
        sampler_steps: of the short sampler that is differentiated, DDIM or, for a rectified flow,
            Euler. Memory grows with it: the graphs of all its steps are held for as many rows as
            `engine.rows_sample` says.
        learning_rate: of Adam, for the mean (in units of the prior's standard deviation) and for
            the log-variance. The noise of the gradients adds to the KL with its square, so that
            more and smaller steps find nearer distributions.
        betas: of Adam.
        step_size: "shared" divides the gradient by one root mean square for the mean and one for
            the log-variance, "coordinate" by one for each coordinate, as Adam does. The latter
            moves coordinates without influence as far as the others, at the price of their KL.
        basis: in which the distribution is diagonal: "pixel" as published, or "dct", an
            orthonormal frequency basis of each channel.
        bandwidth: frequencies (i, j) of a (H, W) plane move only if i / H + j / W is below it;
            2 moves all of them. The rest stays that of the prior and costs no KL.
        kl_weight: weight of the KL (nats per dimension) beside the error.
        check_every: optimiser steps between checks.
        num_check: samples of a check, fewer where those drawn decide already.
        candidate_rate: share of them that must replicate to pass.
        shrink: of the mean and of the log-variance by each step back towards the prior.
        num_shrinks: steps back at most, each after a check that is passed.
        num_confirmations: how many distributions may be tried by `replication.num_confirm` fresh
            samples each, those nearest to the prior first; the search goes on after a step whose
            distributions all failed. The intervals are widened for so many looks (Bonferroni).
        confirmed_rate: share of the fresh samples that must replicate at one of these looks. The
            true rate may be lower: 58 of 64 at the best of four looks take 0.77 or more (95 %).
        confidence: of the rate's interval and the certificate, over all looks.
        check_prior: check the untouched prior first, so that an image which the model returns
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
            ValueError: the model cannot be sampled in so many steps, or nothing would be confirmed.
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
                trace.read()  # a sample may have ended it before the losses were looked at
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
        """See `Measurement`; `sampler` of the evaluations includes the differentiated ones."""
        checks = self._checks_until(self.num_steps)
        by_scale = [sampler.evaluations_at(scale) for scale in sampler.guidance_scales]

        def with_scale(of_sample: int, num_check: int, confirmations: int) -> Evaluations:
            calls = of_sample // sampler.num_evaluations  # 2 of a guided step
            moved = self.num_steps * self.batch_size * self.sampler_steps * calls
            drawn = checks * num_check * sum(by_scale)
            confirmed = self.num_shrinks * num_check + criterion.num_confirm
            forward = moved + drawn + confirmations * confirmed * of_sample
            return Evaluations(forward=forward, backward=moved, sampler=forward)

        fewest = deciding_failures(self.num_check, self.candidate_rate)
        return CostRange(
            fewest=with_scale(min(by_scale), fewest if criterion.early_exit else self.num_check, 0),
            most=with_scale(max(by_scale), self.num_check, self.num_confirmations),
        )

    def passing(self, criterion: ReplicationCriterion, num_scales: int, steps: int) -> Passing:
        """See `Searching`: a share of the fresh samples at one of the looks."""
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
        """Of one look, so that all of them together have the whole (Bonferroni)."""
        return 1 - (1 - self.confidence) / self.num_confirmations

    def _checks_at(self, step: int) -> bool:
        return step % self.check_every == 0 if step else self.check_prior

    def _checks_until(self, step: int) -> int:
        """How many of the steps up to this one end with a check."""
        return step // self.check_every + self.check_prior

    def _moved(self, noise: GaussianNoise) -> Tensor:
        """1 for the coordinates that may move, 0 for the rest; broadcasts over channels."""
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
        """Root mean square error of each sample's latents, the mean over the batch.

        Squared, a few samples that are far off would drown those that the next steps could win.
        """
        count = self.batch_size
        draws = in_pixels(noise.draw(count, rng), self.basis)
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
        draws = in_pixels(noise.draw(self.num_check, rng).detach(), self.basis)
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
        """Frozen: what has passed, and its steps back towards the prior that pass as well."""
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
        found = await confirm(
            noise,
            target,
            setting,
            rng,
            num_samples=setting.criterion.num_confirm,
            guidance_scale=guidance_scale,
            basis=self.basis,
            confidence=self._confidence,
        )
        return Look(noise=noise, found=found, is_confirmed=found.rate >= self.confirmed_rate)

    def _outcome(self, trace: Trace, looks: Sequence[Look]) -> Outcome:
        """The confirmed distribution, or the best of those that were looked at, or the last q."""
        if not looks:
            found = trace.not_replicated()
            return replace(found, columns={**found.columns, "basis": self.basis})
        look = max(looks, key=lambda look: look.found.rate)
        trace.noise, trace.closest = look.noise, look.found.check
        found = trace.replicated() if look.is_confirmed else trace.not_replicated()
        return replace(
            found,
            replication_rate=look.found.rate,
            best_similarity=max(look.found.check.best, *trace.curves["similarity"]),
            columns={**found.columns, "basis": self.basis, **look.found.columns()},
        )
