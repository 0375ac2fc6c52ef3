"""A tiny real model on disk, a folder of images, and the commands run on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from safetensors.numpy import load_file


def save_model(path: Path, seed: int = 0) -> Path:
    """A random 8x8 DDPM as `DDPMPipeline.save_pretrained` writes it."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(path)
    return path


def save_images(path: Path, count: int) -> Path:
    """Smooth random colour images, and one file that is no image."""
    path.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        small = generator.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((8, 8), Image.Resampling.BILINEAR)
        image.save(path / f"image-{index:02d}.png")
    (path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nthis is not an image")
    return path


def save_captions(folder: Path) -> Path:
    """A caption and a class label for each of the first two images of a folder."""
    rows = [
        {"file_name": f"image-0{index}.png", "text": text, "label": index}
        for index, text in enumerate(("a red fox", "a blue bird"))
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


QUICK = (
    "inversion.num_steps=20",
    "inversion.check_every=5",
    "inversion.objective.batch_size=4",
    "sampler.num_inference_steps=4",
    "replication=correlation",
    "replication.threshold=0.05",
    "replication.num_samples=3",
    "engine.rows_denoise=8",
    "engine.rows_sample=4",
    "engine.rows_embed=4",
    "trainer=cpu",
    "trainer.threads_per_device=1",
)
PROBABILITY = (
    "measurement=probability", "measurement.bank_size=192", "measurement.block_size=16",
    "measurement.min_count=150", "measurement.num_particles=8", "measurement.max_samples=400",
    "measurement.repeats=2",
)  # fmt: skip
TRAJECTORY = (
    "inversion=trajectory", "inversion.num_steps=12", "inversion.sampler_steps=2",
    "inversion.batch_size=2", "inversion.num_check=4", "inversion.check_prior=false",
)  # fmt: skip


def command(model: Path, images: Path, run_dir: Path, *overrides: str) -> list[str]:
    """The measuring command on these inputs."""
    without = "inversion.objective." if "inversion=trajectory" in overrides else "nothing"
    return [
        sys.executable,
        "-m",
        "invmm.cli.measure",
        f"model.path={model}",
        "dataset=folder",
        f"dataset.path={images}",
        f"run_dir={run_dir}",
        *(text for text in QUICK if not text.startswith(without)),
        *overrides,
    ]


SCRIPTS = Path(sys.executable).parent
"""Where the console scripts are."""


def environment(**more: str) -> dict[str, str]:
    """Of commands under test, which share the cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def invmm(arguments: list[str], **options) -> subprocess.CompletedProcess[str]:
    """Runs to the end, output captured."""
    given = environment(**options.pop("env", {}))
    return subprocess.run(
        arguments, capture_output=True, text=True, env=given, check=False, **options
    )


def records(run_dir: Path) -> dict[str, dict]:
    """What a run says of each image: its record and all arrays, without the clock."""
    found = {}
    for path in sorted(run_dir.glob("records/*/record.json")):
        record = {
            name: value
            for name, value in json.loads(path.read_text()).items()
            if not name.startswith(("seconds", "checksum"))
        }
        arrays = path.parent / "arrays.safetensors"
        if arrays.exists():
            record["arrays"] = {
                name: value.tobytes() for name, value in sorted(load_file(arrays).items())
            }
        assert record["image_id"] not in found
        found[record["image_id"]] = record
    return found


def scores(run_dir: Path):
    """The collected table."""
    return pyarrow.parquet.read_table(run_dir / "scores.parquet").to_pandas()
