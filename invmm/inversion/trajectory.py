"""The tight inversion: the noise distribution is moved by what its draws are denoised to (ours).

The published loss looks at one noise level at a time and only suggests where a noise leads; here
a short sampler is run from the noise itself, gradients through all of its steps. And what counts
is not the first distribution that passes a check, but the one nearest to the prior whose rate of
replication a set of fresh samples confirms.

Legend: noise -> q = N(mu, sigma^2); loss -> the error of the samples; kl -> R; weight -> lambda;
sampler_steps -> K; batch_size -> B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Len, Lt
from torch import Tensor

from invmm.diffusion.sampling import Sampler
from invmm.engine.check import Check
from invmm.engine.criterion import ReplicationCriterion
from invmm.engine.outcomes import CostRange, Evaluations, NonFiniteError, Outcome
from invmm.engine.protocols import Setting, Target
from invmm.engine.requests import Embed, Minimise, Sample, draw_seeds
from invmm.inversion.frequency import from_frequencies, low_frequencies
from invmm.inversion.noise import GaussianNoise
from invmm.inversion.optimizer import Adam
from invmm.inversion.trace import Trace
from invmm.probability.certificate import clopper_pearson, log_p_certified, lower_rate

_ALL_FREQUENCIES = 2.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A distribution that looked good enough to be confirmed.

    Attributes:
        noise: frozen.
        kl: nats per latent dimension.
        guidance_scale: at which it replicated.
    """

    noise: GaussianNoise
    kl: float
    guidance_scale: float


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """InvMM of one image by the samples themselves; the score is that of a confirmed rate (ours).

    Attributes:
        num_steps: optimiser steps.
        batch_size: noises per step.
        sampler_steps: of the short sampler that is differentiated, DDIM or, for a rectified flow,
            Euler. Memory grows with it: the graphs of all its steps are held for as many rows as
            `engine.rows_sample` says.
        learning_rate: of Adam, for the mean (in units of the prior's standard deviation) and for
            the log-variance.
        learning_rate_decay: "cosine" goes to zero at the last step, which averages the noise of
            the gradients out of the distribution that is found; "none" keeps it.
        betas: of Adam.
        step_size: "shared" divides the gradient by one root mean square for the mean and one for
            the log-variance, "coordinate" by one for each coordinate, as Adam does. The latter
            moves coordinates without influence as far as the others, at the price of their KL.
        basis: in which the distribution is diagonal: "pixel" as published, or "dct", an
            orthonormal frequency basis of each channel.
        bandwidth: frequencies (i, j) of a (H, W) plane move only if i / H + j / W is below it;
            2 moves all of them. The rest stays that of the prior and costs no KL.
        kl_weight: weight of the KL (nats per dimension) beside the squared error, at first.
        kl_weight_factor: by which the weight is multiplied at a check that is passed, and divided
            at one where less than `lowest_rate` of the samples replicate.
        lowest_rate: see `kl_weight_factor`.
        check_every: optimiser steps between checks.
        num_check: samples of each check, all of them drawn.
        candidate_rate: share of them that must replicate to pass; the distribution is then
            remembered.
        num_confirm: fresh samples, drawn after the distribution is frozen.
        num_confirmations: how many candidates, nearest to the prior first, may be tried. The
            intervals are widened for so many looks (Bonferroni).
        confirmed_rate: share of the fresh samples that must replicate.
        confidence: of the rate's interval and the certificate, over all looks.
        check_prior: check the untouched prior first, so that an image which the model returns
            anyway scores 0.

    Raises:
        ValueError: no check would ever be reached, or a bandwidth without a frequency basis.
    """

    num_steps: Annotated[int, Ge(1)] = 96
    batch_size: Annotated[int, Ge(1)] = 8
    sampler_steps: Annotated[int, Ge(1)] = 5
    learning_rate: Annotated[float, Gt(0)] = 0.02
    learning_rate_decay: Literal["cosine", "none"] = "cosine"
    betas: Annotated[Sequence[Annotated[float, Ge(0), Lt(1)]], Len(2, 2)] = (0.9, 0.99)
    step_size: Literal["shared", "coordinate"] = "shared"
    basis: Literal["pixel", "dct"] = "dct"
    bandwidth: Annotated[float, Gt(0), Le(_ALL_FREQUENCIES)] = 1.0
    kl_weight: Annotated[float, Ge(0)] = 0.5
    kl_weight_factor: Annotated[float, Ge(1)] = 1.5
    lowest_rate: Annotated[float, Ge(0), Le(1)] = 0.5
    check_every: Annotated[int, Ge(1)] = 12
    num_check: Annotated[int, Ge(1)] = 16
    candidate_rate: Annotated[float, Gt(0), Le(1)] = 0.9
    num_confirm: Annotated[int, Ge(1)] = 64
    num_confirmations: Annotated[int, Ge(1)] = 3
    confirmed_rate: Annotated[float, Gt(0), Le(1)] = 0.9
    confidence: Annotated[float, Gt(0), Lt(1)] = 0.95
    check_prior: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.num_steps < self.check_every:
            raise ValueError(
                f"inversion.num_steps={self.num_steps} never reaches a replication check; use at "
                f"least inversion.check_every={self.check_every}"
            )
        if self.basis == "pixel" and self.bandwidth != _ALL_FREQUENCIES:
            raise ValueError(
                f"inversion.bandwidth={self.bandwidth} has no meaning for inversion.basis=pixel; "
                f"use inversion.bandwidth={_ALL_FREQUENCIES:g} or inversion.basis=dct"
            )

    async def __call__(self, target: Target, setting: Setting, rng: torch.Generator) -> Outcome:
        """Runs the search; see `Measurement`."""
        noise = GaussianNoise.prior(target.latents)
        optimizer = Adam(noise.parameters(), self._moved(noise), self.betas, self.step_size)
        short = self.short_sampler(setting)
        scale, weight = setting.sampler.guidance_scales[0], self.kl_weight
        candidates: list[Candidate] = []
        looks: list[tuple[Candidate, Check]] = []
        trace = Trace(noise)
        trace.curves["rate"] = []
        trace.curves["rate_step"] = trace.curves["similarity_step"]
        try:
            for step in range(self.num_steps + 1):
                if step > 0:
                    loss, kl = await self._loss(noise, target, short, scale, rng), noise.kl()
                    await Minimise(loss + weight * kl)
                    optimizer.step(self._learning_rate_at(step))
                    trace.stepped(loss=loss, kl=kl, kl_weight=weight)
                if not self._checks_at(step):
                    continue
                trace.read()
                check = await self._check(noise, target, setting, rng)
                trace.checked(check)
                rate, scale = _rate(check, setting), check.guidance_scale
                trace.curves["rate"].append(rate)
                if rate >= self.candidate_rate:
                    weight *= self.kl_weight_factor
                    candidates.append(_candidate(noise, scale))
                elif rate < self.lowest_rate:
                    weight /= self.kl_weight_factor
                if step == 0 and candidates:  # nothing can be nearer to the prior than itself
                    looks.append(await self._confirm(candidates.pop(), target, setting, rng))
                    if looks[-1][1].passed:
                        return self._outcome(trace, looks, setting)
            trace.read()
            candidates.sort(key=lambda candidate: candidate.kl)
            for candidate in candidates[: self.num_confirmations - len(looks)]:
                looks.append(await self._confirm(candidate, target, setting, rng))
                if looks[-1][1].passed:
                    break
        except NonFiniteError as error:
            with suppress(NonFiniteError):
                trace.read()  # a sample may have ended it before the losses were looked at
            return trace.diverged(error)
        return self._outcome(trace, looks, setting)

    def short_sampler(self, setting: Setting) -> Sampler:
        """The differentiated sampler: deterministic, and otherwise like that of the checks.

        Raises:
            ValueError: the model cannot be sampled in so many steps.
        """
        total, steps = setting.schedule.num_train_timesteps, self.sampler_steps
        is_flow = setting.schedule.is_flow
        if steps > total or (not is_flow and total % steps):
            raise ValueError(
                f"inversion.sampler_steps={steps} does not divide the model's {total} training "
                "timesteps; use a divisor of them"
            )
        scheduler = "flow_euler" if is_flow else "ddim"
        return replace(setting.sampler, scheduler=scheduler, num_inference_steps=steps, eta=0.0)

    def cost(self, sampler: Sampler, criterion: ReplicationCriterion) -> CostRange:
        """See `Measurement`; `sampler` of the evaluations includes the differentiated ones."""
        checks = sum(map(self._checks_at, range(self.num_steps + 1)))
        by_scale = [sampler.evaluations_at(scale) for scale in sampler.guidance_scales]
        drawn = checks * self.num_check * sum(by_scale)

        def with_scale(of_sample: int, confirmations: int) -> Evaluations:
            calls = of_sample // sampler.num_evaluations  # 2 of a guided step
            moved = self.num_steps * self.batch_size * self.sampler_steps * calls
            confirmed = confirmations * self.num_confirm * of_sample
            forward = moved + drawn + confirmed
            return Evaluations(forward=forward, backward=moved, sampler=forward)

        return CostRange(
            fewest=with_scale(min(by_scale), 0),
            most=with_scale(max(by_scale), self.num_confirmations),
        )

    def in_pixels(self, noise: Tensor) -> Tensor:
        """(B, C, H, W) draws in the basis -> as the sampler takes them."""
        return from_frequencies(noise) if self.basis == "dct" else noise

    def _checks_at(self, step: int) -> bool:
        return step % self.check_every == 0 if step else self.check_prior

    def _learning_rate_at(self, step: int) -> float:
        if self.learning_rate_decay == "none":
            return self.learning_rate
        done = (step - 1) / self.num_steps
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2

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
        """Squared error of the samples' latents, the mean over the batch and the dimensions."""
        count = self.batch_size
        draws = self.in_pixels(noise.draw(count, rng))
        rows, negative = target.rows(count), target.negative_rows(count)
        latents = await Sample(draws, sampler, rows, None, guidance_scale, negative)
        return (latents.float() - target.latents.float()).square().mean()

    async def _check(
        self, noise: GaussianNoise, target: Target, setting: Setting, rng: torch.Generator
    ) -> Check:
        """Draws a full set at each guidance scale: a rate is wanted, not only a decision."""
        draws = self.in_pixels(noise.draw(self.num_check, rng).detach())
        seeds = draw_seeds(self.num_check, setting.sampler, rng)
        scales = setting.sampler.guidance_scales
        checks = [await _replicas(draws, seeds, scale, target, setting) for scale in scales]
        best = max(checks, key=lambda check: (_rate(check, setting), check.best))
        return replace(best, passed=_rate(best, setting) >= self.candidate_rate)

    async def _confirm(
        self, candidate: Candidate, target: Target, setting: Setting, rng: torch.Generator
    ) -> tuple[Candidate, Check]:
        """Fresh samples of a frozen distribution; none of them has chosen it."""
        draws = self.in_pixels(candidate.noise.draw(self.num_confirm, rng).detach())
        seeds = draw_seeds(self.num_confirm, setting.sampler, rng)
        check = await _replicas(draws, seeds, candidate.guidance_scale, target, setting)
        return candidate, replace(check, passed=_rate(check, setting) >= self.confirmed_rate)

    def _outcome(
        self, trace: Trace, looks: Sequence[tuple[Candidate, Check]], setting: Setting
    ) -> Outcome:
        """The confirmed candidate, or the best of those that were looked at, or the last q."""
        if not looks:
            found = trace.not_replicated()
            return replace(found, columns={**found.columns, "basis": self.basis})
        candidate, check = max(looks, key=lambda look: _rate(look[1], setting))
        best = max(check.best, *trace.curves["similarity"])
        trace.noise, trace.closest = candidate.noise, check
        found = trace.replicated() if check.passed else trace.not_replicated()
        return replace(
            found,
            replication_rate=_rate(check, setting),
            best_similarity=best,
            columns={**found.columns, **self._confirmation(candidate, check, setting)},
        )

    def _confirmation(self, candidate: Candidate, check: Check, setting: Setting) -> dict[str, Any]:
        """What the fresh samples prove, whether or not they suffice for a score."""
        drawn, passed = len(check.similarities), _passed(check, setting)
        confidence = 1 - (1 - self.confidence) / self.num_confirmations
        low, high = clopper_pearson(passed, drawn, confidence)
        rate = lower_rate(passed, drawn, confidence)
        certified = log_p_certified(candidate.kl * candidate.noise.mean.numel(), rate)
        return {
            "basis": self.basis,
            "confirm_passed": passed,
            "confirm_drawn": drawn,
            "rate_low": low,
            "rate_high": high,
            "log_p_certified": certified if math.isfinite(certified) else None,
        }


def _candidate(noise: GaussianNoise, guidance_scale: float) -> Candidate:
    frozen = GaussianNoise(noise.mean, noise.log_variance)
    return Candidate(noise=frozen, kl=frozen.kl().double().item(), guidance_scale=guidance_scale)


async def _replicas(
    noise: Tensor,
    seeds: tuple[int, ...] | None,
    guidance_scale: float,
    target: Target,
    setting: Setting,
) -> Check:
    """Samples and compares all of the noises (n, C, H, W) at one guidance scale."""
    count = len(noise)
    rows, negative = target.rows(count), target.negative_rows(count)
    latents = await Sample(noise, setting.sampler, rows, seeds, guidance_scale, negative)
    embedding = await Embed(latents)
    similarities = embedding.vectors @ target.embedding
    passed = bool((similarities >= setting.criterion.threshold).all())
    return Check(similarities, embedding.pixels, passed, guidance_scale)


def _passed(check: Check, setting: Setting) -> int:
    return int((check.similarities >= setting.criterion.threshold).sum())


def _rate(check: Check, setting: Setting) -> float:
    return _passed(check, setting) / len(check.similarities)
