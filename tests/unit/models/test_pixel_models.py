"""The pixel U-Net's recipe: what it tells of a model, and that it is true of the loaded one."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from invmm.models.adapter import ModelRecipe
from invmm.models.pixel import PixelNetwork, PixelUNet

CPU = torch.device("cpu")
SCHEDULE = {
    "num_train_timesteps": 100,
    "beta_start": 0.001,
    "beta_end": 0.1,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("pixel") / "ddpm")


def random_unet(**values):
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    common = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1,
        "norm_num_groups": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return UNet2DModel(**{**common, **values})


def save_bare(path: Path, **values) -> PixelUNet:
    random_unet(**values).save_pretrained(path)
    return PixelUNet(path=str(path), noise_schedule=SCHEDULE)


def test_the_description_is_true_of_the_loaded_network(pipeline):
    recipe = PixelUNet(path=str(pipeline))
    assert isinstance(recipe, ModelRecipe)
    info, network, schedule = recipe.describe(), recipe.load(CPU), recipe.schedule()
    assert info.latent_shape == network.latent_shape == (3, 8, 8)
    assert info.image_size == 8
    assert info.num_train_timesteps == network.schedule.num_train_timesteps == 1000
    assert info.prediction_type == network.schedule.prediction_type == "epsilon"
    assert torch.equal(schedule.alphas_cumprod, network.schedule.alphas_cumprod)
    numbers = sum(p.numel() for p in network.denoiser.parameters())
    assert info.weight_bytes is not None
    assert 4 * numbers < info.weight_bytes < 4 * numbers + 20_000


def test_a_description_reads_no_weights(pipeline, tmp_path):
    folder = Path(shutil.copytree(pipeline, tmp_path / "model"))
    before = PixelUNet(path=str(folder)).describe()
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"x" * weights.stat().st_size)
    assert PixelUNet(path=str(folder)).describe() == before


def test_the_fingerprint_is_that_of_the_file(pipeline):
    name = "unet/diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256((pipeline / name).read_bytes()).hexdigest()
    assert PixelUNet(path=str(pipeline)).fingerprint() == {name: digest}


def test_a_bare_network_takes_its_schedule_from_the_config(tmp_path):
    recipe = save_bare(tmp_path / "bare")
    betas = torch.linspace(0.001**0.5, 0.1**0.5, 100, dtype=torch.float64) ** 2
    network = recipe.load(CPU)
    torch.testing.assert_close(
        network.schedule.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-4, atol=0
    )
    assert recipe.describe().num_train_timesteps == 100
    assert network.schedule.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match=r"model\.noise_schedule=\{num_train_timesteps: 1000"):
        PixelUNet(path=recipe.path).describe()


def test_the_schedule_of_the_config_overrides_the_pipelines(pipeline):
    recipe = PixelUNet(path=str(pipeline), noise_schedule=SCHEDULE)
    assert recipe.describe().num_train_timesteps == 100
    assert recipe.load(CPU).schedule.prediction_type == "v_prediction"


def test_the_schedule_of_any_known_scheduler_class_is_read(pipeline, tmp_path):
    """A pipeline saved with a sampler's scheduler means the same trained schedule."""
    from diffusers import DDIMPipeline, PNDMScheduler

    scheduler = PNDMScheduler(beta_start=0.002, beta_end=0.03, prediction_type="epsilon")
    DDIMPipeline(random_unet(), scheduler).save_pretrained(tmp_path / "ddim")
    index = json.loads((tmp_path / "ddim" / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    config = tmp_path / "ddim" / "scheduler" / "scheduler_config.json"
    scheduler.save_config(config.parent)
    (tmp_path / "ddim" / "model_index.json").write_text(json.dumps(index))
    schedule = PixelUNet(path=str(tmp_path / "ddim")).schedule()
    betas = torch.linspace(0.002, 0.03, 1000, dtype=torch.float64)
    torch.testing.assert_close(
        schedule.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-3, atol=0
    )


def test_a_misspelt_key_of_the_schedule_is_refused():
    with pytest.raises(ValueError, match=r"model\.noise_schedule has no key beta_strt"):
        PixelUNet(path="x/y", noise_schedule={"beta_strt": 0.1})


def test_a_schedule_that_cannot_be_built_names_its_key(pipeline):
    recipe = PixelUNet(path=str(pipeline), noise_schedule={"beta_schedule": "steep"})
    with pytest.raises(ValueError, match=r"noise schedule of model\.noise_schedule is unusable"):
        recipe.schedule()


def test_a_greyscale_model_sees_luminance_and_answers_in_three_channels(tmp_path):
    network = save_bare(tmp_path / "grey", in_channels=1, out_channels=1).load(CPU)
    assert network.latent_shape == (1, 8, 8)
    red = torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)
    latents = network.encode(red)
    torch.testing.assert_close(latents, torch.full((1, 1, 8, 8), 2 * 0.299 - 1))
    pixels = network.decode(latents)
    assert pixels.shape == (1, 3, 8, 8)
    torch.testing.assert_close(network.encode(pixels), latents)


def test_a_learned_variance_is_left_out(tmp_path):
    network = save_bare(tmp_path / "variance", out_channels=6).load(CPU)
    latents, timesteps = torch.randn(2, 3, 8, 8), torch.tensor([0, 99])
    expected = network.denoiser(latents, timesteps).sample
    assert expected.shape == (2, 6, 8, 8)
    assert torch.equal(network.predict(latents, timesteps, None), expected[:, :3])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-3), ("bfloat16", 5e-2)])
def test_half_precision_weights_answer_in_the_precision_of_the_latents(dtype, tolerance, pipeline):
    latents = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([1, 500, 999])
    full = PixelUNet(path=str(pipeline)).load(CPU).predict(latents, timesteps, None)
    network = PixelUNet(path=str(pipeline), dtype=dtype).load(CPU)
    assert {p.dtype for p in network.denoiser.parameters()} == {getattr(torch, dtype)}
    half = network.predict(latents, timesteps, None)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() / full.abs().max() < tolerance


def test_a_variant_is_loaded_from_its_own_file(pipeline, tmp_path):
    from diffusers import DDPMPipeline

    half = DDPMPipeline.from_pretrained(pipeline, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    recipe = PixelUNet(path=str(tmp_path / "half"), variant="fp16")
    assert list(recipe.fingerprint()) == ["unet/diffusion_pytorch_model.fp16.safetensors"]
    assert recipe.load(CPU).latent_shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"of variant fp16; give model\.variant=fp16"):
        PixelUNet(path=str(tmp_path / "half")).describe()


def test_a_pipeline_in_memory_answers_like_its_folder(pipeline):
    from diffusers import DDPMPipeline

    latents, timesteps = torch.randn(2, 3, 8, 8), torch.tensor([7, 700])
    network = PixelNetwork.from_pipeline(DDPMPipeline.from_pretrained(pipeline))
    expected = PixelUNet(path=str(pipeline)).load(CPU)
    assert torch.equal(
        network.predict(latents, timesteps, None), expected.predict(latents, timesteps, None)
    )


def test_a_pipeline_whose_latents_are_no_pixels_is_refused():
    """Three channels everywhere, and yet what the U-Net sees are codes of an autoencoder."""
    from diffusers import DDIMScheduler, LDMPipeline, VQModel

    latent = LDMPipeline(VQModel(norm_num_groups=8), random_unet(), DDIMScheduler())
    with pytest.raises(ValueError, match="LDMPipeline is not supported; give a DDPMPipeline"):
        PixelNetwork.from_pipeline(latent)
