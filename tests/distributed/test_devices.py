"""Several processes give the records of one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import pytorch_lightning as pl
import tiny
from integration.test_measure import wait_for

from invmm.runtime.measure import _OneBatch
from invmm.runtime.processes import own_processes
from invmm.runtime.trainer import TrainerSettings

SLURM_STEP = {
    "SLURM_JOB_ID": "8815", "SLURM_JOB_NAME": "invmm", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node7",
}  # fmt: skip


@pytest.mark.slow
def test_two_processes_equal_one(finished, model, images, tmp_path):
    """Within a SLURM step of one task, whose ranks and ports are none of theirs."""
    run_dir, _ = finished
    command = tiny.command(model, images, tmp_path / "run", "trainer.devices=2")
    result = tiny.invmm(command, env=SLURM_STEP)
    assert result.returncode == 0, result.stderr
    assert tiny.records(tmp_path / "run") == tiny.records(run_dir)


@pytest.mark.slow
def test_two_processes_under_torchrun_equal_one(finished, model, images, tmp_path):
    run_dir, _ = finished
    command = tiny.command(model, images, tmp_path / "run", "trainer.devices=2")
    options = ["--nproc-per-node=1", "--master-port=29713", "--no-python"]
    result = tiny.invmm([*command[:1], "-m", "torch.distributed.run", *options, *command])
    assert result.returncode == 0, result.stderr
    assert tiny.records(tmp_path / "run") == tiny.records(run_dir)


def test_copies_of_a_command_are_refused_in_one_line(model, images, tmp_path, monkeypatch, capsys):
    """Two tasks of srun: each would measure every image."""
    from invmm.cli.measure import COMMAND

    second = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    for name, value in {**SLURM_STEP, **second}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["invmm"])  # Hydra's
    assert COMMAND.run(tiny.command(model, images, tmp_path / "run")[3:]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("invmm: SLURM_PROCID=1 of SLURM_STEP_NUM_TASKS=2: SLURM runs")
    assert "--ntasks=1" in line
    assert not list((tmp_path / "run").glob("*"))


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(("to", "signum", "code"), [
    ("parent", signal.SIGTERM, 143), ("parent", signal.SIGINT, 130), ("worker", signal.SIGKILL, 3),
])  # fmt: skip
def test_no_process_outlives_the_run_and_nothing_is_lost(
    to, signum, code, finished, model, images, tmp_path
):
    run_dir, _ = finished
    slow = tiny.command(model, images, tmp_path / "run", "trainer.devices=2", "engine.slots=1")
    process = subprocess.Popen(
        slow, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for(lambda: list((tmp_path / "run").glob("records/*/record.json")))
    workers = children(process.pid)
    os.kill(process.pid if to == "parent" else workers[-1], signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "The same command goes on where this one stopped" in errors
    wait_for(lambda: not any(map(is_alive, workers)), seconds=10)
    result = tiny.invmm(tiny.command(model, images, tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert tiny.records(tmp_path / "run") == tiny.records(run_dir)


class Refuses(pl.LightningModule):
    """A module of which the last process finds what no process can compute."""

    def predict_step(self, batch, batch_idx):
        if self.global_rank == self.trainer.world_size - 1:
            raise ValueError("model.path=here: no such weights; give another")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_what_a_worker_refuses_is_refused(devices):
    """In one line and as a ValueError, so that the command ends with exit code 2."""
    settings = TrainerSettings(accelerator="cpu", devices=devices)
    with (
        pytest.raises(ValueError, match=r"^model\.path=here: no such weights; give another$"),
        own_processes(settings, logger=False, enable_checkpointing=False) as trainer,
    ):
        trainer.predict(Refuses(), _OneBatch(), return_predictions=False)


@pytest.mark.slow
def test_damage_heals_with_several_devices_as_with_one(finished, model, images, tmp_path):
    run_dir, _ = finished
    shutil.copytree(run_dir, tmp_path / "run")
    broken, gone, *_ = sorted((tmp_path / "run" / "records").iterdir())
    arrays = broken / "arrays.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:-8])
    (gone / "samples.png").unlink()
    command = tiny.command(model, images, tmp_path / "run", "trainer.devices=2")
    result = tiny.invmm(command)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "set aside in" in line]
    assert len(lines) == 2, result.stderr
    assert tiny.records(tmp_path / "run") == tiny.records(run_dir)
