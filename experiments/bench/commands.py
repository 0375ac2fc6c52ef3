"""What the command itself does: processes side by side, and memory against the queue."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from invmm.cli.measure import COMMAND
from invmm.results.processes import read_processes

QUEUES = (64, 512, 4096)


def processes_against_one(model: str, repetitions: int) -> list[dict[int, float]]:
    """Seconds from the first image begun to the last one ended, by number of processes."""
    threads = torch.get_num_threads()
    runs = [{devices: _drain(model, devices) for devices in (1, 2)} for _ in range(repetitions)]
    torch.set_num_threads(threads)
    return runs


def _drain(model: str, devices: int) -> float:
    quiet = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
    ):
        code = COMMAND.run([
            "experiment=demo", f"model.path={model}", f"run_dir={folder}",
            "dataset.take={duplicated: 12, single: 18, held_out: 18}",
            f"trainer.devices={devices}", "trainer.threads_per_device=1",
            "inversion.num_steps=12", "inversion.check_every=12",
        ])  # fmt: skip
        assert code == 0, quiet.getvalue()
        accounts = read_processes(Path(folder))
    assert len(accounts) == devices
    assert sum(account["images"] for account in accounts) == 48
    ended = max(account["ended"] for account in accounts)
    return ended - min(account["started"] for account in accounts)


def memory_against_queue() -> dict[int, float]:
    """Peak memory of the measuring process in MiB, by number of queued 8x8 images."""
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        model = _tiny_model(Path(folder) / "model")
        for count in QUEUES:
            images = _tiny_images(Path(folder) / f"images-{count}", count)
            run_dir = Path(folder) / f"run-{count}"
            command = [
                str(Path(sys.executable).parent / "invmm"),
                f"model.path={model}", "dataset=folder", f"dataset.path={images}",
                f"run_dir={run_dir}", "replication=correlation", "replication.num_samples=2",
                "sampler.num_inference_steps=2", "inversion.num_steps=1", "inversion.check_every=1",
                "trainer=cpu",
            ]  # fmt: skip
            environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
            subprocess.run(command, check=True, capture_output=True, env=environment)
            (account,) = read_processes(run_dir)
            assert account["images"] == count
            peaks[count] = account["peak_memory_bytes"] / 2**20
    return peaks


def _tiny_model(path: Path) -> Path:
    from diffusers import DDPMPipeline

    from invmm.training.architectures import UNet

    torch.manual_seed(0)
    unet, scheduler = UNet(image_size=8, block_out_channels=[8], attention_levels=[]).build()
    DDPMPipeline(unet, scheduler).save_pretrained(path)
    return path


def _tiny_images(path: Path, count: int) -> Path:
    path.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(path / f"{index:05d}.png")
    return path
