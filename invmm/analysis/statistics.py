"""Statistics over the scores of a run, with intervals."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invmm.probability.certificate import clopper_pearson
from invmm.results.collect import has_score, is_censored

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Proportion:
    """A share with its exact interval.

    Attributes:
        count: number of successes.
        total: number of trials.
        low: lower end of the Clopper-Pearson 95 % interval.
        high: its upper end.
    """

    count: int
    total: int
    low: float
    high: float

    def __str__(self) -> str:
        digits = 0 if self.total < 1000 else 1
        interval = f"{self.low:.{digits}%} to {self.high:.{digits}%}"
        return f"{self.count} of {self.total} (95 % interval {interval})"


def proportion(count: int, total: int) -> Proportion:
    """A share with its Clopper-Pearson 95 % interval, which is 0 to 1 without trials."""
    return Proportion(count, total, *(clopper_pearson(count, total) if total else (0.0, 1.0)))


def memorization_order(frame: pd.DataFrame, *, tie_break: bool) -> np.ndarray:
    """A number per image that grows with memorization, for rank statistics.

    Images without a score are censored: they rank below all that have one, either tied or ordered
    by their best similarity.

    Args:
        frame: the score table.
        tie_break: order the censored by best similarity; else they are tied.
    """
    scored = has_score(frame).to_numpy()
    closeness = frame.best_similarity.fillna(-1).to_numpy() if tie_break else np.zeros(len(frame))
    ranks = np.empty(len(frame))
    ranks[scored] = 2 - _scaled_ranks(frame.score.to_numpy()[scored])
    ranks[~scored] = _scaled_ranks(closeness[~scored]) - 2
    return ranks


@dataclass(frozen=True)
class Estimate:
    """A statistic with its interval.

    Attributes:
        value: of all images.
        low: lower end of the 95 % interval.
        high: its upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} (95 % interval {self.low:.3g} to {self.high:.3g})"


def independent_count(groups: np.ndarray) -> float:
    """The effective number of independent images, (sum of sizes)^2 / sum of sizes^2 (Kish 1965).

    Args:
        groups: (N,) the near-duplicate group of each image, N >= 1.

    Returns:
        In [1, N]; N if no two images are alike.
    """
    sizes = np.unique(groups, return_counts=True)[1]
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def median_interval(values: np.ndarray) -> Estimate | None:
    """The median with its exact 95 % interval between two of the values, for any distribution.

    The interval inverts the sign test, so it contains the median in at least 95 % of samples.

    Args:
        values: (N,) independent values.

    Returns:
        None for NaN or fewer than 6 values: the interval from the smallest to the largest of 5
        misses the median in 6 % of samples.
    """
    from scipy.stats import quantile_test

    if len(values) < 6 or np.isnan(values).any():
        return None
    interval = quantile_test(values).confidence_interval(0.95)
    return Estimate(float(np.median(values)), float(interval.low), float(interval.high))


@dataclass(frozen=True)
class SuccessCurve:
    """The share of images that succeed within a budget (Kaplan & Meier 1958).

    Attributes:
        budgets: (n,) rising, at which an image succeeded or gave up.
        shares: (n,) of images that succeed within each budget, in [0, 1].
        low: (n,) lower end of the 95 % log-log interval; NaN where none or all succeeded, for which
            the formula is undefined.
        high: (n,) its upper end.
    """

    budgets: np.ndarray
    shares: np.ndarray
    low: np.ndarray
    high: np.ndarray


def success_curve(budgets: np.ndarray, succeeded: np.ndarray) -> SuccessCurve:
    """Success against budget, where images that gave up are censored, not failed.

    Args:
        budgets: (N,) steps or evaluations of each image until it succeeded or gave up; one that
            gives up where another succeeds still counts as at risk there.
        succeeded: (N,) bool.
    """
    from scipy.stats import CensoredData, ecdf

    censored = ~np.asarray(succeeded, bool)
    if len(censored) == 0:
        return SuccessCurve(*[np.empty(0)] * 4)
    cdf = ecdf(CensoredData.right_censored(budgets, censored)).cdf
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The confidence interval is undefined", RuntimeWarning)
        interval = cdf.confidence_interval(0.95, method="log-log")
    ends = (interval.low.probabilities, interval.high.probabilities)
    return SuccessCurve(cdf.quantiles, cdf.probabilities, *ends)


