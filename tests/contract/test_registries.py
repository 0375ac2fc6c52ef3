"""Every scheduler and pipeline class of the installed diffusers: read exactly, or refused by name.

What is refused is listed in `refused/`. A class in neither column is new in diffusers: read its
source, then either support it or add its name to the list.
"""

from __future__ import annotations

import inspect
import json
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import pipelines
import pytest
import torch
from packaging.version import Version

from invmm.diffusion.sampling import Sampler, draw
from invmm.diffusion.schedule import NoiseSchedule
from invmm.diffusion.scheduler_config import BETA_SCHEDULERS, DISTILLED, FLOW_SCHEDULERS
from invmm.models.auto import AutoModel
from invmm.models.borrowed import BorrowedModel
from invmm.models.loading import PIPELINES as PIXEL_PIPELINES
from invmm.models.pipeline import PIPELINES as LATENT_PIPELINES
from invmm.models.pixel import PixelNetwork, PixelUNet

SUPPORTED = {
    "schedulers": {*BETA_SCHEDULERS, *FLOW_SCHEDULERS},
    "pipelines": {*PIXEL_PIPELINES, *LATENT_PIPELINES},
}
REGISTRY = {
    "schedulers": ("schedulers",),
    "pipelines": ("pipelines", "modular_pipelines"),
}
newest = pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.42"),
    reason="the lists name the classes of diffusers 0.42; older ones had others, now removed",
)
NO_SCHEDULERS = ("SchedulerMixin", "Output")


def refused(kind: str) -> set[str]:
    return set((Path(__file__).parent / "refused" / f"{kind}.txt").read_text().split())


def exported(kind: str) -> set[str]:
    """Names that diffusers exports, those that wait for another package included."""
    names: set[str] = set()
    for module, found in diffusers._import_structure.items():
        if module in REGISTRY[kind] or module.startswith("utils.dummy"):
            names |= set(found)
    if kind == "schedulers":
        return {n for n in names if "Scheduler" in n and not n.endswith(NO_SCHEDULERS)}
    own = set(diffusers._import_structure["pipelines"])
    return own | {name for name in names if name.endswith("Pipeline")}


def unknown(kind: str, names: set[str]) -> list[str]:
    """Names in neither column."""
    return sorted(names - SUPPORTED[kind] - refused(kind))


@newest
@pytest.mark.parametrize("kind", REGISTRY)
def test_every_class_is_in_exactly_one_column(kind):
    names = exported(kind)
    assert unknown(kind, names) == []
    assert SUPPORTED[kind] & refused(kind) == set()
    assert SUPPORTED[kind] <= names
    assert len(names) > {"schedulers": 45, "pipelines": 300}[kind]


@newest
@pytest.mark.parametrize("kind", REGISTRY)
def test_a_class_that_nobody_looked_at_is_seen(kind):
    assert unknown(kind, {*exported(kind), "BrandNewScheduler"}) == ["BrandNewScheduler"]


def test_no_scheduler_goes_by_another_name():
    classes = {
        name
        for name in diffusers._import_structure["schedulers"]
        if issubclass(getattr(diffusers, name), diffusers.SchedulerMixin)
    } - {"SchedulerMixin"}
    assert classes <= exported("schedulers")


@newest
@pytest.mark.slow
def test_no_pipeline_goes_by_another_name():
    """Imports all of them."""
    names = [n for found in diffusers._import_structure.values() for n in found]
    classes = set()
    for name in names:
        found = getattr(diffusers, name, None)
        if inspect.isclass(found) and issubclass(found, diffusers.DiffusionPipeline):
            classes.add(name)
    assert classes - {"DiffusionPipeline"} <= exported("pipelines")
    assert len(classes) > 250


# Refused ------------------------------------------------------------------------------------


def test_refused_pipelines_are_refused_by_name_from_folder_and_in_memory(tmp_path):
    names = sorted(refused("pipelines"))
    index = tmp_path / "model_index.json"
    for name in names:
        index.write_text(json.dumps({"_class_name": name}))
        with pytest.raises(ValueError, match=f"holds a {name}; supported are DDPMPipeline, "):
            AutoModel(path=str(tmp_path)).describe()
        own = type(name, (), {"__module__": "diffusers.pipelines"})()
        with pytest.raises(ValueError, match=f"a {name} is not supported; give one of DDPM"):
            BorrowedModel(own)


