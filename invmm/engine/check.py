"""The question that every measurement asks: is what the model draws a replica of the image?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from invmm.diffusion.guidance import Condition
from invmm.engine.protocols import Setting, Target
from invmm.engine.requests import Embed, Sample, draw_seeds


@dataclass(frozen=True, eq=False)
class Check:
    """What one check saw, at the guidance scale that decided it.

    Attributes:
        similarities: (n,) of the samples drawn; n < num_samples if one of them already failed.
        pixels: (n, 3, H, W) the samples.
        passed: all num_samples replicate.
        guidance_scale: the first that passed; if none did, the one that came closest.
    """

    similarities: Tensor
    pixels: Tensor
    passed: bool
    guidance_scale: float

    @property
    def best(self) -> float:
        """The highest similarity seen."""
        return self.similarities.max().item()


async def check_replication(
    noise: Tensor,
    condition: Condition | None,
    target: Target,
    setting: Setting,
    rng: torch.Generator,
    *,
    first_scale: float | None = None,
) -> Check:
    """Samples from the given noises and compares with the target, at each guidance scale.

    Args:
        noise: (num_samples, C, H, W), all of them drawn beforehand so that an early exit
            consumes the same randomness as a full check.
        condition: num_samples rows that belong to the noises, or None.
        target: the image.
        setting: sampler and criterion.
        rng: for samplers that draw noise of their own.
        first_scale: the guidance scale that came closest before; it is tried first.
    """
    seeds = draw_seeds(len(noise), setting.sampler, rng)
    checks: list[Check] = []
    for scale in sorted(setting.sampler.guidance_scales, key=lambda scale: scale != first_scale):
        checks.append(await _check_at(scale, noise, condition, seeds, target, setting))
        if checks[-1].passed and setting.criterion.early_exit:
            break
    return next((c for c in checks if c.passed), max(checks, key=lambda check: check.best))


async def _check_at(
    guidance_scale: float,
    noise: Tensor,
    condition: Condition | None,
    seeds: tuple[int, ...] | None,
    target: Target,
    setting: Setting,
) -> Check:
    """One failure decides, so samples are drawn in rounds that only survivors reach."""
    criterion = setting.criterion
    similarities, pixels = [], []
    for drawn in _rounds(len(noise), early_exit=criterion.early_exit):
        count = drawn.stop - drawn.start
        latents = await Sample(
            noise[drawn],
            setting.sampler,
            condition and {name: value[drawn] for name, value in condition.items()},
            seeds and seeds[drawn],
            guidance_scale,
            target.negative_rows(count),
        )
        embedding = await Embed(latents)
        similarities.append(embedding.vectors @ target.embedding)
        pixels.append(embedding.pixels)
        if (similarities[-1] < criterion.threshold).any():
            break
    seen = torch.cat(similarities)
    passed = len(seen) == len(noise) and bool((seen >= criterion.threshold).all())
    return Check(seen, torch.cat(pixels), passed, guidance_scale)


def _rounds(count: int, *, early_exit: bool) -> Iterator[slice]:
    """All at once, or 1, 1, 2, 4, ...: each round doubles what has been drawn."""
    start = 0
    while start < count:
        stop = min(count, max(1, 2 * start)) if early_exit else count
        yield slice(start, stop)
        start = stop
