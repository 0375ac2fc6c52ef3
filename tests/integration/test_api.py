"""`invmm.measure`: a pipeline in memory gives what the command gives for its folder."""

from __future__ import annotations

import json
import sys

import numpy as np
import pipelines
import pytest
import tiny
import torch
from PIL import Image

import invmm
from invmm.cli import measure as command
from invmm.cli.foreign import Own, rebuilt

OPTIONS = [text for text in tiny.QUICK if not text.startswith("trainer=")]


def pictures(count: int) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


@pytest.fixture
def pixel_pipeline(tmp_path):
    from diffusers import DDPMPipeline

    return DDPMPipeline.from_pretrained(tiny.save_model(tmp_path / "saved"))


def test_it_equals_the_command(pixel_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["invmm"])
    images = tiny.save_images(tmp_path / "png", 3)
    overrides = tiny.command(tmp_path / "saved", images, tmp_path / "command")[3:]
    assert command.COMMAND.run(overrides) == 0
    frame = invmm.measure(pixel_pipeline, images, *OPTIONS, run_dir=tmp_path / "python")
    assert frame.image_id.tolist() == sorted(["broken.png", *(f"image-0{i}.png" for i in range(3))])
    ours, theirs = tiny.records(tmp_path / "python"), tiny.records(tmp_path / "command")
    for record in (*ours.values(), *theirs.values()):
        record.pop("config_digest")
    assert ours == theirs


def test_a_model_in_training_comes_back_as_it_was(pixel_pipeline, tmp_path):
    unet = pixel_pipeline.unet.train().requires_grad_(True)
    unet.conv_in.requires_grad_(False)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    invmm.measure(pixel_pipeline, pictures(2), *OPTIONS, run_dir=tmp_path / "run")
    assert unet.training
    assert unet.conv_out.weight.requires_grad
    assert not unet.conv_in.weight.requires_grad
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_captions_and_guidance_of_a_text_model(tmp_path):
    pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
    frame = invmm.measure(
        pipeline, {"fox": pictures(2)[0], "bird": pictures(2)[1]}, *OPTIONS, "prompt=caption",
        "sampler.guidance_scales=[1,3]", prompts={"fox": "a red fox"}, run_dir=tmp_path / "run",
    )  # fmt: skip
    by_id = frame.set_index("image_id")
    assert by_id.status["bird"] == "FAILED"
    assert "no caption" in by_id.error["bird"]
    assert by_id.guidance_scale["fox"] in (1.0, 3.0)
    assert by_id.caption["fox"] == "a red fox"


