"""An orthonormal frequency basis of the noise: the discrete cosine transform (DCT-II).

A rotation leaves N(0, I) unchanged, and so the KL of a rotated distribution from it; it only
changes which distributions are diagonal. A plane (H, W) of a channel has the frequencies (i, j),
0 <= i < H and 0 <= j < W; (0, 0) is its mean times sqrt(H W).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dct_matrix(size: int) -> Tensor:
    """(size, size) float32, orthonormal; row k is the cosine of frequency k."""
    k = torch.arange(size, dtype=torch.float64)[:, None]
    x = torch.arange(size, dtype=torch.float64)[None]
    cosines = torch.cos(math.pi * (x + 0.5) * k / size) * math.sqrt(2 / size)
    cosines[0] /= math.sqrt(2)
    return cosines.float()


def to_frequencies(latents: Tensor) -> Tensor:
    """(B, C, H, W) latents or noise -> the frequencies of each plane, of the same shape."""
    rows, columns = (dct_matrix(size).to(latents) for size in latents.shape[-2:])
    return rows @ latents @ columns.T


def from_frequencies(frequencies: Tensor) -> Tensor:
    """The inverse of `to_frequencies`."""
    rows, columns = (dct_matrix(size).to(frequencies) for size in frequencies.shape[-2:])
    return rows.T @ frequencies @ columns


def low_frequencies(height: int, width: int, bandwidth: float) -> Tensor:
    """(H, W) float32 mask: 1 where i / H + j / W < bandwidth, else 0; 2 keeps all."""
    i = torch.arange(height)[:, None] / height
    j = torch.arange(width)[None] / width
    return (i + j < bandwidth).float()
