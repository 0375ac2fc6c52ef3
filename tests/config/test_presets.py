"""Every preset in conf/ composes, binds to its class and dry-runs."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files

import pytest
import tiny
import yaml
from hydra import compose, initialize_config_module
from hydra.errors import HydraException

from invmm.cli import measure, threshold, train
from invmm.cli.estimate import Plan
from invmm.config.compose import compose_job, groups
from invmm.config.schema import build
from invmm.data.openmoji import OpenMoji
from invmm.engine.outcomes import CostRange, Evaluations
from invmm.inversion.controllers import AdaptiveKLWeight, FixedKLWeight
from invmm.models.adapter import ModelRecipe
from invmm.models.auto import AutoModel
from invmm.models.cost import CallCost
from invmm.replication.sscd import SscdTorchScript

CONF = files("invmm.conf")
PRESETS = [(group, option) for group, options in groups().items() for option in options]
TRAINED = {
    ("model", "unet_tiny"),
    ("model", "unet_cifar10"),
    ("model", "text_tiny"),
    ("experiment", "demo_model"),
    ("experiment", "calibration_model"),
    ("experiment", "text_demo_model"),
    ("experiment", "training_steps_model"),
    ("experiment", "duplication_model"),
    ("experiment", "duplication_cifar10_model"),
}
OWN_NEEDS = {
    ("experiment", "duplication_cifar10_model"): ["dataset=folder"],
    ("measurement", "replay"): ["measurement.source=source"],
    ("replication", "sscd_torchscript"): ["replication.similarity.path=sscd.pt"],
    ("sampler", "flow_euler"): ["prompt=empty"],
    ("sampler", "flow_heun"): ["prompt=empty"],
}
FULL_SCALE = {
    ("model", "ddpm_cifar10"): [],
    ("model", "ldm_celebahq"): [],
    ("model", "ldm_ffhq"): [],
    ("model", "sd14"): ["prompt=caption"],
    ("model", "sd21"): ["prompt=empty"],
    ("model", "sd35_medium"): ["prompt=caption", "sampler=flow_euler"],
    ("model", "sdxl"): ["prompt=caption"],
    ("experiment", "paper_cifar10"): [],
    ("experiment", "paper_celebahq"): [],
    ("experiment", "paper_ffhq"): [],
    ("experiment", "paper_sd14"): [],
    ("experiment", "paper_sd21"): [],
    ("experiment", "paper_sd35"): [],
    ("experiment", "sdxl"): [],
    ("experiment", "duplication_cifar10"): ["model.path=google/ddpm-cifar10-32"],
    ("experiment", "training_steps_cifar10"): ["model.path=google/ddpm-cifar10-32"],
    ("experiment", "duplication_laion"): [],
    ("experiment", "training_steps_laion"): [],
    ("experiment", "membership_cifar10"): ["model.path=google/ddpm-cifar10-32"],
    ("experiment", "membership_celebahq"): [],
    ("experiment", "membership_laion"): [],
    ("experiment", "sampling_cifar10"): [],
    ("experiment", "sampling_celebahq"): [],
    ("experiment", "sampling_laion"): [],
}
"""Presets that name their own model, and what else their command needs."""
OWN_MODEL = {
    ("experiment", "text_demo"): "sd1 epsilon",
    ("model", "latent"): "ldm vq",
    ("prompt", "caption"): "sd1 epsilon",
    ("prompt", "learned"): "sd1 epsilon",
    ("prompt", "empty"): "sdxl",
    ("prompt", "class_label"): "dit",
    ("sampler", "flow_euler"): "sd3",
    ("sampler", "flow_heun"): "sd3",
}


def command_of(group, option):
    is_training = group == "training" or (group, option) in TRAINED
    return train.COMMAND if is_training else measure.COMMAND


@pytest.fixture
def model_for(model, saved_pipeline):
    """(group, option) -> a model that the option suits."""

    def path(group, option):
        family = OWN_MODEL.get((group, option))
        return saved_pipeline(family) if family else model

    return path


@pytest.fixture(scope="session")
def told(tmp_path_factory):
    """Images with a caption and a label each."""
    path = tiny.save_images(tmp_path_factory.mktemp("told") / "png", 3)
    rows = [{"file_name": p.name, "text": "a dot", "label": 1} for p in sorted(path.iterdir())]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


SEARCH = {"_target_": "invmm.inversion.inversion.Inversion"}


@pytest.fixture(autouse=True)
def source(model, tmp_path):
    """What is left of a search of the model, for presets that start from one."""
    inputs = {"model": AutoModel(path=str(model)).fingerprint()}
    manifest = {"inputs": inputs, "config_digest": "", "config": {"measurement": SEARCH}}
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "manifest.json").write_text(json.dumps(manifest))


def overrides_for(group, option, model, images):
    given = [f"{group}={option}", *OWN_NEEDS.get((group, option), [])]
    given += FULL_SCALE.get((group, option), [])
    if command_of(group, option) is measure.COMMAND:
        if (group, option) not in FULL_SCALE:
            given.append(f"model.path={model}")
        if group not in ("dataset", "experiment"):
            given.append("dataset=folder")
    if "dataset=folder" in given:
        given.append(f"dataset.path={images}")
    return given


@pytest.mark.parametrize(("group", "option"), PRESETS)
def test_every_preset_dry_runs(
    group, option, model_for, told, every_icon, no_hub, capsys, tmp_path
):
    model = model_for(group, option)
    capsys.readouterr()  # diffusers talks while it saves
    overrides = [*overrides_for(group, option, model, told), f"run_dir={tmp_path}/run"]
    code = command_of(group, option).run([*overrides, "dry_run=true"])
    shown = capsys.readouterr()
    assert (code, shown.err) == (0, "")
    text, _, facts = shown.out.partition("\n\n")
    assert yaml.safe_load(text)["dry_run"] is True
    assert re.search(r"^(training )?images: [1-9]\d*", facts, re.MULTILINE)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("group", "option"), PRESETS)
def test_a_preset_binds_to_the_class_that_it_names(group, option, model_for, images, no_hub):
    model = model_for(group, option)
    node = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
    if "_target_" not in node:
        return
    command, faults = command_of(group, option), []
    config = compose_job(command.config_name, overrides_for(group, option, model, images), faults)
    key = "measurement" if group == "inversion" else group
    built = getattr(command.check(config, faults), key)
    assert faults == []
    assert f"{type(built).__module__}.{type(built).__name__}" == node["_target_"]
    for name, value in node.items():
        is_value = value not in ("???", "${seed}") and not isinstance(value, dict)
        if is_value and name != "_target_":
            assert config[group][name] == value or (group, name) == ("model", "path")


@pytest.mark.parametrize(("group", "option"), PRESETS)
def test_a_preset_opens_with_its_command(group, option):
    first, second = (CONF / group / f"{option}.yaml").read_text().splitlines()[:2]
    line = second if first.startswith("# @package") else first
    assert re.match(rf"# .*\b{group}={option}\b.*", line)


@pytest.mark.parametrize(("option", "expected"), [
    ("paper_ddpm", (2000, 0.1, 50, 32, 1e-4, "reconstruction")),
    ("paper_ldm", (2000, 0.1, 10, 16, 5e-4, "total")),
    ("paper_sd", (2000, 0.1, 50, 16, 1e-3, "total")),
])  # fmt: skip
def test_the_published_values(option, expected, model, images):
    config = compose_job("measure", overrides_for("inversion", option, model, images), [])
    inversion = measure.COMMAND.check(config, []).measurement
    weight = inversion.kl_weight
    assert (
        inversion.num_steps,
        inversion.learning_rate,
        inversion.check_every,
        inversion.objective.batch_size,
        weight.increment,
        weight.progress,
    ) == expected
    assert (weight.initial, weight.tolerance, weight.window) == (1.0, 1e-3, 100)
    assert inversion.objective.timesteps == "uniform"
    assert not inversion.check_prior


def test_fixed_differs_from_adaptive_in_the_weight_alone(inputs):
    def inversion(option):
        config = compose_job("measure", [*inputs, f"inversion={option}"], [])
        return config["inversion"], measure.COMMAND.check(config, []).measurement

    adaptive, fixed = inversion("adaptive"), inversion("fixed")
    assert isinstance(adaptive[1].kl_weight, AdaptiveKLWeight)
    assert isinstance(fixed[1].kl_weight, FixedKLWeight)
    assert {k for k in adaptive[0] if adaptive[0][k] != fixed[0][k]} == {"kl_weight"}


@pytest.mark.parametrize(("option", "expected"), [
    # model, latents, then steps, batch, check_every, increment, tolerance, then scheduler, sampler
    # steps, scales, then samples, threshold, input of SSCD, prompt
    ("paper_cifar10", ("pixel", (3, 32, 32), 2000, 32, 50, 1e-4, 1e-3, "ddim", 200, [1], 8, 0.5,
                       32, "none")),
    ("paper_celebahq", ("ldm", (3, 64, 64), 2000, 16, 10, 5e-4, 1e-3, "ddim", 50, [1], 8, 0.5, 256,
                        "none")),
    ("paper_ffhq", ("ldm", (3, 64, 64), 2000, 16, 10, 5e-4, 1e-3, "ddim", 50, [1], 8, 0.5, 256,
                    "none")),
    ("paper_sd14", ("stable_diffusion", (4, 64, 64), 2000, 16, 50, 1e-3, 1e-3, "ddim", 50,
                    [1, 2, 3, 4, 5, 6, 7], 8, 0.5, 320, "learned")),
    ("paper_sd21", ("stable_diffusion", (4, 64, 64), 2000, 16, 50, 1e-3, 1e-3, "ddim", 50,
                    [1, 2, 3, 4, 5, 6, 7], 8, 0.5, 320, "learned")),
    ("paper_sd35", ("sd3", (16, 64, 64), 2000, 16, 50, 1e-3, 1e-3, "flow_euler", 50,
                    [1, 2, 3, 4, 5], 8, 0.5, 320, "learned")),
])  # fmt: skip
def test_the_published_experiments(option, expected, no_hub):
    faults = []
    config = compose_job("measure", [f"experiment={option}"], faults)
    recipes = measure.COMMAND.check(config, faults)
    assert faults == []
    info, inversion = recipes.model.describe(), recipes.measurement
    weight, sampler, replication = inversion.kl_weight, recipes.sampler, recipes.replication
    assert (
        info.family,
        info.latent_shape,
        inversion.num_steps,
        inversion.objective.batch_size,
        inversion.check_every,
        weight.increment,
        weight.tolerance,
        sampler.scheduler,
        sampler.num_inference_steps,
        list(sampler.guidance_scales),
        replication.num_samples,
        replication.threshold,
        replication.similarity.size,
        recipes.prompt.kind,
    ) == expected
    assert isinstance(replication.similarity, SscdTorchScript)
    assert not replication.early_exit


@pytest.mark.parametrize(("option", "paper", "own"), [
    ("duplication_cifar10", "paper_cifar10", {"model", "dataset"}),
    ("training_steps_cifar10", "paper_cifar10", {"model", "dataset"}),
    ("duplication_laion", "paper_sd14", {"prompt", "dataset"}),
    ("training_steps_laion", "paper_sd14", {"prompt", "dataset"}),
    ("membership_cifar10", "paper_cifar10", {"model", "dataset"}),
    ("membership_celebahq", "paper_celebahq", {"dataset"}),
    ("membership_laion", "paper_sd14", {"prompt", "dataset"}),
    ("sampling_cifar10", "paper_cifar10", {"measurement"}),
    ("sampling_celebahq", "paper_celebahq", {"measurement"}),
    ("sampling_laion", "paper_sd14", {"measurement", "prompt", "sampler"}),
])  # fmt: skip
def test_a_study_at_full_scale_has_the_published_settings_but_its_own(option, paper, own):
    study, published = (compose_job("measure", [f"experiment={x}"], []) for x in (option, paper))
    assert {key for key in study if study[key] != published[key]} == {*own, "out"}
    assert study["out"] == f"results/{option}"


@pytest.mark.parametrize(("ending", "scale"), [
    ("celebahq", 1.0), ("ffhq", 1.0), ("sd14", 0.18215), ("sd21", 0.18215), ("laion", 0.18215),
    ("sd35", 1.5305),
])  # fmt: skip
def test_latents_are_scaled_as_published(ending, scale, no_hub):
    """Of the model's preset and of every experiment on it, and by its config alone."""
    options = [
        f"{group}={option}"
        for group in ("model", "experiment")
        for option in groups()[group]
        if option.endswith((f"_{ending}", ending)) and not option.endswith("_model")
    ]
    assert len(options) >= (4 if ending in ("celebahq", "laion") else 2 - (ending == "sd35"))
    for option in options:
        node = compose_job("measure", [option], [])["model"]
        for given in (node, {**node, "latent_scale": None}):
            recipe = build(ModelRecipe, given, "model", faults := [])
            assert faults == []
            assert recipe.describe().latent_scale == scale


