"""Near-duplicates among the images of a run, told by the free samples that replicate them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

MIN_SHARED = 2
"""Replicas that two images share at least, if they are near-duplicates (ours)."""
MIN_SHARE = 0.5
"""Of the replicas of the rarer one, how many are shared at least (ours)."""


def near_duplicates(replicas: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Image id -> group, for the images that some other one looks like.

    Two images whose replicas are largely the same free samples are one image to the criterion,
    and are linked; a group is whatever links connect. Images that are hardly replicated may be
    alike without being found.

    Args:
        replicas: image id -> indices of the free samples that replicate it, each once, all out of
            one bank.

    Returns:
        Groups of two images at least; a group is named by the id of its most replicated image,
        the first of them if there are several.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    ids = list(replicas)
    counts = np.array([len(replicas[image_id]) for image_id in ids])
    if not counts.any():
        return {}
    samples = np.concatenate([replicas[image_id] for image_id in ids]).astype(np.int64)
    is_replica = csr_array((np.ones_like(samples), samples, np.r_[0, counts.cumsum()]))
    shared = (is_replica @ is_replica.T).tocoo()
    left, right = shared.row, shared.col
    rarer = np.minimum(counts[left], counts[right])
    linked = (shared.data >= MIN_SHARED) & (shared.data >= MIN_SHARE * rarer)
    links = csr_array((shared.data[linked], (left[linked], right[linked])), shape=shared.shape)
    labels = connected_components(links, directed=False)[1]
    most_replicated = np.argsort(-counts, kind="stable")
    first = most_replicated[np.unique(labels[most_replicated], return_index=True)[1]]
    sizes = np.bincount(labels)
    return {
        image_id: ids[first[label]]
        for image_id, label in zip(ids, labels, strict=True)
        if sizes[label] > 1
    }
