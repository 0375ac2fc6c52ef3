"""`--multirun` on a tiny real model: over images, seeds, models and hyperparameters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest
import tiny


def sweep(model, images, run_dir, *overrides: str) -> list[str]:
    return [*tiny.command(model, images, run_dir), "--multirun", *overrides]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("other") / "ddpm", seed=1)


@pytest.mark.slow
def test_models_images_and_hyperparameters(model, other_model, images, tmp_path):
    arguments = sweep(
        model, images, tmp_path / "sweep", f"model.path={model},{other_model}",
        "dataset.ids=[image-00.png],[image-01.png]", "inversion.num_steps=5",
        "inversion.check_every=2,5",
    )  # fmt: skip
    result = tiny.invmm(arguments)
    assert result.returncode == 0, result.stderr
    found = [path for path in (tmp_path / "sweep").iterdir() if path.is_dir()]
    assert len(found) == 8
    combinations = set()
    for folder in found:
        (image_id,) = tiny.records(folder)
        config = json.loads((folder / "manifest.json").read_text())["config"]
        assert config["dataset"]["ids"] == [image_id]
        check_every = config["measurement"]["check_every"]
        combinations.add((config["model"]["path"], image_id, check_every))
    assert len(combinations) == 8
    again = tiny.invmm(arguments)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("1 of them measured before") == 8


@pytest.mark.slow
def test_a_job_equals_the_single_run(model, images, tmp_path):
    quick = ("dataset.ids=[image-00.png,image-02.png]", "inversion.num_steps=5")
    result = tiny.invmm(sweep(model, images, tmp_path / "sweep", *quick, "seed=3,4"))
    assert result.returncode == 0, result.stderr
    single = tiny.invmm(tiny.command(model, images, tmp_path / "single", *quick, "seed=4"))
    assert single.returncode == 0, single.stderr
    expected = tiny.records(tmp_path / "single")
    jobs = [tiny.records(folder) for folder in (tmp_path / "sweep").iterdir() if folder.is_dir()]
    assert len(jobs) == 2
    assert sum(records == expected for records in jobs) == 1


def test_a_job_whose_inputs_are_faulty_fails_the_sweep_in_one_line(model, images, tmp_path):
    quick = ("dataset.ids=[image-00.png],[nowhere.png]", "inversion.num_steps=5")
    result = tiny.invmm(sweep(model, images, tmp_path / "sweep", *quick))
    assert result.returncode == 2
    assert "nowhere.png" in result.stderr
    assert "Traceback" not in result.stderr
    measured = list((tmp_path / "sweep").glob("*/records/*/record.json"))
    assert len(measured) == 1  # the other job ran


def test_a_signal_ends_the_whole_sweep(model, images, tmp_path):
    process = subprocess.Popen(
        sweep(model, images, tmp_path / "sweep", "seed=0,1", "inversion.num_steps=100000"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list((tmp_path / "sweep").glob("*/records/*/record.json")):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    folders = [path for path in (tmp_path / "sweep").iterdir() if path.is_dir()]
    assert len(folders) == 1  # the second job never began
