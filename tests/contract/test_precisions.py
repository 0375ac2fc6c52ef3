"""Half precision against the pipelines of diffusers, from folders and in memory.

Pixels alone would not tell: group normalisation hides a wrong scale of the latents. So what goes
into the autoencoder is compared too, and in which precision.
"""

from __future__ import annotations

import contextlib
from functools import cache, partial
from typing import Any

import pipelines
import pytest
import test_pipelines
import torch
from packaging.version import Version
from test_networks import pixel_pipeline
from torch import Tensor

from invmm.diffusion.sampling import Sampler, draw
from invmm.models.borrowed import BorrowedModel
from invmm.models.pipeline import PIPELINES, LatentPipeline
from invmm.models.pixel import PixelNetwork, PixelUNet

CPU = torch.device("cpu")
DIFFUSION = ("ddim", "ddpm", "dpmsolver", "unipc", "euler", "heun")
FAMILIES = {
    "ldm vq": DIFFUSION, "ldm kl": DIFFUSION,
    # DiTPipeline does not scale its noise, as Euler and Heun ask for.
    "dit": ("ddim", "ddpm", "dpmsolver", "unipc"),
    "sd1 epsilon": DIFFUSION, "sd2 v": DIFFUSION, "sdxl": DIFFUSION,
    "sd3": ("flow_euler", "flow_heun"),
}  # fmt: skip
"""The schedulers with which each family is compared; the first is its own."""
LATENTS = {"float32": 1e-5, "bfloat16": 4e-2, "float16": 6e-3}
"""Relative error of what goes into the autoencoder; a scale that is a tenth off makes 1e-1."""
PIXELS = {"float32": 1e-5, "bfloat16": 6e-2, "float16": 1e-2}
"""Relative error of what comes out; a VQ autoencoder rounds to its codebook."""


def error(found: Tensor, expected: Tensor) -> float:
    """Root mean square, of the deviation of the expected values."""
    return (
        (found.float() - expected.float()).square().mean().sqrt() / expected.float().std()
    ).item()


@contextlib.contextmanager
def recorded(autoencoder: Any):
    """What the autoencoder decodes, and what it makes of it."""
    calls: list[tuple[Tensor, Tensor]] = []
    decode = autoencoder.decode

    def recording(latents, *args, **options):
        output = decode(latents, *args, **options)
        calls.append((latents, output[0]))
        return output

    autoencoder.decode = recording
    try:
        yield calls
    finally:
        autoencoder.decode = decode


def autoencoder_of(pipeline: Any) -> Any:
    return getattr(pipeline, PIPELINES[type(pipeline).__name__].family.autoencoder)


def sampler_for(network: Any, scheduler: str | None = None) -> Sampler:
    flow = network.schedule.is_flow
    return Sampler(
        scheduler=scheduler or ("flow_euler" if flow else "ddim"),
        num_inference_steps=test_pipelines.STEPS,
        timestep_spacing="linspace" if flow else "trailing",
    )  # fmt: skip


@contextlib.contextmanager
def seeded_steps():
    """DDPM's noise is seeded in LDMPipeline and DiTPipeline too, which hand on no generator.

    It is drawn in float32: older releases of torch draw other numbers in half precision.
    """
    from diffusers.schedulers import scheduling_ddpm

    plain = scheduling_ddpm.randn_tensor
    # DiTPipeline steps twice as many rows and throws the second half away.
    generators = [*test_pipelines.generators(), *test_pipelines.generators()]

    def seeded(shape, generator=None, *, dtype, device):
        chosen = generator or generators[: shape[0]]
        return plain(shape, generator=chosen, dtype=torch.float32, device=device).to(dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling_ddpm, "randn_tensor", seeded)
        yield


