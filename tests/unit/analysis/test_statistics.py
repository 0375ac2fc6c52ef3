"""Statistics on cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, spearmanr

from invmm.analysis.statistics import (
    found_shares,
    image_groups,
    median_interval,
    memorization_order,
    near_duplicate_groups,
    proportion,
    rank_correlation,
    spearman_interval,
    success_curve,
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


def test_exact_intervals():
    none = proportion(0, 10)
    assert none.low == 0
    assert (1 - none.high) ** 10 == pytest.approx(0.025)
    every = proportion(10, 10)
    assert every.high == 1
    assert every.low**10 == pytest.approx(0.025)
    assert str(none) == "0 of 10 (95 % interval 0% to 31%)"
    assert (proportion(0, 0).low, proportion(0, 0).high) == (0, 1)
    assert str(proportion(0, 999)) == "0 of 999 (95 % interval 0% to 0%)"
    assert str(proportion(0, 1000)) == "0 of 1000 (95 % interval 0.0% to 0.4%)"


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


def test_shares_are_of_the_measured_images_of_each_group():
    frame = scores(
        ("REPLICATED", 0.1, 0.9), ("NOT_REPLICATED", None, 0.3), ("FAILED", None, None),
        ("SCORED", 2.0, None), ("CENSORED", None, 0.1), ("DIVERGED", None, None),
    ).assign(split="train", copies=pd.array([4, 2, 8, 0, 0, 1], dtype="Int64"))  # fmt: skip
    found = {group: (share.count, share.total) for group, share in found_shares(frame).items()}
    assert found == {
        "duplicated": (1, 2), "single": (0, 0), "held_out": (1, 2), "unknown": (0, 0),
    }  # fmt: skip


def test_an_image_that_is_like_no_other_is_its_own_group():
    groups = pd.array(["b", None, "b"], dtype="string")
    frame = pd.DataFrame({"image_id": ["a", "c", "b"], "near_duplicate_group": groups})
    assert near_duplicate_groups(frame).tolist() == ["b", "c", "b"]


# Intervals ----------------------------------------------------------------------------------------


def test_the_median_of_six_lies_between_the_outermost():
    """Both fall to one side of the median in 2 of 64 samples; of five, in 2 of 32."""
    found = median_interval(np.array([5.0, 1.0, 2.0, 9.0, 7.0, 3.0]))
    assert (found.value, found.low, found.high) == (4, 1, 9)
    assert str(found) == "4 (95 % interval 1 to 9)"
    assert median_interval(np.arange(5.0)) is None
    assert median_interval(np.array([])) is None
    assert median_interval(np.array([5.0, 1.0, 2.0, 9.0, 7.0, np.nan])) is None
    # Of nine, the second and eighth: 2 (1 + 9) / 512 = 3.9 %; the third and seventh: 18 %.
    nine = median_interval(np.arange(9.0))
    assert (nine.low, nine.high) == (1, 7)
    ties = median_interval(np.ones(8))
    assert (ties.value, ties.low, ties.high) == (1, 1, 1)


@pytest.mark.parametrize("draw", ["standard_normal", "standard_exponential", "standard_cauchy"])
@pytest.mark.parametrize("size", [6, 9, 30, 101])
def test_the_interval_of_a_median_covers_it(draw, size):
    """The exact coverage lies between 95 and 98 %: 400 samples, four standard errors."""
    generator = np.random.default_rng([size, len(draw)])
    truth = {"standard_exponential": np.log(2)}.get(draw, 0)
    intervals = [median_interval(getattr(generator, draw)(size)) for _ in range(400)]
    covered = sum(interval.low <= truth <= interval.high for interval in intervals)
    assert covered / 400 >= 0.906
    if size >= 30:
        assert covered / 400 <= 0.995


# Censoring ----------------------------------------------------------------------------------------


def test_kaplan_meier_by_hand():
    """A tie at 2 of one success and one that gave up, who was at risk until then."""
    budgets = np.array([4, 2, 1, 3, 2])
    curve = success_curve(budgets, np.array([False, True, True, True, False]))
    assert curve.budgets.tolist() == [1, 2, 3, 4]
    survival = [4 / 5, 4 / 5 * 3 / 4, 4 / 5 * 3 / 4 * 1 / 2]
    assert (1 - curve.shares).tolist() == pytest.approx([*survival, survival[-1]])
    # exponential Greenwood at 2: the variance of log(-log S) is sum d / (n (n - d)) / log(S)^2
    half = 1.959964 * (1 / 20 + 1 / 12) ** 0.5 / abs(np.log(0.6))
    assert curve.low[1] == pytest.approx(1 - 0.6 ** np.exp(-half), rel=1e-5)
    assert curve.high[1] == pytest.approx(1 - 0.6 ** np.exp(half), rel=1e-5)


def test_without_censoring_success_is_a_plain_share():
    curve = success_curve(np.array([10, 30, 10, 20]), np.ones(4, bool))
    assert curve.budgets.tolist() == [10, 20, 30]
    assert curve.shares.tolist() == [0.5, 0.75, 1]


def test_all_censored_is_no_success_and_not_a_failure():
    curve = success_curve(np.array([600, 600]), np.zeros(2, bool))
    assert (curve.budgets.tolist(), curve.shares.tolist()) == ([600], [0])
    assert np.isnan(curve.low).all()
    assert len(success_curve(np.array([]), np.array([])).shares) == 0


def named(frame: pd.DataFrame, *names: str) -> pd.DataFrame:
    alone = pd.array([None] * len(names), dtype="string")
    return frame.assign(image_id=list(names), near_duplicate_group=alone)


def test_spearman_ranks_the_censored_last():
    left = named(MIXED, *"abcde")  # with the tie-break d b c a e; else d b and a tie of c a e
    right = named(
        scores(("ESTIMATED", 1.0, 0.9), ("ESTIMATED", 2.0, 0.8), ("ESTIMATED", 3.0, 0.7),
               ("CENSORED", None, 0.1), ("CENSORED", None, 0.2), ("FAILED", None, None)),
        *"dbcaex",
    )  # fmt: skip
    # ranks 5 4 3 2 1 against 5 4 3 1 2: 1 - 6 * 2 / (5 * 24)
    assert rank_correlation(left, right, tie_break=True).value == pytest.approx(0.9)
    # ranks 5 4 2 2 2 against 5 4 3 1.5 1.5: the correlation of ranks with ties
    tied = np.corrcoef([5, 4, 2, 2, 2], [5, 4, 3, 1.5, 1.5])[0, 1]
    assert rank_correlation(left, right, tie_break=False).value == pytest.approx(tied)
    assert rank_correlation(left, left, tie_break=False).value == pytest.approx(1)


def test_spearman_of_what_is_not_told_apart_is_nothing():
    censored = named(scores(("CENSORED", None, 0.5), ("CENSORED", None, 0.2)), "a", "b")
    scored = named(scores(("ESTIMATED", 1.0, 0.5), ("ESTIMATED", 2.0, 0.2)), "a", "b")
    assert rank_correlation(censored, scored, tie_break=False) is None
    assert rank_correlation(censored, scored, tie_break=True).value == pytest.approx(1)
    assert rank_correlation(scored, named(scored, "x", "y"), tie_break=True) is None
    with pytest.raises(ValueError, match="image_id=a stands in a table twice"):
        rank_correlation(named(scored, "a", "a"), scored, tie_break=True)


def test_the_interval_of_spearman_is_that_of_fisher_z():
    """By hand: n = 28 and r = 0.5, z = 0.549 +- 1.96 sqrt(1.125 / 25)."""
    assert spearman_interval(0.5, 28) == pytest.approx((0.13275, 0.74653), abs=1e-4)
    assert spearman_interval(-0.5, 28) == pytest.approx((-0.74653, -0.13275), abs=1e-4)
    assert spearman_interval(0.5, 3.9) == (-1, 1)


def test_a_perfect_rank_correlation_is_not_certain():
    """The inner end is that of ten ranks of which two neighbours are swapped, the outer one 1."""
    swapped = 1 - 6 * 2 / (10 * 99)
    low, high = spearman_interval(1.0, 10)
    assert (low, high) == (spearman_interval(swapped, 10)[0], 1)
    assert 0.9 < low < 0.97
    assert spearman_interval(-1.0, 10) == (-1, -low)
    ten = named(scores(*(("ESTIMATED", float(n), None) for n in range(10))), *"abcdefghij")
    found = rank_correlation(ten, ten, tie_break=False)
    assert (found.value, found.low, found.high) == pytest.approx((1, low, 1))
    pairs = ten.assign(near_duplicate_group=pd.array([*"aabbccddee"], dtype="string"))
    for tables in ((pairs, ten), (ten, pairs)):
        found = rank_correlation(*tables, tie_break=False)
        assert (found.low, found.high) == spearman_interval(1.0, 5)


@pytest.mark.parametrize("runs", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_interval_of_spearman_covers_it(runs):
    """Of normal scores, whose rank correlation is 6 / pi asin(r / 2)."""
    held = {}
    for correlation in (0.0, 0.5, 0.9, -0.97):
        for size in (12, 30, 64):
            rng = np.random.default_rng([round(100 * abs(correlation)), size])
            truth = 6 / np.pi * np.arcsin(correlation / 2)
            held[correlation, size] = 0
            for _ in range(runs):
                first, noise = rng.standard_normal((2, size))
                second = correlation * first + np.sqrt(1 - correlation**2) * noise
                low, high = spearman_interval(spearmanr(first, second).statistic, size)
                held[correlation, size] += low <= truth <= high
    assert sum(held.values()) / (len(held) * runs) >= 0.93
    for cell, count in held.items():
        assert binomtest(count, runs).proportion_ci(0.98).high >= 0.93, (cell, count)
