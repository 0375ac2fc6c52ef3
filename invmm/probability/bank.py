"""A bank of free samples, drawn from the prior, with which many images can be compared.

A bank is drawn in blocks, each from a generator of its own, so that any process can draw any block
and any sample can be drawn again from its index.
"""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from invmm.diffusion.sampling import Sampler
from invmm.engine.criterion import ReplicationCriterion
from invmm.engine.outcomes import CostRange, Evaluations, Outcome
from invmm.engine.protocols import Measurement, Setting, Target, Use, refuse_searched_prompt
from invmm.engine.requests import Embed, Embedding, Sample
from invmm.faults import Refusal
from invmm.probability.population import Draws

NUM_SHOWN = 8
"""Number of closest samples that an outcome shows, as many as a check of the paper draws."""


@dataclass(frozen=True, kw_only=True)
class Bank:
    """What determines the samples of a bank; none is drawn yet.

    Attributes:
        seed: from which each block gets its own.
        num_samples: M, in the bank.
        block_size: samples of a block; the last may be smaller.
        shape: (C, H, W) of a latent.
        sampler: how the model draws.
    """

    seed: int
    num_samples: int
    block_size: int
    shape: tuple[int, ...]
    sampler: Sampler

    @property
    def cost(self) -> Evaluations:
        """Network evaluations of all samples."""
        return sampling_cost(self.num_samples, self.sampler)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return -(-self.num_samples // self.block_size)

    def draws(self, block: int) -> Draws:
        """The random numbers of a block's samples."""
        count = min(self.block_size, self.num_samples - block * self.block_size)
        rng = torch.Generator().manual_seed((self.seed + block) % 2**63)
        return Draws.from_prior(count, self.shape, self.sampler, rng)

    def draws_of(self, indices: Tensor) -> Draws:
        """The random numbers of the samples with these indices (B,), in their order."""
        blocks = indices // self.block_size
        order = blocks.argsort(stable=True)
        parts = [
            self.draws(block)[indices[blocks == block] % self.block_size]
            for block in blocks.unique().tolist()
        ]
        return Draws.joined(parts)[order.argsort()]

    async def vectors(self, block: int, target: Target, setting: Setting) -> Tensor:
        """(B, D) embeddings of a block, drawn under the target's condition, on the CPU."""
        return (await sampled(self.draws(block), target, setting)).vectors.float().cpu()

    async def drawn(self, target: Target, setting: Setting) -> DrawnBank:
        """The whole bank, drawn under one image's condition."""
        vectors = [await self.vectors(block, target, setting) for block in range(self.num_blocks)]
        return DrawnBank(self, torch.cat(vectors))


@dataclass(frozen=True, eq=False)
class DrawnBank:
    """A bank and the embeddings of its samples.

    Attributes:
        bank: from which any sample can be drawn again.
        embeddings: (M, D) unit-norm, on the CPU.
    """

    bank: Bank
    embeddings: Tensor

    def similarities(self, target: Target) -> Tensor:
        """(M,) similarities of the samples to an image, on the CPU."""
        return self.embeddings @ target.embedding.float().cpu()

    async def closest(self, target: Target, setting: Setting) -> Closest:
        """The samples closest to an image, drawn again for their pictures."""
        similarities = self.similarities(target)
        rows = similarities.topk(min(NUM_SHOWN, len(similarities))).indices
        closest = Closest(target, setting)
        await closest.see(self.bank.draws_of(rows))
        return closest


@runtime_checkable
class BankMeasurement(Measurement, Protocol):
    """A measurement that begins with a bank, which images with the same condition can share."""

    def bank(self, seed: int, shape: tuple[int, ...], sampler: Sampler) -> Bank:
        """The bank of all images, if they share their condition."""
        ...

    async def from_bank(
        self, drawn: DrawnBank, target: Target, setting: Setting, rng: torch.Generator
    ) -> Outcome:
        """Measures an image, given the drawn bank."""
        ...

    def cost_from_bank(self, sampler: Sampler) -> CostRange:
        """The cost of `from_bank`; see `Measurement.cost`."""
        ...


@dataclass(frozen=True, eq=False)
class SharedBank:
    """A measurement with a bank that was drawn once, for all images.

    Attributes:
        drawn: the bank.
        recipe: the measurement.
    """

    drawn: DrawnBank
    recipe: BankMeasurement

    def check(self, use: Use) -> None:
        """See `Measurement`."""
        self.recipe.check(use)

    def __call__(
        self, target: Target, setting: Setting, rng: torch.Generator
    ) -> Coroutine[Any, Any, Outcome]:
        """See `Measurement`."""
        return self.recipe.from_bank(self.drawn, target, setting, rng)

    def cost(self, sampler: Sampler, criterion: ReplicationCriterion) -> CostRange:
        """See `Measurement`."""
        return self.recipe.cost_from_bank(sampler)


class Closest:
    """Samples, compares with an image, and keeps the `NUM_SHOWN` samples closest to it.

    Args:
        target: the image.
        setting: how the model draws.

    Attributes:
        similarities: of the closest samples, highest first.
        pixels: of the same, (3, H, W) in [-1, 1].
    """

    def __init__(self, target: Target, setting: Setting) -> None:
        self.target, self.setting = target, setting
        self.similarities: list[float] = []
        self.pixels: list[Tensor] = []

    async def see(self, draws: Draws) -> Tensor:
        """Samples from B draws; returns (B,) similarities to the image, on the CPU."""
        embedding = await sampled(draws, self.target, self.setting)
        similarities = (embedding.vectors @ self.target.embedding).float().cpu()
        best, rows = similarities.topk(min(NUM_SHOWN, len(draws)))
        values = [*self.similarities, *best.tolist()]
        pixels = [*self.pixels, *embedding.pixels[rows.to(embedding.pixels.device)].cpu()]
        order = sorted(range(len(values)), key=lambda row: -values[row])[:NUM_SHOWN]
        self.similarities = [values[row] for row in order]
        self.pixels = [pixels[row] for row in order]
        return similarities

    @property
    def samples(self) -> Tensor:
        """(N, 3, H, W) pixels in [-1, 1] of the closest, best first."""
        return torch.stack(self.pixels)


async def sampled(draws: Draws, target: Target, setting: Setting) -> Embedding:
    """Runs the sampler on the draws under the target's condition, decodes and embeds."""
    count = len(draws)
    latents = await Sample(
        draws.noise.to(target.latents),
        setting.sampler,
        target.rows(count),
        tuple(draws.seeds.tolist()),
        only_guidance_scale(setting.sampler),
        target.negative_rows(count),
    )
    return await Embed(latents)


def sampling_cost(num_samples: int, sampler: Sampler) -> Evaluations:
    """Network evaluations of free samples.

    Raises:
        ValueError: the sampler has several guidance scales.
    """
    evaluations = num_samples * sampler.evaluations_at(only_guidance_scale(sampler))
    return Evaluations(forward=evaluations, sampler=evaluations)


def only_guidance_scale(sampler: Sampler) -> float:
    """The guidance scale of a sampler that has just one, as a probability needs.

    Raises:
        ValueError: it has several.
    """
    if len(sampler.guidance_scales) > 1:
        scales = ", ".join(f"{scale:g}" for scale in sampler.guidance_scales)
        raise Refusal(
            f"sampler.guidance_scales=[{scales}] leaves open which probability is meant; use one, "
            f"as sampler.guidance_scales=[{sampler.guidance_scales[0]:g}]",
            "sampler.guidance_scales",
        )
    return sampler.guidance_scales[0]


def check_bank_use(measurement: Measurement, use: Use) -> None:
    """What every measurement of free samples needs, see `Measurement`.

    Raises:
        ValueError: it is to be repeated, or several ways to use the model are asked for.
    """
    refuse_searched_prompt(measurement, use)
    if use.repeats != 1:
        raise Refusal(
            f"repeats={use.repeats} has no meaning for a {type(measurement).__name__}, whose "
            "interval holds the chance of its draws; give repeats=1, and other seeds for more "
            "draws",
            "repeats",
        )
    only_guidance_scale(use.sampler)
