"""Recognises launchers (srun, mpirun, torchrun) that start several copies of one command."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class _Launcher:
    """How a launcher numbers its processes.

    Attributes:
        name: in messages.
        count: environment variable with the number of processes. For SLURM it is not SLURM_NTASKS,
            which is set in a batch script too, although that runs once.
        index: environment variable with the number of this process.
        single: the option by which it starts one process.
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
    """Refuses to run as one of several copies, each of which would do all of the work.

    Args:
        shard: the part of the images that this process measures; copies with shards are allowed.
        can_shard: whether the command has the option `shard`.

    Raises:
        ValueError: a launcher started several copies; names its variables and the cures.
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
