"""How well a score tells some images from others: AUROC and TPR at low FPR, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invmm.analysis.statistics import (
    Estimate,
    memorization_order,
    near_duplicate_groups,
    proportion,
)

if TYPE_CHECKING:
    import pandas as pd

_MOST_FALSE = 0.01


@dataclass(frozen=True)
class Contrast:
    """How well a score tells some images, the positives, from others.

    Attributes:
        positives: how many.
        negatives: how many.
        auroc: probability that a positive stands above a negative, ties counted half.
        tpr_at_fpr_1: true-positive rate at the last operating point whose false-positive rate is
            <= 1 %. Its interval is that of the operating point which these negatives set: fewer
            than 100 of them say little of where it lies among others.
    """

    positives: int
    negatives: int
    auroc: Estimate
    tpr_at_fpr_1: Estimate


def contrast(
    frame: pd.DataFrame, positives: pd.Series, negatives: pd.Series, *, tie_break: bool
) -> Contrast | None:
    """`separated` of a score table, near-duplicates drawn together for the intervals.

    Args:
        frame: score table of the images that were measured.
        positives: bool, which of them should score as more memorized.
        negatives: bool, than these.
        tie_break: see `memorization_order`.
    """
    order = memorization_order(frame, tie_break=tie_break)
    groups = near_duplicate_groups(frame).to_numpy()
    return separated(order[positives], order[negatives], (groups[positives], groups[negatives]))


def separated(
    positives: np.ndarray,
    negatives: np.ndarray,
    duplicates: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Contrast | None:
    """Both statistics with bootstrap percentile intervals; each side is resampled on its own.

    Where all resamples agree, as they do if nothing is out of order, the interval is conservative:
    with k groups on the smaller side, k independent pairs of a positive and a negative came out
    alike, so that another comes out otherwise with a probability of at most 1 - 0.025^(1/k), about
    3.7 / k (Clopper & Pearson 1934; the rule of three at 95 % two-sided).

    Args:
        positives: numbers that grow with memorization.
        negatives: of the other side.
        duplicates: the duplicate group of each positive and of each negative; images of a group are
            drawn together. None if no two images are alike.
        resamples: drawn with replacement.
        seed: of them.

    Returns:
        None if a side is empty; intervals from 0 to 1 if one has a single group, which says nothing
        of its spread.
    """
    from sklearn.metrics import auc, roc_curve

    sides = positives, negatives
    if not all(map(len, sides)):
        return None
    labels, values = np.repeat([1, 0], [*map(len, sides)]), np.concatenate(sides)
    groups = duplicates or tuple(np.arange(len(side)) for side in sides)
    places = [np.unique(own, return_inverse=True)[1] for own in groups]
    sizes = [int(own.max()) + 1 for own in places]

    def found(weights: np.ndarray | None = None) -> tuple[float, float]:
        false, true, _ = roc_curve(labels, values, sample_weight=weights, drop_intermediate=False)
        return float(auc(false, true)), float(true[false <= _MOST_FALSE][-1])

    rng = np.random.default_rng(seed)

    def drawn() -> np.ndarray:
        """How often each image is drawn."""
        counts = (rng.multinomial(size, np.full(size, 1 / size)) for size in sizes)
        return np.concatenate([own[place] for own, place in zip(counts, places, strict=True)])

    if min(sizes) < 2:
        ends = [(0.0, 1.0)] * 2
    else:
        samples = np.array([found(drawn()) for _ in range(resamples)])
        ends = np.quantile(samples, [0.025, 0.975], axis=0).T.tolist()
    area, rate = (
        _estimate(value, low, high, min(sizes))
        for value, (low, high) in zip(found(), ends, strict=True)
    )
    return Contrast(len(positives), len(negatives), area, rate)


def _estimate(value: float, low: float, high: float, pairs: int) -> Estimate:
    """Widened to what so many pairs that came out alike leave open, if resamples leave nothing."""
    if math.isclose(low, high, abs_tol=1e-9):  # up to rounding
        alike = 1 - proportion(0, pairs).high
        low, high = value * alike, 1 - (1 - value) * alike
    return Estimate(value, low, high)
