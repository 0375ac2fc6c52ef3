"""An option of the command line wins whole over the values of a preset."""

from __future__ import annotations

from importlib.resources import files

import pytest
import yaml

from invmm.config.compose import compose_job
from invmm.config.runs import run_digest


def composed(*overrides: str, config_name: str = "measure"):
    faults: list[str] = []
    config = compose_job(config_name, overrides, faults)
    assert faults == []
    return config


def option(group: str, name: str):
    return yaml.safe_load((files("invmm.conf") / group / f"{name}.yaml").read_text())


@pytest.mark.parametrize(("preset", "group", "name"), [
    ("duplication_cifar10", "replication", "sscd"), ("paper_cifar10", "replication", "correlation"),
    ("duplication_cifar10", "sampler", "euler"), ("demo", "sampler", "ddim"),
    ("paper_cifar10", "dataset", "folder"), ("paper_cifar10", "inversion", "fixed"),
    ("demo", "trainer", "gpu"),
])  # fmt: skip
def test_the_preset_s_values_below_the_group_do_not_apply(preset, group, name):
    given = [f"experiment={preset}", f"{group}={name}"]
    config = composed(*given)
    assert composed(*reversed(given)) == config
    assert config[group] == option(group, name)
    others = composed(f"experiment={preset}")
    assert {key for key in config if config[key] != others[key]} <= {
        group, *(["measurement"] if group == "inversion" else []),
    }  # fmt: skip


def test_keys_of_the_command_line_win_over_both():
    config = composed(
        "replication=sscd", "experiment=duplication_cifar10", "replication.similarity.size=64",
        "+replication.similarity.path=mine.onnx", "sampler.eta=0.5", "dataset.first=3",
    )  # fmt: skip
    own = option("replication", "sscd")
    own["similarity"] |= {"size": 64, "path": "mine.onnx"}
    assert config["replication"] == own
    assert config["sampler"]["num_inference_steps"] == 200  # the preset's: no sampler= was given
    assert config["sampler"]["eta"] == 0.5
    assert config["dataset"]["take"] == {"duplicated": 70, "single": 30, "held_out": 30}
    assert config["dataset"]["first"] == 3


def test_a_preset_that_sets_a_measurement():
    preset = composed("experiment=sampling_laion")
    assert preset["measurement"]["num_samples"] == 64
    assert (
        "block_size"
        not in composed("experiment=sampling_laion", "measurement=secmi")["measurement"]
    )
    inversion = composed("experiment=sampling_laion", "measurement=inversion")
    assert inversion["measurement"] == inversion["inversion"] == option("inversion", "paper_sd")
    own = composed("experiment=sampling_laion", "inversion=fixed")
    assert own["measurement"] == preset["measurement"]
    assert own["inversion"] == option("inversion", "fixed")


def test_interpolations_of_an_option_see_the_whole_config():
    """dataset.seed of a preset for training is ${seed}; a chosen data set has its own."""
    preset = composed("experiment=duplication_model", "seed=5", config_name="train")
    assert preset["dataset"]["seed"] == 5
    chosen = composed("experiment=duplication_model", "seed=5", "dataset=openmoji",
                      config_name="train")  # fmt: skip
    assert chosen["dataset"] == option("dataset", "openmoji")
    assert chosen["run_dir"] == "results/duplication/model_5"


def test_an_interpolation_of_what_the_option_lacks_names_the_key_to_give():
    given = ["experiment=duplication", "dataset=folder", "dataset.path=i"]
    faults: list[str] = []
    assert compose_job("measure", given, faults) == {}
    assert faults == [
        "model.path does not resolve: Interpolation key 'dataset.seed' not found; give "
        "model.path=VALUE"
    ]
    assert composed(*given, "model.path=m")["model"]["path"] == "m"


def test_a_key_is_deleted_from_the_option():
    faults: list[str] = []
    given = ["experiment=paper_cifar10", "dataset=folder", "dataset.path=i", "~dataset.resize"]
    config = compose_job("measure", given, faults)
    assert faults == []
    assert "resize" not in config["dataset"]
    assert "first" not in config["dataset"]


def test_the_same_values_have_the_same_digest_whoever_gave_them():
    """The demo sets nothing of the replication, so giving its default changes nothing."""
    assert run_digest("measure", composed("experiment=demo")) == run_digest(
        "measure", composed("experiment=demo", "replication=sscd")
    )
