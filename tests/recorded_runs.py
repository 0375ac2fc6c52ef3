"""Records ten small runs, and compares two recordings bit by bit.

    python tests/recorded_runs.py record FOLDER
    python tests/recorded_runs.py compare BEFORE AFTER

A restructuring changes no number: record before and after it, and compare. The runs span model
families, measurements, prompts, schedules, shards and devices. Their inputs are made from fixed
seeds, so that two recordings under the same versions of the packages have the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import tiny
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
LEFT_OUT = {
    "seconds*": "depend on the machine",
    "path": "begins with the folder of the recording",
    "config_digest": "depends on how the config spells its settings",
    "source_digest": "is the config_digest of the run that was replayed",
    "files": "holds digests of the arrays and pictures, which are compared themselves",
    "checksum": "covers all of these",
}
"""Columns that are not compared, and why: a machine or the spelling of a config decides them."""
Values = dict[str, dict[str, Any]]
"""Image or file -> column or array -> value."""


@dataclass(frozen=True)
class Run:
    """What is measured, and how.

    Attributes:
        model: one of `pipelines.MAKERS`, or ddpm.
        overrides: of `tiny.command`.
        shards: commands, one after the other, that share the images.
    """

    model: str
    overrides: tuple[str, ...]
    shards: int = 1


PAPER_SD = ("inversion=paper_sd", "inversion.num_steps=4", "inversion.check_every=2")
RUNS = {
    "pixel_adaptive": Run("ddpm", ("replication.num_confirm=4",)),
    "pixel_trajectory": Run("ddpm", (
        *tiny.TRAJECTORY, "inversion.num_steps=36", "replication.threshold=-0.03",
        "replication.num_confirm=8",
    )),
    "pixel_replay": Run("ddpm", (
        "measurement=replay", "measurement.source=pixel_adaptive", "measurement.num_samples=16",
        "sampler=ddpm",
    )),
    "pixel_splitting": Run("ddpm", (
        *tiny.PROBABILITY, "replication.threshold=0.3", "trainer.devices=2",
    )),
    "vq_shards": Run("ldm vq", (
        "inversion=paper_ldm", "inversion.num_steps=20", "inversion.check_every=5",
    ), shards=2),
    "dit_labels": Run("dit", (
        "measurement=free_sampling", "measurement.num_samples=48", "measurement.block_size=16",
        "prompt=class_label", "sampler.guidance_scales=[4]",
    )),
    "sd1_membership": Run("sd1 epsilon", ("measurement=secmi", "prompt=caption")),
    "sd2_v_learned": Run("sd2 v", (
        *PAPER_SD, "prompt=learned", "sampler.guidance_scales=[1,2]", "replication.threshold=1",
    )),
    "sdxl_lora": Run("sdxl", (
        *PAPER_SD, "model.lora=inputs/sdxl_lora.safetensors", "prompt=caption", "repeats=2",
        "sampler.guidance_scales=[1,3]", "replication.threshold=-1", "replication.num_confirm=2",
    )),
    "sd3_flow": Run("sd3", (
        *PAPER_SD, "sampler=flow_euler", "prompt=caption", "sampler.guidance_scales=[1,3]",
    )),
}  # fmt: skip
"""By the name of their folders; a run may read the folders of those before it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Records or compares; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="runs all into a new folder")
    recording.add_argument("folder", type=Path)
    comparison = commands.add_parser("compare", help="exits 1 on any difference or missing run")
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    given = parser.parse_args(arguments)
    if given.command == "compare":
        return compare(given.before, given.after)
    if given.folder.exists():
        parser.error(f"{given.folder} exists; give a new folder, since a run there would go on")
    return record(given.folder)


def record(folder: Path) -> int:
    """Makes the inputs and runs all; 1 after the first run that fails, else 0."""
    make_inputs(folder / "inputs")
    for name, run in RUNS.items():
        started = time.monotonic()
        for shard in range(run.shards):
            # Paths are relative to the recording, so that all recordings have the same configs.
            command = tiny.command(
                Path("inputs", folder_name(run.model)), Path("inputs/images"), Path(name),
                *run.overrides, *([f"shard={shard}/{run.shards}"] if run.shards > 1 else []),
            )  # fmt: skip
            # The code is that of this tree, even where the interpreter has another one installed.
            ended = tiny.invmm(command, cwd=folder, env={"PYTHONPATH": str(ROOT)})
            if ended.returncode:
                print(f"{name}: exit code {ended.returncode}\n{ended.stderr[-2000:]}")
                return 1
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    return 0


