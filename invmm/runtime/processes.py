"""The processes of a Lightning trainer: how they are started, and that all of them end."""

from __future__ import annotations

import logging
import re
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from invmm.runtime.trainer import TrainerSettings

EXIT_DONE, EXIT_INCOMPLETE = 0, 3

# Spawned workers import this module before Lightning starts to talk in them.
for _name in ("pytorch_lightning", "lightning_fabric", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pytorch_lightning")

WORKER_DEATHS = (ProcessExitedException, ProcessRaisedException)
"""What a parent sees of a worker that was killed or raised."""


def trainer_options(settings: TrainerSettings) -> dict[str, Any]:
    """Options of `pl.Trainer` that measuring and training share."""
    return {
        "accelerator": settings.accelerator,
        "devices": settings.devices,
        "strategy": "ddp_spawn" if settings.devices > 1 else "auto",
        "use_distributed_sampler": False,
        "enable_model_summary": False,
    }


@contextmanager
def no_process_left(trainer: pl.Trainer) -> Iterator[None]:
    """Ends all workers when the block ends, however it ends."""
    try:
        yield
    finally:
        for process in getattr(trainer.strategy.launcher, "procs", []):
            process.terminate()
            process.join(timeout=10)
            process.kill()


def last_line(error: BaseException) -> str:
    """The message of an error without the traceback that a worker's carries."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def peak_memory_bytes() -> int:
    """The most that this process ever held in main memory."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        # Counts what the process inherited from the one that started it, too.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(peak) * 1024
