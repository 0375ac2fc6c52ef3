"""The command end to end on a tiny real model."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file

from invmm.cli.measure import COMMAND
from invmm.results.processes import read_processes
from invmm.runtime import measure


def test_a_run_writes_what_it_promises(finished):
    run_dir, result = finished
    records = tiny.records(run_dir)
    assert len(records) == 8
    assert records["broken.png"]["status"] == "FAILED"
    table = tiny.scores(run_dir).set_index("image_id")
    assert set(table.index) == set(records)
    replicated = table[table.status == "REPLICATED"]
    assert 0 < len(replicated) < 7
    assert replicated.score.notna().all()
    assert table[table.status == "NOT_REPLICATED"].score.isna().all()
    assert (replicated.score_nats - 192 * replicated.score).abs().max() < 1e-4
    for name in ("gallery.png", "scores.png", "scores.csv", "manifest.json"):
        assert (run_dir / name).stat().st_size > 0
    assert "broken.png" in result.stdout
    assert "Traceback" not in result.stderr


def test_a_run_whose_images_all_fail_is_incomplete(model, tmp_path):
    """Under the shell of a notebook whose backend is not installed here."""
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes(b"\x89PNG\r\n\x1a\nno image")
    arguments = tiny.command(model, tmp_path / "images", tmp_path / "run")
    shell = {"MPLBACKEND": "module://nowhere_to.be_found"}
    result = tiny.invmm(arguments, env=shell)
    assert result.returncode == 3, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "no image was measured" in line]
    assert line.startswith("no image was measured: 2 FAILED, all with the error: ImageError: ")
    assert (tmp_path / "run" / "gallery.png").exists()
    assert (tmp_path / "run" / "scores.csv").exists()
    assert tiny.invmm(arguments, env=shell).returncode == 3  # as long as it is so


@pytest.mark.parametrize(("value", "code", "line"), [
    (3e38, 3, "no image was measured: 1 DIVERGED, all with the error: "),
    (math.nan, 2, "holds NaN or infinite weights in float32 (conv_out.bias); export the model"),
])  # fmt: skip
def test_a_model_that_is_no_good_is_told(value, code, line, model, tmp_path, monkeypatch, capsys):
    """Weights too large for the losses, or no numbers at all, lie in the file."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (weights,) = folder.rglob("*.safetensors")
    tensors = load_file(weights)
    tensors["conv_out.bias"][0] = value
    save_file(tensors, weights, metadata={"format": "pt"})
    images = tiny.save_images(tmp_path / "images", 1)
    (images / "broken.png").unlink()
    monkeypatch.setattr(sys, "argv", ["invmm"])
    assert COMMAND.run(tiny.command(folder, images, tmp_path / "run")[3:]) == code
    assert line in capsys.readouterr().err


def test_a_rerun_measures_nothing_again(finished, model, images):
    run_dir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.glob("records/*/*")}
    result = tiny.invmm(tiny.command(model, images, run_dir, "engine.slots=3"))
    assert result.returncode == 0, result.stderr
    assert "8 of them measured before" in result.stdout
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.glob("records/*/*")}


def test_a_report_that_cannot_be_written_keeps_every_record(
    finished, model, images, tmp_path, monkeypatch, capsys
):
    """A full disk at the very end: exit code 3, and the same command ends the run."""
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    overrides = tiny.command(model, images, run_dir)[3:]
    monkeypatch.setattr(sys, "argv", ["invmm", *overrides])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(measure, "report", full)
        assert COMMAND.run(overrides) == 3
    assert "No space left on device; every record is kept" in capsys.readouterr().err
    assert tiny.records(run_dir) == tiny.records(finished[0])
    assert COMMAND.run(overrides) == 0


def test_another_config_is_refused_with_the_keys_that_differ(finished, model, images):
    run_dir, _ = finished
    result = tiny.invmm(tiny.command(model, images, run_dir, "seed=7", "inversion.num_steps=25"))
    assert result.returncode == 2
    assert "seed" in result.stderr
    assert "num_steps" in result.stderr
    assert "Traceback" not in result.stderr


def test_slots_do_not_change_a_record(finished, model, images, tmp_path):
    run_dir, _ = finished
    for slots in (1, 4, 16):
        folder = tmp_path / f"slots-{slots}"
        result = tiny.invmm(tiny.command(model, images, folder, f"engine.slots={slots}"))
        assert result.returncode == 0, result.stderr
        assert tiny.records(folder) == tiny.records(run_dir)


def test_measured_rows_are_kept_and_belong_to_the_digest(finished, model, images, tmp_path):
    run_dir, _ = finished
    arguments = tiny.command(
        model, images, tmp_path / "run", "engine.rows_denoise=auto", "dataset.ids=[image-00.png]"
    )
    result = tiny.invmm(arguments)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "run" / "rows.json").read_text())["rows_denoise"]
    assert f"rows per call, measured once for this run: rows_denoise {rows}" in result.stdout
    (record,) = tiny.records(tmp_path / "run").values()
    fixed = tiny.records(run_dir)["image-00.png"]
    assert record["config_digest"] != fixed["config_digest"]
    # Another count decided before is kept, whatever this machine would measure.
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "rows.json").write_text('{"rows_denoise": 3}')
    arguments = [*arguments, f"run_dir={folder}"]
    assert tiny.invmm(arguments).returncode == 0
    (account,) = read_processes(folder)
    assert account["rows_denoise"] == 3
    (other,) = tiny.records(folder).values()
    assert other["config_digest"] not in (record["config_digest"], fixed["config_digest"])


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_good_order(signum, code, model, images, tmp_path):
    arguments = tiny.command(model, images, tmp_path / "run", "inversion.num_steps=100000")
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for(lambda: list((tmp_path / "run").glob("records/*/record.json")))
    process.send_signal(signum)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "The same command goes on where this one stopped" in errors
    assert "Traceback" not in errors
    left = list((tmp_path / "run" / "records").glob("*/record.json"))
    assert 0 < len(left) < 8
    assert all(json.loads(path.read_text())["image_id"] for path in left)


def test_two_runs_in_one_folder_are_refused(model, images, tmp_path):
    arguments = tiny.command(model, images, tmp_path / "run", "inversion.num_steps=100000")
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        wait_for(lambda: list((tmp_path / "run").glob("records/*/record.json")))
        result = tiny.invmm(arguments)
    finally:
        process.kill()
        process.wait()
    assert result.returncode == 2
    assert str(tmp_path / "run") in result.stderr


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
