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
        early_exit: draw samples in rounds of 1, 1, 2, 4, ... and stop at the first that fails, or
            where a rate is asked for, at the failure that puts it out of reach. The decision is
            the same; most checks then cost an eighth (ours).
        num_confirm: fresh samples of a distribution that has passed, for its rate, the exact
            interval and the certificate; they change no score. 0 draws none (ours).
    """

    threshold: Annotated[float, Ge(-1), Le(1)] = 0.5
    num_samples: Annotated[int, Ge(1)] = 8
    early_exit: bool = True
    num_confirm: Annotated[int, Ge(0)] = 64


@dataclass(frozen=True, kw_only=True)
class Passing:
    """What a search asked of its checks before it called an image REPLICATED.

    Attributes:
        count: replicas among the samples of one check, at least.
        num_samples: of a check.
        looks: checks that were made until one passed; most of them show another distribution.
        confidence: of the interval of the rate that is recorded with it.
        is_recorded: the recorded count is that of this check, not of samples drawn after it.
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
