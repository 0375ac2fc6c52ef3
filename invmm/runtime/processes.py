"""The processes of a Lightning trainer: how they are started, and that all of them end."""

from __future__ import annotations

import logging
import os
import re
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.environments import LightningEnvironment
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from invmm.runtime.trainer import TrainerSettings

# Spawned workers import this module before Lightning starts to talk in them.
for _name in ("pytorch_lightning", "lightning_fabric", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pytorch_lightning")

WORKER_DEATHS = (ProcessExitedException, ProcessRaisedException)
"""What a parent sees of a worker that was killed or raised."""

_LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "STANDALONE_PORT", "TORCHELASTIC_USE_AGENT_STORE"),
)
"""Environment variables by which launchers tell processes their ranks and addresses."""


@contextmanager
def own_processes(settings: TrainerSettings, **options: Any) -> Iterator[pl.Trainer]:
    """A trainer that starts one process for each device, and ends them all with the block.

    Within SLURM, torchrun, LSF, MPI or Kubeflow, Lightning would read the launcher's variables in
    the processes that it starts itself, and each of those would be rank 0 of 1.

    Args:
        settings: accelerator and number of devices.
        options: further options of `pl.Trainer`.

    Raises:
        ValueError: a worker raised one, which arrives as text; as with a single device.
    """
    inherited = {name: os.environ.pop(name) for name in _LAUNCHER_VARIABLES if name in os.environ}
    launcher = None
    try:
        trainer = pl.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            strategy="ddp_spawn" if settings.devices > 1 else "auto",
            plugins=[LightningEnvironment()],
            use_distributed_sampler=False,
            enable_model_summary=False,
            **options,
        )
        launcher = trainer.strategy.launcher
        yield trainer
    except ProcessRaisedException as error:
        kind, _, message = last_line(error).partition(": ")
        if kind == ValueError.__name__:
            raise ValueError(message) from None
        raise
    finally:
        for process in getattr(launcher, "procs", []):
            process.terminate()
            process.join(timeout=10)
            process.kill()
        for name in _LAUNCHER_VARIABLES:
            os.environ.pop(name, None)  # set by Lightning
        os.environ.update(inherited)


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
