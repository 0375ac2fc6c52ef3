"""Whether another launcher runs this command several times over."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class _Launcher:
    """How a launcher tells its processes apart.

    Attributes:
        name: for people.
        count, index: environment variables; SLURM_NTASKS is no count, since a batch script has
            it too and runs once.
        single: how it is told to start one process.
    """

    name: str
    count: str
    index: str
    single: str


_LAUNCHERS = (
    _Launcher("SLURM", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun --ntasks=1"),
    _Launcher("submitit", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_GLOBALID", "tasks_per_node=1"),
    _Launcher("LSF", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "jsrun --nrs 1"),
    _Launcher("MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpirun -n 1"),
    _Launcher("MPI", "PMI_SIZE", "PMI_RANK", "mpirun -n 1"),
    # Kubeflow sets the same variables.
    _Launcher("torchrun", "WORLD_SIZE", "RANK", "no torchrun, or --nproc-per-node=1"),
)


def refuse_copies(shard: str | None = None, *, can_shard: bool = True) -> None:
    """Refuses to do in each of several processes what is to be done once.

    Args:
        shard: the part of the images that this process measures: it has work of its own.
        can_shard: whether the command knows shards.

    Raises:
        ValueError: this is one of several processes.
    """
    for launcher in _LAUNCHERS if shard is None else ():
        index, count = _number(launcher.index, 0), _number(launcher.count, 1)
        if index == 0 and count == 1:
            continue
        cures = [f"{launcher.single} with trainer.devices=N for N devices"]
        if can_shard:
            cures.append(f"shard={index}/{max(count, index + 1)} here and the others elsewhere")
        raise ValueError(
            f"{launcher.index}={index} of {launcher.count}={count}: {launcher.name} runs this "
            f"command several times, and each would do all of the work; use {', or '.join(cures)}"
        )


def _number(variable: str, otherwise: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else otherwise
