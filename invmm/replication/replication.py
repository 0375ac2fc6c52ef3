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
        """The network, ready on its device."""
        ...

    def identity(self) -> dict[str, str | int]:
        """What makes two similarities comparable: name, weights, input size, normalisation."""
        ...


@dataclass(frozen=True, kw_only=True)
class Replication(ReplicationCriterion):
    """A criterion and the networks that judge it.

    Attributes:
        similarity: decides.
        second_opinion: stored beside, decides nothing; a control against artefacts of the first.
    """

    similarity: SimilarityRecipe
    second_opinion: SimilarityRecipe | None = None
