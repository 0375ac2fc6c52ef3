"""What a run was made of, so that its numbers can be defended and it cannot be mixed up."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from invmm.data.dataset import ImageDataset
from invmm.data.manifest import list_digest
from invmm.files import read_file, write_atomically
from invmm.models.adapter import ModelRecipe
from invmm.replication.replication import Replication
from invmm.results.ownership import differences
from invmm.results.run_folder import RunFolder

_PACKAGES = ("invmm", "torch", "diffusers", "pytorch-lightning", "onnxruntime", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What must not change between a run and its continuation, beside the config.

    Attributes:
        model: weight file -> SHA-256.
        model_settings: config or vocabulary of the model -> SHA-256.
        similarity: identity of the similarity network.
        second_opinion: identity of the control measure, None without one.
        dataset: digest of the list of images.
    """

    model: Mapping[str, str]
    model_settings: Mapping[str, str]
    similarity: Mapping[str, str | int]
    second_opinion: Mapping[str, str | int] | None
    dataset: str

    @classmethod
    def of(cls, model: ModelRecipe, replication: Replication, dataset: ImageDataset) -> Inputs:
        """Reads and hashes the files."""
        second = replication.second_opinion
        return cls(
            model=model.fingerprint(),
            model_settings=model.settings(),
            similarity=replication.similarity.identity(),
            second_opinion=second.identity() if second else None,
            dataset=list_digest(dataset.entries),
        )


def write_manifest(
    folder: RunFolder, inputs: Inputs, *, config: Mapping[str, Any], seed: int, problems: list[str]
) -> None:
    """Writes manifest.json, or checks that this run goes on with the same inputs.

    Raises:
        ValueError: model, similarity network or list of images are not those of the folder.
    """
    path = folder.path / "manifest.json"
    if path.exists():
        try:
            whole = json.loads(read_file(path))
            stored = dict(whole["inputs"])
            if (whole["config_digest"], whole["seed"]) != (folder.digest, seed):
                raise ValueError("its config_digest or seed is not that of this run")
            known = known_to(stored, asdict(inputs))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged; choose another run_dir") from error
        if changed := differences(stored, known):
            raise ValueError(
                f"run_dir={folder.path} was measured with other inputs ({'; '.join(changed)}); "
                "choose another run_dir"
            )
        return
    if any((folder.path / "records").glob("*/record.json")):
        raise ValueError(
            f"{path} is missing, so that nothing says with which model the records beside it were "
            "measured; put it back, or choose another run_dir"
        )
    manifest = {
        "inputs": asdict(inputs),
        "config_digest": folder.digest,
        "config": config,
        "seed": seed,
        "dataset_problems": problems,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": _hardware(),
    }
    write_atomically(path, json.dumps(manifest, indent=1).encode())


def known_to(stored: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs without the settings of the model if the manifest is older than they are."""
    return {k: v for k, v in inputs.items() if k != "model_settings" or k in stored}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git() -> dict[str, str | bool] | None:
    """Commit of the checkout that the code runs from, None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git_says(root, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git_says(root, "status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git_says(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }
