"""Jobs of a sweep, tolerant composition, and what identifies a run."""

from __future__ import annotations

import pytest

from invmm.config.compose import compose_job, groups, jobs, permissive
from invmm.config.runs import run_digest

MODEL = "model.path=somewhere"


def composed(*overrides: str, config_name: str = "measure"):
    faults: list[str] = []
    config = compose_job(config_name, [MODEL, *overrides], faults)
    assert faults == []
    return config


def test_groups_are_the_folders_of_conf():
    found = groups()
    assert found["sampler"] == [
        "ddim",
        "ddpm",
        "dpmsolver",
        "euler",
        "flow_euler",
        "flow_heun",
        "heun",
        "unipc",
    ]
    assert set(found) == {
        "dataset", "experiment", "inversion", "logger", "measurement", "model", "prompt",
        "replication", "sampler", "trainer", "training",
    }  # fmt: skip


@pytest.mark.parametrize(("overrides", "expected"), [
    ([], [[]]),
    (["a=1,2", "b=x"], [["a=1", "b=x"], ["a=2", "b=x"]]),
    (["a=1,2", "b=x,y"], [["a=1", "b=x"], ["a=1", "b=y"], ["a=2", "b=x"], ["a=2", "b=y"]]),
    (["a=range(0,3)"], [["a=0"], ["a=1"], ["a=2"]]),
    (["a=[1,2]"], [["a=[1,2]"]]),
    (["sampler=glob(d*)"], [["sampler=ddim"], ["sampler=ddpm"], ["sampler=dpmsolver"]]),
])  # fmt: skip
def test_a_sweep_is_the_product_of_its_values(overrides, expected):
    faults: list[str] = []
    assert jobs(overrides, multirun=True, faults=faults) == expected
    assert faults == []


def test_several_values_need_multirun():
    faults: list[str] = []
    assert jobs(["a=1,2", "b=3"], multirun=False, faults=faults) == [["b=3"]]
    assert faults == ["a=1,2 names several values; add --multirun to run one job each"]


def test_every_unreadable_override_is_listed():
    faults: list[str] = []
    unreadable = ["a=[1", "b", "", "c=interval(0,1)"]
    assert jobs([*unreadable, "d=1"], multirun=True, faults=faults) == [["d=1"]]
    assert [fault.split(" cannot be read")[0] for fault in faults] == [f"'{x}'" for x in unreadable]


def test_unknown_keys_are_let_in_and_groups_are_left_alone():
    given = ["a=1", "+a.b=2", "++c=3", "sampler=ddim", "~seed", "hydra.verbose=true"]
    accepted = ["++a=1", "++a.b=2", "++c=3", "sampler=ddim", "~seed", "hydra.verbose=true"]
    assert permissive(given) == accepted
    assert composed("seeed=1")["seeed"] == 1
    assert composed("dataset.take.single=3")["dataset"]["take"] == {"single": 3}


def test_measurement_is_the_chosen_inversion():
    config = composed("inversion=paper_ldm", "inversion.num_steps=77")
    assert config["measurement"] == config["inversion"]
    assert config["measurement"]["num_steps"] == 77
    assert config["measurement"]["kl_weight"]["increment"] == 5e-4


def test_what_does_not_resolve_is_a_fault_with_its_key():
    faults: list[str] = []
    assert compose_job("measure", [MODEL, "sampler.eta=${nope}"], faults) == {}
    assert faults == [
        "sampler.eta does not resolve: Interpolation key 'nope' not found; give sampler.eta=VALUE"
    ]


@pytest.mark.parametrize("override", [
    "out=elsewhere", "run_dir=here", "logger=wandb", "logger=tensorboard", "trainer=gpu",
    "trainer.devices=2", "trainer.threads_per_device=1", "engine.slots=1", "retry_failed=true",
    "dry_run=true", "hydra.verbose=true",
])  # fmt: skip
def test_the_digest_ignores_where_and_how(override):
    assert run_digest("measure", composed(override)) == run_digest("measure", composed())


@pytest.mark.parametrize("override", [
    "seed=1", "inversion.num_steps=601", "inversion=fixed", "inversion.objective.batch_size=5",
    "model.path=other", "model.dtype=bfloat16", "dataset.seed=1", "dataset.take={single: 1}",
    "sampler=heun", "sampler.eta=0.5", "replication=correlation", "replication.threshold=0.4",
    "replication.early_exit=false", "engine.rows_denoise=8", "engine.rows_sample=4",
    "engine.rows_embed=4",
])  # fmt: skip
def test_the_digest_changes_with_all_that_changes_results(override):
    assert run_digest("measure", composed(override)) != run_digest("measure", composed())


def test_the_digest_is_the_same_whatever_the_order_of_keys():
    config = composed()
    assert run_digest("measure", dict(reversed(config.items()))) == run_digest("measure", config)
    assert len(run_digest("measure", config)) == 12
