"""What one bank of free samples says of many images at once.

M samples drawn from the prior, without any search, are compared with n images. The share that
replicates an image is the plain estimate of its replication probability, which suffices down to
about 10 / M; for rarer images the closest samples are where splitting starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from invmm.probability.certificate import clopper_pearson

BLOCK_SIZE = 4096
"""Rows and columns of similarities that are held at a time, 64 MiB in single precision (ours)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleBank:
    """Free samples compared with every image; rows of all tensors follow the images.

    Images that share a bank share its luck: their counts are correlated, and each interval holds
    for one image at a time.

    Attributes:
        num_samples: M.
        counts: (n,) integer; samples at or above the threshold.
        top_similarities: (n, k) the closest samples' cosine similarities, best first.
        top_indices: (n, k) which samples they are; of equal ones the earlier drawn.
    """

    num_samples: int
    counts: Tensor
    top_similarities: Tensor
    top_indices: Tensor

    @classmethod
    def compare(
        cls,
        sample_embeddings: Tensor,
        target_embeddings: Tensor,
        *,
        threshold: float,
        num_top: int = 1,
        block_size: int = BLOCK_SIZE,
    ) -> SampleBank:
        """Compares all samples with all images, a block of similarities at a time.

        Args:
            sample_embeddings: (M, D) unit-norm.
            target_embeddings: (n, D) unit-norm, on the same device.
            threshold: smallest cosine similarity of a replica, in [-1, 1].
            num_top: k, how many of the closest samples are remembered for each image.
            block_size: rows and columns of a block; changes memory, not the result.

        Raises:
            ValueError: no samples, or more to remember than there are.
        """
        num_samples = len(sample_embeddings)
        if num_samples == 0:
            raise ValueError("an empty bank of samples says nothing; draw at least 1 sample")
        if not 1 <= num_top <= num_samples:
            raise ValueError(f"num_top={num_top} must lie in [1, {num_samples}], the bank's size")
        counts, similarities, indices = [], [], []
        for targets in target_embeddings.split(block_size):
            count = torch.zeros(len(targets), dtype=torch.long, device=targets.device)
            top = targets.new_empty(len(targets), 0)
            index = count.new_empty(len(targets), 0)
            for start, block in _blocks(sample_embeddings, block_size):
                found = targets @ block.T
                count += (found >= threshold).sum(1)
                drawn = torch.arange(start, start + len(block), device=targets.device)
                index = torch.cat([index, drawn.expand(len(targets), -1)], 1)
                # Stable, so that the earlier of equal samples stays ahead in every blocking.
                top, order = torch.cat([top, found], 1).sort(dim=1, descending=True, stable=True)
                top, index = top[:, :num_top], index.gather(1, order[:, :num_top])
            counts.append(count)
            similarities.append(top)
            indices.append(index)
        return cls(
            num_samples=num_samples,
            counts=torch.cat(counts),
            top_similarities=torch.cat(similarities),
            top_indices=torch.cat(indices),
        )

    @property
    def p(self) -> Tensor:
        """(n,) replication probabilities, counts / M, double precision."""
        return self.counts.double() / self.num_samples

    @property
    def best_similarity(self) -> Tensor:
        """(n,) highest cosine similarity of any sample."""
        return self.top_similarities[:, 0]

    @property
    def best_index(self) -> Tensor:
        """(n,) the sample that has it."""
        return self.top_indices[:, 0]

    def intervals(self, confidence: float = 0.95) -> Tensor:
        """(n, 2) Clopper-Pearson ends of p, double precision."""
        counts = self.counts.tolist()
        ends = {count: clopper_pearson(count, self.num_samples, confidence) for count in {*counts}}
        return torch.tensor([ends[count] for count in counts], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Samples that replicate any of a set of images.

    Attributes:
        count: samples that do.
        total: samples drawn.
        low: lower end of the Clopper-Pearson 95 % interval of the share.
        high: its upper end.
    """

    count: int
    total: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """Count / total."""
        return self.count / self.total


def share_replicating(
    sample_embeddings: Tensor,
    target_embeddings: Tensor,
    threshold: float,
    *,
    block_size: int = BLOCK_SIZE,
) -> Share:
    """How much of what the model draws is a replica of any of these images.

    Args:
        sample_embeddings: (M, D) unit-norm, of independent free samples.
        target_embeddings: (n, D) unit-norm, on the same device.
        threshold: smallest cosine similarity of a replica, in [-1, 1].
        block_size: rows and columns of similarities that are held at a time.

    Raises:
        ValueError: no samples.
    """
    count = 0
    for samples in sample_embeddings.split(block_size):
        replicates = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
        for targets in target_embeddings.split(block_size):
            replicates |= (samples @ targets.T >= threshold).any(1)
        count += int(replicates.sum())
    low, high = clopper_pearson(count, len(sample_embeddings))
    return Share(count=count, total=len(sample_embeddings), low=low, high=high)


def near_duplicate_groups(
    embeddings: Tensor, threshold: float, *, block_size: int = BLOCK_SIZE
) -> Tensor:
    """Groups of images that are linked, directly or through others, by near-duplication.

    Resampling by group instead of by image keeps intervals honest where images repeat.

    Args:
        embeddings: (n, D) unit-norm.
        threshold: similarity from which two images are linked, in [-1, 1].
        block_size: rows and columns of similarities that are held at a time.

    Returns:
        (n,) integer on the CPU: the group of each image, numbered from 0 in the order of their
        first images.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(embeddings)
    links = [torch.empty(0, 2, dtype=torch.long)]
    for start, rows in _blocks(embeddings, block_size):
        for other, columns in _blocks(embeddings[start:], block_size):
            linked = (rows @ columns.T >= threshold).nonzero().cpu()
            links.append(linked + torch.tensor([start, start + other]))
    first, second = torch.cat(links).T.numpy()
    graph = coo_array(([True] * len(first), (first, second)), shape=(n, n))
    _, labels = connected_components(graph, directed=False)
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels.tolist()])


def _blocks(rows: Tensor, block_size: int) -> Iterator[tuple[int, Tensor]]:
    """Each block with the index of its first row."""
    for start in range(0, len(rows), block_size):
        yield start, rows[start : start + block_size]
