"""The false-match rate of a threshold: how often two different images count as replicas.

Pairs that share an image are not independent: a few images that resemble many others move the
rate far more than a binomial count of pairs would. So the interval counts *images*:

* The rate of n images is a U-statistic of order two. The jackknife over images estimates its
  variance V, on average too large rather than too small (Efron & Stein 1981).
* rate (1 - rate) / V is the number of independent pairs that would be as informative. The exact
  binomial interval is taken for this number, corrected by the ratio of Student's t with n - 1
  degrees of freedom to the normal (Korn & Graubard 1998, as for surveys with clusters).
* If look-alikes make up a share w of all images, w² of all pairs match, but n images show such a
  pair only if two or more of them are look-alikes. So the upper end is at least w², for the largest
  share w (Clopper-Pearson) with which n images still plausibly hold just one.

  variable          meaning
  degrees           false matches of each image, d; half their sum is the number of false pairs
  squared_degrees   the sum of d², which with the number of pairs gives V
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

_BLOCK = 1024
_BINS = 4000
_TAIL = 0.025


@dataclass(frozen=True, kw_only=True)
class ThresholdReport:
    """False matches among distinct images of a data set.

    Attributes:
        threshold: the similarity that was tested.
        num_images: n.
        num_pairs: n (n - 1) / 2 pairs of different images.
        num_false: pairs at or above the threshold.
        rate: num_false / num_pairs.
        interval: 95 % interval of the rate in the population of which the images are a random
            sample, see `false_match_interval`.
        images_with_false: share of the images with at least one false match.
        allowed_rate: largest rate that is acceptable.
        images_needed: least number of images that can show a rate as low as that.
        proposed: the smallest threshold (in steps of 0.0005) at and above which the interval's
            upper end is at most `allowed_rate`; None if too few images or too many look-alikes
            leave none.
    """

    threshold: float
    num_images: int
    num_pairs: int
    num_false: int
    rate: float
    interval: tuple[float, float]
    images_with_false: float
    allowed_rate: float
    images_needed: int
    proposed: float | None

    def __str__(self) -> str:
        low, high = self.interval
        return "\n".join(
            (
                f"{self.num_images} images, {self.num_pairs} pairs of different ones",
                f"threshold {self.threshold:g}: {self.num_false} pairs match falsely, "
                f"{self.rate:.3%} (95 % interval {low:.3%} to {high:.3%})",
                f"{self.images_with_false:.1%} of the images have at least one false match",
                self._advice(),
            )
        )

    def _advice(self) -> str:
        if self.proposed is not None:
            return (
                f"replication.threshold={self.proposed:g} is the smallest whose false-match rate "
                f"is at most {self.allowed_rate:g}, by the upper end of that interval"
            )
        if self.num_images < self.images_needed:
            return (
                f"no threshold is proposed: {self.num_images} images cannot show a rate of at most "
                f"allowed_rate={self.allowed_rate:g}; give at least {self.images_needed}"
            )
        return (
            f"no threshold is proposed: too many images are alike for allowed_rate="
            f"{self.allowed_rate:g}; give other images or a larger rate"
        )


def false_matches(
    embeddings: Tensor, *, threshold: float, allowed_rate: float = 1e-3
) -> ThresholdReport:
    """Compares every image with every other, in blocks of rows.

    Args:
        embeddings: (n, D) unit-norm, one per distinct image.
        threshold: similarity from which two images count as replicas.
        allowed_rate: false-match rate that the proposed threshold may have, in (0, 1).

    Raises:
        ValueError: fewer than two images, or embeddings that are not finite.
    """
    n = len(embeddings)
    if n < 2:
        raise ValueError(f"a threshold needs at least 2 images to compare, not {n}")
    if broken := int((~embeddings.isfinite().all(1)).sum()):
        raise ValueError(
            f"the embeddings of {broken} of {n} images are not finite; replication.similarity "
            "is damaged, use another one"
        )
    degrees = torch.zeros(n, dtype=torch.long)
    # Of every threshold of the grid: the sums over images of d and of d².
    sums = torch.zeros(2, _BINS + 1, dtype=torch.float64)
    for start in range(0, n, _BLOCK):
        similarity = (embeddings[start : start + _BLOCK] @ embeddings.T).double()
        rows = torch.arange(len(similarity))
        similarity[rows, start + rows] = -math.inf  # no image is a pair with itself
        degrees[start + rows] = (similarity >= threshold).sum(1)
        bins = ((similarity + 1) * _BINS / 2).floor().clamp(-1, _BINS).long() + 1
        histogram = torch.bincount(
            (rows[:, None] * (_BINS + 2) + bins).flatten(), minlength=len(rows) * (_BINS + 2)
        ).view(len(rows), -1)[:, 1:]
        at_or_above = histogram.flip(1).cumsum(1).flip(1).double()
        sums += torch.stack([at_or_above.sum(0), at_or_above.square().sum(0)])
    num_false = int(degrees.sum()) // 2
    low, high = false_match_interval(num_false, degrees.square().sum().item(), n)
    _, highs = false_match_interval(sums[0].numpy() / 2, sums[1].numpy(), n)
    from_here_on = np.maximum.accumulate(highs[::-1])[::-1]
    allowed = np.flatnonzero(from_here_on <= allowed_rate)
    return ThresholdReport(
        threshold=threshold,
        num_images=n,
        num_pairs=math.comb(n, 2),
        num_false=num_false,
        rate=num_false / math.comb(n, 2),
        interval=(float(low), float(high)),
        images_with_false=(degrees > 0).double().mean().item(),
        allowed_rate=allowed_rate,
        images_needed=images_needed(allowed_rate),
        proposed=int(allowed[0]) * 2 / _BINS - 1 if len(allowed) else None,
    )


def false_match_interval(
    num_false: ArrayLike, squared_degrees: ArrayLike, num_images: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95 % interval of the false-match rate, from the false matches among n random images.

    Args:
        num_false: number of matching pairs, of any shape.
        squared_degrees: sum over images of the squared number of images that each matches, of the
            same shape.
        num_images: n, at least 2.

    Returns:
        Its lower and upper ends, in [0, 1], of the same shape.
    """
    from scipy.stats import beta, t

    n, pairs = num_images, math.comb(num_images, 2)
    num_false = np.asarray(num_false, dtype=float)
    rate = num_false / pairs
    # The rate without image i is (num_false - d_i) / comb(n - 1, 2).
    spread = np.asarray(squared_degrees, dtype=float) - 4 * num_false**2 / n
    variance = 4 * spread / (n * (n - 1) * max(n - 2, 1) ** 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        effective = np.where(variance > 0, rate * (1 - rate) / variance, pairs)
    correction = (t.ppf(_TAIL, max(pairs - 1, 1)) / t.ppf(_TAIL, n - 1)) ** 2
    effective = np.minimum(effective, pairs) * correction
    matches = rate * effective
    low = np.nan_to_num(beta.ppf(_TAIL, matches, effective - matches + 1), nan=0.0)
    high = np.nan_to_num(beta.ppf(1 - _TAIL, matches + 1, effective - matches), nan=1.0)
    # Bounds even if all pairs match or none does: the sample may miss an image that matches no
    # other, or all but one of a group of look-alikes.
    return (
        np.minimum(low, beta.ppf(_TAIL, n, 1) ** 2),
        np.maximum(high, beta.ppf(1 - _TAIL, 2, n - 1) ** 2),
    )


def images_needed(rate: float) -> int:
    """Least number of images without a match for which the interval ends at or below the rate."""
    from scipy.stats import nbinom

    # Number of images drawn until two belong to a group whose share is sqrt(rate).
    return 2 + int(nbinom.ppf(1 - _TAIL, 2, math.sqrt(rate)))
