"""The replication test of a run: a criterion, a similarity network and a second opinion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from invmm.engine.criterion import ReplicationCriterion
from invmm.engine.protocols import Similarity


@runtime_checkable
class SimilarityRecipe(Protocol):
    """How to get a similarity network."""

    def load(self, device: torch.device) -> Similarity:
        """Loads the network for embeddings on a device."""
        ...

    def identity(self) -> dict[str, str | int]:
        """Name, weights, input size, normalisation: similarities compare only if all are equal."""
        ...


@dataclass(frozen=True, kw_only=True)
class Replication(ReplicationCriterion):
    """A criterion, and the similarity networks that its samples are compared by.

    Attributes:
        similarity: decides which samples are replicas.
        second_opinion: its similarities are recorded and decide nothing; a control against
            artefacts of the first network.
    """

    similarity: SimilarityRecipe
    second_opinion: SimilarityRecipe | None = None
