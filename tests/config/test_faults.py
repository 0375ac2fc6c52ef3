"""What a person sees who made mistakes: all of them at once, before anything heavy."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import tiny

from invmm.cli import measure, threshold, train
from invmm.config.compose import groups


def run(arguments, tmp_path, module="measure"):
    return tiny.invmm([sys.executable, "-m", f"invmm.cli.{module}", *arguments], cwd=tmp_path)


@pytest.fixture
def faults(inputs, capsys):
    """(overrides) -> lines below the headline, from the command run in this process."""

    def of(*overrides, command=measure.COMMAND, given=inputs):
        assert command.run([*given, *overrides]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        headline, *lines = shown.err.splitlines()
        plural = "" if len(lines) == 1 else "s"
        assert headline == f"{command.name}: {len(lines)} fault{plural}"
        return [line.strip() for line in lines]

    return of


def test_four_mistakes_are_listed_in_one_go(inputs, tmp_path):
    mistakes = ["inversion.num_stepz=3", "sampler.eta=two", "sampler=ddmi", "seed=-1"]
    result = run([*inputs, *mistakes], tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "invmm: 4 faults",
        "  sampler=ddmi is not an option; did you mean ddpm? There are ddim, ddpm, dpmsolver, "
        "euler, flow_euler, flow_heun, heun, unipc",
        "  sampler.eta=two is not possible: it should be a valid number",
        "  inversion.num_stepz=3 is not a key; did you mean num_steps?",
        "  seed=-1 is not possible: it should be greater than or equal to 0",
    ]
    assert list(tmp_path.iterdir()) == []


def test_faults_load_nothing_heavy(inputs, tmp_path):
    script = (
        "import sys; from invmm.cli.measure import COMMAND\n"
        f"code = COMMAND.run({[*inputs, 'seed=x']!r})\n"
        "heavy = {'diffusers', 'transformers', 'pytorch_lightning', 'onnxruntime', 'pandas', "
        "'matplotlib', 'scipy', 'sklearn', 'wandb', 'resvg_py'}\n"
        "print(code, sorted(heavy & set(sys.modules)))"
    )
    result = tiny.invmm([sys.executable, "-c", script], cwd=tmp_path)
    assert result.stdout == "2 []\n"


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_unknown_keys_are_found_however_they_are_given(prefix, faults):
    assert faults(f"{prefix}seeed=3", f"{prefix}sampler.etta=0", f"{prefix}inversion.x.y=1") == [
        "sampler.etta=0 is not a key; did you mean eta?",
        "inversion.x={'y': 1} is not a key; known are check_every, check_prior, kl_weight, "
        "learning_rate, num_steps, objective",
        "seeed=3 is not a key; did you mean seed?",
    ]


def test_a_key_of_another_option_is_answered_with_that_option(faults):
    (line, *_) = faults(given=["model.path=m", "dataset.path=images"])
    assert line == (
        "dataset.path=images is not a key of this dataset; add dataset=celebahq or dataset=cifar10 "
        "or dataset=ffhq or dataset=folder or dataset=laion_memorized, which has it"
    )


@pytest.mark.parametrize(("overrides", "expected"), [
    (["inversion.num_steps=20", "inversion.check_every=50"],
     "inversion.num_steps=20 never reaches a replication check; use at least "
     "inversion.check_every=50"),
    (["sampler.num_inference_steps=2000"],
     "sampler.num_inference_steps=2000 exceeds the model's 1000 training timesteps; use at most "
     "1000"),
    (["sampler.num_inference_steps=60"],
     "sampler.num_inference_steps=60 does not divide the model's 1000 training timesteps, as DDIM "
     "needs; use 50"),
    (["replication.threshold=1.5"],
     "replication.threshold=1.5 is not possible: it should be less than or equal to 1"),
    (["replication.threshold=-2"],
     "replication.threshold=-2 is not possible: it should be greater than or equal to -1"),
    (["repeats=0"], "repeats=0 is not possible: it should be greater than or equal to 1"),
    (["repeats=3", "measurement=probability"],
     "repeats=3 has no meaning for a Splitting, whose interval holds the chance of its draws; give "
     "repeats=1, and other seeds for more draws"),
    (["dataset.size=16"], "dataset.size=16 is not the model's 8; use dataset.size=null"),
    (["dataset.ids=[a.png]", "dataset.take={single: 1}"],
     "dataset.ids and dataset.take exclude each other; give one of them"),
    (["sampler=euler", "sampler.eta=0.5"],
     "sampler.eta=0.5 has no meaning for sampler.scheduler=euler; use sampler=ddim or "
     "sampler.eta=0"),
    (["measurement.num_steps=30"], "measurement.num_steps is read only; give inversion.num_steps"),
    (["model=unet_tiny"],
     "model._target_=invmm.training.architectures.UNet is no ModelRecipe; choose another "
     "model=OPTION"),
    (["out="], "out= is not possible: it should have at least 1 character"),
    (["run_dir=2024"],
     "run_dir=2024 is not possible: it should be a valid string; in quotes it is one: "
     "'run_dir=\"2024\"'"),
    (["model=null"], f"model=null is not an option; there are {', '.join(groups()['model'])}"),
    (["experiment=dmo"], "experiment=dmo is not an option; did you mean demo? There are "
                         f"{', '.join(groups()['experiment'])}"),
    (["engine=3"], "engine=3 is not a group of settings; give engine.KEY=VALUE"),
    (["~seed"], "seed is missing; give seed=VALUE"),
    (["~sampler"], "sampler is missing; give sampler=VALUE"),
    (["seed=0,1"], "seed=0,1 names several values; add --multirun to run one job each"),
    (["seed=${nope}"],
     "seed does not resolve: Interpolation key 'nope' not found; give seed=VALUE"),
])  # fmt: skip
def test_each_contradiction_is_named_with_its_cure(overrides, expected, faults):
    assert faults(*overrides) == [expected]


def test_a_value_that_cannot_be_read_is_the_only_fault_of_its_key(faults):
    given = [
        "model.path=nowhere/模型",
        "dataset=folder",
        "dataset.path=unicode_path/画像",
        "seed=x",
    ]
    lines = faults(given=given)
    assert lines[:3] == [
        "'model.path=nowhere/模型' cannot be read: give 'model.path=\"nowhere/模型\"'",
        "'dataset.path=unicode_path/画像' cannot be read: give "
        "'dataset.path=\"unicode_path/画像\"'",
        "seed=x is not possible: it should be a valid integer",
    ]
    assert len(lines) == 4
    assert lines[3].startswith("model.path=nowhere/模型 ")  # which is another fault, and true
    # What nobody can guess is left out, and not missed; so are the keys of an unknown option.
    assert faults("dataset.path=[a", given=["model.path=nowhere", "dataset=folder"])[:1] == [
        "'dataset.path=[a' cannot be read: check its brackets, and put each text within them in "
        "quotes"
    ]
    found = faults("dataset=foldr", "dataset.path=i", "dataset.recursive=1", given=["seed=x"])
    assert [line.split()[0] for line in found] == ["dataset=foldr", "model.path", "seed=x"]


def test_devices_that_are_not_here(faults, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (line,) = faults("trainer=gpu")
    assert line.startswith("trainer.accelerator=gpu: ")
    assert line.endswith("; use trainer=cpu, or dry_run=true to plan")
    assert faults("trainer.accelerator=tpu")[0].startswith(
        "trainer.accelerator=tpu is not possible"
    )
    (line,) = faults("trainer=gpu", command=train.COMMAND, given=[])
    assert line.startswith("trainer.accelerator=gpu: ")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert faults("trainer=gpu", "trainer.devices=3") == [
        "trainer.devices=3 is more than the GPUs here; use trainer.devices=2"
    ]


def test_a_missing_value_is_asked_for(faults):
    assert faults(given=["dataset=folder"]) == [
        "model.path is missing; give model.path=VALUE",
        "dataset.path is missing; give dataset.path=VALUE",
    ]


def test_a_model_that_is_not_there_is_named_beside_other_faults(faults, images, tmp_path):
    given = [f"model.path={tmp_path}/nowhere", "dataset=folder", f"dataset.path={images}", "seed=x"]
    found = faults(given=given)
    assert found[0] == "seed=x is not possible: it should be a valid integer"
    assert len(found) == 2
    assert found[1].startswith(f"model.path={tmp_path}/nowhere ")


@pytest.mark.parametrize("target", [
    "os.system", "torch.load", "pathlib.Path", "invmm.cli.measure.main",
])  # fmt: skip
@pytest.mark.parametrize("node", ["model", "inversion.kl_weight", "replication.similarity"])
def test_a_foreign_target_is_refused(node, target, faults):
    assert faults(f"{node}._target_={target}") == [
        f"{node}._target_={target} is not allowed; it must be a settings class of invmm"
    ]


def test_a_sweep_lists_the_faults_of_all_its_jobs(faults):
    sweep = ["sampler=ddim,nope", "seed=0,x", "inversion.num_stepz=1"]
    found = faults("--multirun", *sweep, given=[])
    assert found == [
        "model.path is missing; give model.path=VALUE",
        "inversion.num_stepz=1 is not a key; did you mean num_steps?",
        "seed=x is not possible: it should be a valid integer   "
        "[job sampler=ddim seed=x inversion.num_stepz=1]",
        "sampler=nope is not an option; did you mean unipc? There are ddim, ddpm, dpmsolver, "
        "euler, flow_euler, flow_heun, heun, unipc   "
        "[job sampler=nope seed=0 inversion.num_stepz=1]",
    ]


def test_the_other_commands_list_theirs(faults):
    mistakes = ["training.num_steps=0", "model.image_sise=3", "dataset.size=32"]
    assert faults(*mistakes, command=train.COMMAND, given=[]) == [
        "model.image_sise=3 is not a key; did you mean image_size?",
        "training.num_steps=0 is not possible: it should be greater than or equal to 1",
        "dataset.size=32 is not the model's 16; use dataset.size=null",
    ]
    assert faults("allowed_rate=0", "image_size=0", command=threshold.COMMAND, given=[]) == [
        "image_size=0 is not possible: it should be greater than or equal to 1",
        "allowed_rate=0 is not possible: it should be greater than 0",
    ]


def test_a_dry_run_of_a_training_ends_as_the_training_would(images, tmp_path, faults, capsys):
    given = ["dataset=folder", f"dataset.path={images}", "dry_run=true"]
    (line,) = faults(*given, "training.batch_size=3", "trainer.devices=2",
                     command=train.COMMAND, given=[])  # fmt: skip
    assert line == (
        "training.batch_size=3 cannot be shared out over trainer.devices=2; use a multiple"
    )
    held_out = shutil.copytree(images, tmp_path / "held_out")
    rows = [json.dumps({"file_name": p.name, "copies": 0}) for p in images.iterdir()]
    (held_out / "metadata.jsonl").write_text("\n".join(rows))
    for overrides, message in (
        (["model=text_tiny"], "4 of the training images have no caption"),
        ([f"dataset.path={held_out}"], "the data set has no image to train on"),
    ):
        assert train.COMMAND.run([*given, *overrides]) == 2
        shown = capsys.readouterr()
        assert (shown.out, shown.err.startswith(f"invmm-train: {message}")) == ("", True)


def test_flags_that_are_none_end_in_a_usage_line(tmp_path):
    result = run(["--cfg", "job"], tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: invmm [--multirun] [KEY=VALUE ...]")


def test_what_only_the_run_can_find_is_one_line_too(inputs, tmp_path):
    given = [*inputs[:2], f"dataset.path={tmp_path}/nowhere", "replication=correlation"]
    result = run(given, tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"invmm: dataset.path={tmp_path}/nowhere ")
    assert result.stderr.count("\n") == 1


def test_collecting_from_nothing_is_a_fault(tmp_path):
    result = run([str(tmp_path)], tmp_path, "collect")
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr == f"invmm-collect: {tmp_path} holds no records; give the folder of a run\n"
    )


def test_an_interrupted_check_leaves_no_traceback(monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(measure.COMMAND), "run", lambda self, arguments: interrupt(arguments))
    with pytest.raises(SystemExit) as end:
        measure.main()
    assert end.value.code == 130


@pytest.mark.parametrize("shard", ["4/4", "1/", "a/b", "-1/2", "0/0"])
def test_a_shard_that_is_none(shard, faults):
    (line,) = faults(f"shard={shard}")
    assert line == f"shard={shard} is no part; use shard=0/4, shard=1/4, ... for four machines"


def test_shards_need_row_counts_that_all_machines_share(faults):
    (line,) = faults("shard=0/2", "engine.rows_embed=auto")
    assert line.startswith("engine.rows_embed=auto may be measured differently on each machine")


def test_rows_are_a_number_or_auto(faults):
    lines = faults("engine.rows_sample=many", "engine.slots=0")
    assert lines == [
        "engine.slots=0 is not possible: it should be greater than or equal to 1, or it should be "
        "'auto'",
        "engine.rows_sample=many is not possible: it should be a valid integer, or it should be "
        "'auto'",
    ]


def test_guidance_of_an_unconditional_model(faults):
    (line,) = faults("sampler.guidance_scales=[1,3]")
    assert "has no meaning for an unconditional model; use sampler.guidance_scales=[1]" in line


def test_guidance_of_a_pixel_model_with_classes(faults, tmp_path, images):
    """Its labels are a condition, but none of them stands for no label."""
    folder = tiny.save_model(tmp_path / "ddpm")
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_class_embeds": 10}))
    given = [f"model.path={folder}", "dataset=folder", f"dataset.path={images}"]
    for dry_run in ("true", "false"):
        (line,) = faults(
            "prompt=class_label", "prompt.label=3", "sampler.guidance_scales=[1,3]",
            f"dry_run={dry_run}", given=given,
        )  # fmt: skip
        assert "has no meaning for a class-conditional pixel model" in line
        assert line.endswith("use sampler.guidance_scales=[1]")


def test_parts_that_do_not_work_together_are_one_fault(tmp_path, images, capsys):
    folder = tiny.save_model(tmp_path / "ddpm")
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "norm_num_groups": 3}))
    given = [f"model.path={folder}", "dataset=folder", f"dataset.path={images}"]
    for dry_run in ("true", "false"):
        assert measure.COMMAND.run([*given, f"dry_run={dry_run}"]) == 2
        said = capsys.readouterr().err
        assert f"the parts of model.path={folder} do not work together" in said
        assert "Traceback" not in said


def test_a_prompt_that_does_not_suit_the_model(faults, saved_pipeline, images, capsys):
    def given(family):
        return [f"model.path={saved_pipeline(family)}", "dataset=folder", f"dataset.path={images}"]

    assert faults("prompt=caption") == [
        "prompt=caption has no meaning for a pixel model; use prompt=none"
    ]
    folder = given("sd1 epsilon")
    capsys.readouterr()
    (line,) = faults(given=folder)
    assert line.endswith(
        "stable_diffusion model; use prompt=caption or prompt=empty or prompt=learned"
    )
    (line,) = faults("sampler=flow_euler", "prompt=empty", given=given("sd1 epsilon"))
    assert "cannot draw from a model trained on noise; use sampler=ddim" in line
    folder = given("sd3")
    capsys.readouterr()
    (line,) = faults("prompt=empty", given=folder)
    assert "cannot draw from a model trained on a rectified flow; use sampler=flow_euler" in line


@pytest.mark.parametrize(("overrides", "name"), [
    (["measurement=probability"], "Splitting"), (["measurement=free_sampling"], "FreeSampling"),
    (["inversion=trajectory"], "Trajectory"),
])  # fmt: skip
def test_what_cannot_search_a_prompt(overrides, name, faults, saved_pipeline, images, capsys):
    given = [f"model.path={saved_pipeline('sd1 epsilon')}", "dataset=folder",
             f"dataset.path={images}"]  # fmt: skip
    capsys.readouterr()
    assert faults("prompt=learned", *overrides, given=given) == [
        f"prompt=learned cannot be searched by a {name}; use measurement=inversion with "
        "inversion=paper_sd, or prompt=caption"
    ]


def test_a_search_that_makes_no_sense(faults, saved_pipeline, images, capsys):
    given = [f"model.path={saved_pipeline('sd1 epsilon')}", "dataset=folder",
             f"dataset.path={images}"]  # fmt: skip
    capsys.readouterr()
    assert faults("prompt=caption", "prompt.search={}", given=given) == [
        "prompt.search has no meaning for prompt=caption; use prompt=learned"
    ]
    assert faults("prompt=learned", "prompt.search=null", given=given) == [
        "prompt.search=null leaves prompt=learned nothing to do; leave it out"
    ]
    lines = faults(
        "prompt=learned", "prompt.search.temperature=0", "prompt.search.num_tokens=0",
        "prompt.search.check_prompts=all", "prompt.search.encoders=[]", given=given,
    )  # fmt: skip
    assert [line.partition(" ")[0] for line in lines] == [
        "prompt.search.temperature=0", "prompt.search.num_tokens=0", "prompt.search.encoders=[]",
        "prompt.search.check_prompts=all",
    ]  # fmt: skip


def test_options_of_another_family(faults):
    (line,) = faults("model.lora=some.safetensors")
    assert line.startswith("model.lora=some.safetensors has no meaning for a DDPMPipeline")


def test_a_scale_of_vq_latents_that_the_folder_does_not_tell(
    faults, saved_pipeline, images, capsys, tmp_path
):
    folder = Path(shutil.copytree(saved_pipeline("ldm vq"), tmp_path / "vq"))
    capsys.readouterr()  # diffusers talks while it saves
    file = folder / "vqvae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scaling_factor": 0.18215}))
    given = [f"model.path={folder}", "dataset=folder", f"dataset.path={images}"]
    for dry_run in ("dry_run=true", "dry_run=false"):
        (line,) = faults(dry_run, given=given)
        assert line.startswith("model.latent_scale=null leaves the scale open: scaling_factor=0.1")
        assert "use model.latent_scale=1.0 for unscaled latents" in line
    assert measure.COMMAND.run([*given, "model.latent_scale=1", "dry_run=true"]) == 0
    assert "latents: 3x8x8, the autoencoder's output times 1\n" in capsys.readouterr().out
    for value in ("0", "-1", "nan", "inf", "one", "true", "[1]"):
        (line,) = faults(f"model.latent_scale={value}", given=given)
        assert re.match(rf"model\.latent_scale={re.escape(value)} is not possible: it", line)


@pytest.fixture
def with_scheduler(model, images, tmp_path):
    """(keys) -> overrides for the tiny model with these keys in its scheduler_config.json."""

    def given(name="DDPMScheduler", **keys):
        folder = Path(shutil.copytree(model, tmp_path / "other", dirs_exist_ok=True))
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", name]
        (folder / "model_index.json").write_text(json.dumps(index))
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(keys))
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(b"never read")
        return [f"model.path={folder}", "dataset=folder", f"dataset.path={images}", "dry_run=true"]

    return given


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_zero_terminal_snr_of_a_noise_predictor_is_one_fault(spacing, faults, with_scheduler):
    given = with_scheduler(rescale_betas_zero_snr=True)
    (line,) = faults(f"sampler.timestep_spacing={spacing}", given=given)
    assert "rescale_betas_zero_snr=true leaves no signal" in line
    assert line.endswith("or prediction_type=v_prediction, as the model was trained")


def test_a_short_sampler_that_the_model_cannot_take_is_found_by_the_check(faults):
    assert faults("inversion=trajectory", "inversion.sampler_steps=7") == [
        "inversion.sampler_steps=7 does not divide the model's 1000 training timesteps; use a "
        "divisor of them"
    ]
    overrides = ["inversion.sampler_steps=1", "sampler.timestep_spacing=leading"]
    (line,) = faults("inversion=trajectory", *overrides)
    assert line.startswith("with inversion.sampler_steps=1, sampler.num_inference_steps=1 with ")


@pytest.mark.parametrize(("name", "keys", "message"), [
    ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type=continuous is not"),
    ("EulerDiscreteScheduler", {"sigma_max": 700.0}, "sigma_max=700.0 is not supported"),
    ("LCMScheduler", {}, "(it samples distilled models, which is not supported; measure"),
    ("EDMEulerScheduler", {"sigma_max": 80.0}, "(no trained schedule can be read from it; name"),
    ("HeunDiscreteScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
     "rescale_betas_zero_snr=true is ignored by the HeunDiscreteScheduler"),
    ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"},
     "sampler.timestep_spacing=trailing starts at timestep 999, where alpha-bar is 2.4e-09"),
])  # fmt: skip
def test_a_schedule_that_cannot_be_read_is_one_fault_of_the_check(
    name, keys, message, faults, with_scheduler
):
    (line,) = faults(given=with_scheduler(name, **keys))
    assert message in line


def test_a_prompt_that_no_image_has_ends_before_weights_load(
    saved_pipeline, images, tmp_path, monkeypatch, capsys
):
    """Not FAILED once an image; a dry run, on which people gate, ends in the same way."""
    given = [f"model.path={saved_pipeline('sd1 epsilon')}", "prompt=caption", "dataset=folder",
             f"dataset.path={images}", f"run_dir={tmp_path / 'run'}"]  # fmt: skip
    reason = "prompt=caption needs a caption, and none of the 4 images has one; put them into"
    monkeypatch.setattr(sys, "argv", ["invmm"])
    monkeypatch.setattr("invmm.runtime.worker.Worker.__init__", lambda *_: pytest.fail("loads"))
    assert measure.COMMAND.run(given) == 2
    *_, line = capsys.readouterr().err.splitlines()  # after what transformers has to say
    assert line.startswith(f"invmm: {reason}")
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert measure.COMMAND.run([*given, "dry_run=true"]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.startswith(f"invmm: {reason}")) == ("", True)
