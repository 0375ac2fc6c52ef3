"""The memory estimate of a dry run against what a real forward pass keeps."""

from __future__ import annotations

import pytest
import tiny
import torch

from invmm.models.memory import activation_bytes
from invmm.models.pixel import PixelUNet


def test_bytes_of_a_network_that_can_be_counted_by_hand():
    """A SiLU keeps its input, a linear layer with frozen weights nothing of its own."""
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU()).requires_grad_(False)
    inputs = torch.zeros(3, 4, requires_grad=True)
    assert activation_bytes(network, lambda: network(inputs)) == 3 * 8 * 4


def test_the_estimate_is_just_above_what_a_real_pass_keeps(tmp_path):
    recipe = PixelUNet(path=str(tiny.save_model(tmp_path / "model")))
    network = recipe.load(torch.device("cpu"))._unet
    latents = torch.randn(4, 3, 8, 8, requires_grad=True)
    timesteps = torch.zeros(4, dtype=torch.long)
    real = activation_bytes(network, lambda: network(latents, timesteps).sample)
    estimate = recipe.activation_bytes(4)
    assert real <= estimate <= 1.5 * real
    assert recipe.activation_bytes(8) == pytest.approx(2 * estimate, rel=0.05)
    half = PixelUNet(path=recipe.path, dtype="bfloat16")
    assert half.activation_bytes(4) == estimate // 2
