"""Machines that do not know of each other give the records of one run."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
import tiny
from distributed.test_devices import children
from integration.test_measure import wait_for


def test_shards_in_one_folder_equal_one_run(finished, model, images, tmp_path):
    """At the same time; the shard that ends last reports on all images."""
    run_dir, _ = finished
    shards = [
        subprocess.Popen(
            tiny.command(model, images, tmp_path / "run", f"shard={index}/2"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=tiny.environment(),
        )
        for index in range(2)
    ]  # fmt: skip
    ends = [shard.communicate(timeout=120) for shard in shards]
    assert [shard.returncode for shard in shards] == [0, 0], ends
    assert "4 images (shard 0/2 of 8)" in ends[0][0]
    assert tiny.records(tmp_path / "run") == tiny.records(run_dir)
    again = tiny.invmm(tiny.command(model, images, tmp_path / "run"))
    assert again.returncode == 0
    assert "8 of them measured before" in again.stdout
    assert len(tiny.scores(tmp_path / "run")) == 8


@pytest.mark.slow
def test_shards_in_folders_of_their_own_join_to_one_table(finished, model, images, tmp_path):
    run_dir, _ = finished
    records = {}
    for index in range(2):
        folder = tmp_path / f"shard-{index}"
        result = tiny.invmm(tiny.command(model, images, folder, f"shard={index}/2"))
        assert result.returncode == 0, result.stderr
        records.update(tiny.records(folder))
    assert records == tiny.records(run_dir)


LAUNCHERS = {
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", []),
    "ray_local": ("hydra_plugins.hydra_ray_launcher", ["hydra.launcher.ray.init.num_cpus=2"]),
}


def launched(name, model, images, run_dir, *overrides):
    plugin, options = LAUNCHERS[name]
    pytest.importorskip(plugin)
    console_script = [str(tiny.SCRIPTS / "invmm"), *tiny.command(model, images, run_dir)[3:]]
    return tiny.invmm([
        *console_script, "--multirun", f"hydra/launcher={name}", *options, *overrides,
    ])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_runs_the_shards(name, finished, model, images, tmp_path):
    run_dir, _ = finished
    result = launched(name, model, images, tmp_path / "sweep", "shard=0/2,1/2")
    assert result.returncode == 0, result.stdout + result.stderr
    (folder,) = [path.parent for path in (tmp_path / "sweep").glob("*/manifest.json")]
    assert tiny.records(folder) == tiny.records(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_job_that_fails_elsewhere_fails_the_command(name, model, images, tmp_path):
    overrides = ("dataset.ids=[image-00.png],[nowhere.png]", "inversion.num_steps=5")
    result = launched(name, model, images, tmp_path / "sweep", *overrides)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    measured = list((tmp_path / "sweep").glob("*/records/*/record.json"))
    assert len(measured) == 1  # the other job ran


@pytest.mark.slow
def test_a_job_that_gets_sigterm_is_queued_again_and_goes_on(finished, model, images, tmp_path):
    """SLURM announces a preemption so; here the signal goes to the task, as SLURM sends it."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    run_dir, _ = finished
    command = tiny.command(model, images, tmp_path / "sweep", "engine.slots=1")[3:]
    sweep = subprocess.Popen(
        [tiny.SCRIPTS / "invmm", *command, "--multirun", "hydra/launcher=submitit_local",
         "hydra.launcher.timeout_min=5", "shard=0/1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=tiny.environment(),
    )  # fmt: skip
    wait_for(lambda: list((tmp_path / "sweep").glob("*/records/*/record.json")), seconds=120)
    (controller,) = children(sweep.pid)
    os.kill(controller, signal.SIGTERM)  # it hands the signal on to its task
    output, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, output
    (log,) = (tmp_path / "sweep" / ".submitit").rglob("*log.out")
    assert log.read_text().count("Starting with") == 2  # submitit's, once a start of the task
    (folder,) = [path.parent for path in (tmp_path / "sweep").glob("*/manifest.json")]
    assert tiny.records(folder) == tiny.records(run_dir)
