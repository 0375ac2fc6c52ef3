"""How well a score tells some images from others: AUROC and TPR at low FPR, with intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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

_RESAMPLES_AT_ONCE = 100  # all of them would not fit for ten thousand images


def auroc(positives: np.ndarray, negatives: np.ndarray) -> float | None:
    """Probability that a positive stands above a negative, ties counted half; None if empty."""
    return _of_roc(_area, positives, negatives)


def tpr_at_fpr(positives: np.ndarray, negatives: np.ndarray, limit: float = 0.01) -> float | None:
    """True-positive rate at the last operating point whose false-positive rate is <= limit."""
    return _of_roc(partial(_tpr, limit=limit), positives, negatives)


def auroc_interval(
    positives: np.ndarray,
    negatives: np.ndarray,
    duplicates: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate | None:
    """`auroc` with its bootstrap percentile interval; each side is resampled on its own.

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
        None if a side is empty; from 0 to 1 if one has a single group, which says nothing of its
        spread.
    """
    return _share_interval(_area, (positives, negatives), duplicates, resamples, seed)


def tpr_at_fpr_interval(
    positives: np.ndarray,
    negatives: np.ndarray,
    duplicates: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    limit: float = 0.01,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate | None:
    """`tpr_at_fpr` with its interval; arguments and returns as of `auroc_interval`.

    It is that of the operating point which these negatives set: fewer than 1 / limit of them say
    little of where the limit lies among others.
    """
    statistic = partial(_tpr, limit=limit)
    return _share_interval(statistic, (positives, negatives), duplicates, resamples, seed)


@dataclass(frozen=True)
class Contrast:
    """How well a score tells some images, the positives, from others.

    Attributes:
        positives: how many.
        negatives: how many.
        auroc: see `auroc`.
        tpr_at_fpr_1: see `tpr_at_fpr`, at a limit of 1 %.
    """

    positives: int
    negatives: int
    auroc: Estimate
    tpr_at_fpr_1: Estimate


def contrast(
    frame: pd.DataFrame, positives: pd.Series, negatives: pd.Series, *, tie_break: bool
) -> Contrast | None:
    """Both statistics, near-duplicates drawn together for the intervals; None if a side is empty.

    Args:
        frame: score table of the images that were measured.
        positives: bool, which of them should score as more memorized.
        negatives: bool, than these.
        tie_break: see `memorization_order`.
    """
    order = memorization_order(frame, tie_break=tie_break)
    groups = near_duplicate_groups(frame).to_numpy()
    above, below = order[positives], order[negatives]
    duplicates = groups[positives], groups[negatives]
    area = auroc_interval(above, below, duplicates)
    rate = tpr_at_fpr_interval(above, below, duplicates)
    return Contrast(len(above), len(below), area, rate) if area and rate else None


def _roc(
    positives: np.ndarray, negatives: np.ndarray, weights: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """True and false positives of every operating point, from none to all.

    Args:
        positives: (P,).
        negatives: (N,).
        weights: (..., P) and (..., N), how often each of them counts.

    Returns:
        Two (..., points), rising from 0 to the sum of the weights; ties are one point.
    """
    values = np.concatenate([positives, negatives])
    order = np.argsort(-values)
    points = np.flatnonzero(np.diff(values[order], append=-np.inf))

    def risen(*counts: np.ndarray) -> np.ndarray:
        total = np.concatenate(counts, axis=-1)[..., order].cumsum(-1)[..., points]
        return np.concatenate([np.zeros_like(total[..., :1]), total], axis=-1)

    of_positives, of_negatives = weights
    return (
        risen(of_positives, np.zeros_like(of_negatives)),
        risen(np.zeros_like(of_positives), of_negatives),
    )


def _area(true: np.ndarray, false: np.ndarray) -> np.ndarray:
    """(..., points) each -> (...) area below the curve (pairs, Mann & Whitney 1947)."""
    pairs = np.diff(false) * (true[..., 1:] + true[..., :-1]) / 2
    return pairs.sum(-1) / (true[..., -1] * false[..., -1])


def _tpr(true: np.ndarray, false: np.ndarray, *, limit: float) -> np.ndarray:
    """(..., points) each -> (...)."""
    last = (false / false[..., -1:] <= limit).sum(-1, keepdims=True) - 1
    return np.take_along_axis(true, last, -1)[..., 0] / true[..., -1]


_OfRoc = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _of_roc(statistic: _OfRoc, positives: np.ndarray, negatives: np.ndarray) -> float | None:
    if len(positives) == 0 or len(negatives) == 0:
        return None
    once = (np.ones(len(positives)), np.ones(len(negatives)))
    return float(statistic(*_roc(positives, negatives, once)))


def _share_interval(
    statistic: _OfRoc,
    sides: tuple[np.ndarray, np.ndarray],
    duplicates: tuple[np.ndarray, np.ndarray] | None,
    resamples: int,
    seed: int,
) -> Estimate | None:
    value = _of_roc(statistic, *sides)
    if value is None:
        return None
    groups = duplicates or tuple(np.arange(len(side)) for side in sides)
    places = [np.unique(own, return_inverse=True)[1] for own in groups]
    sizes = [int(own.max()) + 1 for own in places]
    if min(sizes) < 2:
        return Estimate(value, 0.0, 1.0)
    generator = np.random.default_rng(seed)
    drawn = []
    for block in range(0, resamples, _RESAMPLES_AT_ONCE):
        count = min(_RESAMPLES_AT_ONCE, resamples - block)
        first, second = (
            generator.multinomial(size, np.full(size, 1 / size), size=count)[:, own]
            for size, own in zip(sizes, places, strict=True)
        )
        drawn.append(statistic(*_roc(*sides, (first, second))))
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    if low == high:
        agree = 1 - proportion(0, min(sizes)).high
        low, high = value * agree, 1 - (1 - value) * agree
    return Estimate(value, float(low), float(high))
