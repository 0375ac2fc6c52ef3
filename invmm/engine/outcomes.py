"""How a measurement ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Status(StrEnum):
    """How a measurement ended; each status says what its score means."""

    REPLICATED = "REPLICATED"
    """A replicating noise distribution was found; the score is its divergence from the prior."""
    NOT_REPLICATED = "NOT_REPLICATED"
    """None was found within the budget: no score; the true one is censored, not infinite."""
    ESTIMATED = "ESTIMATED"
    """The replication probability was estimated, or bounded from below by a certificate (column
    `method`); the score is -log p per latent dimension."""
    CENSORED = "CENSORED"
    """The probability is below what the budget can resolve: no score, but an upper bound of p."""
    SCORED = "SCORED"
    """A membership score, which has no threshold; lower means more like a training image."""
    DIVERGED = "DIVERGED"
    """A loss or a sample stopped being finite; lower the learning rate or use fp32."""
    FAILED = "FAILED"
    """The image or the measurement raised an error; `error` holds it. A rerun with
    `retry_failed=true` tries again."""

    @property
    def has_score(self) -> bool:
        """Whether a score was found."""
        return self in (Status.REPLICATED, Status.ESTIMATED, Status.SCORED)

    @property
    def is_censored(self) -> bool:
        """Whether the budget ended before a score was found."""
        return self in (Status.NOT_REPLICATED, Status.CENSORED)


class NonFiniteError(ArithmeticError):
    """Thrown into a measurement whose numbers are no longer finite."""


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """Rows the network evaluated for one image; padding is not counted.

    Attributes:
        forward: rows through the network forwards, with or without gradients.
        backward: rows backpropagated (each costs about one more forward with frozen weights).
        sampler: those of `forward` that samplers took.
    """

    forward: int = 0
    backward: int = 0
    sampler: int = 0

    @property
    def in_forwards(self) -> int:
        """The cost in forward evaluations: one that is backpropagated counts as two."""
        return self.forward + self.backward

    def __add__(self, other: Evaluations) -> Evaluations:
        """The sum of both."""
        return Evaluations(
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
            sampler=self.sampler + other.sampler,
        )

    def __mul__(self, times: int) -> Evaluations:
        """The evaluations of so many repetitions."""
        return Evaluations(
            forward=self.forward * times,
            backward=self.backward * times,
            sampler=self.sampler * times,
        )


@dataclass(frozen=True, kw_only=True)
class CostRange:
    """Evaluations of an image that is never replicated and uses up its whole budget.

    Attributes:
        fewest: every check is decided by its first sample.
        most: every check draws all its samples.
    """

    fewest: Evaluations
    most: Evaluations

    def __add__(self, other: Evaluations) -> CostRange:
        """The range shifted by evaluations that are needed in any case."""
        return CostRange(fewest=self.fewest + other, most=self.most + other)

    def __mul__(self, times: int) -> CostRange:
        """The range of so many repetitions."""
        return CostRange(fewest=self.fewest * times, most=self.most * times)


class Spent(StrEnum):
    """What time is spent on; each has a column of the score table."""

    NETWORK = "network"
    """Denoiser, forwards and backwards, of the search itself."""
    SAMPLER = "sampler"
    """Drawing samples for checks."""
    SIMILARITY = "similarity"
    """Decoding and embedding samples."""
    MEASUREMENT = "measurement"
    """The search outside the network: optimiser, losses, random numbers."""
    PREPARATION = "preparation"
    """Reading, encoding and embedding the image."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Where the time of one image went; calls shared with other images are split by rows.

    Attributes:
        total: wall time from start to end; images that share the engine overlap.
        on: what it was spent on.
    """

    total: float = 0.0
    on: Mapping[Spent, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a measurement for one image.

    Attributes:
        status: how it ended.
        score: the measure per latent dimension (InvMM: nats); None unless `status.has_score`.
        score_nats: the measure summed over latent dimensions; None for membership scores too.
        replication_rate: share of samples that replicate, None unless a full set was drawn.
        best_similarity: highest similarity of any sample drawn, in [-1, 1].
        steps: optimiser steps taken.
        error: one line, for DIVERGED and FAILED.
        curves: name -> values over the run; a sparse curve has its steps in "<name>_step".
        tensors: arrays by name (of an inversion, mean and log-variance of the noise).
        samples: (N, 3, H, W) pixels in [-1, 1] of the closest check, best first.
        columns: further columns of the score table that only this measurement has.
        evaluations: counted by the engine.
        seconds: measured by the engine.
    """

    status: Status
    score: float | None = None
    score_nats: float | None = None
    replication_rate: float | None = None
    best_similarity: float | None = None
    steps: int = 0
    error: str | None = None
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    samples: Tensor | None = None
    columns: Mapping[str, float | int | str | None] = field(default_factory=dict)
    evaluations: Evaluations = Evaluations()
    seconds: Seconds = field(default_factory=Seconds)
