"""How scores tell images apart: cases worked out by hand, all pairs and SciPy beside them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap

from invmm.analysis.separation import contrast, separated
from invmm.analysis.statistics import Estimate

APART = np.arange(8.0) + 100, np.arange(12.0)
"""Eight positives above twelve negatives."""
LEAST = 0.025 ** (1 / 8)
"""The share p at which eight independent pairs all come out alike with a probability of 2.5 %."""


def by_pairs(positives: np.ndarray, negatives: np.ndarray) -> tuple[float, float]:
    """AUROC from all pairs, and the TPR by trying every threshold."""
    above = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
    allowed = [t for t in positives if (negatives >= t).sum() <= 0.01 * len(negatives)]
    return above.mean(), (positives >= min(allowed, default=np.inf)).mean()


def auroc_interval(*sides, **options) -> Estimate:
    return separated(*sides, **options).auroc


def tpr_interval(*sides, **options) -> Estimate:
    return separated(*sides, **options).tpr_at_fpr_1


def auroc(*sides) -> float:
    return separated(*sides, resamples=1).auroc.value


def tpr_at_fpr(*sides) -> float:
    return separated(*sides, resamples=1).tpr_at_fpr_1.value


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [([3, 4], [1, 2], 1.0), ([1, 2], [3, 4], 0.0), ([1, 1], [1, 1], 0.5), ([3, 1], [2, 0], 0.75),
     ([2, 1], [1, 0], 0.875)],
)  # fmt: skip
def test_auroc_counts_pairs_and_half_ties(positives, negatives, expected):
    assert auroc(np.array(positives), np.array(negatives)) == expected


@pytest.mark.parametrize("negatives", [7, 99, 100, 250])
def test_both_are_those_of_all_pairs_and_thresholds(negatives):
    generator = np.random.default_rng(negatives)
    for levels in (3, 9, 10_000):  # many ties, some, hardly any
        sides = (
            generator.integers(0, levels, 40) + levels // 4,
            generator.integers(0, levels, negatives),
        )
        assert (auroc(*sides), tpr_at_fpr(*sides)) == pytest.approx(by_pairs(*sides), abs=1e-12)


def test_of_nothing_there_is_nothing():
    nothing, something = np.array([]), np.array([1.0, 2.0])
    assert separated(nothing, something) is None
    assert separated(something, nothing) is None


def test_tpr_stays_at_or_below_the_false_positive_rate():
    negatives = np.arange(100.0)  # 1 % is exactly one of them, the 99
    assert tpr_at_fpr(np.array([99.5, 98.5, 97.5, 0.0]), negatives) == 0.5
    # few negatives: not one false positive is allowed
    assert tpr_at_fpr(np.array([5.0, 3.0, 1.0]), np.array([4.0, 2.0])) == pytest.approx(1 / 3)
    # a positive tied with the highest negative cannot be had without it
    assert tpr_at_fpr(np.array([5.0, 4.0]), np.array([4.0, 2.0])) == 0.5


# Intervals ----------------------------------------------------------------------------------------


def test_intervals_of_four_images_by_enumeration():
    """3 and 1 against 2 and 0: of 16 resamples 1 has an AUROC of 0 and 7 have 1, as of the TPR."""
    sides = np.array([3.0, 1.0]), np.array([2.0, 0.0])
    area, rate = auroc_interval(*sides), tpr_interval(*sides)
    assert (area.value, area.low, area.high) == (0.75, 0, 1)
    assert (rate.value, rate.low, rate.high) == (0.5, 0, 1)


def test_intervals_are_those_of_scipy_up_to_chance():
    generator = np.random.default_rng(5)
    sides = generator.integers(4, 40, 40).astype(float), generator.integers(0, 30, 60).astype(float)
    found = auroc_interval(*sides), tpr_interval(*sides)
    for place, interval in enumerate(found):
        reference = bootstrap(
            sides,
            lambda *drawn, place=place: by_pairs(*drawn)[place],
            vectorized=False,
            method="percentile",
            n_resamples=400,
            random_state=1,
        ).confidence_interval
        assert (interval.low, interval.high) == pytest.approx(tuple(reference), abs=0.04)
        assert interval.high - interval.low > 0.1


@pytest.mark.parametrize("interval", [auroc_interval, tpr_interval])
def test_without_any_error_the_interval_is_that_of_eight_pairs(interval):
    """No resample errs either.

    If a positive stood above all negatives with probability LEAST, and else below them, then eight
    would all stand above in 2.5 % of the cases.
    """
    found = interval(*APART)
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(LEAST)
    upside_down = interval(*(-side for side in APART))
    assert (upside_down.value, upside_down.low) == (0, 0)
    assert upside_down.high == pytest.approx(1 - LEAST)


def test_of_ties_alone_little_is_known():
    """Pairs that are no ties are at most 1 - LEAST, and may all fall to one side."""
    found = auroc_interval(np.ones(8), np.ones(9))
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx((LEAST / 2, 1 - LEAST / 2))


def test_duplicates_count_once():
    sides = APART[0], APART[1][:8]
    copies = np.repeat(np.arange(8), 5), np.repeat(np.arange(8), 5)
    repeated = np.repeat(sides[0], 5), np.repeat(sides[1], 5)
    for interval in (auroc_interval, tpr_interval):
        assert interval(*repeated, copies) == interval(*sides)
        assert interval(*repeated).low > LEAST + 0.1  # as if they were forty images
    overlapping = sides[0] - 98, sides[1]
    repeated = np.repeat(overlapping[0], 5), np.repeat(overlapping[1], 5)
    for interval in (auroc_interval, tpr_interval):
        together, alone = interval(*repeated, copies), interval(*repeated)
        assert together == interval(*overlapping)
        assert together.high - together.low > 1.5 * (alone.high - alone.low)


@pytest.mark.parametrize("interval", [auroc_interval, tpr_interval])
def test_one_group_says_nothing_about_spread(interval):
    found = interval(np.array([3.0]), np.array([1.0, 2.0]))
    assert (found.value, found.low, found.high) == (1, 0, 1)
    found = interval(APART[0], APART[1], (np.zeros(8), np.arange(12)))
    assert (found.value, found.low, found.high) == (1, 0, 1)


def test_the_seed_decides_the_resamples():
    sides = np.arange(9.0), np.arange(9.0) - 3
    found = auroc_interval(*sides, resamples=250)
    assert found.low < found.value < found.high
    assert auroc_interval(*sides, resamples=250) == found
    assert auroc_interval(*sides, resamples=250, seed=1) != found


# Score tables -------------------------------------------------------------------------------------


def table(*rows: tuple[str, str, float | None, float | None]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["image_id", "status", "score", "best_similarity"])
    return frame.astype({"score": "float64", "best_similarity": "float64"}).assign(
        near_duplicate_group=pd.array([None] * len(rows), dtype="string")
    )


CENSORED = table(
    ("a", "REPLICATED", 0.2, 0.9),
    ("b", "NOT_REPLICATED", None, 0.4),
    ("c", "REPLICATED", 0.3, 0.8),
    ("d", "NOT_REPLICATED", None, 0.1),
)
"""Positives a and b, negatives c and d."""
POSITIVE = pd.Series([True, True, False, False])


def test_the_censored_stand_last_by_similarity_or_tied():
    """Of the positives, a stands above both; b, censored, below c, and above d or tied with it."""
    found = contrast(CENSORED, POSITIVE, ~POSITIVE, tie_break=True)
    assert (found.positives, found.negatives) == (2, 2)
    assert (found.auroc.value, found.tpr_at_fpr_1.value) == (3 / 4, 1 / 2)
    tied = contrast(CENSORED, POSITIVE, ~POSITIVE, tie_break=False)
    assert (tied.auroc.value, tied.tpr_at_fpr_1.value) == (2.5 / 4, 1 / 2)


def test_if_all_are_censored_the_score_alone_says_little():
    rows = [(str(index), "NOT_REPLICATED", None, index / 20) for index in range(16)]
    positive = pd.Series([index >= 8 for index in range(16)])
    by_similarity = contrast(table(*rows), positive, ~positive, tie_break=True)
    assert by_similarity.auroc.value == 1
    assert by_similarity.auroc.low == pytest.approx(LEAST)
    alone = contrast(table(*rows), positive, ~positive, tie_break=False)
    assert alone.auroc.value == 0.5
    assert (alone.auroc.low, alone.auroc.high) == pytest.approx((LEAST / 2, 1 - LEAST / 2))
    assert (alone.tpr_at_fpr_1.value, alone.tpr_at_fpr_1.low) == (0, 0)
    assert alone.tpr_at_fpr_1.high == pytest.approx(1 - LEAST)


def test_near_duplicates_are_drawn_together():
    """Eight positives, but near-duplicates of four: as sure as four pairs make it."""
    rows = [(str(index), "SCORED", float(index), None) for index in range(16)]
    positive = pd.Series([index < 8 for index in range(16)])
    groups = [str(index // 2) if index < 8 else None for index in range(16)]
    frame = table(*rows).assign(near_duplicate_group=pd.array(groups, dtype="string"))
    found = contrast(frame, positive, ~positive, tie_break=True)
    assert found.auroc.value == 1
    assert found.auroc.low == pytest.approx(0.025 ** (1 / 4))
    assert contrast(frame, positive, positive & ~positive, tie_break=True) is None
