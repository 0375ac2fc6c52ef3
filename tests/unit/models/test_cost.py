"""The estimates of a dry run against what a real forward pass does."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from invmm.models.cost import CallCost, call_cost
from invmm.models.execution import Execution
from invmm.models.pixel import PixelUNet


def test_a_network_that_can_be_counted_by_hand():
    """A SiLU keeps its input, a linear layer with frozen weights nothing of its own."""
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU()).requires_grad_(False)
    inputs = torch.zeros(3, 4, requires_grad=True)
    cost = call_cost(network, lambda: network(inputs))
    assert cost == CallCost(activation_bytes=3 * 8 * 4, flop=2 * 3 * 4 * 8)


def test_the_estimate_is_just_above_what_a_real_pass_keeps(tmp_path):
    recipe = PixelUNet(path=str(tiny.save_model(tmp_path / "model")))
    unet = recipe.load(torch.device("cpu")).denoiser
    latents = torch.randn(4, 3, 8, 8, requires_grad=True)
    timesteps = torch.zeros(4, dtype=torch.long)
    real = call_cost(unet, lambda: unet(latents, timesteps).sample)
    estimate = recipe.call_cost(4, Execution())
    assert real.activation_bytes <= estimate.activation_bytes <= 1.5 * real.activation_bytes
    with sdpa_kernel(SDPBackend.MATH):  # the one kernel that is counted on a CPU
        assert estimate.flop == call_cost(unet, lambda: unet(latents, timesteps).sample).flop
    twice = recipe.call_cost(8, Execution())
    assert twice.activation_bytes == pytest.approx(2 * estimate.activation_bytes, rel=0.05)
    assert twice.flop == 2 * estimate.flop
    half = PixelUNet(path=recipe.path, dtype="bfloat16").call_cost(4, Execution())
    cast = recipe.call_cost(4, Execution(autocast="bfloat16"))
    assert half.activation_bytes == cast.activation_bytes == estimate.activation_bytes // 2


def test_gradient_checkpointing_needs_less_memory(tmp_path):
    recipe = PixelUNet(path=str(tiny.save_model(tmp_path / "model")))
    plain = recipe.call_cost(4, Execution())
    spared = recipe.call_cost(4, Execution(gradient_checkpointing=True))
    assert spared.activation_bytes < 0.5 * plain.activation_bytes
