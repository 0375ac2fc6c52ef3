"""Our sampling against the pipelines of diffusers themselves, and loading them from folders."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pipelines
import pytest
import torch
from safetensors.torch import load_file, save_file

from invmm.diffusion.guidance import guided, is_guided, repeated
from invmm.diffusion.sampling import Sampler, draw
from invmm.models.execution import Execution
from invmm.models.pipeline import PIPELINES, LatentPipeline

CPU = torch.device("cpu")
ROWS, STEPS = 2, 5
SEEDS = (11, 12)
"""Of a stochastic sampler, one a row."""
TEXT = [name for name in pipelines.MAKERS if name.startswith("sd")]
PROMPT, LABEL = "a red fox", 7


@pytest.fixture(scope="module", params=pipelines.MAKERS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipeline(name):
    return pipelines.seeded(pipelines.MAKERS[name])


@pytest.fixture(scope="module")
def network(pipeline):
    return wrapped(pipeline)


def wrapped(pipeline):
    return PIPELINES[type(pipeline).__name__](pipeline, CPU)


def prompt_of(network):
    return {"none": None, "class_label": LABEL, "caption": PROMPT}[network.family.prompts[0]]


def noise_for(network, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, *network.latent_shape, generator=rng)


def ours(network, sampler: Sampler, noise, scale: float, prompt=None, negative: str = ""):
    """Pixels in [0, 1]."""
    prompt = prompt_of(network) if prompt is None else prompt
    with torch.no_grad():
        condition = repeated(network.condition(prompt), ROWS)
        if is_guided(scale):
            scales = torch.full((ROWS,), scale)
            step = guided(
                network.predict, condition, repeated(network.negative(negative), ROWS), scales
            )
        else:

            def step(latents, timesteps):
                return network.predict(latents, timesteps, condition)

        latents = draw(step, noise, sampler=sampler, schedule=network.schedule, seeds=SEEDS)
        return (network.decode(latents) + 1) / 2


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def theirs(pipeline, noise, scale: float, prompt=PROMPT, negative: str | None = None):
    """Pixels in [0, 1] from the pipeline's own loop, its first noise handed to it."""
    kind = type(pipeline).__name__
    options = {"num_inference_steps": STEPS, "generator": generators()}
    if kind in ("LDMPipeline", "DiTPipeline"):
        module = __import__(type(pipeline).__module__, fromlist=["randn_tensor"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "randn_tensor", lambda *args, **kwargs: noise)
            if kind == "LDMPipeline":
                images = pipeline(batch_size=ROWS, output_type="np", **options).images
            else:
                images = pipeline(
                    class_labels=[LABEL] * ROWS, guidance_scale=scale, output_type="np", **options
                ).images
        return torch.from_numpy(images).movedim(-1, 1)
    images = pipeline(
        prompt=[prompt] * ROWS, negative_prompt=None if negative is None else [negative] * ROWS,
        guidance_scale=scale, latents=noise.clone(), output_type="pt", **options,
    ).images  # fmt: skip
    return images


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_sampling_equals_the_pipeline(scale, pipeline, network):
    if scale != 1 and network.family.prompts == ("none",):
        pytest.skip("unconditional")
    flow = network.schedule.is_flow
    sampler = Sampler(
        scheduler="flow_euler" if flow else "ddim", num_inference_steps=STEPS,
        timestep_spacing="linspace" if flow else "trailing",
    )  # fmt: skip
    noise = noise_for(network)
    expected = theirs(pipeline, noise, scale)
    torch.testing.assert_close(ours(network, sampler, noise, scale), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01


SCHEDULERS = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {"final_sigmas_type": "zero"}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}),
    "unipc": ("UniPCMultistepScheduler", {"final_sigmas_type": "zero"}),
    "heun": ("HeunDiscreteScheduler", {}),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["sd1 epsilon", "sd2 v", "sdxl"])
