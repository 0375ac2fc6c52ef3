"""Parts of a model that are tried out on shapes alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from invmm.models.trial import try_out

LATENT, PICTURE = (1, 4, 8, 8), (1, 3, 16, 16)


def try_parts(denoised: tuple, encoded: tuple, decoded: tuple) -> None:
    """Parts that return these shapes, whatever they are given."""
    autoencoder: Any = SimpleNamespace(
        encode=lambda pixels: SimpleNamespace(latents=torch.empty(encoded)),
        decode=lambda latents: SimpleNamespace(sample=torch.empty(decoded)),
    )
    try_out(
        "model.path=it",
        lambda: (torch.nn.Identity(), autoencoder),
        lambda denoiser, latents, timesteps: torch.empty(denoised),
        shape=LATENT[1:],
        pixels_per_latent=2,
    )


def test_parts_that_fit_together():
    try_parts(LATENT, LATENT, PICTURE)
    try_parts((1, 8, 8, 8), LATENT, PICTURE)  # a learned variance beside the noise


@pytest.mark.parametrize(("place", "shape", "part"), [
    (0, (1, 4, 8, 4), "denoiser"),
    (1, (1, 4, 4, 4), "autoencoder's encoder"),
    (1, (1, 3, 8, 8), "autoencoder's encoder"),
    (2, (1, 3, 8, 16), "autoencoder's decoder"),
    (2, (1, 1, 16, 16), "autoencoder's decoder"),
])  # fmt: skip
def test_a_part_of_another_shape_is_refused(place, shape, part):
    shapes: list[tuple] = [LATENT, LATENT, PICTURE]
    shapes[place] = shape
    with pytest.raises(ValueError, match=part):
        try_parts(*shapes)