def folder_name(model: str) -> str:
    """Of a model in the inputs."""
    return model.replace(" ", "_")


def make_inputs(place: Path) -> None:
    """Models of random weights, LoRA weights, and images with captions."""
    tiny.save_captions(tiny.save_images(place / "images", 3))
    tiny.save_model(place / "ddpm")
    for model in sorted({run.model for run in RUNS.values()} - {"ddpm"}):
        pipeline = pipelines.seeded(pipelines.MAKERS[model])
        pipeline.save_pretrained(place / folder_name(model))
        if model == "sdxl":
            pipelines.save_lora(pipeline, place / "sdxl_lora.safetensors")


def compare(before: Path, after: Path) -> int:
    """Prints a line for the inputs and for each run; 1 if any differs or is missing, else 0."""
    num_unequal = 0
    for name in ("inputs", *RUNS):
        read = digests if name == "inputs" else recorded
        try:
            old, new = (read(folder / name) for folder in (before, after))
            found = difference(old, new)
        except (OSError, ValueError, LookupError, SafetensorError) as error:
            old, found = {}, f" cannot be read: {error}"
        num_unequal += found is not None
        print(f"{name}:{found or summary(old)}")
    return 1 if num_unequal else 0


def digests(place: Path) -> Values:
    """Of the files in a folder."""
    files = [path for path in sorted(place.rglob("*")) if path.is_file()]
    if not files:
        raise FileNotFoundError(f"{place} is missing")
    return {
        str(path.relative_to(place)): {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in files
    }


def recorded(run_dir: Path) -> Values:
    """The record, arrays and pictures of each image, and the blocks of free samples."""
    found: Values = {}
    for path in sorted(run_dir.glob("records/*/record.json")):
        record = json.loads(path.read_bytes())
        found[record["image_id"]] = {
            **kept(record),
            "columns": kept(record["columns"]),
            **load_file(path.with_name("arrays.safetensors")),
            **{file.name: np.array(Image.open(file)) for file in path.parent.glob("*.png")},
        }
    if not found:
        raise FileNotFoundError(f"{run_dir} is missing or has no records")
    for path in sorted(run_dir.glob("free_samples/*.safetensors")):
        found[f"free_samples/{path.name}"] = dict(load_file(path))
    return found


def kept(columns: dict[str, Any]) -> dict[str, Any]:
    """The columns that are compared."""
    return {
        name: value
        for name, value in columns.items()
        if not any(fnmatchcase(name, pattern) for pattern in LEFT_OUT)
    }


def difference(before: Any, after: Any) -> str | None:
    """The first difference in any bit, as " NAME was VALUE and is VALUE"; None if there is none."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys([*before, *after]):
            if name not in before or name not in after:
                return f" {name} is only in {'BEFORE' if name in before else 'AFTER'}"
            if found := difference(before[name], after[name]):
                return f" {name}{found}"
        return None
    old, new = shown(before), shown(after)
    if old == new and isinstance(before, np.ndarray):
        unequal = np.flatnonzero((bits(before) != bits(after)).any(1))
        if not len(unequal):
            return None
        first = np.unravel_index(unequal[0], before.shape)
        place = [int(index) for index in first]
        old, new = before[first].item(), after[first].item()
        count = f"{len(unequal)} of {before.size} values differ"
        return f" {place} was {old!r} and is {new!r}; {count}"
    return None if old == new else f" was {old} and is {new}"


def shown(value: Any) -> str:
    """A text that differs where two values do, but for the content of arrays; -0.0 is not 0.0."""
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else repr(value)


def bits(array: np.ndarray) -> np.ndarray:
    """(values, bytes of a value)."""
    return np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8)


def summary(values: Values) -> str:
    """How much is equal."""
    records = sum("image_id" in found for found in values.values())
    arrays = sum(isinstance(v, np.ndarray) for found in values.values() for v in found.values())
    what = f"{records} records, {arrays} arrays" if records else f"{len(values)} files"
    return f" {what} equal"


if __name__ == "__main__":
    raise SystemExit(main())
