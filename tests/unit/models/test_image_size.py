"""Latent models at another size than the one they were made for."""

from __future__ import annotations

import pipelines
import pytest
import torch

from invmm.models.auto import AutoModel

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["ldm kl", "sd1 epsilon", "sdxl", "sd3"])
def test_a_pipeline_at_half_its_size(family, tmp_path):
    pytest.importorskip("transformers")
    pipelines.seeded(pipelines.MAKERS[family]).save_pretrained(tmp_path)
    own, half = (AutoModel(path=str(tmp_path), image_size=size) for size in (None, 8))
    channels = own.describe().latent_shape[0]
    assert own.describe().image_size == 16
    assert (half.describe().latent_shape, half.describe().image_size) == ((channels, 4, 4), 8)
    network = half.load(CPU)
    assert network.latent_shape == (channels, 4, 4)
    pixels = torch.zeros(1, 3, 8, 8)
    latents = network.encode(pixels)
    assert latents.shape[1:] == network.latent_shape
    condition = network.condition("a" if family != "ldm kl" else None)
    assert network.predict(latents, torch.zeros(1, dtype=torch.long), condition).shape == (
        latents.shape
    )
    assert network.decode(latents).shape == pixels.shape
    if family == "sdxl":
        assert condition["time_ids"].tolist() == [[8, 8, 0, 0, 8, 8]]
