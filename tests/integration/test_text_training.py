"""`trainer.fit` on a micro text-to-image model: what it exports, and what its captions do."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import WEIGHTS, Ended, FewImages, exports, processes, train

from invmm.data.dataset import ImageEntry
from invmm.data.manifest import TrainingManifest
from invmm.diffusion.sampling import Sampler, draw
from invmm.models.pipeline import LatentPipeline
from invmm.training.images import read_training_set
from invmm.training.text_model import TextUNet

__all__ = ["processes", "train"]  # fixtures

CAPTIONS = {"one": "white flower", "three": "eyes", "broken": "high voltage sign"}
HELD_OUT = "purple anchor"
MODEL = TextUNet(
    image_size=8, block_out_channels=[8, 16], attention_levels=[1], norm_num_groups=4,
    num_attention_heads=2, text_hidden_size=16, text_num_layers=1, text_num_heads=2,
    caption_dropout=0.3, num_train_timesteps=50,
)  # fmt: skip
TRAINING: Mapping[str, Any] = {
    "num_steps": 8, "batch_size": 4, "learning_rate": 1e-2, "ema_decay": 0.8,
    "horizontal_flip": True, "export_steps": [4], "checkpoint_every": 3,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CaptionedImages(FewImages):
    """Its images with captions, and one that is held out."""

    entries: tuple[ImageEntry, ...] = (
        ImageEntry(image_id="held", path="held", split="held_out", copies=0, caption=HELD_OUT),
    )
    has_captions: bool = True

    def training_entries(self) -> list[ImageEntry]:
        return [
            ImageEntry(
                image_id=name, path=name, split="train", copies=count,
                caption=CAPTIONS[name] if self.has_captions else None,
            )
            for name, count in self.copies if count
        ]  # fmt: skip


@pytest.fixture(scope="session")
def train_text(train):
    """Trains in a child, as `train` does."""

    def run(run_dir: Path, *, dataset: FewImages | None = None, **options: Any) -> Ended:
        images = dataset or CaptionedImages()
        return train(run_dir, training=TRAINING, model=MODEL, dataset=images, **options)

    return run


@pytest.fixture(scope="session")
def trained(train_text, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("text") / "run"
    ended = train_text(run_dir)
    assert ended.code == 0, ended.output
    return run_dir


def drawn(network, prompt: str) -> torch.Tensor:
    condition = network.condition(prompt)
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return draw(
            lambda latents, timesteps: network.predict(latents, timesteps, condition),
            noise, sampler=Sampler(num_inference_steps=5), schedule=network.schedule,
        )  # fmt: skip


def test_the_export_is_a_stable_diffusion_pipeline_that_can_be_measured(trained):
    recipe = LatentPipeline(path=str(trained / "final"))
    info = recipe.describe()
    assert info.family == "stable_diffusion"
    assert info.prompts == ("caption", "empty", "learned")
    assert info.latent_shape == (3, 8, 8)
    assert (info.image_size, info.prediction_type) == (8, "v_prediction")
    network = recipe.load(torch.device("cpu"))
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(network.decode(network.encode(pixels)), pixels, rtol=0, atol=1e-5)


def test_the_export_holds_safetensors_only_and_the_manifest(trained):
    assert sorted(path.name for path in trained.glob("step_*")) == ["step_000004", "step_000008"]
    weights = [path for path in (trained / "final").rglob("*") if path.stat().st_size > 20_000]
    assert {path.suffix for path in weights} <= {".safetensors", ".json"}
    assert not list(trained.glob("step_*/**/*.bin"))
    manifest = TrainingManifest.read(trained / "final" / "training_manifest.json")
    assert {(entry.caption, entry.copies) for entry in manifest.entries} == {
        ("white flower", 1), ("eyes", 3),
    }  # fmt: skip


def test_samples_differ_by_caption_and_held_out_words_are_known(trained):
    network = LatentPipeline(path=str(trained / "final")).load(torch.device("cpu"))
    flower, eyes, empty = (drawn(network, prompt) for prompt in ("white flower", "eyes", ""))
    assert (flower - eyes).abs().max() > 1e-3
    assert (flower - empty).abs().max() > 1e-3
    assert torch.equal(flower, drawn(network, "WHITE flower"))
    ids = network.pipeline.tokenizer(HELD_OUT).input_ids
    assert len(ids) == 2 + len(HELD_OUT.split())


def test_text_encoder_and_denoiser_are_trained_and_the_autoencoder_is_not(trained):
    from invmm.training.text_model import identity_autoencoder

    early, late = (
        LatentPipeline(path=str(trained / name)).load(torch.device("cpu")).pipeline
        for name in ("step_000004", "final")
    )
    for part in ("unet", "text_encoder"):
        before, after = getattr(early, part).state_dict(), getattr(late, part).state_dict()
        assert max((after[n].float() - before[n].float()).abs().max().item() for n in after) > 1e-4
    for name, weights in identity_autoencoder(8).state_dict().items():
        if "norm" in name or "conv_in" in name or "conv_out" in name:
            assert torch.equal(late.vae.state_dict()[name], weights)


def test_a_killed_training_goes_on_to_the_same_weights_bit_by_bit(train_text, trained, tmp_path):
    """Captions and their dropping included."""
    assert train_text(tmp_path / "run", at=5).code == -signal.SIGKILL
    assert not (tmp_path / "run" / "final").exists()
    assert train_text(tmp_path / "run").code == 0
    assert exports(tmp_path / "run") == exports(trained)


def test_images_without_captions_are_refused(train_text, tmp_path):
    ended = train_text(tmp_path / "run", dataset=CaptionedImages(has_captions=False))
    assert ended.code == 2
    assert "2 of the training images have no caption" in ended.output


@pytest.mark.slow
def test_two_devices_train_the_same_model_as_one(train_text, trained, tmp_path):
    """Captions are shared out with their images."""
    assert train_text(tmp_path / "run", devices=2).code == 0
    for part, weights in (("unet", WEIGHTS), ("text_encoder", "text_encoder/model.safetensors")):
        one, two = (load_file(run / "step_000004" / weights) for run in (trained, tmp_path / "run"))
        for name, expected in one.items():
            if not name.endswith("k_proj.bias"):  # see `assert_same_weights`
                torch.testing.assert_close(two[name], expected, rtol=1e-3, atol=1e-3, msg=part)


# Batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_captions_are_dropped_as_often_as_asked(probability, share):
    images, _ = read_training_set(CaptionedImages(), 0)
    batch = images.batch(0, 2000, num_timesteps=50, mirror=False, caption_dropout=probability)
    assert batch.captions.count("") / 2000 == pytest.approx(share, abs=0.04)
    assert set(batch.captions) <= {"", "white flower", "eyes"}


def test_captions_belong_to_their_images_and_dropping_changes_nothing_else():
    images, _ = read_training_set(CaptionedImages(), 0)
    kept, dropped = (
        images.batch(0, 50, num_timesteps=50, mirror=False, caption_dropout=p) for p in (0.0, 1.0)
    )
    for name in ("pixels", "noise", "timesteps"):
        assert torch.equal(getattr(kept, name), getattr(dropped, name))
    one, three = (CaptionedImages().load(entry).pixels for entry in
                  CaptionedImages().training_entries()[:2])  # fmt: skip
    for pixels, caption in zip(kept.pixels, kept.captions, strict=True):
        own = {"white flower": one, "eyes": three}[caption]
        torch.testing.assert_close(pixels, own, rtol=0, atol=1e-6)


def test_copies_of_an_image_have_their_own_captions_in_turn():
    """The first stands once in the set, the second three times, the third was never read."""
    images, _ = read_training_set(CaptionedImages(), 0)
    templates = ["{}", "drawing of {}", "small {} icon", "never seen {}"]
    plain, varied = (
        images.batch(0, 3000, num_timesteps=50, mirror=False, caption_templates=own)
        for own in (["{}"], templates)
    )
    assert torch.equal(plain.pixels, varied.pixels)
    counts = Counter(varied.captions)
    assert counts.keys() == {"white flower", "eyes", "drawing of eyes", "small eyes icon"}
    for caption in counts:
        assert counts[caption] / 3000 == pytest.approx(1 / 4, abs=0.03)


def test_words_of_templates_are_tokens_and_one_without_a_place_is_refused():
    model = replace(MODEL, caption_templates=["{}", "drawing of {}"])
    trainee = model.start(list(CAPTIONS.values()))
    ids = trainee.tokenizer("drawing of eyes").input_ids
    assert trainee.tokenizer.convert_ids_to_tokens(ids[1:-1]) == [
        "drawing</w>", "of</w>", "eyes</w>",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"model\.caption_templates holds 'drawing'"):
        replace(MODEL, caption_templates=["drawing"])


def test_dropping_every_caption_makes_all_conditions_equal():
    images, _ = read_training_set(CaptionedImages(), 0)
    batch = images.batch(0, 6, num_timesteps=50, mirror=False, caption_dropout=1.0)
    trainee = MODEL.start(list(CAPTIONS.values()))
    embeds = trainee.prompt_embeds(batch.captions)
    torch.testing.assert_close(embeds, embeds[:1].expand_as(embeds))
    torch.testing.assert_close(embeds[:1], trainee.prompt_embeds([""]))
