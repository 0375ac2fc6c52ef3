"""The parts of a text-to-image model to train: text encoder, autoencoder, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from invmm.training.architectures import TrainableModel
from invmm.training.text_model import TextUNet, identity_autoencoder

CONF = Path(__file__).parents[3] / "conf" / "model" / "text_tiny.yaml"
CAPTIONS = ["white flower", "lower flowers", "tear-off calendar"]
TINY = {
    "image_size": 8, "block_out_channels": [8, 16], "attention_levels": [1], "norm_num_groups": 4,
    "num_attention_heads": 2, "text_hidden_size": 16, "text_num_layers": 1, "text_num_heads": 2,
}  # fmt: skip


def preset() -> TextUNet:
    values = yaml.safe_load(CONF.read_text())
    assert values.pop("_target_") == "invmm.training.text_model.TextUNet"
    return TextUNet(**values)


def test_the_text_encoder_knows_the_tokens_ids():
    trainee = TextUNet(**TINY).start(CAPTIONS)
    config, tokenizer = trainee.text_encoder.config, trainee.tokenizer
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id,
    )  # fmt: skip
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_id != 2, "transformers takes 2 for the mistaken id of early configs"


# Autoencoder --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "white", "black", "one bright pixel"])
def test_the_autoencoder_gives_back_its_pixels(kind):
    bright = -torch.ones(1, 3, 16, 16)
    bright[0, :, 5, 7] = 1
    pixels = {
        "random": torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        "white": torch.ones(1, 3, 16, 16),
        "black": -torch.ones(1, 3, 16, 16),
        "one bright pixel": bright,
    }[kind]
    autoencoder = identity_autoencoder(16)
    with torch.no_grad():
        posterior = autoencoder.encode(pixels).latent_dist
        decoded = autoencoder.decode(posterior.mode()).sample
    torch.testing.assert_close(posterior.mode(), pixels, rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded, pixels, rtol=0, atol=1e-5)
    assert posterior.std.max() < 1e-6


# Model --------------------------------------------------------------------------------------


def test_the_preset_has_under_two_million_parameters():
    recipe = preset()
    assert isinstance(recipe, TrainableModel)
    trainee = recipe.start(["white flower"])
    trained = [p for p in trainee.parameters() if p.requires_grad]
    assert 1.7e6 < sum(p.numel() for p in trained) < 2e6
    assert not any(p.requires_grad for p in trainee.vae.parameters())


def test_predictions_are_those_of_the_pipeline():
    """Captions reach the network by the same path in training as in the exported pipeline."""
    trainee = TextUNet(**TINY).start(CAPTIONS)
    pipeline = trainee.pipeline()
    captions = ["white flower", ""]
    expected = pipeline.encode_prompt(captions, torch.device("cpu"), 1, False)[0]
    torch.testing.assert_close(trainee.prompt_embeds(captions), expected)
    noisy, timesteps = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    torch.testing.assert_close(
        trainee(noisy, timesteps, captions),
        pipeline.unet(noisy, timesteps, expected).sample,
    )


def test_training_images_without_a_caption_are_refused():
    with pytest.raises(ValueError, match="2 of the training images have no caption"):
        TextUNet(**TINY).start(["a", None, "b", None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 3}, r"model\.num_attention_heads=3 does not divide the widths"),
        ({"text_num_heads": 3}, r"model\.text_num_heads=3 does not divide.*=16"),
        ({"attention_levels": [2]}, r"model\.attention_levels=\[2\] names a level"),
        ({"attention_levels": [3]}, r"model\.attention_levels=\[3\] names a level"),
        ({"attention_levels": [-1]}, r"model\.attention_levels=\[-1\] names a level"),
        ({"image_size": 12}, r"model\.image_size=12 is no size.*multiple of 8"),
        ({"caption_templates": ["{}", "a picture"]}, r"model\.caption_templates holds 'a picture'"),
        ({"beta_start": 0.5}, r"model\.beta_start=0\.5 exceeds model\.beta_end"),
    ],
)
def test_what_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TextUNet(**{**TINY, **change})
