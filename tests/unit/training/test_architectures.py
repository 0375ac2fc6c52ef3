"""Networks to train: their sizes, their schedules, and what cannot be built."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from invmm.training.architectures import TrainableModel, UNet

CONF = Path(__file__).parents[3] / "conf" / "model"


def preset(name: str) -> UNet:
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert values.pop("_target_") == "invmm.training.architectures.UNet"
    return UNet(**values)


def num_parameters(recipe: UNet) -> int:
    import_module("diffusers")  # the first import fails on the meta device with torch 2.7
    with torch.device("meta"):
        unet, _ = recipe.build()
    return sum(parameter.numel() for parameter in unet.parameters())


def test_the_tiny_preset_has_about_a_million_parameters():
    recipe = preset("unet_tiny")
    assert isinstance(recipe, TrainableModel)
    assert 1.0e6 < num_parameters(recipe) < 1.2e6
    assert recipe.image_size == 16


def test_the_cifar10_preset_has_the_published_size():
    """35.7 million parameters (Ho et al. 2020, appendix B)."""
    assert num_parameters(preset("unet_cifar10")) == pytest.approx(35.7e6, rel=0.005)


def test_attention_stands_at_the_named_levels_only():
    unet, _ = UNet(block_out_channels=[8, 8, 16], attention_levels=[1], norm_num_groups=4).build()
    assert [type(b).__name__ for b in unet.down_blocks] == [
        "DownBlock2D", "AttnDownBlock2D", "DownBlock2D",
    ]  # fmt: skip
    assert [type(b).__name__ for b in unet.up_blocks] == [
        "UpBlock2D", "AttnUpBlock2D", "UpBlock2D",
    ]  # fmt: skip


def test_the_schedule_is_the_one_asked_for():
    recipe = UNet(
        block_out_channels=[8, 16], attention_levels=[], norm_num_groups=4,
        prediction_type="v_prediction", num_train_timesteps=50, beta_schedule="scaled_linear",
        beta_start=0.01, beta_end=0.04,
    )  # fmt: skip
    _, scheduler = recipe.build()
    betas = torch.linspace(0.1, 0.2, 50, dtype=torch.float64) ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), (1 - betas).cumprod(0))
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.clip_sample is False


def test_the_caller_seeds_the_weights():
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        unet, _ = UNet(block_out_channels=[8], attention_levels=[], norm_num_groups=4).build()
        return unet.conv_in.weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_out_channels": []}, r"model\.block_out_channels=\[\] is no network"),
        ({"norm_num_groups": 5}, r"model\.norm_num_groups=5 does not divide"),
        ({"attention_levels": [2]}, r"model\.attention_levels=\[2\].*use 0 to 1"),
        ({"attention_levels": [-1]}, r"model\.attention_levels=\[-1\].*use 0 to 1"),
        ({"attention_head_dim": 32}, r"model\.attention_head_dim=32 does not divide.*\[16\]"),
        ({"image_size": 9}, r"model\.image_size=9 cannot be halved 1 times; use a multiple of 2"),
        ({"beta_start": 0.5}, r"model\.beta_start=0\.5 exceeds model\.beta_end=0\.02"),
    ],
)
def test_what_cannot_be_built_is_refused(values, message):
    fine = {"block_out_channels": [8, 16], "attention_levels": [1], "norm_num_groups": 4}
    UNet(**fine)
    with pytest.raises(ValueError, match=message):
        UNet(**{**fine, **values})


def test_the_narrowest_network_is_one():
    UNet(block_out_channels=[1], attention_levels=[], norm_num_groups=1, attention_head_dim=1)
