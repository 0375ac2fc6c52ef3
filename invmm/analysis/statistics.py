"""How well a score tells one group of images from another, and how sure one can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invmm.results.collect import has_score

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
    from scipy.stats import binomtest

    if total == 0:
        return Proportion(0, 0, 0.0, 1.0)
    interval = binomtest(count, total).proportion_ci(0.95, method="exact")
    return Proportion(count, total, interval.low, interval.high)


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


def auroc(positives: np.ndarray, negatives: np.ndarray) -> float | None:
    """Probability that a positive stands above a negative, ties counted half; None if empty."""
    from sklearn.metrics import roc_auc_score

    if len(positives) == 0 or len(negatives) == 0:
        return None
    labels = np.repeat([1, 0], [len(positives), len(negatives)])
    return float(roc_auc_score(labels, np.concatenate([positives, negatives])))


def tpr_at_fpr(positives: np.ndarray, negatives: np.ndarray, limit: float = 0.01) -> float | None:
    """True-positive rate at the last operating point whose false-positive rate is <= limit."""
    from sklearn.metrics import roc_curve

    if len(positives) == 0 or len(negatives) == 0:
        return None
    labels = np.repeat([1, 0], [len(positives), len(negatives)])
    fpr, tpr, _ = roc_curve(labels, np.concatenate([positives, negatives]), drop_intermediate=False)
    return float(tpr[fpr <= limit][-1])


def image_groups(frame: pd.DataFrame) -> pd.Series:
    """duplicated, single, held_out or unknown, for each image."""
    copies = frame.copies
    groups = frame.split.map({"held_out": "held_out"}).fillna("unknown").astype(object)
    groups[(copies > 1).fillna(False)] = "duplicated"
    groups[(copies == 1).fillna(False)] = "single"
    groups[(copies == 0).fillna(False)] = "held_out"
    return groups


def _standing(values: np.ndarray) -> np.ndarray:
    """Ranks scaled into (0, 1), ties shared: comparable within, whatever the scale."""
    from scipy.stats import rankdata

    return rankdata(values) / (len(values) + 1)