def test_a_machine_without_the_hub_is_told_what_is_assumed(no_hub, capsys):
    assert measure.COMMAND.run(["experiment=paper_celebahq", "dry_run=true"]) == 0
    facts = capsys.readouterr().out
    assert "\ndata set: not here, its size is taken as stated; dataset.path=korexyz/" in facts
    assert "\nmodel: architecture from the package's own table; CompVis/ldm-celebahq-256 " in facts
    assert "\nimages: 100 of 256x256 pixels\n" in facts
    assert "\nlatents: 3x64x64, the autoencoder's output times 1\n" in facts
    # 2,000 steps of 16, and 200 checks of 8 samples of 50 steps
    assert "112,000 forward (80,000 of them in samplers) and 32,000 backward\n" in facts
    memory = re.search(r"\nmemory of a GPU: about ([\d.]+) GiB", facts)
    assert memory
    assert 14 <= float(memory[1]) <= 15  # 14.7; torch 2.7 keeps more for an attention: 15.0
    overrides = ["experiment=paper_celebahq", "dataset.first=null", "dataset.num_images=null"]
    assert measure.COMMAND.run([*overrides, "dataset.streaming=false", "dry_run=true"]) == 2
    assert "could not be fetched from the hub (no connection)" in capsys.readouterr().err


