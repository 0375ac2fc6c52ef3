"""How well a score separates two sets of images: AUROC and TPR at low FPR, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invmm.analysis.statistics import (
    Estimate,
    independent_count,
    memorization_order,
    near_duplicate_groups,
)
from invmm.probability.certificate import clopper_pearson

if TYPE_CHECKING:
    import pandas as pd

MAX_FALSE_POSITIVE_RATE = 0.01


@dataclass(frozen=True)
class Contrast:
    """How well a score separates positives from negatives.

    Attributes:
        positives: number of positive images.
        negatives: number of negative images.
        auroc: probability that a positive ranks above a negative, ties counted half.
        tpr_at_fpr_1: true-positive rate at the last operating point whose false-positive rate is
            <= 1 %. Its interval takes that point as given; fewer than 100 negatives hardly tell
            where it would be for others.
    """

    positives: int
    negatives: int
    auroc: Estimate
    tpr_at_fpr_1: Estimate


def contrast(
    frame: pd.DataFrame, positives: pd.Series, negatives: pd.Series, *, tie_break: bool
) -> Contrast | None:
    """`separated` for a score table; near-duplicates count together in the intervals.

    Args:
        frame: score table of the images that were measured.
        positives: (N,) bool, the images that should score as more memorized.
        negatives: (N,) bool, the images that they are compared with.
        tie_break: see `memorization_order`.
    """
    order = memorization_order(frame, tie_break=tie_break)
    groups = near_duplicate_groups(frame).to_numpy()
    return separated(order[positives], order[negatives], (groups[positives], groups[negatives]))


def separated(
    positives: np.ndarray,
    negatives: np.ndarray,
    duplicates: tuple[np.ndarray, np.ndarray] | None = None,
) -> Contrast | None:
    """Both statistics with 95 % intervals that need no resampling and hold near 0 and 1.

    With m positives and n negatives the variance of an AUROC of A is at most A (1 - A) / min(m, n),
    whatever the two distributions (Bamber 1975): that of a proportion of min(m, n) trials, so that
    its interval is Wilson's (1927). At equal numbers a lower AUROC above 0.5 never has a narrower
    one. The TPR is a proportion of the positives, with the interval of Clopper & Pearson (1934).
    Images of a group count together, see `independent_count`.

    Args:
        positives: (m,) numbers that grow with memorization.
        negatives: (n,) likewise.
        duplicates: (m,) and (n,) near-duplicate groups of the positives and of the negatives; None
            if no two images are alike.

    Returns:
        None if a side is empty or holds NaN; intervals from 0 to 1 if a side has a single group, as
        its spread is then unknown.
    """
    from sklearn.metrics import auc, roc_curve

    sides = positives, negatives
    values = np.concatenate(sides)
    if not all(map(len, sides)) or np.isnan(values).any():
        return None
    labels = np.repeat([1, 0], [*map(len, sides)])
    false, true, _ = roc_curve(labels, values, drop_intermediate=False)
    area, rate = float(auc(false, true)), float(true[false <= MAX_FALSE_POSITIVE_RATE][-1])
    groups = duplicates or tuple(np.arange(len(side)) for side in sides)
    independent = [independent_count(own) for own in groups]
    if min(len(np.unique(own)) for own in groups) < 2:
        ends = [(0.0, 1.0)] * 2
    else:
        ends = [
            _wilson(area, min(independent)),
            clopper_pearson(rate * independent[0], independent[0]),
        ]
    (low, high), (rate_low, rate_high) = ends
    return Contrast(
        positives=len(positives),
        negatives=len(negatives),
        auroc=Estimate(area, low, high),
        tpr_at_fpr_1=Estimate(rate, rate_low, rate_high),
    )


def _wilson(rate: float, trials: float) -> tuple[float, float]:
    """95 % score interval of a rate in [0, 1] from a number of trials (Wilson 1927)."""
    shrunk = 1.959963984540054**2 / trials  # square of the 0.975 quantile of N(0, 1)
    reach = math.sqrt(rate * (1 - rate) * shrunk + shrunk**2 / 4)
    low, high = ((rate + shrunk / 2 + side * reach) / (1 + shrunk) for side in (-1, 1))
    # exact at 0 and 1, which rounding would miss
    return (0.0 if rate == 0 else low), (1.0 if rate == 1 else high)
