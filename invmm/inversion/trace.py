"""What an inversion remembers on its way: its curves, its closest samples, its end."""

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
from invmm.inversion.prompt import FixedPrompt, SoftPrompt


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
        """After an optimiser step: the losses it saw and the weight it used; reads neither."""
        self._unread.append((loss.detach(), kl.detach()))
        self.curves["kl_weight"].append(kl_weight)

    def read(self) -> Losses:
        """The losses of all steps, those since the last time fetched from the device at once.

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
        """After a replication check; a passed one becomes the closest whatever its similarity."""
        best = check.best
        self.curves["similarity"].append(best)
        self.curves["similarity_min"].append(check.similarities.min().item())
        self.curves["similarity_step"].append(self.steps)
        if check.passed or self.closest is None or best > self.closest.best:
            self.closest = check

    def replicated(self, confirmation: Confirmation | None = None) -> Outcome:
        """The distribution as it stands replicates: its KL is the score.

        Args:
            confirmation: tells the rate at which it does; without one that of the check, 1.
        """
        with torch.no_grad():
            kl = self.noise.kl().double().item()
        found = self._outcome(
            Status.REPLICATED,
            score=kl,
            score_nats=kl * self.noise.mean.numel(),
            replication_rate=1.0,
        )
        if confirmation is None:
            return found
        columns = {**found.columns, **confirmation.columns()}
        if self.prompt.parameters():  # it would hold for the found prompt, not for the caption
            columns["log_p_certified"] = None
        return replace(found, replication_rate=confirmation.rate, columns=columns)

    def not_replicated(self) -> Outcome:
        """The budget is used up."""
        return self._outcome(Status.NOT_REPLICATED)

    def diverged(self, error: Exception) -> Outcome:
        """The numbers stopped being finite."""
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
        found = {"tensors": tensors, "columns": columns, **results}
        return Outcome(
            status=status,
            best_similarity=best,
            steps=self.steps,
            curves=dict(self.curves),
            samples=samples,
            **found,
        )