def test_other_schedulers_equal_the_pipeline_with_them(kind, scheduler):
    import diffusers

    pipeline = pipelines.seeded(pipelines.MAKERS[kind])
    network = wrapped(pipeline)
    name, options = SCHEDULERS[scheduler]
    pipeline.scheduler = getattr(diffusers, name)(
        **pipelines.SD_BETAS, prediction_type=network.schedule.prediction_type,
        timestep_spacing="trailing", **options,
    )  # fmt: skip
    sampler = Sampler(scheduler=scheduler, num_inference_steps=STEPS)
    noise = noise_for(network)
    expected = theirs(pipeline, noise, 3.0)
    torch.testing.assert_close(ours(network, sampler, noise, 3.0), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", TEXT)
def test_a_negative_prompt_equals_the_pipeline(kind):
    pipeline = pipelines.seeded(pipelines.MAKERS[kind])
    network = wrapped(pipeline)
    flow = network.schedule.is_flow
    sampler = Sampler(
        scheduler="flow_euler" if flow else "ddim", num_inference_steps=STEPS,
        timestep_spacing="linspace" if flow else "trailing",
    )  # fmt: skip
    noise = noise_for(network)
    expected = theirs(pipeline, noise, 4.0, negative="blue")
    found = ours(network, sampler, noise, 4.0, negative="blue")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - ours(network, sampler, noise, 4.0)).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_those_of_the_autoencoder(dtype, network, name):
    """As published: before quantisation, or the posterior's; shifted and scaled in float32."""
    size = network.image_size
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    codec = copy.deepcopy(network.codec)
    codec.autoencoder.to(dtype)
    with torch.no_grad():
        found = codec.encode(pixels)
        if "sdxl" in name:  # upcast, as its config asks
            codec.autoencoder.to(dtype := torch.float32)
        encoded = codec.autoencoder.encode(pixels.to(dtype))
    assert found.shape == (1, *network.latent_shape)
    config = codec.autoencoder.config
    if hasattr(encoded, "latents"):
        latents = encoded.latents
    elif codec.posterior == "mode":
        latents = encoded.latent_dist.mode()
    else:
        drawn = torch.randn(found.shape[1:], generator=torch.Generator().manual_seed(0)).to(dtype)
        latents = encoded.latent_dist.mean + encoded.latent_dist.std * drawn
    shift = getattr(config, "shift_factor", None) or 0.0
    expected = (latents.float() - shift) * config.scaling_factor
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert network.image_size == (24 if "24 pixels" in name else 16)


def test_no_part_of_a_pipeline_is_left_trainable(network):
    for part in network.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            assert not part.training
            assert not any(parameter.requires_grad for parameter in part.parameters())


# Folders ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline") / "saved"
    pipeline.save_pretrained(path)
    return path


def test_a_folder_loads_to_the_same_network(folder, network):
    recipe = LatentPipeline(path=str(folder))
    loaded = recipe.load(CPU)
    info = recipe.describe()
    assert info.latent_shape == loaded.latent_shape == network.latent_shape
    assert info.image_size == loaded.image_size == network.image_size
    assert info.prediction_type == loaded.schedule.prediction_type
    assert info.num_train_timesteps == 1000
    assert info.prompts == network.family.prompts
    latents, timesteps = noise_for(network), torch.tensor([900, 30])
    condition = repeated(network.condition(prompt_of(network)), ROWS)
    own = repeated(loaded.condition(prompt_of(loaded)), ROWS)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.predict(latents, timesteps, own), network.predict(latents, timesteps, condition)
        )
    weights = sum(
        parameter.numel() * 4
        for part in network.pipeline.components.values()
        if isinstance(part, torch.nn.Module)
        for parameter in part.parameters()
    )
    assert weights < info.weight_bytes < 1.2 * weights + 200_000
    assert len(recipe.fingerprint()) == sum(
        isinstance(part, torch.nn.Module) for part in network.pipeline.components.values()
    )


def test_a_call_is_priced_without_weights(folder):
    recipe = LatentPipeline(path=str(folder))
    one, two = (recipe.call_cost(rows, Execution()) for rows in (1, 2))
    assert 0 < one.flop < two.flop <= 2 * one.flop
    assert one.activation_bytes > 0


def each_weight_file(folder: Path):
    return sorted(folder.glob("*/*.safetensors"))


