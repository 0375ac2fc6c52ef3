"""How images share the network, and how that is chosen where it is left open."""

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
            whenever a call would go out partly empty.
        rows_denoise: rows per call of the denoiser with gradients; memory grows with it. A result
            is bitwise reproducible at the same number of rows only, so it belongs to a run's
            identity. "auto" doubles it, once at the beginning of a run, while that speeds up the
            network by a tenth and fits into memory; the run keeps what was found.
        rows_sample: rows per run of the sampler; a guided one evaluates the network on twice as
            many.
        rows_embed: rows per call of the similarity network.
    """

    slots: Count | Literal["auto"] = "auto"
    rows_denoise: Count | Literal["auto"] = 16
    rows_sample: Count | Literal["auto"] = 8
    rows_embed: Count | Literal["auto"] = 8

    @property
    def open(self) -> list[str]:
        """The row counts that are left to be chosen."""
        rows = ("rows_denoise", "rows_sample", "rows_embed")
        return [name for name in rows if getattr(self, name) == "auto"]

    def chosen(
        self, network: Network, similarity: Similarity, condition: Condition | None = None
    ) -> EngineSettings:
        """The settings with every open row count measured on this device.

        Args:
            network: the model.
            similarity: the similarity network.
            condition: one row like those of the run.
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
        found = {name: fastest_rows(calls[name], network.device) for name in self.open}
        return replace(self, **found)


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
            found = rate(2 * rows)
        except Exception as error:
            if is_out_of_memory(error):
                return max(1, rows // 2)  # what a run holds beside the call needs room too
            raise
        if found < _WORTH * best:
            return rows
        rows, best = 2 * rows, found
    return rows