def test_checkpointing_trades_memory_for_arithmetic(no_hub, capsys):
    def facts(*overrides):
        given = ["experiment=paper_celebahq", "dry_run=true", *overrides]
        assert measure.COMMAND.run(given) == 0
        shown = capsys.readouterr().out
        kept = re.search(r"and ([\d.]+) GiB of activations", shown)
        return float(kept[1]), float(re.search(r"at most: ([\d.e+]+) floating", shown)[1])

    plain, spared = facts(), facts("execution.gradient_checkpointing=true")
    assert spared[0] < 0.6 * plain[0]
    # 112,000 + 32,000 forwards in all, and 32,000 again
    assert spared[1] / plain[1] == pytest.approx(176 / 144, rel=0.01)


def test_the_cost_of_the_published_experiment(inputs, capsys):
    assert measure.COMMAND.run([*inputs, "experiment=paper_ddpm", "dry_run=true"]) == 0
    facts = capsys.readouterr().out
    # 2,000 steps of 32, and 40 checks of 8 samples of 200 steps
    assert "128,000 forward (64,000 of them in samplers) and 64,000 backward\n" in facts
    assert "512,000 forward and 256,000 backward" in facts
    assert "give trainer.tflops=" in facts


def test_the_default_says_what_early_exits_save(inputs, capsys):
    overrides = [*inputs, "sampler.num_inference_steps=20", "dry_run=true", "shard=1/3"]
    assert measure.COMMAND.run([*overrides, "trainer.devices=2", "trainer.tflops=1e-3"]) == 0
    facts = capsys.readouterr().out
    # 600 steps of 4, and 25 checks of 8 samples of 20 steps, or of one
    assert "6,400 forward (4,000 of them in samplers) and 2,400 backward, or 2,900 forward" in facts
    assert "devices: 6 (2 x 3 shards), 1 images each" in facts
    assert "hours at a sustained 0.001 TFLOP/s" in facts