def rank_correlation(
    left: pd.DataFrame, right: pd.DataFrame, *, tie_break: bool
) -> Estimate | None:
    """Spearman's correlation of two runs over the images that both measured, censored ones last.

    The interval is that of Fisher's z with the variance (1 + r^2 / 2) / (n - 3) of Bonett & Wright
    (2000). For r = 1 or -1, where z is infinite, its inner end is computed from the next possible
    correlation of n ranks, that with two neighbours swapped. Near-duplicates count together.

    Args:
        left: score table of one run.
        right: of another.
        tie_break: order the censored by best similarity; else they are tied.

    Returns:
        In [-1, 1], 1 if both rank alike; the interval is -1 to 1 for fewer than 4 independent
        images. None if all images are tied in either run.

    Raises:
        ValueError: a table has an image twice.
    """
    from scipy.stats import spearmanr

    tables = [
        frame.loc[has_score(frame) | is_censored(frame)].set_index("image_id", drop=False)
        for frame in (left, right)
    ]
    for table in tables:
        if not table.index.is_unique:
            twice = table.index[table.index.duplicated()][0]
            raise ValueError(f"image_id={twice} stands in a table twice; give the table of one run")
    common = tables[0].index.intersection(tables[1].index)
    tables = [table.loc[common] for table in tables]
    first, second = (memorization_order(table, tie_break=tie_break) for table in tables)
    if min(len(np.unique(first)), len(np.unique(second))) < 2:
        return None
    correlation: Any = spearmanr(first, second)
    rho = float(np.clip(correlation.statistic, -1, 1))
    images = min(independent_count(near_duplicate_groups(table).to_numpy()) for table in tables)
    return Estimate(rho, *spearman_interval(rho, images))


def spearman_interval(rho: float, images: float) -> tuple[float, float]:
    """95 % interval of a rank correlation of independent images; see `rank_correlation`."""
    if images < 4:
        return -1.0, 1.0
    largest = 1 - 12 / (images * (images**2 - 1))
    inner = float(np.clip(rho, -largest, largest))
    reach = 1.959963984540054 * math.sqrt((1 + inner**2 / 2) / (images - 3))
    low, high = (math.tanh(math.atanh(inner) + side * reach) for side in (-1, 1))
    return (-1.0 if rho < -largest else low), (1.0 if rho > largest else high)


def found_shares(frame: pd.DataFrame) -> dict[str, Proportion]:
    """Group -> the share of its measured images that have a score; groups may be empty."""
    measured = frame.loc[has_score(frame) | is_censored(frame)]
    groups, scored = image_groups(measured), has_score(measured)
    return {
        group: proportion(int(scored[groups == group].sum()), int((groups == group).sum()))
        for group in ("duplicated", "single", "held_out", "unknown")
    }


def image_groups(frame: pd.DataFrame) -> pd.Series:
    """duplicated, single, held_out or unknown, for each image."""
    copies = frame.copies
    groups = frame.split.map({"held_out": "held_out"}).fillna("unknown").astype(object)
    groups[(copies > 1).fillna(False)] = "duplicated"
    groups[(copies == 1).fillna(False)] = "single"
    groups[(copies == 0).fillna(False)] = "held_out"
    return groups


def near_duplicate_groups(frame: pd.DataFrame) -> pd.Series:
    """The near-duplicate group of each image; its own id if no other image is like it."""
    return frame.near_duplicate_group.fillna(frame.image_id)


def _scaled_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks scaled into (0, 1); tied values share their mean rank."""
    from scipy.stats import rankdata

    return rankdata(values) / (len(values) + 1)
