"""The bank of free samples: counts by hand, and blocks that change nothing."""

from __future__ import annotations

import math

import pytest
import torch

from invmm.probability.bank import SampleBank, near_duplicate_groups, share_replicating
from invmm.probability.certificate import clopper_pearson


def at_angles(*degrees: float) -> torch.Tensor:
    """Unit vectors of the plane, whose similarities are cosines of differences."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


SAMPLES = at_angles(0, 50, 80, 100, 50)
TARGETS = at_angles(10, 90, 200)


def test_counts_by_hand():
    bank = SampleBank.compare(SAMPLES, TARGETS, threshold=math.cos(math.radians(45)), num_top=3)
    # within 45 degrees of 10: 0, 50, 50; of 90: 50, 80, 100, 50; of 200: none
    assert bank.num_samples == 5
    assert bank.counts.tolist() == [3, 4, 0]
    assert bank.p.tolist() == [0.6, 0.8, 0.0]
    assert bank.best_similarity.tolist() == pytest.approx(
        [math.cos(math.radians(degrees)) for degrees in (10, 10, 100)]
    )
    assert bank.top_indices[0].tolist() == [0, 1, 4]  # tied: the earlier first
    assert bank.top_indices[2].tolist() == [3, 2, 1]
    assert bank.best_index[0] == 0
    intervals = bank.intervals()
    assert intervals.tolist() == [list(clopper_pearson(count, 5)) for count in (3, 4, 0)]


def test_a_sample_at_the_threshold_counts():
    vector = torch.tensor([[1.0, 0.0]])
    assert SampleBank.compare(vector, vector, threshold=1.0).counts.tolist() == [1]


@pytest.fixture(scope="module")
def scattered():
    generator = torch.Generator().manual_seed(3)
    samples, targets = (
        torch.nn.functional.normalize(
            torch.randn(count, 6, generator=generator, dtype=torch.float64), dim=1
        )
        for count in (53, 17)
    )
    return samples, targets


@pytest.mark.parametrize("block_size", [1, 4, 7, 53, 1000])
def test_blocks_do_not_change_the_result(scattered, block_size):
    samples, targets = scattered
    similarity = targets @ samples.T
    bank = SampleBank.compare(samples, targets, threshold=0.4, num_top=5, block_size=block_size)
    best = similarity.topk(5)
    assert bank.counts.tolist() == (similarity >= 0.4).sum(1).tolist()
    assert torch.equal(bank.top_indices, best.indices)
    torch.testing.assert_close(bank.top_similarities, best.values)
    share = share_replicating(samples, targets, 0.7, block_size=block_size)
    assert share.count == int((similarity >= 0.7).any(0).sum())
    assert 0 < share.count < 53
    groups = near_duplicate_groups(samples, 0.8, block_size=block_size)
    assert torch.equal(groups, near_duplicate_groups(samples, 0.8))
    assert 1 < int(groups.max()) < 52


def test_share_counts_a_sample_once_however_many_images_it_replicates():
    share = share_replicating(SAMPLES, TARGETS, math.cos(math.radians(45)))
    assert (share.count, share.total, share.rate) == (5, 5, 1.0)
    share = share_replicating(SAMPLES, TARGETS, math.cos(math.radians(15)))
    assert (share.count, share.rate) == (3, 0.6)  # 0, 80 and 100
    assert (share.low, share.high) == clopper_pearson(3, 5)


def test_groups_are_linked_through_others():
    # 0 - 20 - 40 is a chain although 0 and 40 differ; 100 and 110 are a pair; 200 is alone.
    angles = at_angles(100, 0, 200, 40, 110, 20)
    groups = near_duplicate_groups(angles, math.cos(math.radians(25)))
    assert groups.tolist() == [0, 1, 2, 1, 0, 1]
    assert near_duplicate_groups(angles, 0.9999).tolist() == [0, 1, 2, 3, 4, 5]
    assert near_duplicate_groups(angles[:0], 0.5).tolist() == []


def test_an_empty_bank_is_refused():
    with pytest.raises(ValueError, match="draw at least 1 sample"):
        SampleBank.compare(SAMPLES[:0], TARGETS, threshold=0.5)
    with pytest.raises(ValueError, match=r"num_top=6 must lie in \[1, 5\]"):
        SampleBank.compare(SAMPLES, TARGETS, threshold=0.5, num_top=6)
    with pytest.raises(ValueError, match="trials=0"):
        share_replicating(SAMPLES[:0], TARGETS, 0.5)
