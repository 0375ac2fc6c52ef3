"""How many devices a run uses."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """Devices of a Lightning trainer.

    Attributes:
        accelerator: auto takes a GPU where there is one.
        devices: processes, one a device; images are shared out between them as they go.
        threads_per_device: CPU threads of each process; null shares the cores out evenly. Sums
            are rounded differently with another number of threads, so fix it where records of
            different numbers of devices must agree to the last bit.
        tflops: arithmetic that one device sustains, in 10^12 operations a second; dry_run then
            estimates hours. `make bench` prints it for this machine.
    """

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    devices: Annotated[int, Ge(1)] = 1
    threads_per_device: Annotated[int, Ge(1)] | None = None
    tflops: Annotated[float, Gt(0)] | None = None

    @property
    def num_threads(self) -> int:
        """CPU threads of each process."""
        return self.threads_per_device or max(1, (os.cpu_count() or 1) // self.devices)
