"""An orthonormal frequency basis of the noise: the discrete cosine transform (DCT-II).

A rotation leaves N(0, I) as it is, and with it the divergence of any distribution from it; what
changes is which distributions are diagonal. The frequencies of a (H, W) plane are numbered like
its pixels, (0, 0) being the mean.
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


def to_frequencies(pixels: Tensor) -> Tensor:
    """(B, C, H, W) in pixels -> the same in frequencies, plane by plane."""
    rows, columns = (dct_matrix(size).to(pixels) for size in pixels.shape[-2:])
    return rows @ pixels @ columns.T


def from_frequencies(frequencies: Tensor) -> Tensor:
    """The inverse of `to_frequencies`."""
    rows, columns = (dct_matrix(size).to(frequencies) for size in frequencies.shape[-2:])
    return rows.T @ frequencies @ columns


def low_frequencies(height: int, width: int, bandwidth: float) -> Tensor:
    """(H, W) float32: 1 where i / H + j / W < bandwidth, else 0; all of them at 2."""
    i = torch.arange(height)[:, None] / height
    j = torch.arange(width)[None] / width
    return (i + j < bandwidth).float()
