"""What the scores of a run say together, and how sure one can be."""

from __future__ import annotations

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
        count: successes.
        total: trials.
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
    """Clopper-Pearson 95 %; of nothing, anything between 0 and 1."""
    return Proportion(count, total, *(clopper_pearson(count, total) if total else (0.0, 1.0)))


def memorization_order(frame: pd.DataFrame, *, tie_break: bool) -> np.ndarray:
    """A number per image that grows with memorization, for rank statistics.

    Images without a score are censored, not infinite: they rank behind all that have one, tied,
    or by their best similarity.

    Args:
        frame: the score table.
        tie_break: order the censored by best similarity.
    """
    scored = has_score(frame).to_numpy()
    behind = frame.best_similarity.fillna(-1).to_numpy() if tie_break else np.zeros(len(frame))
    ranks = np.empty(len(frame))
    ranks[scored] = 2 - _standing(frame.score.to_numpy()[scored])
    ranks[~scored] = _standing(behind[~scored]) - 2
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


def median_interval(
    values: np.ndarray,
    duplicates: np.ndarray | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate | None:
    """The median with its bootstrap percentile interval.

    Args:
        values: (N,).
        duplicates: (N,) the duplicate group of each; images of a group are drawn together. None if
            no two images are alike.
        resamples: drawn with replacement.
        seed: of them.

    Returns:
        None for fewer than two groups: then nothing is known of its spread.
    """
    from scipy.stats import bootstrap

    groups = np.arange(len(values)) if duplicates is None else duplicates
    by_group = [values[groups == group] for group in np.unique(groups)]
    if len(by_group) < 2:
        return None
    interval = bootstrap(
        [np.arange(len(by_group))],
        lambda drawn: np.median(np.concatenate([by_group[index] for index in drawn])),
        vectorized=False,
        method="percentile",
        n_resamples=resamples,
        random_state=np.random.default_rng(seed),  # pyright: ignore # rng before scipy 1.15
    ).confidence_interval
    return Estimate(float(np.median(values)), float(interval.low), float(interval.high))


@dataclass(frozen=True)
class SuccessCurve:
    """The share of images that succeed within a budget (Kaplan & Meier 1958).

    Attributes:
        budgets: (n,) rising, at which an image succeeded or gave up.
        shares: (n,) within each of them, in [0, 1].
        low: (n,) lower end of the 95 % log-log interval; NaN while no or every image succeeded,
            where the formula says nothing.
        high: (n,) its upper end.
    """

    budgets: np.ndarray
    shares: np.ndarray
    low: np.ndarray
    high: np.ndarray


def success_curve(budgets: np.ndarray, succeeded: np.ndarray) -> SuccessCurve:
    """Success against budget, where images that gave up are censored, not failed.

    Args:
        budgets: (N,) steps or evaluations that each image took, until success or its end; one
            that ends where another succeeds counts as at risk there.
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


def rank_correlation(left: pd.DataFrame, right: pd.DataFrame, *, tie_break: bool) -> float | None:
    """Spearman's correlation of two runs over the images that both measured, censored ones last.

    Args:
        left: score table of one run.
        right: of another.
        tie_break: order the censored by best similarity; else they are tied.

    Returns:
        In [-1, 1], 1 if both rank alike; None if either does not tell any two images apart.

    Raises:
        ValueError: an image stands in a table twice.
    """
    from scipy.stats import spearmanr

    tables = [
        frame.loc[has_score(frame) | is_censored(frame)].set_index("image_id")
        for frame in (left, right)
    ]
    for table in tables:
        if not table.index.is_unique:
            twice = table.index[table.index.duplicated()][0]
            raise ValueError(f"image_id={twice} stands in a table twice; give the table of one run")
    common = tables[0].index.intersection(tables[1].index)
    first, second = (memorization_order(t.loc[common], tie_break=tie_break) for t in tables)
    if min(len(np.unique(first)), len(np.unique(second))) < 2:
        return None
    found: Any = spearmanr(first, second)
    return float(found.statistic)


def found_shares(frame: pd.DataFrame) -> dict[str, Proportion]:
    """Group -> the share of its measured images that have a score; of no images in some."""
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
    """The near-duplicate group of each image; of those that are like no other, their own id."""
    return frame.near_duplicate_group.fillna(frame.image_id)


def _standing(values: np.ndarray) -> np.ndarray:
    """Ranks scaled into (0, 1), ties shared: comparable within, whatever the scale."""
    from scipy.stats import rankdata

    return rankdata(values) / (len(values) + 1)
