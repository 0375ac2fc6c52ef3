"""Whatever launched a command, it starts its own processes, and copies of it are refused."""

from __future__ import annotations

import os
import signal

import pytest

from invmm.runtime.launch import refuse_copies
from invmm.runtime.processes import own_processes
from invmm.runtime.signals import Interrupted, interruptible, raise_on_signals
from invmm.runtime.trainer import TrainerSettings

SLURM_TASK = {
    "SLURM_JOB_ID": "8815", "SLURM_JOB_NAME": "invmm", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node7",
}  # fmt: skip
ONE_PROCESS = {
    "srun, one task": SLURM_TASK,
    "sbatch with two tasks, no srun": {
        "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "invmm", "SLURM_NTASKS": "2", "SLURM_PROCID": "0",
    },
    "torchrun": {
        "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "0",
        "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "node1.invalid",
        "MASTER_PORT": "29500",
    },
    "LSF": {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "/nowhere", "JSM_NAMESPACE_LOCAL_RANK": "0",
            "JSM_NAMESPACE_SIZE": "1", "JSM_NAMESPACE_RANK": "0"},
    "Kubeflow": {"MASTER_ADDR": "master.invalid", "MASTER_PORT": "1", "WORLD_SIZE": "1",
                 "RANK": "0", "NODE_RANK": "3"},
}  # fmt: skip
SEVERAL = {
    "srun, first task": {**SLURM_TASK, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"},
    "srun, second task": {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
    "jsrun": {"JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "0"},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
    "mpiexec": {"PMI_SIZE": "2", "PMI_RANK": "1"},
    "torchrun": {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
    "submitit_local": {"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "0"},
}


@pytest.fixture
def launched(monkeypatch):
    """(variables): as if a launcher had set these and no others."""
    for name in [n for n in os.environ if n.startswith(("SLURM_", "SUBMITIT_", "PMI_", "OMPI_"))]:
        monkeypatch.delenv(name)

    def by(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return by


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_it_starts_its_own_two_processes(name, launched):
    launched(ONE_PROCESS[name])
    refuse_copies()
    before = dict(os.environ)
    with own_processes(TrainerSettings(accelerator="cpu", devices=2), logger=False) as trainer:
        assert trainer.world_size == 2
        assert trainer.strategy.launcher is not None
        environment = trainer.strategy.cluster_environment
        assert not environment.creates_processes_externally
        assert environment.main_address == "127.0.0.1"
        assert environment.node_rank() == 0
        assert "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", SEVERAL)
def test_copies_are_refused_unless_each_has_a_part(name, launched):
    launched(SEVERAL[name])
    with pytest.raises(ValueError, match=r"runs this command several times") as refusal:
        refuse_copies()
    message = str(refusal.value)
    assert "=2: " in message or "SLURM_PROCID=1" in message
    assert "trainer.devices=N" in message
    assert f"shard={1 if '=1 of' in message else 0}/2" in message
    refuse_copies("0/2")
    with pytest.raises(ValueError, match="several times") as refusal:
        refuse_copies(can_shard=False)
    assert "shard" not in str(refusal.value)


# Signals in a job of submitit ----------------------------------------------------------------


@pytest.fixture
def submitit(launched, monkeypatch, tmp_path):
    """(executor, state of the job): a job whose SIGUSR2 queues it again, ending in 144."""

    def queue_again(signum, frame):
        raise SystemExit(144)

    def job(executor, state):
        squeue = tmp_path / "squeue"
        squeue.write_text(f"#!/bin/sh\n{'exit 1' if state is None else f'echo {state}'}\n")
        squeue.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        launched({"SUBMITIT_EXECUTOR": executor, "SLURM_JOB_ID": "7"})

    former = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    signal.signal(signal.SIGUSR2, queue_again)
    signal.signal(signal.SIGTERM, lambda signum, frame: None)  # submitit's
    yield job
    for number, handler in former.items():
        signal.signal(number, handler)


def struck_by(signum):
    with interruptible():
        os.kill(os.getpid(), signum)
        signal.pause()


@pytest.mark.parametrize(("executor", "state", "ending"), [
    ("slurm", "RUNNING", SystemExit),  # preempted, with some grace
    ("slurm", "COMPLETING", Interrupted),  # cancelled, or SLURM itself queues it again
    ("slurm", None, Interrupted),
    ("local", None, SystemExit),
])  # fmt: skip
def test_sigterm_queues_a_job_again_that_is_to_run(executor, state, ending, submitit):
    submitit(executor, state)
    with pytest.raises(ending) as ended:
        struck_by(signal.SIGTERM)
    code = ended.value.code if ending is SystemExit else ended.value.exit_code
    assert code == (144 if ending is SystemExit else 143)
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN  # one request is enough


def test_sigint_ends_it(submitit):
    submitit("slurm", "RUNNING")
    with pytest.raises(Interrupted):
        struck_by(signal.SIGINT)


def test_the_signal_does_not_kill_the_workers(submitit):
    """SLURM sends it to every process of the task; the one that submitit started acts."""
    submitit("slurm", "RUNNING")
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    former = signal.getsignal(signal.SIGINT)
    try:
        raise_on_signals()
        os.kill(os.getpid(), signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGINT, former)
