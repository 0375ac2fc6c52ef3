"""When the samples of a noise distribution count as replicas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le


@dataclass(frozen=True, kw_only=True)
class ReplicationCriterion:
    """When a noise distribution counts as replicating: all of its samples are close (paper).

    Attributes:
        threshold: smallest cosine similarity of a replica, in [-1, 1] (paper: 0.5). It means
            something only together with the similarity network and the data; calibrate it with
            `invmm-threshold`.
        num_samples: samples that must all replicate (paper: 8).
        early_exit: draw samples in rounds of 1, 1, 2, 4, ... and stop at the first that fails; if
            only a share must replicate, at the failure that puts it out of reach. The decision is
            the same; most checks then cost an eighth (ours).
        num_confirm: fresh samples drawn from a distribution that has passed, for its replication
            rate with an exact interval and a certificate; they change no score. 0 draws none
            (ours).
    """

    threshold: Annotated[float, Ge(-1), Le(1)] = 0.5
    num_samples: Annotated[int, Ge(1)] = 8
    early_exit: bool = True
    num_confirm: Annotated[int, Ge(0)] = 64


@dataclass(frozen=True, kw_only=True)
class Passing:
    """The test that an image had to pass in a search to be REPLICATED.

    Attributes:
        count: least number of replicas among the samples of a check that passes.
        num_samples: samples of a check.
        looks: largest number of checks made, any of which could have passed; most of them see
            different distributions.
        confidence: of the recorded interval of the rate.
        is_recorded: whether the record holds the count of this check, not of later samples.
    """

    count: int
    num_samples: int
    looks: int
    confidence: float
    is_recorded: bool

    @property
    def rate(self) -> float:
        """Share of the samples that must replicate."""
        return self.count / self.num_samples
