"""By which factor latents are scaled: told by the config, by the user, or refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pipelines
import pytest
import torch

from invmm.diffusion.sampling import Sampler, draw
from invmm.models.auto import AutoModel
from invmm.models.borrowed import BorrowedModel
from invmm.models.codec import latent_scale
from invmm.models.pipeline import LatentPipeline

CPU = torch.device("cpu")
AMBIGUOUS = r"model\.latent_scale=null leaves the scale open: scaling_factor=0\.18215 .*; use"


def unscaled_vq(**scale: float):
    """A pipeline whose VQ autoencoder is told no scale, unless it is given here."""
    return pipelines.seeded(lambda: pipelines.ldm(pipelines.vq_autoencoder(**scale)))


@pytest.fixture(scope="module")
def pipeline():
    return unscaled_vq()


@pytest.fixture(scope="module")
def saved_again(pipeline, tmp_path_factory):
    """As diffusers saves it: with its own default in the file."""
    path = tmp_path_factory.mktemp("vq") / "saved"
    pipeline.save_pretrained(path)
    assert json.loads((path / "vqvae/config.json").read_text())["scaling_factor"] == 0.18215
    return path


@pytest.fixture
def folder(saved_again, tmp_path):
    """(values of the autoencoder's config.json) -> a copy with them; None takes a key out."""

    def made(**values: object) -> Path:
        path = Path(shutil.copytree(saved_again, tmp_path / "model", dirs_exist_ok=True))
        file = path / "vqvae/config.json"
        config = json.loads(file.read_text())
        config.pop("scaling_factor")
        file.write_text(json.dumps({**config, **values}))
        return path

    return made


@pytest.fixture(scope="module")
def expected(pipeline):
    """Noise and pixels in [0, 1] of the pipeline whose factor is 1; an image and its latents."""
    theirs = unscaled_vq()
    theirs.vqvae.register_to_config(scaling_factor=1.0)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    module = __import__(type(theirs).__module__, fromlist=["randn_tensor"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *args, **options: noise)
        drawn = theirs(batch_size=2, num_inference_steps=5, output_type="np").images
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        latents = theirs.vqvae.encode(image).latents
        decoded = theirs.vqvae.decode(latents).sample.clamp(-1, 1)
    return noise, torch.from_numpy(drawn).movedim(-1, 1), image, latents, decoded


def assert_equals(network, expected) -> None:
    noise, drawn, image, latents, decoded = expected
    sampler = Sampler(num_inference_steps=5)
    with torch.no_grad():
        found = draw(
            lambda x, t: network.predict(x, t, None),
            noise,
            sampler=sampler,
            schedule=network.schedule,
        )
        pixels = (network.decode(found) + 1) / 2
        torch.testing.assert_close(pixels, drawn, rtol=0, atol=1e-5)
        torch.testing.assert_close(network.encode(image), latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(network.decode(latents), decoded, rtol=0, atol=1e-5)
    assert drawn.std() > 0.01


def test_a_folder_without_a_scale_equals_the_unscaled_pipeline(folder, expected):
    recipe = AutoModel(path=str(folder()))
    assert recipe.describe().latent_scale == 1
    assert_equals(recipe.load(CPU), expected)


def test_a_pipeline_in_memory_does_whether_built_or_loaded(pipeline, folder, expected):
    from diffusers import LDMPipeline

    loaded = LDMPipeline.from_pretrained(folder())
    told = unscaled_vq()
    told.vqvae.register_to_config(scaling_factor=1.0)
    for own in (pipeline, loaded, told):
        model = BorrowedModel(own)
        assert model.describe().latent_scale == 1
        assert_equals(model.load(CPU), expected)


def test_a_folder_saved_again_asks_and_then_equals_it(saved_again, expected):
    recipe = LatentPipeline(path=str(saved_again))
    for action in (recipe.describe, lambda: recipe.load(CPU)):
        with pytest.raises(ValueError, match=AMBIGUOUS):
            action()
    told = LatentPipeline(path=str(saved_again), latent_scale=1.0)
    assert told.describe().latent_scale == 1
    assert_equals(told.load(CPU), expected)


def test_memory_asks_too_where_the_scale_was_loaded_from_a_file(saved_again, expected):
    from diffusers import LDMPipeline

    loaded = LDMPipeline.from_pretrained(saved_again)
    with pytest.raises(ValueError, match=AMBIGUOUS):
        BorrowedModel(loaded).describe()
    assert_equals(BorrowedModel(loaded, latent_scale=1.0).load(CPU), expected)


@pytest.mark.parametrize("given", [1, 0.18215])
def test_either_answer_is_taken(saved_again, given):
    recipe = LatentPipeline(path=str(saved_again), latent_scale=given)
    assert recipe.load(CPU).codec.scale == recipe.describe().latent_scale == given


@pytest.mark.parametrize("scale", [1.0, 0.7, 0.13025, 3])
def test_any_other_scale_in_the_file_is_used(folder, scale):
    recipe = LatentPipeline(path=str(folder(scaling_factor=scale)))
    assert recipe.load(CPU).codec.scale == recipe.describe().latent_scale == scale


@pytest.mark.parametrize(
    "value", [0, -0.0, -1, math.nan, math.inf, 1e-50, 10**400, "1.0", True, None, [1.0]]
)
@pytest.mark.parametrize("is_vq", [True, False])
def test_no_scale_is_refused_in_one_line(value, is_vq):
    with pytest.raises(ValueError, match=r"autoencoder has scaling_factor=.* is needed") as told:
        latent_scale({"scaling_factor": value}, is_vq=is_vq)
    assert "\n" not in str(told.value)
    if value is not None:
        with pytest.raises(ValueError, match=r"model\.latent_scale=.* cannot be a scale"):
            latent_scale({}, is_vq=is_vq, given=value)


@pytest.mark.parametrize("value", [0, "1.0", math.nan, None])
def test_no_scale_is_refused_before_weights_load(folder, value):
    path = folder(scaling_factor=value)
    (path / "vqvae/diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"the autoencoder has scaling_factor="):
        AutoModel(path=str(path)).describe()


def test_an_option_that_contradicts_the_file_is_refused(folder):
    path = folder(scaling_factor=0.7)
    with pytest.raises(ValueError, match=r"latent_scale=1\.0 contradicts scaling_factor=0\.7"):
        AutoModel(path=str(path), latent_scale=1.0).describe()


def test_kl_autoencoders_keep_their_own():
    assert latent_scale({"scaling_factor": 0.18215}, is_vq=False) == 0.18215
    assert latent_scale({}, is_vq=False) == 0.18215  # what diffusers' pipelines then divide by
    assert latent_scale({"scaling_factor": 0.7}, is_vq=False, given=0.7) == 0.7
    with pytest.raises(ValueError, match=r"latent_scale=1\.0 contradicts scaling_factor=0\.18215"):
        latent_scale({}, is_vq=False, given=1.0)
    kl = pipelines.seeded(pipelines.MAKERS["ldm kl"])
    assert BorrowedModel(kl).describe().latent_scale == 0.7


def test_what_a_config_notes_as_filled_in_is_not_taken_for_told():
    filled_in = {"scaling_factor": 0.18215, "_use_default_values": ["scaling_factor"]}
    assert latent_scale(filled_in, is_vq=True) == 1
    assert latent_scale({**filled_in, "scaling_factor": 0.5}, is_vq=True) == 0.5
    for strange in ("scaling_factor", 5, None, ["norm_num_groups"]):
        with pytest.raises(ValueError, match=AMBIGUOUS):
            latent_scale({**filled_in, "_use_default_values": strange}, is_vq=True)


def test_a_pixel_model_has_no_scale(tmp_path):
    import tiny
    from diffusers import DDPMPipeline

    path = tiny.save_model(tmp_path / "ddpm")
    with pytest.raises(ValueError, match=r"model\.latent_scale=1\.0 has no meaning for a DDPMPipe"):
        AutoModel(path=str(path), latent_scale=1.0).describe()
    with pytest.raises(ValueError, match=r"model\.latent_scale=1\.0 has no meaning for a DDPMPipe"):
        BorrowedModel(DDPMPipeline.from_pretrained(path), latent_scale=1.0).describe()