@pytest.mark.parametrize("name", [["my_code", "DDPMPipeline"], None, 3, {}])
def test_a_pipeline_whose_class_is_no_name_is_refused(name, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    is_code = isinstance(name, (list, dict))
    refusal = "a community pipeline" if is_code else "holds a .*; supported are DDPMPipeline, DDIM"
    with pytest.raises(ValueError, match=refusal):
        AutoModel(path=str(tmp_path)).describe()


@pytest.fixture(scope="module")
def unet():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def saved(unet, tmp_path_factory):
    path = tmp_path_factory.mktemp("registries") / "ddpm"
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(path)
    return path


@pytest.fixture
def folder_with(saved, tmp_path):
    """(scheduler class, keys) -> the model with such a scheduler_config.json."""

    def made(name: str, pipeline: str = "DDPMPipeline", **keys: object) -> PixelUNet:
        path = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        (path / "scheduler").mkdir(parents=True)
        (path / "unet").symlink_to(saved / "unet")
        index = json.loads((saved / "model_index.json").read_text())
        index |= {"scheduler": ["diffusers", name], "_class_name": pipeline}
        (path / "model_index.json").write_text(json.dumps(index))
        config = {"_class_name": name, **keys}
        (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        return PixelUNet(path=str(path))

    return made


def in_memory(unet, scheduler):
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    pipeline.scheduler = scheduler
    return pipeline


def test_refused_schedulers_are_refused_by_name_from_folder_and_in_memory(folder_with, unet):
    for name in sorted(refused("schedulers") | set(FLOW_SCHEDULERS)):
        reason = "distilled models" if name in DISTILLED else "no trained schedule can be read"
        message = rf"names \['diffusers', '{name}'\] as its scheduler \(.*{reason}.*supported"
        with pytest.raises(ValueError, match=message):
            folder_with(name).describe()
        found = getattr(diffusers, name, None)  # None: newer than the installed diffusers
        if found is not None and not hasattr(found, "_backends"):
            scheduler = found.__new__(found)
            for read in (BorrowedModel, PixelNetwork.from_pipeline):
                with pytest.raises(ValueError, match=message):
                    read(in_memory(unet, scheduler))


def test_parts_of_another_class_are_refused_in_memory(unet):
    pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
    BorrowedModel(pipeline)
    text_unet = pipeline.unet
    own = type("MyUNet", (type(text_unet),), {})
    pipeline.unet = own(**dict(text_unet.config))
    with pytest.raises(ValueError, match=r"names \['test_registries', 'MyUNet'\] as its unet"):
        BorrowedModel(pipeline)
    pipeline.unet = text_unet
    pipeline.vae = pipelines.vq_autoencoder()
    with pytest.raises(ValueError, match=r"names \['diffusers', 'VQModel'\] as its vae"):
        BorrowedModel(pipeline)
    pipeline.vae = None
    with pytest.raises(ValueError, match="names None as its vae"):
        BorrowedModel(pipeline)
    subclass = type("DDPMPipeline", (diffusers.DDPMPipeline,), {"__module__": "my_code"})
    with pytest.raises(ValueError, match=r"a my_code\.DDPMPipeline is not supported"):
        BorrowedModel(subclass(unet, diffusers.DDPMScheduler()))


# Read exactly -------------------------------------------------------------------------------

KEYS = {
    "none": {},
    "others": {"num_train_timesteps": 100, "beta_start": 5e-4, "beta_end": 0.03,
               "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"},
    "cosine": {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", 
               "prediction_type": "sample"},
    "values": {"num_train_timesteps": 50, "trained_betas": [0.001 * i for i in range(1, 51)]},
    "zero snr": {"num_train_timesteps": 200, "rescale_betas_zero_snr": True,
                 "prediction_type": "v_prediction"},
}  # fmt: skip
INSTALLED = [n for n in BETA_SCHEDULERS if not hasattr(getattr(diffusers, n), "_backends")]


@pytest.mark.parametrize("name", INSTALLED)
def test_supported_schedulers_give_their_own_schedule(name, folder_with, unet):
    found = getattr(diffusers, name)
    for keys in KEYS.values():
        if not keys.keys() <= signature(found.__init__).parameters.keys():
            continue
        scheduler = found(**keys)
        recipe = folder_with(name, **keys)
        borrowed = BorrowedModel(in_memory(unet, scheduler))
        for schedule in (recipe.schedule(), borrowed.schedule()):
            torch.testing.assert_close(
                schedule.alphas_cumprod, scheduler.alphas_cumprod, atol=1e-6, rtol=0
            )
            assert schedule.prediction_type == scheduler.config.prediction_type
        for info in (recipe.describe(), borrowed.describe()):
            assert info.num_train_timesteps == scheduler.config.num_train_timesteps
            assert info.prediction_type == scheduler.config.prediction_type


def test_a_ddim_pipeline_makes_a_ddim_scheduler_of_any(folder_with):
    """Keys left out then have the defaults of that class, not of the one in the files."""
    recipe = folder_with("HeunDiscreteScheduler", "DDIMPipeline", beta_start=0.001)
    own = diffusers.DDIMPipeline.from_pretrained(recipe.path).scheduler.alphas_cumprod
    torch.testing.assert_close(recipe.schedule().alphas_cumprod, own, atol=1e-6, rtol=0)


def test_a_supported_scheduler_without_its_package_is_refused_by_it(folder_with):
    missing = sorted(set(BETA_SCHEDULERS) - set(INSTALLED))
    for name in missing:
        with pytest.raises(ValueError, match=f"{name} needs the packages .*; install them, or"):
            folder_with(name).schedule()


@pytest.mark.parametrize("name", INSTALLED)
def test_drawing_equals_the_pipeline_with_the_same_betas(name, folder_with, unet):
    """From equal noise, whatever class the model's own scheduler has."""
    ddim = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **KEYS["others"])
    pipeline = diffusers.DDIMPipeline(unet, ddim)
    pipeline.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    options = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"}
    images: Any = pipeline(generator=rng, **options)["images"]  # pyright: ignore
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = folder_with(name, **KEYS["others"]).load(torch.device("cpu"))
    with torch.no_grad():
        drawn = draw(
            lambda latents, timesteps: network.predict(latents, timesteps, None), noise,
            sampler=Sampler(num_inference_steps=5), schedule=network.schedule,
        )  # fmt: skip
    ours = network.decode(drawn) / 2 + 0.5
    expected = torch.from_numpy(images).movedim(-1, 1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


SAMPLERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}


@pytest.fixture(scope="module")
def text_pipeline():
    return pipelines.seeded(pipelines.MAKERS["sd2 zero-snr"])


@pytest.mark.parametrize("keys", ["others", "cosine", "zero snr"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_equals_the_pipeline_with_it(sampler, keys, text_pipeline):
    name, options = SAMPLERS[sampler]
    betas = {**KEYS["others"], **KEYS[keys]}
    schedule = NoiseSchedule.from_config(betas)
    if sampler == "heun" and betas.pop("rescale_betas_zero_snr", None):
        # The class has no such key: the same betas by hand, the last as other classes have it.
        alphas = schedule.alphas_cumprod.double()
        alphas[-1] = 2**-24
        betas["trained_betas"] = (1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])).tolist()
    text_pipeline.scheduler = getattr(diffusers, name)(
        timestep_spacing="trailing", **betas, **options
    )
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    embeds = torch.randn(2, 77, 16, generator=torch.Generator().manual_seed(2))
    expected = text_pipeline(
        prompt_embeds=embeds, guidance_scale=1.0, num_inference_steps=5, latents=noise.clone(),
        generator=[torch.Generator().manual_seed(seed) for seed in (11, 12)],
        output_type="latent",
    ).images  # fmt: skip
    with torch.no_grad():
        found = draw(
            lambda latents, timesteps: text_pipeline.unet(latents, timesteps, embeds).sample,
            noise, sampler=Sampler(scheduler=sampler, num_inference_steps=5), schedule=schedule,
            seeds=(11, 12),
        )  # fmt: skip
    atol = 1e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
    assert expected.std() > 0.01


@pytest.mark.parametrize("keys", [{}, {"shift": 3.0}, {"num_train_timesteps": 500, "shift": 6.0}])
@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_rectified_flows_give_their_own_sigmas(name, keys):
    scheduler = getattr(diffusers, name)(**keys)
    for schedule in (
        NoiseSchedule.from_config({"_class_name": name, **keys}),
        NoiseSchedule.from_scheduler(scheduler),
    ):
        for found, expected in (
            (schedule.noise_scales, scheduler.sigmas),
            (schedule.timesteps / 1000, scheduler.timesteps / 1000),
        ):
            torch.testing.assert_close(found, expected.flip(0), atol=1e-6, rtol=0)
        own = getattr(diffusers, name)(**keys)
        own.set_timesteps(7)
        sampler = "flow_heun" if "Heun" in name else "flow_euler"
        options = {"num_inference_steps": 7, "timestep_spacing": "linspace"}
        built = Sampler(scheduler=sampler, **options).build(schedule)
        assert torch.equal(built.sigmas, own.sigmas)
        assert torch.equal(built.timesteps, own.timesteps)


def test_models_on_betas_and_on_flows_do_not_take_each_others_schedulers(text_pipeline):
    flow = pipelines.seeded(pipelines.MAKERS["sd3"])
    for pipeline, scheduler in (
        (flow, diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True)),
        (text_pipeline, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
    ):
        pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=r"names .* as its scheduler.*; supported are"):
            BorrowedModel(pipeline)
