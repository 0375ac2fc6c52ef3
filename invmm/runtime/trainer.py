"""How many devices a run uses."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from invmm.faults import Refusal


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

    def check_machine(self) -> None:
        """Refuses devices that this machine does not have; a dry run plans for another machine.

        Raises:
            ValueError: there is no such device, or fewer than `devices`.
        """
        if self.accelerator == "cpu":
            return
        import torch

        counts = {"mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count()}
        # As Lightning chooses: an Apple GPU first.
        kinds = (self.accelerator,) if self.accelerator in counts else tuple(counts)
        count = next((counts[kind] for kind in kinds if counts[kind]), 0)
        if not count:
            if self.accelerator == "auto":
                return  # the processes share the CPU
            raise Refusal(
                f"trainer.accelerator={self.accelerator}: {why_no_gpu()}; use trainer=cpu, or "
                "dry_run=true to plan",
                "trainer.accelerator",
            )
        if self.devices > count:
            raise Refusal(
                f"trainer.devices={self.devices} is more than the GPUs here; use "
                f"trainer.devices={count}",
                "trainer.devices",
            )

    @property
    def num_threads(self) -> int:
        """CPU threads of each process."""
        return self.threads_per_device or max(1, (os.cpu_count() or 1) // self.devices)


def why_no_gpu() -> str:
    """Why torch finds no GPU: how it was built, or which GPUs it may see."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"this PyTorch ({torch.__version__}) is built for CPUs"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f" that CUDA_VISIBLE_DEVICES={visible!r} lets through"
    return f"there is no GPU here{hidden}"