def test_the_same_call_goes_on_and_another_picture_is_another_run(
    pixel_pipeline, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    first, second = pictures(2)
    for _ in range(2):
        invmm.measure(pixel_pipeline, {"it": first}, *OPTIONS)
    assert "1 of them measured before" in capsys.readouterr().out
    invmm.measure(pixel_pipeline, {"it": second}, *OPTIONS)
    assert "measured before" not in capsys.readouterr().out
    assert len(list((tmp_path / "results" / "runs").iterdir())) == 2


@pytest.mark.parametrize(
    ("images", "overrides", "prompts", "message"),
    [
        ([], (), None, "images is empty"),
        (3, (), None, "images is a int; give a mapping by id or a list"),
        ([3], (), None, "give a PIL image or a path"),
        (None, (), ["a", "b", "c"], "prompts has 3 entries for 2 images"),
        (None, ("inversion.num_stepz=3", "seed=x"), None, "(?s)num_stepz.*did you mean.*seed=x"),
        (
            None,
            ("model.dtype=float16",),
            None,
            r"cannot be given in Python: .* pipeline\.to\(DTYPE\)",
        ),
        (
            None,
            ("dataset.ids=[a]",),
            None,
            r"dataset\.ids=\[a\] cannot be given in Python: the images are",
        ),
        (None, ("trainer=gpu",), None, "^trainer.accelerator=gpu is not where the pipeline is, on"),
        (None, ("trainer.accelerator=mps",), None, "accelerator=mps is not where the pipeline is"),
        ("folder", ("dataset.path=b",), None, "dataset.path=b cannot be given in Python"),
        ("folder", (), ["a"], "prompts is for images in memory"),
        (None, ("execution.compile=true",), None, "would alter the pipeline for good"),
        (None, ("trainer.devices=2",), None, "trainer.devices must be 1"),
        (None, ("prompt=caption",), None, "use prompt=none"),
    ],
)
def test_faults_are_errors_with_their_cure(
    images, overrides, prompts, message, pixel_pipeline, tmp_path
):
    images = pictures(2) if images is None else images
    with pytest.raises(ValueError, match=message):
        invmm.measure(pixel_pipeline, images, *overrides, prompts=prompts, run_dir=tmp_path / "run")


def test_the_keys_of_a_folder_can_be_given(tmp_path):
    """The cure of a folder with two captions can be followed, and tells runs apart."""
    pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
    folder, run_dir = tmp_path / "images, new", tmp_path / "run"
    folder.mkdir()
    pictures(1)[0].save(folder / "a.png")
    (folder / "metadata.csv").write_text("file_name,text,caption\na.png,a fox,a bird\n")

    def measured(*overrides):
        options = ("measurement=denoising_loss", *OPTIONS, "prompt=caption", *overrides)
        return invmm.measure(pipeline, folder, *options, run_dir=run_dir)

    with pytest.raises(ValueError, match=r"give dataset\.caption=text or dataset.caption=caption"):
        measured()
    assert list(measured("dataset.caption=caption").caption) == ["a bird"]
    with pytest.raises(ValueError, match=r"dataset\.caption was caption and is text"):
        measured("dataset.caption=text")


def test_the_scale_of_vq_latents_is_told_where_the_pipeline_hides_it(tmp_path):
    """And belongs to the run: another one is another run."""
    from diffusers import LDMPipeline

    pipelines.seeded(lambda: pipelines.ldm(pipelines.vq_autoencoder())).save_pretrained(tmp_path)
    pipeline = LDMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    options, run_dir = ("measurement=denoising_loss", *OPTIONS), tmp_path / "run"

    def measured(*overrides):
        return invmm.measure(pipeline, pictures(1), *options, *overrides, run_dir=run_dir)

    with pytest.raises(ValueError, match=r"^model\.latent_scale=null leaves the scale open: .*$"):
        measured()
    with pytest.raises(ValueError, match=r"^model\.latent_scale=0 is not possible: .*0$"):
        measured("model.latent_scale=0")
    assert measured("model.latent_scale=1").score.notna().all()
    with pytest.raises(ValueError, match=r"model\.latent_scale was 1\.0 and is 0\.18215"):
        measured("model.latent_scale=0.18215")
    # Verified from a folder, which does not tell it either.
    manifest = json.loads((run_dir / "manifest.json").read_text())
    own = Own(model=str(tmp_path), lora=None, similarity=None, images=None)
    assert rebuilt(run_dir, manifest, own).model.describe().latent_scale == 1


def test_another_pipeline_is_refused():
    with pytest.raises(ValueError, match="a dict is not supported; give one of DDPMPipeline"):
        invmm.measure({}, pictures(1))


def test_a_scheduler_that_cannot_be_read_is_refused(pixel_pipeline, tmp_path):
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler

    for scheduler, message in (
        (LCMScheduler(), r"pipeline in memory names .*LCMScheduler.* as its .*distilled"),
        (DDIMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr=true leaves no"),
        (EulerDiscreteScheduler(timestep_type="continuous"), "timestep_type=continuous is not"),
    ):
        pixel_pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=message):
            invmm.measure(pixel_pipeline, pictures(1), *OPTIONS, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_importing_the_package_imports_nothing_heavy():
    script = "import sys, invmm; print(sorted({'torch', 'hydra', 'pandas'} & set(sys.modules)))"
    assert tiny.invmm([sys.executable, "-c", script]).stdout == "[]\n"
