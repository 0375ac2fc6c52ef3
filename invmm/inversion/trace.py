"""What an inversion remembers on its way: its curves, its closest samples, its end."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from invmm.engine.check import Check
from invmm.engine.outcomes import Outcome, Status
from invmm.inversion.noise import GaussianNoise


class Trace:
    """Collects the curves of one inversion and turns them into its outcome."""

    def __init__(self, noise: GaussianNoise) -> None:
        self.noise = noise
        self.steps = 0
        self.curves: dict[str, list[float]] = defaultdict(list)
        self.closest: Check | None = None

    def stepped(self, *, loss: float, kl: float, kl_weight: float) -> None:
        """After an optimiser step: the losses it saw and the weight it used."""
        self.steps += 1
        self.curves["loss"].append(loss)
        self.curves["kl"].append(kl)
        self.curves["kl_weight"].append(kl_weight)

    def checked(self, check: Check) -> None:
        """After a replication check; a passed one becomes the closest whatever its similarity."""
        best = check.similarities.max().item()
        self.curves["similarity"].append(best)
        self.curves["similarity_min"].append(check.similarities.min().item())
        self.curves["similarity_step"].append(self.steps)
        if check.passed or self.closest is None or best > self.closest.similarities.max():
            self.closest = check

    def replicated(self) -> Outcome:
        """The distribution as it stands replicates: its KL is the score."""
        with torch.no_grad():
            kl = self.noise.kl().double().item()
        return self._outcome(
            Status.REPLICATED,
            score=kl,
            score_nats=kl * self.noise.mean.numel(),
            replication_rate=1.0,
        )

    def not_replicated(self) -> Outcome:
        """The budget is used up."""
        return self._outcome(Status.NOT_REPLICATED)

    def diverged(self, error: Exception) -> Outcome:
        """The numbers stopped being finite."""
        return self._outcome(Status.DIVERGED, error=f"{error} at step {self.steps + 1}")

    def _outcome(self, status: Status, **results: Any) -> Outcome:
        samples = best = None
        if self.closest is not None:
            order = self.closest.similarities.argsort(descending=True)
            samples = self.closest.pixels[order].cpu()
            best = max(self.curves["similarity"])
        return Outcome(
            status=status,
            best_similarity=best,
            steps=self.steps,
            curves=dict(self.curves),
            tensors=self.noise.tensors(),
            samples=samples,
            **results,
        )
