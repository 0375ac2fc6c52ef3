"""Records the curves and the closest check of an inversion, and makes its outcome."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from invmm.engine.check import Check
from invmm.engine.outcomes import NonFiniteError, Outcome, Status
from invmm.inversion.confirmation import Confirmation
from invmm.inversion.controllers import Losses
from invmm.inversion.noise import GaussianNoise
from invmm.inversion.soft_prompt import FixedPrompt, SoftPrompt


class Trace:
    """Collects the curves of one inversion and turns them into its outcome."""

    def __init__(
        self, noise: GaussianNoise, prompt: FixedPrompt | SoftPrompt | None = None
    ) -> None:
        self.noise, self.prompt = noise, prompt or FixedPrompt()
        self.curves: dict[str, list[float]] = defaultdict(list)
        self.closest: Check | None = None
        self._unread: list[tuple[Tensor, Tensor]] = []

    @property
    def steps(self) -> int:
        """Optimiser steps whose losses have been read."""
        return len(self.curves["loss"])

    @property
    def closest_scale(self) -> float | None:
        """The guidance scale of the closest check so far."""
        return self.closest.guidance_scale if self.closest else None

    def stepped(self, *, loss: Tensor, kl: Tensor, kl_weight: float) -> None:
        """Records the losses and the weight of an optimiser step; the losses stay unread."""
        self._unread.append((loss.detach(), kl.detach()))
        self.curves["kl_weight"].append(kl_weight)

    def read(self) -> Losses:
        """The losses of all steps; those since the last call are fetched from the device at once.

        Raises:
            NonFiniteError: one of them is NaN or infinite; the curves end before it.
        """
        unread, self._unread = self._unread, []
        values = torch.stack([value for pair in unread for value in pair]) if unread else None
        for loss, kl in () if values is None else values.reshape(-1, 2).tolist():
            if not math.isfinite(loss + kl):
                broken = kl if math.isfinite(loss) else loss
                del self.curves["kl_weight"][self.steps :]
                raise NonFiniteError(f"the loss is {broken}")
            self.curves["loss"].append(loss)
            self.curves["kl"].append(kl)
        curves = zip(self.curves["loss"], self.curves["kl"], self.curves["kl_weight"], strict=True)
        return Losses(
            reconstruction=self.curves["loss"],
            total=[loss + weight * kl for loss, kl, weight in curves],
        )

    def checked(self, check: Check) -> None:
        """Records a replication check; one that passed becomes the closest in any case."""
        best = check.best
        self.curves["similarity"].append(best)
        self.curves["similarity_min"].append(check.similarities.min().item())
        self.curves["similarity_step"].append(self.steps)
        if check.passed or self.closest is None or best > self.closest.best:
            self.closest = check

    def replicated(self, confirmation: Confirmation | None = None) -> Outcome:
        """The outcome if the current distribution replicates: its KL is the score.

        Args:
            confirmation: gives the replication rate; without one it is 1, that of the check.
        """
        with torch.no_grad():
            kl = self.noise.kl().double().item()
        outcome = self._outcome(
            Status.REPLICATED,
            score=kl,
            score_nats=kl * self.noise.mean.numel(),
            replication_rate=1.0,
        )
        if confirmation is None:
            return outcome
        columns = {**outcome.columns, **confirmation.columns()}
        if self.prompt.parameters():  # it would hold for the searched prompt, not for the caption
            columns["log_p_certified"] = None
        return replace(outcome, replication_rate=confirmation.rate, columns=columns)

    def not_replicated(self) -> Outcome:
        """The outcome if the budget is used up."""
        return self._outcome(Status.NOT_REPLICATED)

    def diverged(self, error: Exception) -> Outcome:
        """The outcome if a number is not finite."""
        return self._outcome(
            Status.DIVERGED, error=f"at step {self.steps + 1}: {error}", tensors={}
        )

    def _outcome(self, status: Status, **results: Any) -> Outcome:
        samples = best = None
        columns: dict[str, float | str] = dict(self.prompt.columns())
        if self.closest is not None:
            order = self.closest.similarities.argsort(descending=True)
            samples = self.closest.pixels[order].cpu()
            best = max(self.curves["similarity"])
            columns["guidance_scale"] = self.closest.guidance_scale
        tensors = {**self.noise.tensors(), **self.prompt.tensors()}
        options = {"tensors": tensors, "columns": columns, **results}
        return Outcome(
            status=status,
            best_similarity=best,
            steps=self.steps,
            curves=dict(self.curves),
            samples=samples,
            **options,
        )
