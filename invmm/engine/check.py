"""The question that every measurement asks: is what the model draws a replica of the image?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from invmm.engine.protocols import Setting, Target
from invmm.engine.requests import Embed, Sample, draw_seeds


@dataclass(frozen=True, eq=False)
class Check:
    """What one check saw.

    Attributes:
        similarities: (n,) of the samples drawn; n < num_samples if the first already failed.
        pixels: (n, 3, H, W) the samples.
        passed: all num_samples replicate.
    """

    similarities: Tensor
    pixels: Tensor
    passed: bool


async def check_replication(
    noise: Tensor, target: Target, setting: Setting, rng: torch.Generator
) -> Check:
    """Samples from the given noises and compares with the target.

    Args:
        noise: (num_samples, C, H, W), all of them drawn beforehand so that an early exit
            consumes the same randomness as a full check.
        target: the image.
        setting: sampler and criterion.
        rng: for samplers that draw noise of their own.
    """
    criterion, sampler = setting.criterion, setting.sampler
    seeds = draw_seeds(len(noise), sampler, rng)
    similarities, pixels = [], []
    start = 0
    for stop in (1, len(noise)) if criterion.early_exit and len(noise) > 1 else (len(noise),):
        latents = await Sample(
            noise[start:stop],
            sampler,
            target.rows(stop - start),
            seeds and seeds[start:stop],
        )
        embedding = await Embed(latents)
        similarities.append(embedding.vectors @ target.embedding)
        pixels.append(embedding.pixels)
        start = stop
        if (similarities[-1] < criterion.threshold).any():
            break
    seen = torch.cat(similarities)
    passed = len(seen) == len(noise) and bool((seen >= criterion.threshold).all())
    return Check(seen, torch.cat(pixels), passed)