@cache
def expected(
    name: str, dtype: str, scheduler: str | None = None, overflowing: bool = False
) -> tuple[Any, Tensor, Tensor, float]:
    """The pipeline, what it decodes, what that gives, and its guidance scale."""
    pipeline = pipelines.seeded(pipelines.MAKERS[name])
    if overflowing:
        overflow(pipeline)
    pipeline.to(getattr(torch, dtype))
    network = test_pipelines.wrapped(pipeline)
    if scheduler:
        pipeline.scheduler = sampler_for(network, scheduler).build(network.schedule)
    scale = 1.0 if network.family.prompts == ("none",) else 3.0
    noise = test_pipelines.noise_for(network).to(getattr(torch, dtype))
    # LDMPipeline cannot turn bfloat16 into an array, which it does after decoding.
    unwritable = pytest.raises(TypeError) if (name[:3], dtype) == ("ldm", "bfloat16") else None
    with (
        recorded(autoencoder_of(pipeline)) as calls, seeded_steps(),
        unwritable or contextlib.nullcontext(),
    ):  # fmt: skip
        test_pipelines.theirs(pipeline, noise, scale)
    ((latents, pixels),) = calls
    return pipeline, latents, pixels, scale


def overflow(pipeline: Any) -> None:
    """Activations beyond float16, as in the autoencoder of SDXL itself."""
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight.mul_(2e5)
        pipeline.vae.encoder.conv_in.weight.mul_(2e5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A family's folder in float32."""

    @cache
    def save(name: str):
        path = tmp_path_factory.mktemp("saved") / "model"
        pipelines.seeded(pipelines.MAKERS[name]).save_pretrained(path)
        return str(path)

    return save


@pytest.mark.parametrize("source", ["folder", "memory"])
@pytest.mark.parametrize("dtype", LATENTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_its_pipeline_in_every_precision(name, dtype, source, saved):
    """With every scheduler of the family."""
    network: Any = None
    for scheduler in FAMILIES[name]:
        pipeline, latents, pixels, scale = expected(name, dtype, scheduler)
        if source == "memory":
            network = network or BorrowedModel(pipeline).load(CPU)
        else:
            network = network or LatentPipeline(path=saved(name), dtype=dtype).load(CPU)
        noise = test_pipelines.noise_for(network).to(getattr(torch, dtype)).float()
        with recorded(network.codec.autoencoder) as calls:
            drawn = test_pipelines.ours(network, sampler_for(network, scheduler), noise, scale)
        ((decoded, _),) = calls
        upcast = (name, dtype) == ("sdxl", "float16")
        assert decoded.dtype == latents.dtype == getattr(torch, "float32" if upcast else dtype)
        assert error(decoded, latents) < LATENTS[dtype], scheduler
        wrong = 0.1 if name == "ldm vq" and dtype != "float32" else PIXELS[dtype]
        assert error(drawn, (pixels.float() / 2 + 0.5).clamp(0, 1)) < wrong, scheduler
        # What the tolerance would not forgive.
        assert error(1.1 * decoded.float(), latents) > LATENTS[dtype]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_autoencoder_that_overflows_is_upcast_as_in_its_pipeline(dtype):
    """float16 decodes in float32; bfloat16 does not overflow, and diffusers leaves it alone."""
    pipeline, latents, pixels, scale = expected("sdxl", dtype, overflowing=True)
    network = BorrowedModel(pipeline).load(CPU)
    noise = test_pipelines.noise_for(network).to(getattr(torch, dtype)).float()
    with recorded(network.codec.autoencoder) as calls:
        drawn = test_pipelines.ours(network, sampler_for(network), noise, scale)
    assert calls[0][0].dtype == latents.dtype
    assert latents.dtype == (torch.float32 if dtype == "float16" else torch.bfloat16)
    assert error(drawn, (pixels.float() / 2 + 0.5).clamp(0, 1)) < PIXELS[dtype]
    assert drawn.std() > 0.01
    encoded = network.encode(torch.rand(1, 3, 16, 16) * 2 - 1)
    assert encoded.isfinite().all()
    assert network.codec.autoencoder.dtype == getattr(torch, dtype)  # given back as it was
    pipeline.vae.register_to_config(force_upcast=False)
    try:
        plain = BorrowedModel(pipeline).load(CPU)
        broken = plain.decode(test_pipelines.noise_for(plain))
        assert broken.isnan().any() == (dtype == "float16")
    finally:
        pipeline.vae.register_to_config(force_upcast=True)


STATISTICS = {"latents_mean": [0.3, -0.2, 0.1, 0.5], "latents_std": [2.0, 0.5, 1.5, 3.0]}


@pytest.mark.parametrize(("name", "values", "matters"), [
    ("sdxl", STATISTICS, True), ("sdxl", {"shift_factor": 0.4}, False),
    ("sdxl", {"latents_mean": STATISTICS["latents_mean"]}, False),
    ("sd1 epsilon", {**STATISTICS, "shift_factor": 0.4}, False),
    ("dit", {"shift_factor": 0.4}, False), ("ldm kl", {"shift_factor": 0.4}, False),
    ("sd3", {"shift_factor": 0.4}, True), ("sd3", STATISTICS, False),
])  # fmt: skip
def test_keys_of_the_autoencoder_matter_where_they_do_in_the_pipeline(name, values, matters):
    before = expected(name, "float32")[1]
    pipeline = pipelines.seeded(pipelines.MAKERS[name])
    autoencoder_of(pipeline).register_to_config(**values)
    network = test_pipelines.wrapped(pipeline)
    scale = 1.0 if network.family.prompts == ("none",) else 3.0
    noise = test_pipelines.noise_for(network)
    with recorded(autoencoder_of(pipeline)) as calls:
        test_pipelines.theirs(pipeline, noise, scale)
        test_pipelines.ours(network, sampler_for(network), noise, scale)
    (theirs, _), (ours, _) = calls
    assert error(ours, theirs) < 1e-5
    assert (error(theirs, before) > 1e-2) == matters
    pixels = torch.rand(1, 3, network.image_size, network.image_size) * 2 - 1
    with recorded(autoencoder_of(pipeline)) as calls:
        network.decode(network.encode(pixels))
    encoded = autoencoder_of(pipeline).encode(pixels).latent_dist
    if network.codec.posterior == "mode":  # back where it came from, whatever the scale
        torch.testing.assert_close(calls[0][0], encoded.mode())


@pytest.mark.parametrize("source", ["folder", "memory"])
@pytest.mark.parametrize("dtype", LATENTS)
@pytest.mark.parametrize("classes", [None, 10])
def test_pixel_models_equal_their_pipeline_in_every_precision(classes, dtype, source, tmp_path):
    import diffusers
    from diffusers.pipelines.ddim import pipeline_ddim

    if dtype == "bfloat16" and Version(diffusers.__version__) < Version("0.41"):
        pytest.skip("before diffusers 0.41 pixel pipelines return numpy, which has no bfloat16")
    options = {} if classes is None else {"num_class_embeds": classes}
    pipeline = pixel_pipeline("epsilon", **options)
    pipeline.save_pretrained(tmp_path / "model")
    pipeline.to(getattr(torch, dtype))
    pipeline.unet.eval()
    if source == "memory":
        network = BorrowedModel(pipeline).load(CPU)
    else:
        network = PixelUNet(path=str(tmp_path / "model"), dtype=dtype).load(CPU)
    assert isinstance(network, PixelNetwork)
    noise = test_pipelines.noise_for(network).to(getattr(torch, dtype))
    if classes:  # the pipeline itself gives no labels
        label = torch.full((len(noise),), 7)
        pipeline.unet.forward = partial(pipeline.unet.forward, class_labels=label)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_ddim, "randn_tensor", lambda *args, **kwargs: noise)
        theirs = pipeline(batch_size=len(noise), num_inference_steps=5, output_type="pt").images
    if not isinstance(theirs, Tensor):  # before diffusers 0.41
        theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2)
    if classes:
        del pipeline.unet.forward
    condition = None if classes is None else {"class_labels": torch.full((len(noise),), 7)}
    with torch.no_grad():
        latents = draw(
            lambda at, timesteps: network.predict(at, timesteps, condition), noise.float(),
            sampler=Sampler(num_inference_steps=5), schedule=network.schedule,
        )  # fmt: skip
        ours = (network.decode(latents) + 1) / 2
    assert network.denoiser.dtype == getattr(torch, dtype)
    assert error(ours, theirs) < PIXELS[dtype]
    assert theirs.float().std() > 0.01
