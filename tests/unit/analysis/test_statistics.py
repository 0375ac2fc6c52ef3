"""Statistics on cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from invmm.analysis.statistics import (
    auroc,
    image_groups,
    memorization_order,
    proportion,
    tpr_at_fpr,
)


def scores(*rows: tuple[str, float | None, float | None]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["status", "score", "best_similarity"]).astype(
        {"score": "float64", "best_similarity": "float64"}
    )


MIXED = scores(
    ("NOT_REPLICATED", None, 0.3),
    ("REPLICATED", 1.2, 0.6),
    ("NOT_REPLICATED", None, 0.8),
    ("REPLICATED", 0.1, 0.5),
    ("NOT_REPLICATED", None, None),
)


def test_order_with_tie_break():
    order = memorization_order(MIXED, tie_break=True)
    assert np.argsort(-order).tolist() == [3, 1, 2, 0, 4]
    assert len(set(order)) == 5


def test_order_without_tie_break_ties_the_unreplicated_last():
    order = memorization_order(MIXED, tie_break=False)
    assert order[3] > order[1] > order[0]
    assert order[0] == order[2] == order[4]


def test_equal_scores_tie():
    order = memorization_order(
        scores(("REPLICATED", 0.5, 0.9), ("REPLICATED", 0.5, 0.6)), tie_break=True
    )
    assert order[0] == order[1]


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [([3, 4], [1, 2], 1.0), ([1, 2], [3, 4], 0.0), ([1, 1], [1, 1], 0.5), ([3, 1], [2, 0], 0.75),
     ([2, 1], [1, 0], 0.875)],
)  # fmt: skip
def test_auroc_counts_pairs_and_half_ties(positives, negatives, expected):
    assert auroc(np.array(positives), np.array(negatives)) == expected


def test_auroc_of_nothing_is_nothing():
    assert auroc(np.array([]), np.array([1.0])) is None
    assert tpr_at_fpr(np.array([1.0]), np.array([])) is None


def test_tpr_stays_at_or_below_the_false_positive_rate():
    negatives = np.arange(100.0)  # 1 % is exactly one of them, the 99
    assert tpr_at_fpr(np.array([99.5, 98.5, 97.5, 0.0]), negatives) == 0.5
    # few negatives: not one false positive is allowed
    assert tpr_at_fpr(np.array([5.0, 3.0, 1.0]), np.array([4.0, 2.0])) == pytest.approx(1 / 3)
    # a positive tied with the highest negative cannot be had without it
    assert tpr_at_fpr(np.array([5.0, 4.0]), np.array([4.0, 2.0])) == 0.5


def test_exact_intervals():
    none = proportion(0, 10)
    assert none.low == 0
    assert (1 - none.high) ** 10 == pytest.approx(0.025)
    every = proportion(10, 10)
    assert every.high == 1
    assert every.low**10 == pytest.approx(0.025)
    assert str(none) == "0 of 10 (95 % interval 0% to 31%)"
    assert (proportion(0, 0).low, proportion(0, 0).high) == (0, 1)


def test_groups_follow_the_copies_then_the_split():
    frame = pd.DataFrame(
        {
            "split": ["train", "train", "held_out", "held_out", "train", "unknown"],
            "copies": pd.array([8, 1, 0, None, None, None], dtype="Int64"),
        }
    )
    assert image_groups(frame).tolist() == [
        "duplicated", "single", "held_out", "held_out", "unknown", "unknown",
    ]  # fmt: skip
