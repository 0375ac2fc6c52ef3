"""False matches on cases small enough to count by hand, and how often their interval holds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import beta, binom, binomtest, t

import invmm.replication.threshold as module
from invmm.replication.threshold import false_match_interval, false_matches, images_needed


def at_angles(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane: the similarity of two is the cosine of their difference."""
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def test_four_images_by_hand():
    # differences: 10, 90, 180, 80, 170, 90 degrees; only the first is nearer than 60
    report = false_matches(at_angles(0, 10, 90, 180), threshold=0.5, allowed_rate=0.2)
    assert (report.num_images, report.num_pairs, report.num_false) == (4, 6, 1)
    assert report.rate == pytest.approx(1 / 6)
    assert report.images_with_false == pytest.approx(2 / 4)


def test_the_interval_leaves_out_one_image_at_a_time():
    generator = torch.Generator().manual_seed(2)
    embeddings = F.normalize(torch.randn(40, 4, generator=generator, dtype=torch.float64), dim=1)
    report = false_matches(embeddings, threshold=0.5)
    n, matches = 40, np.triu((embeddings @ embeddings.T).numpy() >= 0.5, 1)
    without = [
        np.delete(np.delete(matches, i, 0), i, 1).sum() / math.comb(n - 1, 2) for i in range(n)
    ]
    variance = (n - 1) / n * np.square(np.array(without) - np.mean(without)).sum()
    independent = report.rate * (1 - report.rate) / variance
    independent *= (t.ppf(0.975, math.comb(n, 2) - 1) / t.ppf(0.975, n - 1)) ** 2
    assert 2 * n < independent < math.comb(n, 2) / 2  # else the pairs would do
    found = report.rate * independent
    assert report.interval == pytest.approx(
        (
            beta.ppf(0.025, found, independent - found + 1),
            beta.ppf(0.975, found + 1, independent - found),
        )
    )


def test_a_similarity_equal_to_the_threshold_matches():
    # the first is similar to all others by exactly 0.5, these to one another by 0.25
    embeddings = torch.eye(10, dtype=torch.float64)
    embeddings[1:] *= math.sqrt(0.75)
    embeddings[1:, 0] = 0.5
    assert false_matches(embeddings, threshold=0.5).num_false == 9
    above = false_matches(embeddings, threshold=0.5001)
    assert above.num_false == 0
    # an upper end equal to the allowed rate is allowed
    report = false_matches(embeddings, threshold=0.5, allowed_rate=above.interval[1])
    assert report.proposed == 0.5005


def test_the_proposal_is_the_smallest_that_keeps_the_rate():
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(80, 8, generator=generator), dim=1)
    proposed = false_matches(embeddings, threshold=0.5, allowed_rate=0.02).proposed
    assert proposed is not None
    assert false_matches(embeddings, threshold=proposed).num_false > 0
    assert false_matches(embeddings, threshold=proposed).interval[1] <= 0.02
    assert false_matches(embeddings, threshold=proposed - 0.0005).interval[1] > 0.02


def test_every_threshold_above_the_proposal_keeps_the_rate():
    """Two groups of five, alike by 0.8 and 0.4: both are known more exactly than the first."""
    similarity = torch.eye(10, dtype=torch.float64)
    similarity[:5, :5], similarity[5:, 5:] = 0.8, 0.4
    embeddings = torch.linalg.cholesky(similarity.fill_diagonal_(1))
    both, one = (false_matches(embeddings, threshold=at).interval[1] for at in (0.3, 0.6))
    assert both < 0.7 < one
    proposed = false_matches(embeddings, threshold=0.3, allowed_rate=0.7).proposed
    assert proposed == pytest.approx(0.8, abs=0.0006)


@pytest.mark.parametrize(("rate", "images"), [(0.001, 174), (0.0001, 555)])
def test_few_images_cannot_show_a_small_rate(rate, images):
    assert images_needed(rate) == images
    for n, shown in ((images - 1, False), (images, True)):
        embeddings = torch.eye(n)
        report = false_matches(embeddings, threshold=0.5, allowed_rate=rate)
        assert (report.proposed is not None) is shown
        assert (report.interval[1] <= rate) is shown
    text = str(false_matches(torch.eye(images - 1), threshold=0.5, allowed_rate=rate))
    assert text.endswith(
        f"no threshold is proposed: {images - 1} images cannot show a rate of at most "
        f"allowed_rate={rate:g}; give at least {images}"
    )


@pytest.mark.parametrize("n", [2, 20, 174])
def test_the_ends_of_the_range(n):
    """One group of the upper end's root is missed with 2.5 %; so is one odd image if all match."""
    low, high = false_match_interval(0, 0, n)
    assert low == 0
    assert binom.cdf(1, n, math.sqrt(high)) == pytest.approx(0.025)
    low, high = false_match_interval(math.comb(n, 2), n * (n - 1) ** 2, n)
    assert math.sqrt(low) ** n == pytest.approx(0.025)
    assert high == 1


def coverage(similarity, threshold, n, *, repetitions, seed=0):
    """How many intervals from n random images hold the rate among all of them."""
    matches = np.triu(similarity >= threshold, 1)
    matches = (matches | matches.T).astype(np.float32)
    rate = matches.sum() / len(matches) / (len(matches) - 1)
    rng = np.random.default_rng(seed)
    degrees = np.empty((repetitions, n))
    for row in degrees:
        chosen = rng.choice(len(matches), n, replace=False)
        row[:] = matches[np.ix_(chosen, chosen)].sum(1)
    low, high = false_match_interval(degrees.sum(1) / 2, np.square(degrees).sum(1), n)
    return int(((low <= rate) & (rate <= high)).sum())


def assert_covers(similarity, cells, *, repetitions):
    held = [coverage(similarity, *cell, repetitions=repetitions) for cell in cells]
    assert sum(held) >= 0.93 * repetitions * len(cells)
    for cell, count in zip(cells, held, strict=True):
        ci = binomtest(count, repetitions).proportion_ci(0.99)
        assert ci.high >= 0.93, f"threshold, images {cell}: {count} of {repetitions}"


def test_the_interval_covers_the_rate_among_images_in_groups():
    """2,000 vectors in groups of 1 to 100: over pairs, 95 % would cover about a half."""
    rng = np.random.default_rng(0)
    sizes = np.concatenate([np.repeat([100, 50, 20, 10, 5], 4), np.ones(1260, int)])
    centres = np.repeat(rng.normal(size=(len(sizes), 16)), sizes, axis=0)
    vectors = centres + 0.5 * rng.normal(size=centres.shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cells = [(at, n) for at in (0.5, 0.7, 0.85) for n in (40, 174)]
    assert_covers((vectors @ vectors.T).astype(np.float32), cells, repetitions=300)


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 32])
def test_the_interval_covers_the_rate_among_icons(size):
    from invmm.data.openmoji import _embeddings, named_icons

    embeddings = _embeddings(named_icons(), size)
    cells = [(at, n) for at in (0.4, 0.5, 0.6, 0.7, 0.8) for n in (30, 100, 174, 400)]
    assert_covers((embeddings @ embeddings.T).numpy(), cells, repetitions=400)


def test_blocks_do_not_change_a_count(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    embeddings = F.normalize(torch.randn(37, 6, generator=generator), dim=1)
    whole = false_matches(embeddings, threshold=0.4)
    monkeypatch.setattr(module, "_BLOCK", 5)
    assert false_matches(embeddings, threshold=0.4) == whole
    similarity = embeddings @ embeddings.T
    hits = (similarity >= 0.4).fill_diagonal_(False)
    assert whole.num_false == int(hits.sum()) // 2
    assert whole.images_with_false == pytest.approx(hits.any(1).float().mean().item())


def test_identical_images_leave_no_threshold():
    angles = [0, 90] * (images_needed(0.1) // 2)  # enough images, were they not alike
    report = false_matches(at_angles(*angles), threshold=0.5, allowed_rate=0.1)
    assert report.num_images == report.images_needed
    assert report.proposed is None
    assert "too many images are alike for allowed_rate=0.1" in str(report)


def test_the_text_names_the_key_to_set():
    text = str(false_matches(at_angles(0, 10, 90, 180), threshold=0.5, allowed_rate=0.99))
    assert "replication.threshold=0.174 is the smallest whose false-match rate is" in text
    assert "1 pairs match falsely" in text
    assert "16.667%" in text


@pytest.mark.parametrize("count", [0, 1])
def test_one_image_has_nothing_to_be_compared_with(count):
    with pytest.raises(ValueError, match=f"not {count}"):
        false_matches(torch.ones(count, 1), threshold=0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_not_finite_are_refused(value):
    embeddings = at_angles(0, 10, 90)
    embeddings[1, 0] = value
    with pytest.raises(ValueError, match=r"of 1 of 3 images are not finite.*replication\.simil"):
        false_matches(embeddings, threshold=0.5)
