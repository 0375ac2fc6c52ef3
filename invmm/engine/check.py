"""The question that every measurement asks: is what the model draws a replica of the image?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from invmm.diffusion.guidance import Condition
from invmm.engine.protocols import Setting, Target
from invmm.engine.requests import Embed, Sample, draw_seeds

_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Check:
    """What one check saw, at the guidance scale that decided it.

    Attributes:
        similarities: (n,) of the samples drawn; fewer than it was given noises if those decided.
        pixels: (n, 3, H, W) the samples.
        replicas: how many of them are.
        passed: enough of all noises replicate.
        guidance_scale: the first that passed; if none did, the one that came closest.
    """

    similarities: Tensor
    pixels: Tensor
    replicas: int
    passed: bool
    guidance_scale: float

    @property
    def best(self) -> float:
        """The highest similarity seen."""
        return self.similarities.max().item()

    @property
    def rate(self) -> float:
        """Share of the samples drawn that replicate."""
        return self.replicas / len(self.similarities)


async def check_replication(
    noise: Tensor,
    condition: Condition | None,
    target: Target,
    setting: Setting,
    rng: torch.Generator,
    *,
    guidance_scales: Sequence[float],
    lowest_rate: float = 1.0,
) -> Check:
    """Samples from the given noises and compares with the target, at each guidance scale.

    Args:
        noise: (n, C, H, W), all of them drawn beforehand so that an early exit consumes the same
            randomness as a full check.
        condition: n rows that belong to the noises, or None.
        target: the image.
        setting: sampler and criterion.
        rng: for samplers that draw noise of their own.
        guidance_scales: in the order in which they are tried.
        lowest_rate: share of the noises that must replicate, in (0, 1].
    """
    seeds = draw_seeds(len(noise), setting.sampler, rng)
    most_failures = deciding_failures(len(noise), lowest_rate) - 1
    checks: list[Check] = []
    for scale in guidance_scales:
        checks.append(
            await _check_at(scale, noise, condition, seeds, target, setting, most_failures)
        )
        if checks[-1].passed and setting.criterion.early_exit:
            break

    def closeness(check: Check) -> tuple[float, float]:
        # Where a single failure decides, the rate among so few says nothing.
        return (check.rate if most_failures else 0.0, check.best)

    return next((check for check in checks if check.passed), max(checks, key=closeness))


async def compare(
    noise: Tensor,
    condition: Condition | None,
    seeds: tuple[int, ...] | None,
    target: Target,
    setting: Setting,
    *,
    guidance_scale: float,
) -> Check:
    """Samples from all of the noises (n, C, H, W), whatever the first ones show, and compares.

    Args:
        noise: as of `check_replication`, like condition, target and setting.
        condition: of them.
        seeds: one a noise, for samplers that draw noise of their own.
        target: the image.
        setting: sampler and criterion.
        guidance_scale: of all samples.
    """
    negative = target.negative_rows(len(noise))
    latents = await Sample(noise, setting.sampler, condition, seeds, guidance_scale, negative)
    embedding = await Embed(latents)
    similarities = embedding.vectors @ target.embedding
    replicas = int((similarities >= setting.criterion.threshold).sum())
    passed = replicas == len(noise)
    return Check(similarities, embedding.pixels, replicas, passed, guidance_scale)


def deciding_failures(num_samples: int, lowest_rate: float) -> int:
    """The number of samples that must fail for the rate to be out of reach; draw no fewer."""
    return num_samples - math.ceil(lowest_rate * num_samples - _ROUNDING) + 1


def starting_with(first: float | None, guidance_scales: Sequence[float]) -> list[float]:
    """The scales in their order, but the one that came closest before is tried first."""
    return sorted(guidance_scales, key=lambda scale: scale != first)


async def _check_at(
    guidance_scale: float,
    noise: Tensor,
    condition: Condition | None,
    seeds: tuple[int, ...] | None,
    target: Target,
    setting: Setting,
    most_failures: int,
) -> Check:
    """In rounds, until all are drawn or too many failed."""
    rounds: list[Check] = []
    failures = 0
    first = most_failures + 1 if setting.criterion.early_exit else len(noise)
    for drawn in _rounds(len(noise), first):
        rounds.append(
            await compare(
                noise[drawn],
                condition and {name: value[drawn] for name, value in condition.items()},
                seeds and seeds[drawn],
                target,
                setting,
                guidance_scale=guidance_scale,
            )
        )
        failures += len(rounds[-1].similarities) - rounds[-1].replicas
        if failures > most_failures:
            break
    return Check(
        similarities=torch.cat([check.similarities for check in rounds]),
        pixels=torch.cat([check.pixels for check in rounds]),
        replicas=sum(check.replicas for check in rounds),
        passed=failures <= most_failures,
        guidance_scale=guidance_scale,
    )


def _rounds(count: int, first: int) -> Iterator[slice]:
    """Each round after the first doubles what has been drawn: 1, 1, 2, 4, ..."""
    start = 0
    while start < count:
        stop = min(count, max(first, 2 * start))
        yield slice(start, stop)
        start = stop
