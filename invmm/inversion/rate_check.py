"""Whether enough samples of a noise distribution replicate, drawn until that is decided (ours)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from invmm.engine.check import Check
from invmm.engine.protocols import Setting, Target
from invmm.engine.requests import draw_seeds
from invmm.inversion.confirmation import compare

_ROUNDING = 1e-9


async def check_rate(
    noise: Tensor,
    target: Target,
    setting: Setting,
    rng: torch.Generator,
    *,
    lowest_rate: float,
    guidance_scales: Sequence[float],
) -> Check:
    """Samples from the given noises at each scale, until one passes.

    Args:
        noise: (n, C, H, W), all of them drawn beforehand so that a check which is decided early
            consumes the same randomness as a full one.
        target: the image.
        setting: sampler and criterion.
        rng: for samplers that draw noise of their own.
        lowest_rate: share of the samples that must replicate, in (0, 1].
        guidance_scales: in the order in which they are tried.

    Returns:
        Of the scale that passed, else of the one with the highest rate.
    """
    seeds = draw_seeds(len(noise), setting.sampler, rng)
    checks: list[Check] = []
    for scale in guidance_scales:
        checks.append(await _check_at(scale, noise, seeds, target, setting, lowest_rate))
        if checks[-1].passed:
            return checks[-1]
    return max(checks, key=lambda check: (rate(check, setting), check.best))


async def _check_at(
    guidance_scale: float,
    noise: Tensor,
    seeds: tuple[int, ...] | None,
    target: Target,
    setting: Setting,
    lowest_rate: float,
) -> Check:
    """In rounds that double what has been drawn, until all are or too many failed."""
    start, stop = 0, deciding_failures(len(noise), lowest_rate)
    most_failures = stop - 1
    rounds: list[Check] = []
    while True:
        drawn = slice(start, stop)
        rounds.append(
            await compare(
                noise[drawn], seeds and seeds[drawn], target, setting, guidance_scale=guidance_scale
            )
        )
        similarities = torch.cat([check.similarities for check in rounds])
        passed = len(similarities) - replicas(similarities, setting) <= most_failures
        if not passed or len(similarities) == len(noise):
            pixels = torch.cat([check.pixels for check in rounds])
            return Check(similarities, pixels, passed, guidance_scale)
        start, stop = stop, 2 * stop


def deciding_failures(num_samples: int, lowest_rate: float) -> int:
    """The number of samples that must fail for the rate to be out of reach; draw no fewer."""
    return num_samples - math.ceil(lowest_rate * num_samples - _ROUNDING) + 1


def replicas(similarities: Tensor, setting: Setting) -> int:
    """How many of (n,) similarities are those of replicas."""
    return int((similarities >= setting.criterion.threshold).sum())


def rate(check: Check, setting: Setting) -> float:
    """Share of the samples drawn that replicate."""
    return replicas(check.similarities, setting) / len(check.similarities)
