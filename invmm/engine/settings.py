"""How images share the network, and how rows per call are measured where they are "auto"."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from invmm.diffusion.guidance import Condition, repeated
from invmm.engine.memory import is_out_of_memory
from invmm.engine.protocols import Network, Similarity

Count = Annotated[int, Ge(1)]
MAX_ROWS = 1024
_WORTH = 1.1
_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How images share the network.

    Attributes:
        slots: images in flight; changes the speed, never a result. "auto" begins another image
            whenever a call would be partly padding.
        rows_denoise: rows per call of the denoiser with gradients; memory grows with it. A result
            is bitwise reproducible at the same number of rows only, so it belongs to a run's
            identity. "auto" measures it once, at the beginning of a run: it is doubled while that
            speeds up the network by a tenth and fits into memory.
        rows_sample: rows per run of the sampler; with guidance, the network evaluates twice as
            many.
        rows_embed: rows per call of the similarity network.
    """

    slots: Count | Literal["auto"] = "auto"
    rows_denoise: Count | Literal["auto"] = 16
    rows_sample: Count | Literal["auto"] = 8
    rows_embed: Count | Literal["auto"] = 8

    @property
    def rows_to_measure(self) -> list[str]:
        """Names of the row counts that are "auto" and have to be measured."""
        rows = ("rows_denoise", "rows_sample", "rows_embed")
        return [name for name in rows if getattr(self, name) == "auto"]

    def chosen(
        self, network: Network, similarity: Similarity, condition: Condition | None = None
    ) -> EngineSettings:
        """The settings with every row count that is "auto" measured on this device.

        Args:
            network: the model.
            similarity: the similarity network.
            condition: one row of the shapes that the run has; None for an unconditional model.
        """

        def blank(rows: int) -> Tensor:
            return torch.zeros(rows, *network.latent_shape, device=network.device)

        def denoise(rows: int, *, backward: bool) -> None:
            latents = blank(rows).requires_grad_(backward)
            timesteps = torch.zeros(rows, dtype=torch.long, device=network.device)
            with torch.set_grad_enabled(backward):
                output = network.predict(latents, timesteps, repeated(condition, rows))
                if backward:
                    output.sum().backward()

        def embed(rows: int) -> None:
            with torch.no_grad():
                similarity.embed(network.decode(blank(rows)))

        calls: dict[str, Callable[[int], None]] = {
            "rows_denoise": lambda rows: denoise(rows, backward=True),
            "rows_sample": lambda rows: denoise(rows, backward=False),
            "rows_embed": embed,
        }
        measured = {n: fastest_rows(calls[n], network.device) for n in self.rows_to_measure}
        return replace(self, **measured)


def fastest_rows(call: Callable[[int], None], device: torch.device) -> int:
    """Doubles the rows of a call while rows per second grow by a tenth and memory suffices."""

    def rate(rows: int) -> float:
        seconds = []
        for _ in range(_REPEATS + 1):  # the first one warms up
            start = time.perf_counter()
            call(rows)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        return rows / min(seconds[1:])

    rows, best = 1, rate(1)
    while rows < MAX_ROWS:
        try:
            doubled = rate(2 * rows)
        except Exception as error:
            if is_out_of_memory(error):
                return max(1, rows // 2)  # leaves room for what a run holds beside the call
            raise
        if doubled < _WORTH * best:
            return rows
        rows, best = 2 * rows, doubled
    return rows
