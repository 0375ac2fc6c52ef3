"""Near-duplicates by shared replicas, against sets and a closure by hand."""

from __future__ import annotations

import numpy as np
import pytest

from invmm.results.groups import near_duplicates


def indices(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize(("left", "right", "are_alike"), [
    ((1, 2), (1, 2), True),
    ((1, 2, 3, 4), (1, 2, 5, 6, 7), True),
    ((1, 2, 3, 4, 5), (1, 2, 6, 7, 8), False),  # 2 of 5 are less than half
    ((1, 2), range(1000), True),  # half of the rarer, however many the other has
    ((1,), (1,), False),  # one sample may be like two images by chance
    ((), (), False),
    ((1, 2), (3, 4), False),
])  # fmt: skip
def test_two_images_are_alike_if_half_of_the_rarer_ones_replicas_are_shared(left, right, are_alike):
    groups = near_duplicates({"a": indices(*left), "b": indices(*right)})
    assert (set(groups) == {"a", "b"}) is are_alike
    assert are_alike or groups == {}


def test_a_group_is_named_by_its_most_replicated_image_and_reaches_as_far_as_links_do():
    groups = near_duplicates({
        "end": indices(0, 1),
        "middle": indices(0, 1, 2, 3),
        "other end": indices(2, 3, 4, 5, 6),
        "alone": indices(7, 8, 9, 10, 11, 12),
        "second": indices(20, 21),
        "first of equals": indices(30, 31),
        "third": indices(31, 30),
        "too": indices(20, 21),
    })  # fmt: skip
    assert groups == {
        "end": "other end", "middle": "other end", "other end": "other end",
        "second": "second", "too": "second",
        "first of equals": "first of equals", "third": "first of equals",
    }  # fmt: skip


def test_no_image_has_no_group():
    assert near_duplicates({}) == {}


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_the_closure_of_the_links(seed):
    rng = np.random.default_rng(seed)
    replicas = {
        f"{image}": rng.choice(60, size=rng.integers(0, 12), replace=False) for image in range(40)
    }
    sets = {image: set(found.tolist()) for image, found in replicas.items()}

    def is_linked(left: str, right: str) -> bool:
        shared = len(sets[left] & sets[right])
        return shared >= 2 and 2 * shared >= min(len(sets[left]), len(sets[right]))

    expected = {}
    for image in sets:
        reached, grown = set(), {image}
        while grown != reached:
            reached = grown
            grown = reached | {other for one in reached for other in sets if is_linked(one, other)}
        if len(reached) > 1:
            expected[image] = max(sorted(reached, key=int), key=lambda member: len(sets[member]))
    assert len(set(expected.values())) >= 2
    assert near_duplicates(replicas) == expected