def test_what_all_images_share_is_planned_once(inputs, capsys):
    overrides = [*inputs, "sampler.num_inference_steps=20", "dry_run=true"]
    sampling = ["measurement=free_sampling", "measurement.num_samples=100"]
    assert measure.COMMAND.run([*overrides, *sampling]) == 0
    facts = capsys.readouterr().out
    images = int(re.search(r"images: (\d+) of", facts).group(1))
    assert "evaluations of an image, at most: 160 forward" in facts  # 8 pictures, 20 steps
    assert "evaluations of what all images share: 2,000 forward" in facts
    assert f"evaluations in all, at most: {2000 + 160 * images:,} forward" in facts


def test_a_million_images_on_many_devices_are_planned():
    cost = CostRange(
        fewest=Evaluations(forward=10, backward=5), most=Evaluations(forward=60, backward=40)
    )
    plan = Plan(
        images=10**6, devices=8, shards=25, cost=cost, tflops=50.0,
        row=CallCost(activation_bytes=0, flop=18 * 10**12),
    )  # fmt: skip
    assert plan.flop_at_most == 10**6 * 100 * 18e12
    # 1.8e21 operations at 200 x 5e13 a second
    assert plan.hours_at_most == pytest.approx(1.8e21 / 1e16 / 3600)
    assert "devices: 200 (8 x 25 shards), 5,000 images each" in plan.lines()


