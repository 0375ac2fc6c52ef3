"""Reads and checks the distributions that a search saved in its run, to draw from them again."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from safetensors import SafetensorError

from invmm.files import read_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from invmm.inversion.noise import GaussianNoise


def saved_tensors(folder: Path, latent_shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The arrays of a record, among them mean and log_variance of its distribution.

    Args:
        folder: of the record.
        latent_shape: (C, H, W) of the model.

    Raises:
        ValueError: the file is missing or damaged, or the mean or log_variance is missing, has
            another shape, or is not finite.
    """
    from safetensors.torch import load

    path = folder / "arrays.safetensors"
    try:
        tensors = load(read_file(path))
    except (OSError, SafetensorError) as error:
        fault = "missing" if isinstance(error, FileNotFoundError) else f"damaged: {error}"
        raise ValueError(f"its {path.name} is {fault}") from error
    for name in ("mean", "log_variance"):
        if name not in tensors:
            raise ValueError(f"its {path.name} has no {name}")
    for name in ("mean", "log_variance"):
        shape = tuple(tensors[name].shape)
        if shape != tuple(latent_shape):
            raise ValueError(f"its {name} has the shape {shape}, latents have {latent_shape}")
        if not tensors[name].isfinite().all():
            raise ValueError(f"its {name} is not finite")
    return tensors


def saved_noise(tensors: Mapping[str, Tensor], device: torch.device) -> GaussianNoise:
    """The distribution in the arrays of a record, on a device."""
    from invmm.inversion.noise import GaussianNoise

    return GaussianNoise(*(tensors[name][None].to(device) for name in ("mean", "log_variance")))


def check_picture(folder: Path, pixels: Tensor) -> None:
    """Refuses an image other than the one that was measured under its name.

    Args:
        folder: of the record.
        pixels: (3, H, W) in [-1, 1] of the image.

    Raises:
        ValueError: the picture in the record differs from it, or is missing or damaged.
    """
    import torch

    path = folder / "target.png"
    try:
        with Image.open(io.BytesIO(read_file(path))) as picture:
            levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"its {path.name} is missing or damaged") from error
    measured = levels / 127.5 - 1
    if measured.shape != pixels.shape or not torch.allclose(measured, pixels.cpu(), atol=1e-3):
        raise ValueError(f"its {path.name} shows another image than the one of this name here")
