"""False matches on cases small enough to count by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import invmm.replication.threshold as module
from invmm.replication.threshold import false_matches


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
    # one pair of six: the exact interval's upper end solves P(X <= 1) = 0.025
    upper = report.interval[1]
    assert (1 - upper) ** 6 + 6 * upper * (1 - upper) ** 5 == pytest.approx(0.025, abs=1e-6)
    # one false pair of six is allowed, so the threshold may fall to just above cos 80 = 0.1736
    assert report.proposed == pytest.approx(0.174)


def test_the_proposal_is_the_smallest_that_keeps_the_rate():
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(60, 8, generator=generator), dim=1)
    proposed = false_matches(embeddings, threshold=0.5, allowed_rate=0.01).proposed
    assert proposed is not None
    assert false_matches(embeddings, threshold=proposed).rate <= 0.01
    assert false_matches(embeddings, threshold=proposed - 0.0005).rate > 0.01


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
    report = false_matches(at_angles(0, 0, 90), threshold=0.5, allowed_rate=0.0)
    assert report.proposed is None
    assert "no threshold gives" in str(report)


def test_the_text_names_the_key_to_set():
    text = str(false_matches(at_angles(0, 10, 90, 180), threshold=0.5, allowed_rate=0.2))
    assert "replication.threshold=0.174" in text
    assert "1 pairs match falsely" in text
    assert "16.667%" in text


@pytest.mark.parametrize("count", [0, 1])
def test_one_image_has_nothing_to_be_compared_with(count):
    with pytest.raises(ValueError, match=f"not {count}"):
        false_matches(torch.ones(count, 1), threshold=0.5)


def test_no_false_match_still_has_an_upper_bound():
    report = false_matches(at_angles(0, 90), threshold=0.5)
    assert report.interval[0] == 0
    assert report.interval[1] == pytest.approx(1 - math.pow(0.025, 1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_not_finite_are_refused(value):
    embeddings = at_angles(0, 10, 90)
    embeddings[1, 0] = value
    with pytest.raises(ValueError, match=r"of 1 of 3 images are not finite.*replication\.simil"):
        false_matches(embeddings, threshold=0.5)