def test_the_demo_takes_the_images_it_promises(model, every_icon, capsys):
    overrides = ["experiment=demo", f"model.path={model}", "dry_run=true"]
    assert measure.COMMAND.run(overrides) == 0
    facts = capsys.readouterr().out
    assert "images: 28 of 8x8 pixels" in facts
    assert "run_dir: results/demo\n" in facts


def test_a_training_counts_its_copies(every_icon, capsys):
    assert train.COMMAND.run(["experiment=demo_model", "dry_run=true"]) == 0
    # 64 icons, twelve of them with 136 copies together
    assert "training images: 64, 188 with copies" in capsys.readouterr().out


def test_the_duplication_study_measures_what_its_models_were_trained_on(every_icon):
    def opened(config_name, *overrides):
        node = compose_job(config_name, overrides, [])["dataset"]
        return OpenMoji(**{key: value for key, value in node.items() if key != "_target_"}).open(16)

    trained = [opened("train", "experiment=duplication_model", f"seed={seed}") for seed in (1, 2)]
    measured = opened("measure", "experiment=duplication", "dataset.seed=1")
    assert measured.everything == trained[0].everything
    assert measured.everything != trained[1].everything
    six = dict.fromkeys((2, 4, 8, 16, 32, 64), 6)
    assert Counter(icon.copies for icon in measured.everything) == {0: 64, 1: 28, **six}
    two = dict.fromkeys((0, 1, 2, 4, 8, 16, 32, 64), 2)
    assert Counter(icon.copies for icon in measured.entries) == two


def test_the_threshold_dry_runs(images, capsys):
    overrides = ["dataset=folder", f"dataset.path={images}", "image_size=8", "dry_run=true"]
    assert threshold.COMMAND.run(overrides) == 0
    assert capsys.readouterr().out == "4 images, 6 pairs\n"


def test_a_dry_run_of_a_sweep_shows_every_job(inputs, capsys):
    overrides = [*inputs, "inversion.check_every=10,50", "seed=0,1"]
    assert measure.COMMAND.run(["--multirun", *overrides, "dry_run=true"]) == 0
    digests = re.findall(r"^config digest: (\w{12})$", capsys.readouterr().out, re.MULTILINE)
    assert len(set(digests)) == 4


LAUNCHERS = {
    "slurm": ("hydra_plugins.hydra_submitit_launcher", "SlurmLauncher", "slurm"),
    "ray_local": ("hydra_plugins.hydra_ray_launcher", "RayLauncher", "ray"),
    "ray_cluster": ("hydra_plugins.hydra_ray_launcher", "RayLauncher", "ray"),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_composes_and_opens_with_its_command(name, inputs):
    plugin, class_name, _ = LAUNCHERS[name]
    pytest.importorskip(plugin)
    with initialize_config_module("invmm.conf", version_base="1.3"):
        overrides = [*inputs, f"hydra/launcher={name}", "shard=0/2"]
        config = compose("measure", overrides, return_hydra_config=True)
    assert config.hydra.launcher._target_.endswith(class_name)
    first = (CONF / "hydra" / "launcher" / f"{name}.yaml").read_text().splitlines()[0]
    assert f"hydra/launcher={name}" in first
    assert "shard=0/" in first


def test_a_slurm_job_is_one_task_that_starts_its_devices_itself(inputs):
    pytest.importorskip(LAUNCHERS["slurm"][0])
    with initialize_config_module("invmm.conf", version_base="1.3"):
        overrides = [*inputs, "hydra/launcher=slurm", "hydra.launcher.gpus_per_node=4"]
        launcher = compose("measure", overrides, return_hydra_config=True).hydra.launcher
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (1, 1, 4)
    assert launcher.max_num_timeout == 10


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_missing_launcher_names_what_to_install(name, inputs, capsys, monkeypatch):
    _, _, extra = LAUNCHERS[name]
    monkeypatch.setattr(
        "invmm.config.compose.compose",
        lambda *arguments, **options: (_ for _ in ()).throw(
            HydraException(f"In 'hydra/launcher/{name}': Could not find 'hydra/launcher/{extra}'")
        ),
    )
    assert measure.COMMAND.run([*inputs, f"hydra/launcher={name}"]) == 2
    assert f"pip install 'invmm[{extra}]'" in capsys.readouterr().err
