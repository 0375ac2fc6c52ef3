"""The estimates of a dry run against what a real forward pass does."""

from __future__ import annotations

from typing import Any

import pipelines
import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from invmm.models.borrowed import BorrowedModel
from invmm.models.cost import CallCost, call_cost, peak_bytes
from invmm.models.execution import Execution
from invmm.models.pipeline import LatentPipeline
from invmm.models.pixel import PixelUNet


def meta_unet(block: str, **options: Any):
    """A U-Net over 32x32 places with blocks of a kind, and a call of it."""
    from diffusers import UNet2DModel

    with torch.device("meta"):
        network: Any = UNet2DModel(
            sample_size=32, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=4,
            down_block_types=(f"{block}DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", f"{block}UpBlock2D"), **options,
        )  # fmt: skip
        network.requires_grad_(False)
        latents = torch.empty(2, 3, 32, 32, requires_grad=True)
        timesteps = torch.zeros(2, dtype=torch.long)
    return network, lambda: network(latents, timesteps).sample


def test_a_network_that_can_be_counted_by_hand():
    """At the end there are the inputs of both layers and the output."""
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU()).requires_grad_(False)
    inputs = torch.zeros(3, 4, requires_grad=True)
    cost = call_cost(network, lambda: network(inputs))
    flop, weights = 2 * 3 * 4 * 8, (4 * 8 + 8) * 4
    activations = 3 * (4 + 8 + 8) * 4
    assert cost == CallCost(activation_bytes=activations, flop=flop, weight_bytes=weights)
    assert cost.in_half_precision() == CallCost(
        activation_bytes=activations // 2, flop=flop, weight_bytes=weights // 2
    )


def test_autocast_keeps_norms_in_float32_and_copies_of_weights():
    """Casts of input and weights in two bytes; in four the norm's input, its output, the sum."""
    network = torch.nn.Sequential(
        torch.nn.Linear(4, 8, bias=False), torch.nn.LayerNorm(8, elementwise_affine=False)
    ).requires_grad_(False)
    with torch.device("meta"):
        network.to("meta")
        inputs = torch.zeros(3, 4, requires_grad=True)

    def call() -> torch.Tensor:
        output = network(inputs)
        dtypes.append(output.dtype)
        return output

    dtypes: list[torch.dtype] = []
    in_float32 = call_cost(network, call).activation_bytes
    cast = call_cost(network, call, autocast="float16").activation_bytes
    assert dtypes == [torch.float32, torch.float32]
    # while the norm runs: inputs, their cast, the weights' cast, the product, its cast, the output
    # and two statistics a row
    assert cast >= 3 * 4 * (4 + 2) + 8 * 4 * 2 + 3 * 8 * (2 + 4 + 4) + 2 * 3 * 4
    assert in_float32 < cast


def test_a_checkpointed_network_is_counted_under_autocast(tmp_path):
    recipe = PixelUNet(path=str(tiny.save_model(tmp_path / "model")))
    plain, spared = (
        recipe.call_cost(
            4, Execution(autocast="float16", gradient_checkpointing=way)
        ).activation_bytes
        for way in (False, True)
    )
    whole = recipe.call_cost(4, Execution()).activation_bytes
    assert spared < 0.8 * plain
    assert 0.6 * whole < plain < 1.2 * whole


@pytest.mark.parametrize("kind", ["pixel", "latent"])
def test_autocast_counts_for_float32_alone(kind, tmp_path):
    """A model in half precision is computed in it; its cost is half of float32's in bytes."""
    path, recipe = tmp_path / "model", {"pixel": PixelUNet, "latent": LatentPipeline}[kind]
    if kind == "pixel":
        tiny.save_model(path)
    else:
        pipelines.seeded(pipelines.stable_diffusion).save_pretrained(path)
    whole = recipe(path=str(path)).call_cost(4, Execution())
    cast = recipe(path=str(path)).call_cost(4, Execution(autocast="bfloat16"))
    assert cast.activation_bytes != whole.activation_bytes
    assert cast.weight_bytes == whole.weight_bytes
    for autocast in (None, "bfloat16"):
        half = recipe(path=str(path), dtype="bfloat16").call_cost(4, Execution(autocast=autocast))
        assert half.activation_bytes == pytest.approx(whole.activation_bytes / 2, abs=1)
        assert half.weight_bytes == whole.weight_bytes // 2


def test_without_gradients_only_what_is_still_needed_is_held():
    layers = [torch.nn.Linear(4, 1000), torch.nn.Linear(1000, 10), torch.nn.Linear(10, 500)]
    network = torch.nn.Sequential(*layers)
    # the caller's input, and the widest pair of a layer's input and output
    assert peak_bytes(network, lambda: network(torch.zeros(1, 4))) == (4 + 1000 + 10) * 4


def test_what_is_held_is_what_the_graph_keeps_and_little_more():
    """Against the tensors that autograd itself says it saves."""
    network, call = meta_unet("", add_attention=False)
    weights = {value.untyped_storage()._cdata for value in network.state_dict().values()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    cost = call_cost(network, call)
    assert saved < cost.activation_bytes < 1.1 * saved


def test_fused_attention_holds_no_matrix_of_all_pairs():
    network, call = meta_unet("Attn")
    plain, fused = call_cost(network, call, attention="math"), call_cost(network, call)
    matrix = 4 * 1024**2 * 8  # one head, 8 of them, 32x32 tokens, float32
    assert plain.activation_bytes - fused.activation_bytes > matrix
    assert plain.flop == fused.flop


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
    assert half.activation_bytes == estimate.activation_bytes // 2


def test_gradient_checkpointing_needs_less_memory(tmp_path):
    recipe = PixelUNet(path=str(tiny.save_model(tmp_path / "model")))
    plain = recipe.call_cost(4, Execution())
    spared = recipe.call_cost(4, Execution(gradient_checkpointing=True))
    assert spared.activation_bytes < 0.7 * plain.activation_bytes


@pytest.mark.parametrize("name", pipelines.MAKERS)
def test_the_condition_that_stands_for_a_prompt_has_its_shape(name):
    """The cost of a call depends on the length of the prompt: with T5, SD3 has 333 tokens."""
    pipeline = pipelines.seeded(pipelines.MAKERS[name])
    network: Any = BorrowedModel(pipeline).load(torch.device("cpu"))
    prompt = {"none": None, "class_label": 0}.get(network.family.prompts[0], "a cat")
    real = network.condition(prompt) or {}
    tokenizer = getattr(pipeline, "tokenizer", None)
    tokens = tokenizer.model_max_length if tokenizer else 0
    blank = network.blank_condition(network.denoiser.config, 1, tokens)
    assert {key: value.shape for key, value in blank.items()} == {
        key: value.shape for key, value in real.items()
    }
