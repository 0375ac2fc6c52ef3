"""Pearson correlation of pixels: the control that needs no network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

# one 8-bit step of one pixel has a norm of 8e-3, the rounding of a constant image about 1e-5
_CONSTANT = 1e-3


@dataclass(frozen=True, kw_only=True)
class PixelCorrelation:
    """Embeds an image as its centred, normalised pixels, so that cosine is correlation.

    A constant image has no correlation with anything: its embedding is zero.

    Attributes:
        size: images are resized to size x size first; null keeps them as they are.
    """

    size: Annotated[int, Ge(1)] | None = None

    def load(self, device: torch.device) -> PixelCorrelation:
        """Returns itself: it has no weights to load."""
        return self

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels -> (B, 3 * H * W) unit-norm embeddings."""
        if self.size is not None:
            pixels = resize(pixels, self.size)
        flat = pixels.float().flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        norm = centred.norm(dim=1, keepdim=True)
        return torch.where(norm > _CONSTANT, centred / norm, 0.0)

    def identity(self) -> dict[str, str | int]:
        """See `SimilarityRecipe`."""
        return {"name": "pixel_correlation", "size": self.size or "as is"}


def resize(pixels: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, C, size, size), bilinear with antialiasing."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(
        pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
