"""What every `Network` promises the engine, whatever its family.

A new family joins with a line in `FAMILIES`: how to make a tiny one, and the diffusers U-Net in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pipelines
import pytest
import torch
from diffusers.pipelines.ddim import pipeline_ddim
from torch import Tensor, nn
from worlds import LINEAR

from invmm.diffusion.guidance import repeated
from invmm.diffusion.sampling import Sampler, draw
from invmm.engine.protocols import Network
from invmm.models.execution import LoadedNetwork
from invmm.models.pipeline import PIPELINES
from invmm.models.pixel import PixelNetwork

SAMPLERS = ("ddim", "ddpm", "euler", "dpmsolver", "heun", "unipc")
ROWS, STEPS = 4, 8


@dataclass(frozen=True)
class Example:
    """A network under test, the module that it wraps, and a prompt or label if it takes one."""

    network: LoadedNetwork
    denoiser: nn.Module
    prompt: str | int | None = None

    def condition(self, rows: int):
        """The condition of so many rows."""
        return repeated(self.network.condition(self.prompt), rows)

    def predict(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        return self.network.predict(latents, timesteps, self.condition(len(latents)))


def pixel_pipeline(prediction_type: str, channels: int = 3, **options):
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=4, dropout=0.5,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **options,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        **LINEAR, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=True,
        timestep_spacing="trailing",
    )  # fmt: skip
    pipeline = DDIMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixel(prediction_type: str, channels: int = 3) -> Example:
    pipeline = pixel_pipeline(prediction_type, channels)
    return Example(PixelNetwork.from_pipeline(pipeline), pipeline.unet)


def class_pixel() -> Example:
    pipeline = pixel_pipeline("epsilon", num_class_embeds=10)
    return Example(PixelNetwork.from_pipeline(pipeline), pipeline.unet, prompt=7)


def latent(name: str) -> Example:
    pipeline = pipelines.seeded(pipelines.MAKERS[name])
    network = PIPELINES[type(pipeline).__name__](pipeline, torch.device("cpu"))
    prompt = {"none": None, "class_label": 7, "caption": "a red fox"}[network.family.prompts[0]]
    return Example(network, network.denoiser, prompt)


FAMILIES: dict[str, Callable[[], Example]] = {
    "pixel epsilon": lambda: pixel("epsilon"),
    "pixel v": lambda: pixel("v_prediction"),
    "pixel sample": lambda: pixel("sample"),
    "pixel grey": lambda: pixel("epsilon", channels=1),
    "class pixel": class_pixel,
    **{name: lambda name=name: latent(name) for name in pipelines.MAKERS},
}
PIXEL = [name for name in FAMILIES if name.startswith("pixel")]


@pytest.fixture(scope="module", params=FAMILIES)
def example(request) -> Example:
    return FAMILIES[request.param]()


@pytest.fixture(scope="module", params=PIXEL)
def pixel_example(request) -> Example:
    return FAMILIES[request.param]()


def random_rows(network: Network, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, *network.latent_shape, generator=rng)


def test_it_is_a_network(example):
    assert isinstance(example.network, LoadedNetwork)
    assert example.network.device == torch.device("cpu")


def test_its_weights_are_frozen_and_nothing_in_it_is_random(example):
    assert not any(parameter.requires_grad for parameter in example.denoiser.parameters())
    assert not any(module.training for module in example.denoiser.modules())
    latents, timesteps = random_rows(example.network, 0), torch.full((ROWS,), 400)
    first = example.predict(latents, timesteps)
    assert torch.equal(first, example.predict(latents, timesteps))


def test_the_raw_output_has_the_shape_of_the_latents(example):
    output = example.predict(random_rows(example.network, 0), torch.arange(ROWS) * 300)
    assert output.shape == (ROWS, *example.network.latent_shape)
    assert output.dtype == torch.float32


def test_the_raw_output_is_that_of_the_wrapped_module(pixel_example):
    latents, timesteps = random_rows(pixel_example.network, 1), torch.arange(ROWS) * 300
    output = pixel_example.predict(latents, timesteps)
    assert torch.equal(output, pixel_example.denoiser(latents, timesteps).sample)


def test_decode_and_encode_are_inverse_on_decoded_images(pixel_example):
    latents = random_rows(pixel_example.network, 2).clamp(-1, 1)
    pixels = pixel_example.network.decode(latents)
    assert pixels.shape == (ROWS, 3, *pixel_example.network.latent_shape[1:])
    assert pixel_example.network.encode(pixels).shape == latents.shape
    torch.testing.assert_close(
        pixel_example.network.decode(pixel_example.network.encode(pixels)), pixels
    )


def test_decoded_pixels_are_clamped(pixel_example):
    pixels = pixel_example.network.decode(10 * random_rows(pixel_example.network, 3))
    assert pixels.min() == -1
    assert pixels.max() == 1


@pytest.mark.parametrize("position", range(ROWS))
def test_rows_are_independent_to_the_last_bit(example, position):
    """Other neighbours, another place among them: the same numbers, at a constant row count."""
    latents, timesteps = random_rows(example.network, 4), torch.tensor([999, 3, 250, 640])
    own, time = latents[0].clone(), timesteps[0]
    expected = example.predict(latents, timesteps)[0]
    others, other_times = 5 * random_rows(example.network, 5), torch.tensor([1, 999, 77, 500])
    others[position], other_times[position] = own, time
    assert torch.equal(example.predict(others, other_times)[position], expected)


def test_a_neighbour_that_is_no_number_harms_nobody(example):
    latents, timesteps = random_rows(example.network, 6), torch.full((ROWS,), 500)
    expected = example.predict(latents, timesteps)
    poisoned = latents.clone()
    poisoned[2] = float("nan")
    output = example.predict(poisoned, timesteps)
    healthy = [0, 1, 3]
    assert torch.equal(output[healthy], expected[healthy])
    assert output[2].isnan().any()


def test_gradients_reach_the_latents_and_no_weight(example):
    latents = random_rows(example.network, 7).requires_grad_()
    output = example.predict(latents, torch.full((ROWS,), 500))
    output[0].square().sum().backward()
    assert latents.grad is not None
    assert latents.grad[0].abs().max() > 0
    assert latents.grad[1:].abs().max() == 0
    assert all(parameter.grad is None for parameter in example.denoiser.parameters())


def test_the_gradient_is_the_slope(example):
    """Against a central difference in a random direction."""
    latents = random_rows(example.network, 8).requires_grad_()
    direction, timesteps = random_rows(example.network, 9), torch.full((ROWS,), 500)

    def loss(at: Tensor) -> Tensor:
        return example.predict(at, timesteps).double().square().mean()

    loss(latents).backward()
    assert latents.grad is not None
    slope = (latents.grad * direction).sum().item()
    step = 1e-2
    with torch.no_grad():
        rise = (loss(latents + step * direction) - loss(latents - step * direction)).item()
    assert slope == pytest.approx(rise / (2 * step), rel=2e-2)


# Sampling -----------------------------------------------------------------------------------


def diffusers_loop(example: Example, name: str, noise: Tensor, seeds: list[int]) -> Tensor:
    """The denoising loop of the diffusers documentation, its scheduler spelt out."""
    import diffusers

    common = {
        **LINEAR, "prediction_type": example.network.schedule.prediction_type,
        "timestep_spacing": "trailing",
    }  # fmt: skip
    scheduler = {
        "ddim": lambda: diffusers.DDIMScheduler(**common, clip_sample=False),
        "ddpm": lambda: diffusers.DDPMScheduler(**common, clip_sample=False),
        "euler": lambda: diffusers.EulerDiscreteScheduler(**common),
        "dpmsolver": lambda: diffusers.DPMSolverMultistepScheduler(**common),
        "heun": lambda: diffusers.HeunDiscreteScheduler(**common),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**common),
    }[name]()
    scheduler.set_timesteps(STEPS)
    draws = {"generator": [torch.Generator().manual_seed(s) for s in seeds]}
    latents = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = example.denoiser(scheduler.scale_model_input(latents, t), t).sample
            options = draws if name == "ddpm" else {}
            latents = scheduler.step(output, t, latents, **options).prev_sample
    return latents


def ours(network: Network, sampler: Sampler, noise: Tensor, seeds: list[int]) -> Tensor:
    with torch.no_grad():
        return draw(
            lambda latents, timesteps: network.predict(latents, timesteps, None),
            noise,
            sampler=sampler,
            schedule=network.schedule,
            seeds=seeds,
        )


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_equals_the_loop_of_diffusers(name, pixel_example):
    example = pixel_example
    noise, seeds = random_rows(example.network, 10), [5, 6, 7, 8]
    sampler = Sampler(scheduler=name, num_inference_steps=STEPS)
    latents = ours(example.network, sampler, noise, seeds)
    expected = diffusers_loop(example, name, noise, seeds)
    scale = expected.abs().max().item()
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5 * max(1, scale))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seeds_give_the_same_images_and_others_do_not(name, pixel_example):
    network = pixel_example.network
    noise, sampler = random_rows(network, 11), Sampler(scheduler=name, num_inference_steps=STEPS)
    first = ours(network, sampler, noise, [1, 2, 3, 4])
    assert torch.equal(first, ours(network, sampler, noise, [1, 2, 3, 4]))
    other = ours(network, sampler, noise, [1, 2, 3, 9])
    assert torch.equal(first[:3], other[:3])
    assert torch.equal(first[3], other[3]) is not sampler.is_stochastic


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_equals_the_pipeline_itself(eta, prediction_type, monkeypatch):
    """With its first noise handed to it; later noises come from one generator a row."""
    pipeline = pixel_pipeline(prediction_type)
    network = PixelNetwork.from_pipeline(pipeline)
    noise, seeds = random_rows(network, 12), [101, 102, 103, 104]
    monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *args, **options: noise)
    (images,) = pipeline(
        batch_size=ROWS, generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        eta=eta, num_inference_steps=10, output_type="np", return_dict=False,
    )  # fmt: skip
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    sampler = Sampler(scheduler="ddim", num_inference_steps=10, eta=eta)
    pixels = network.decode(ours(network, sampler, noise, seeds))
    torch.testing.assert_close(pixels, images * 2 - 1, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "prompt", "cure"), [
    ("pixel v", "a fox", "prompt=none"), ("pixel v", 3, "prompt=none"),
    ("class pixel", 10, "0 to 9"), ("class pixel", None, "0 to 9"), ("dit", 1000, "0 to 999"),
    ("dit", "a fox", "prompt=class_label"), ("ldm vq", "a fox", "prompt=none"),
    ("sd1 epsilon", None, "prompt=caption"), ("sdxl", 3, "prompt=caption"),
])  # fmt: skip
def test_a_prompt_that_a_model_does_not_understand_is_refused(name, prompt, cure):
    with pytest.raises(ValueError, match=cure):
        FAMILIES[name]().network.condition(prompt)
