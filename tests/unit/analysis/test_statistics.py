"""Statistics on cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from invmm.analysis.statistics import (
    found_shares,
    image_groups,
    median_interval,
    memorization_order,
    near_duplicate_groups,
    proportion,
    rank_correlation,
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


# Bootstrap ----------------------------------------------------------------------------------------


def test_the_median_of_three_by_enumeration():
    """Of 27 resamples 7 have the median 1, 13 have 2, 7 have 5: all inside the interval."""
    found = median_interval(np.array([5.0, 1.0, 2.0]))
    assert (found.value, found.low, found.high) == (2, 1, 5)
    assert str(found) == "2 (95 % interval 1 to 5)"


def test_images_of_a_duplicate_group_are_drawn_together():
    """Groups {1, 1, 9} and {5}: the medians are 1, 5, or 3 of both together."""
    found = median_interval(np.array([1.0, 5.0, 9.0, 1.0]), np.array(["a", "b", "a", "a"]))
    assert (found.value, found.low, found.high) == (3, 1, 5)
    unique = np.array([0.3, 1.0, 2.5, 2.7, 4.0, 9.0, 9.5, 12.0])
    assert median_interval(np.repeat(unique, 9), np.repeat(np.arange(8), 9)) == median_interval(
        unique
    )


def test_the_interval_of_a_median_covers_it():
    """At 95 % of 200 draws, within three standard errors of such a count."""
    generator = np.random.default_rng(0)
    intervals = [median_interval(generator.normal(size=30), resamples=300) for _ in range(200)]
    covered = sum(interval.low <= 0 <= interval.high for interval in intervals)
    assert 0.90 <= covered / 200 <= 0.995


def test_one_group_says_nothing_about_spread():
    assert median_interval(np.array([1.0, 2.0]), np.array([7, 7])) is None
    assert median_interval(np.array([])) is None


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
    return frame.assign(image_id=list(names))


def test_spearman_ranks_the_censored_last():
    left = named(MIXED, *"abcde")  # with the tie-break d b c a e; else d b and a tie of c a e
    right = named(
        scores(("ESTIMATED", 1.0, 0.9), ("ESTIMATED", 2.0, 0.8), ("ESTIMATED", 3.0, 0.7),
               ("CENSORED", None, 0.1), ("CENSORED", None, 0.2), ("FAILED", None, None)),
        *"dbcaex",
    )  # fmt: skip
    # ranks 5 4 3 2 1 against 5 4 3 1 2: 1 - 6 * 2 / (5 * 24)
    assert rank_correlation(left, right, tie_break=True) == pytest.approx(0.9)
    # ranks 5 4 2 2 2 against 5 4 3 1.5 1.5: the correlation of ranks with ties
    tied = np.corrcoef([5, 4, 2, 2, 2], [5, 4, 3, 1.5, 1.5])[0, 1]
    assert rank_correlation(left, right, tie_break=False) == pytest.approx(tied)
    assert rank_correlation(left, left, tie_break=False) == pytest.approx(1)


def test_spearman_of_what_is_not_told_apart_is_nothing():
    censored = named(scores(("CENSORED", None, 0.5), ("CENSORED", None, 0.2)), "a", "b")
    scored = named(scores(("ESTIMATED", 1.0, 0.5), ("ESTIMATED", 2.0, 0.2)), "a", "b")
    assert rank_correlation(censored, scored, tie_break=False) is None
    assert rank_correlation(censored, scored, tie_break=True) == pytest.approx(1)
    assert rank_correlation(scored, named(scored, "x", "y"), tie_break=True) is None
    with pytest.raises(ValueError, match="image_id=a stands in a table twice"):
        rank_correlation(named(scored, "a", "a"), scored, tie_break=True)
