"""Counts how many free samples, drawn from the prior, replicate an image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from invmm.diffusion.sampling import Sampler
from invmm.engine.criterion import ReplicationCriterion
from invmm.engine.outcomes import CostRange, Outcome, Status
from invmm.engine.protocols import Setting, Target, Use
from invmm.probability.bank import (
    NUM_SHOWN,
    Bank,
    Closest,
    DrawnBank,
    check_bank_use,
    sampling_cost,
)
from invmm.probability.certificate import clopper_pearson
from invmm.probability.estimate import one_in


@dataclass(frozen=True, kw_only=True)
class FreeSampling:
    """Counts how many free samples replicate an image; the score is -log p per dimension.

    Without a prompt, or with the empty prompt or one fixed label, all images share one bank, so
    that their counts are correlated; with captions each image has a bank of its own. Columns beside
    the score: those of `counted`.

    Attributes:
        num_samples: M, samples of a bank; a p below about 10 / M cannot be told from 0.
        block_size: samples drawn at a time; processes that share a bank divide it in such blocks.
    """

    num_samples: Annotated[int, Ge(1)] = 2048
    block_size: Annotated[int, Ge(1)] = 128

    def bank(self, seed: int, shape: tuple[int, ...], sampler: Sampler) -> Bank:
        """See `BankMeasurement`."""
        return Bank(
            seed=seed,
            num_samples=self.num_samples,
            block_size=self.block_size,
            shape=shape,
            sampler=sampler,
        )

    def check(self, use: Use) -> None:
        """See `Measurement`."""
        check_bank_use(self, use)

    async def __call__(self, target: Target, setting: Setting, rng: torch.Generator) -> Outcome:
        """Draws a bank for this image alone and counts; see `Measurement`."""
        seed = int(torch.randint(2**62, (), generator=rng))
        bank = self.bank(seed, tuple(target.latents.shape[1:]), setting.sampler)
        return await self.from_bank(await bank.drawn(target, setting), target, setting, rng)

    async def from_bank(
        self, drawn: DrawnBank, target: Target, setting: Setting, rng: torch.Generator
    ) -> Outcome:
        """See `BankMeasurement`; draws the closest samples again, for their pictures."""
        similarities = drawn.similarities(target)
        return counted(similarities, await drawn.closest(target, setting), target, setting)

    def cost(self, sampler: Sampler, criterion: ReplicationCriterion) -> CostRange:
        """See `Measurement`."""
        return self.cost_from_bank(sampler) + sampling_cost(self.num_samples, sampler)

    def cost_from_bank(self, sampler: Sampler) -> CostRange:
        """See `BankMeasurement`."""
        shown = sampling_cost(min(NUM_SHOWN, self.num_samples), sampler)
        return CostRange(fewest=shown, most=shown)


def counted(similarities: Tensor, closest: Closest, target: Target, setting: Setting) -> Outcome:
    """The outcome of counting the replicas in a bank.

    Columns: log_p with its exact 95 % interval (Clopper & Pearson), one_in, count,
    num_free_samples, method "counted". Without a replica p is censored, and log_p_high bounds it.

    Args:
        similarities: (M,) of the bank's samples to the image.
        closest: the closest samples of the bank.
        target: the image.
        setting: with the criterion of a replica.
    """
    replicas = (similarities >= setting.criterion.threshold).nonzero()[:, 0]
    count, total = len(replicas), len(similarities)
    low, high = clopper_pearson(count, total)
    log_p = math.log(count / total) if count else None
    nats = None if log_p is None else 0.0 - log_p
    return Outcome(
        status=Status.CENSORED if log_p is None else Status.ESTIMATED,
        score=None if nats is None else nats / target.latents[0].numel(),
        score_nats=nats,
        replication_rate=count / total,
        best_similarity=similarities.max().item(),
        tensors={"replicas": replicas},
        samples=closest.samples,
        columns={
            "method": "counted",
            "log_p": log_p,
            "log_p_low": math.log(low) if count else None,
            "log_p_high": math.log(high),
            "one_in": one_in(log_p),
            "count": count,
            "num_free_samples": total,
        },
    )
