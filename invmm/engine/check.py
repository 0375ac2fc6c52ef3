"""The replication check: samples from given noises, and counts replicas of the image."""

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
    """The result of a replication check, at the guidance scale that decided it.

    Attributes:
        similarities: (n,) of the samples to the image; fewer than the noises after an early exit.
        pixels: (n, 3, H, W) of the samples, in [-1, 1].
        replicas: number of samples that replicate the image.
        passed: whether enough of the noises replicate it.
        guidance_scale: the first that passed; if none did, the one that came closest.
    """

    similarities: Tensor
    pixels: Tensor
    replicas: int
    passed: bool
    guidance_scale: float

    @property
    def best(self) -> float:
        """The highest similarity of a sample."""
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
        # If a single failure decides, few samples were drawn, and their rate says nothing.
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
    """Samples from all of the given noises and compares with the target; never stops early.

    Args:
        noise: (n, C, H, W).
        condition: n rows that belong to the noises, or None.
        seeds: one per noise, for samplers that draw noise of their own.
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
    """The least number of failing samples that puts the rate out of reach."""
    return num_samples - math.ceil(lowest_rate * num_samples - _ROUNDING) + 1


def starting_with(first: float | None, guidance_scales: Sequence[float]) -> list[float]:
    """The scales with `first`, the one that came closest before, moved to the front."""
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
    """Draws in rounds until all noises are sampled or too many failed."""
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
    """Rows of each round; after the first, a round doubles the samples so far: 1, 1, 2, 4, ..."""
    start = 0
    while start < count:
        stop = min(count, max(first, 2 * start))
        yield slice(start, stop)
        start = stop