def test_a_missing_or_infinite_weight_of_any_part_is_an_error_and_never_random(folder, tmp_path):
    for file in each_weight_file(folder):
        copy = Path(shutil.copytree(folder, tmp_path / file.parent.name))
        target = copy / file.relative_to(folder)
        weights = load_file(target)
        key = sorted(key for key in weights if key.endswith("weight"))[-1]
        whole = weights.pop(key)
        for changed, fault in (({}, "missing"), ({key: whole / 0}, "infinite weights in float32")):
            save_file({**weights, **changed}, target, metadata={"format": "pt"})
            with pytest.raises(ValueError, match=f"the {file.parent.name} of .*{fault}"):
                LatentPipeline(path=str(copy)).load(CPU)


HOSTILE = {
    "climbing": ({"../evil": ["diffusers", "X"]}, r"the component '\.\./evil'"),
    "remote code": ({"scheduler": ["my_pipeline", "DDIMScheduler"]}, "as its scheduler"),
    "another class": ({"scheduler": ["diffusers", "DiffusionPipeline"]}, "as its scheduler"),
    "unknown pipeline": ({"_class_name": "KandinskyPipeline"}, "holds a KandinskyPipeline; supp"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_index_is_refused_before_anything_is_loaded(fault, folder, tmp_path):
    changes, message = HOSTILE[fault]
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, **changes}))
    recipe = LatentPipeline(path=str(copy))
    for action in (recipe.describe, lambda: recipe.load(CPU)):
        with pytest.raises(ValueError, match=message):
            action()


def test_pickles_are_not_loaded(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for file in each_weight_file(copy):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    with pytest.raises(ValueError, match="no safetensors files"):
        LatentPipeline(path=str(copy)).describe()


@pytest.mark.parametrize("kind", ["sd1 epsilon", "sdxl", "sd3"])
def test_lora_weights_are_loaded_whole_or_refused(kind, tmp_path):
    pytest.importorskip("peft")
    pipeline = pipelines.seeded(pipelines.MAKERS[kind])
    pipeline.save_pretrained(tmp_path / "model")
    file = tmp_path / "lora.safetensors"
    pipelines.save_lora(pipeline, file)
    recipe = LatentPipeline(path=str(tmp_path / "model"))
    plain = recipe.load(CPU)
    tuned = LatentPipeline(path=recipe.path, lora=str(file)).load(CPU)
    latents, timesteps = noise_for(plain), torch.tensor([900, 30])
    condition = repeated(plain.condition(PROMPT), ROWS)
    with torch.no_grad():
        difference = tuned.predict(latents, timesteps, condition) - plain.predict(
            latents, timesteps, condition
        )
    assert difference.abs().max() > 1e-4
    assert not any(parameter.requires_grad for parameter in tuned.denoiser.parameters())

    weights = load_file(file)
    part = "transformer" if kind == "sd3" else "unet"
    for fault, changed, cause in (
        ("prefix", {key.replace(f"{part}.", "other."): value for key, value in weights.items()},
         r"keys begin with other, and the parts of this model are .*; rename the keys"),
        ("part", {**weights, **{key.replace("to_q", "to_nothing"): value.clone()
                                for key, value in weights.items() if "to_q" in key}},
         r"it has no .*to_nothing"),
        ("infinite", {key: value / 0 for key, value in weights.items()}, "NaN or infinite weights"),
    ):  # fmt: skip
        wrong = tmp_path / f"{fault}.safetensors"
        save_file(changed, wrong)
        with pytest.raises(ValueError, match=rf"model\.lora=.*{cause}"):
            LatentPipeline(path=recipe.path, lora=str(wrong)).load(CPU)
    (tmp_path / "damaged.safetensors").write_bytes(b"{")
    for path, cause in {
        tmp_path: "is a folder", tmp_path / "nowhere.safetensors": "does not exist",
        tmp_path / "model" / "model_index.json": "a pickle is never loaded",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"model\.lora=.* {cause}"):
            LatentPipeline(path=recipe.path, lora=str(path)).describe()
    with pytest.raises(ValueError, match=r"model\.lora=.* is damaged"):
        LatentPipeline(path=recipe.path, lora=str(tmp_path / "damaged.safetensors")).load(CPU)
