"""How scores tell images apart: cases worked out by hand, all pairs and SciPy beside them."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, norm

from invmm.analysis.separation import contrast, separated
from invmm.analysis.statistics import Estimate

APART = np.arange(8.0) + 100, np.arange(12.0)
"""Eight positives above twelve negatives."""
LEAST = 0.025 ** (1 / 8)
"""The rate at which eight of eight come out with a probability of 2.5 % (Clopper-Pearson)."""
PERFECT = 8 / (8 + norm.ppf(0.975) ** 2)
"""The rate that a score test of eight of eight does not reject (Wilson)."""
CELLS = [(area, *sizes) for area in (0.8, 0.95, 0.99) for sizes in ((12, 8), (12, 64), (64, 64))]


def by_pairs(positives: np.ndarray, negatives: np.ndarray) -> tuple[float, float]:
    """AUROC from all pairs, and the TPR by trying every threshold."""
    above = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
    allowed = [t for t in positives if (negatives >= t).sum() <= 0.01 * len(negatives)]
    return above.mean(), (positives >= min(allowed, default=np.inf)).mean()


def auroc_interval(*sides) -> Estimate:
    return separated(*sides).auroc


def tpr_interval(*sides) -> Estimate:
    return separated(*sides).tpr_at_fpr_1


def auroc(*sides) -> float:
    return separated(*sides).auroc.value


def tpr_at_fpr(*sides) -> float:
    return separated(*sides).tpr_at_fpr_1.value


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
    assert separated(something, np.array([1.0, np.nan])) is None


def test_tpr_stays_at_or_below_the_false_positive_rate():
    negatives = np.arange(100.0)  # 1 % is exactly one of them, the 99
    assert tpr_at_fpr(np.array([99.5, 98.5, 97.5, 0.0]), negatives) == 0.5
    # few negatives: not one false positive is allowed
    assert tpr_at_fpr(np.array([5.0, 3.0, 1.0]), np.array([4.0, 2.0])) == pytest.approx(1 / 3)
    # a positive tied with the highest negative cannot be had without it
    assert tpr_at_fpr(np.array([5.0, 4.0]), np.array([4.0, 2.0])) == 0.5


# Intervals ----------------------------------------------------------------------------------------


def score_interval(rate: float, trials: float) -> tuple[float, float]:
    """All p that a score test of `rate` does not reject at 5 %: the roots of its quadratic."""
    z2 = norm.ppf(0.975) ** 2
    roots = np.roots([1 + z2 / trials, -(2 * rate + z2 / trials), rate**2])
    return min(roots.real), max(roots.real)


def test_intervals_are_those_of_a_proportion():
    """Of as many trials as the smaller side has groups; the TPR of as many as the positives."""
    generator = np.random.default_rng(5)
    sides = generator.integers(4, 40, 40).astype(float), generator.integers(0, 30, 60).astype(float)
    for first, second in (sides, sides[::-1]):
        area, rate = auroc_interval(first, second), tpr_interval(first, second)
        assert (area.low, area.high) == pytest.approx(score_interval(area.value, 40))
        exact = binomtest(round(rate.value * len(first)), len(first)).proportion_ci()
        assert (rate.low, rate.high) == pytest.approx((exact.low, exact.high))


def test_a_worse_separation_never_gets_a_narrower_interval():
    """One inversion after the other, from none to an AUROC of one half."""
    widths = []
    for inversions in range(0, 7 * 9 // 2):
        positives, negatives = np.arange(7.0) + 100, np.arange(9.0) + 0.5
        lost, rest = divmod(inversions, 9)
        positives[:lost] = -1
        positives[lost] = 9 - rest if rest else 100
        found = auroc_interval(positives, negatives)
        assert found.value == pytest.approx(1 - inversions / 63)
        assert found.low <= found.value <= found.high
        widths.append(found.high - found.low)
    assert len(widths) == 31
    assert (np.diff(widths) > 0).all()


@pytest.mark.parametrize(("interval", "least"), [(auroc_interval, PERFECT), (tpr_interval, LEAST)])
def test_without_any_error_the_interval_is_that_of_eight(interval, least):
    """As many as the smaller side has: the positives."""
    found = interval(*APART)
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(least)
    upside_down = interval(*(-side for side in APART))
    assert (upside_down.value, upside_down.low) == (0, 0)
    assert upside_down.high == pytest.approx(1 - least)


def test_duplicates_count_once():
    sides = APART[0] - 98, APART[1][:8]
    copies = np.repeat(np.arange(8), 5), np.repeat(np.arange(8), 5)
    repeated = np.repeat(sides[0], 5), np.repeat(sides[1], 5)
    for interval in (auroc_interval, tpr_interval):
        together, alone = interval(*repeated, copies), interval(*repeated)
        assert together == interval(*sides)
        assert together.high - together.low > 1.5 * (alone.high - alone.low)


def test_groups_of_unlike_sizes_count_by_kish():
    """Groups of 6, 1 and 1 of eight images: 64 / 38 independent ones."""
    found = auroc_interval(*APART, (np.array([0] * 6 + [1, 2]), np.arange(12)))
    assert found.low == pytest.approx(score_interval(1, 64 / 38)[0])


@pytest.mark.parametrize("interval", [auroc_interval, tpr_interval])
def test_one_group_says_nothing_about_spread(interval):
    found = interval(np.array([3.0]), np.array([1.0, 2.0]))
    assert (found.value, found.low, found.high) == (1, 0, 1)
    found = interval(APART[0], APART[1], (np.zeros(8), np.arange(12)))
    assert (found.value, found.low, found.high) == (1, 0, 1)


def draws(area: float, positives: int, negatives: int, spread: float, copies: int, rng):
    """Normal scores at this AUROC, the positives with a spread of their own, in groups."""
    shift = norm.ppf(area) * np.hypot(1, spread)
    first = np.repeat(rng.normal(shift, spread, positives), copies)
    return first, rng.normal(0, 1, negatives), np.repeat(np.arange(positives), copies)


def coverage(runs: int) -> dict[tuple, int]:
    """In how many of these runs the interval holds the true AUROC, for each cell."""
    found = {}
    for cell in itertools.product(CELLS, (0.3, 1.0, 3.0), (1, 3)):
        (area, *sizes), spread, copies = cell
        rng = np.random.default_rng([*(round(x * 1000) for x in (area, spread)), *sizes, copies])
        held = 0
        for _ in range(runs):
            first, second, groups = draws(area, *sizes, spread, copies, rng)
            interval = auroc_interval(first, second, (groups, np.arange(len(second))))
            held += interval.low <= area <= interval.high
        found[cell] = held
    return found


@pytest.mark.parametrize("runs", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_the_interval_holds_the_true_auroc(runs):
    """Where the two sides spread alike or not, and if each positive stands there three times."""
    found = coverage(runs)
    assert sum(found.values()) / (len(found) * runs) >= 0.93
    for cell, held in found.items():
        assert binomtest(held, runs).proportion_ci(0.98).high >= 0.93, (cell, held)


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
    assert by_similarity.auroc.low == pytest.approx(PERFECT)
    alone = contrast(table(*rows), positive, ~positive, tie_break=False)
    assert alone.auroc.value == 0.5
    assert (alone.auroc.low, alone.auroc.high) == pytest.approx(score_interval(0.5, 8))
    assert (alone.tpr_at_fpr_1.value, alone.tpr_at_fpr_1.low) == (0, 0)
    assert alone.tpr_at_fpr_1.high == pytest.approx(1 - LEAST)


def test_near_duplicates_count_together():
    """Eight positives, but near-duplicates of four: as sure as four images make it."""
    rows = [(str(index), "SCORED", float(index), None) for index in range(16)]
    positive = pd.Series([index < 8 for index in range(16)])
    groups = [str(index // 2) if index < 8 else None for index in range(16)]
    frame = table(*rows).assign(near_duplicate_group=pd.array(groups, dtype="string"))
    found = contrast(frame, positive, ~positive, tie_break=True)
    assert found.auroc.value == 1
    assert found.auroc.low == pytest.approx(score_interval(1, 4)[0])
    assert contrast(frame, positive, positive & ~positive, tie_break=True) is None
