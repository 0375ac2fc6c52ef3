"""How often the model returns an image when nobody asks for it: counted over free samples.

One bank of samples serves every image that is measured under the same condition. A bank is drawn in
blocks, each from a generator of its own, so that any process can draw any block and any sample can
be drawn again from its index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from invmm.diffusion.sampling import Sampler
from invmm.engine.criterion import ReplicationCriterion
from invmm.engine.outcomes import CostRange, Evaluations, Outcome, Status
from invmm.engine.protocols import Setting, Target
from invmm.engine.requests import Embed, Embedding, Sample
from invmm.probability.certificate import clopper_pearson
from invmm.probability.population import Draws
from invmm.probability.splitting import NUM_SHOWN, one_in, only_guidance_scale


@dataclass(frozen=True, kw_only=True)
class Bank:
    """Free samples by index; nothing is drawn yet.

    Attributes:
        seed: of all of them.
        num_samples: M.
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
    def num_blocks(self) -> int:
        """Blocks to draw."""
        return -(-self.num_samples // self.block_size)

    def draws(self, block: int) -> Draws:
        """The randomness of a block."""
        count = min(self.block_size, self.num_samples - block * self.block_size)
        rng = torch.Generator().manual_seed((self.seed + block) % 2**63)
        return Draws.from_prior(count, self.shape, self.sampler, rng)

    def draws_of(self, indices: Sequence[int]) -> Draws:
        """The randomness of single samples."""
        rows = [divmod(index, self.block_size) for index in indices]
        return Draws.joined([self.draws(block)[row : row + 1] for block, row in rows])

    async def vectors(self, block: int, target: Target, setting: Setting) -> Tensor:
        """(B, D) embeddings of a block, drawn under the target's condition, on the CPU."""
        return (await _drawn(self.draws(block), target, setting)).vectors.float().cpu()


@dataclass(frozen=True, kw_only=True)
class FreeSampling:
    """Counts how many free samples replicate an image; the score is -log p per dimension.

    Under no prompt, the empty one or one fixed label all images share one bank; with captions each
    image is counted over samples of its own. Columns beside the score: log_p with its exact 95 %
    interval (Clopper & Pearson), one_in, count, num_free_samples. Without a single replica p is
    censored: below log_p_high.

    Attributes:
        num_samples: M; p is told apart from 0 down to about 10 / M.
        block_size: samples drawn at a time, the unit in which processes share a bank.
    """

    num_samples: Annotated[int, Ge(1)] = 2048
    block_size: Annotated[int, Ge(1)] = 128

    def bank(self, seed: int, shape: tuple[int, ...], sampler: Sampler) -> Bank:
        """The samples of a seed."""
        return Bank(
            seed=seed,
            num_samples=self.num_samples,
            block_size=self.block_size,
            shape=shape,
            sampler=sampler,
        )

    async def __call__(self, target: Target, setting: Setting, rng: torch.Generator) -> Outcome:
        """Counts over a bank that is the image's own; see `Measurement`."""
        seed = int(torch.randint(2**62, (), generator=rng))
        bank = self.bank(seed, tuple(target.latents.shape[1:]), setting.sampler)
        vectors = [await bank.vectors(block, target, setting) for block in range(bank.num_blocks)]
        return await counted(torch.cat(vectors), bank, target, setting)

    def cost(self, sampler: Sampler, criterion: ReplicationCriterion) -> CostRange:
        """See `Measurement`; fewest: the bank is shared, and only the pictures are drawn again."""
        of_sample = sampler.evaluations_at(only_guidance_scale(sampler))
        shown = min(NUM_SHOWN, self.num_samples) * of_sample
        most = shown + self.num_samples * of_sample
        return CostRange(
            fewest=Evaluations(forward=shown, sampler=shown),
            most=Evaluations(forward=most, sampler=most),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedFreeSampling:
    """The same over a bank that has been drawn, for all images.

    Attributes:
        bank: where its samples come from.
        embeddings: (M, D) of them.
        recipe: what asked for it.
    """

    bank: Bank
    embeddings: Tensor
    recipe: FreeSampling

    async def __call__(self, target: Target, setting: Setting, rng: torch.Generator) -> Outcome:
        """See `Measurement`; draws the closest samples again, for their pictures."""
        return await counted(self.embeddings, self.bank, target, setting)

    def cost(self, sampler: Sampler, criterion: ReplicationCriterion) -> CostRange:
        """See `Measurement`."""
        return self.recipe.cost(sampler, criterion)


async def counted(embeddings: Tensor, bank: Bank, target: Target, setting: Setting) -> Outcome:
    """What a bank says of an image.

    Args:
        embeddings: (M, D) of the bank's samples.
        bank: to draw the closest of them again.
        target: the image.
        setting: sampler and criterion.
    """
    similarities = embeddings @ target.embedding.float().cpu()
    replicas = (similarities >= setting.criterion.threshold).nonzero()[:, 0]
    count, total = len(replicas), len(similarities)
    low, high = clopper_pearson(count, total)
    log_p = math.log(count / total) if count else None
    nats = None if log_p is None else 0.0 - log_p
    closest = similarities.topk(min(NUM_SHOWN, total)).indices.tolist()
    pixels = (await _drawn(bank.draws_of(closest), target, setting)).pixels
    return Outcome(
        status=Status.CENSORED if log_p is None else Status.ESTIMATED,
        score=None if nats is None else nats / target.latents[0].numel(),
        score_nats=nats,
        replication_rate=count / total,
        best_similarity=similarities.max().item(),
        tensors={"replicas": replicas},
        samples=pixels.cpu(),
        columns={
            "log_p": log_p,
            "log_p_low": math.log(low) if count else None,
            "log_p_high": math.log(high),
            "one_in": one_in(log_p),
            "count": count,
            "num_free_samples": total,
        },
    )


async def _drawn(draws: Draws, target: Target, setting: Setting) -> Embedding:
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
