"""How often a threshold calls two different images replicas of one another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1024
_BINS = 4000


@dataclass(frozen=True, kw_only=True)
class ThresholdReport:
    """False matches among distinct images of a data set.

    Attributes:
        threshold: the one in question.
        num_images: n.
        num_pairs: n (n - 1) / 2, all different images.
        num_false: pairs at or above the threshold.
        rate: num_false / num_pairs.
        interval: Clopper-Pearson 95 %, as if pairs were independent.
        images_with_false: share of the images that have any other at or above the threshold.
        allowed_rate: the rate asked for.
        proposed: the smallest threshold (in steps of 0.0005) whose rate is at most that; None if
            there is none, because too many pairs are identical.
    """

    threshold: float
    num_images: int
    num_pairs: int
    num_false: int
    rate: float
    interval: tuple[float, float]
    images_with_false: float
    allowed_rate: float
    proposed: float | None

    def __str__(self) -> str:
        low, high = self.interval
        advice = (
            "no threshold gives"
            if self.proposed is None
            else f"replication.threshold={self.proposed:g} is the smallest that gives"
        )
        return "\n".join(
            (
                f"{self.num_images} images, {self.num_pairs} pairs of different ones",
                f"threshold {self.threshold:g}: {self.num_false} pairs match falsely, "
                f"{self.rate:.3%} (95 % interval {low:.3%} to {high:.3%})",
                f"{self.images_with_false:.1%} of the images have at least one false match",
                f"{advice} a false-match rate of at most {self.allowed_rate:g}",
            )
        )


def false_matches(
    embeddings: Tensor, *, threshold: float, allowed_rate: float = 1e-3
) -> ThresholdReport:
    """Compares every image with every other, in blocks.

    Args:
        embeddings: (n, D) unit-norm, one per distinct image.
        threshold: similarity from which two images count as replicas.
        allowed_rate: false-match rate that the proposed threshold may have.

    Raises:
        ValueError: fewer than two images, or embeddings that are not finite.
    """
    from scipy.stats import binomtest

    n = len(embeddings)
    if n < 2:
        raise ValueError(f"a threshold needs at least 2 images to compare, not {n}")
    if broken := int((~embeddings.isfinite().all(1)).sum()):
        raise ValueError(
            f"the embeddings of {broken} of {n} images are not finite; replication.similarity "
            "is damaged, use another one"
        )
    histogram = torch.zeros(_BINS + 1, dtype=torch.long)
    matched = torch.zeros(n, dtype=torch.bool)
    num_false = 0
    for start in range(0, n, _BLOCK):
        for other in range(start, n, _BLOCK):
            rows, columns = embeddings[start : start + _BLOCK], embeddings[other : other + _BLOCK]
            similarity = (rows @ columns.T).double()
            different = torch.ones_like(similarity, dtype=torch.bool)
            if other == start:
                different = different.triu(diagonal=1)
            hits = (similarity >= threshold) & different
            num_false += int(hits.sum())
            matched[start : start + _BLOCK] |= hits.any(1)
            matched[other : other + _BLOCK] |= hits.any(0)
            bins = ((similarity[different] + 1) * _BINS / 2).floor().clamp(0, _BINS).long()
            histogram += torch.bincount(bins, minlength=_BINS + 1)
    num_pairs = math.comb(n, 2)
    interval = binomtest(num_false, num_pairs).proportion_ci(0.95, method="exact")
    at_or_above = histogram.flip(0).cumsum(0).flip(0)
    allowed = (at_or_above <= allowed_rate * num_pairs).nonzero()
    return ThresholdReport(
        threshold=threshold,
        num_images=n,
        num_pairs=num_pairs,
        num_false=num_false,
        rate=num_false / num_pairs,
        interval=(interval.low, interval.high),
        images_with_false=matched.float().mean().item(),
        allowed_rate=allowed_rate,
        proposed=int(allowed[0]) * 2 / _BINS - 1 if len(allowed) else None,
    )
