"""A class built in Python and its config mean the same, and both refuse what is out of range."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from invmm.config.schema import build
from invmm.inversion.replay import Replay
from invmm.inversion.trajectory import Trajectory
from invmm.probability.free_sampling import FreeSampling
from invmm.probability.splitting import Splitting
from invmm.training.architectures import UNet

CONF = Path(__file__).parents[3] / "conf"
SHIPPED = [
    (Trajectory, "inversion/trajectory.yaml"),
    (Splitting, "measurement/probability.yaml"),
    (FreeSampling, "measurement/free_sampling.yaml"),
]
OUT_OF_RANGE = [
    (Trajectory, {"num_steps": 0}),
    (Trajectory, {"check_every": 0}),
    (Trajectory, {"shrink": 0.0}),
    (Trajectory, {"shrink": 1.0}),
    (Trajectory, {"sampler_steps": 0}),
    (Trajectory, {"betas": [0.9, 0.99, 0.999]}),
    (Trajectory, {"betas": [0.9]}),
    (Trajectory, {"betas": [0.9, 1.0]}),
    (Replay, {"source": ""}),
    (Replay, {"source": "run", "num_samples": 0}),
    (Splitting, {"num_particles": 1}),
    (Splitting, {"level_probability": 1.0}),
    (Splitting, {"level_probability": 0.0}),
    (UNet, {"beta_start": 1.5}),
    (UNet, {"beta_start": 0.0}),
]
AT_THE_EDGE = [
    (Trajectory, {"check_every": 1, "shrink": 0.999, "sampler_steps": 1, "betas": [0.0, 0.0]}),
    (Trajectory, {"shrink": 0.001, "num_shrinks": 0, "num_confirmations": 1}),
    (Replay, {"source": "r", "num_samples": 1}),
    (Splitting, {"num_particles": 2, "level_probability": 0.5}),
]


@pytest.mark.parametrize(("recipe", "file"), SHIPPED)
def test_defaults_of_a_class_are_those_of_its_config(recipe, file):
    shipped = dict(OmegaConf.load(CONF / file))
    own = {field.name: field.default for field in fields(recipe) if field.default is not MISSING}
    plain = {
        name: list(value) if isinstance(value, tuple) else value for name, value in own.items()
    }
    assert plain
    assert plain == {name: shipped[name] for name in plain}


@pytest.mark.parametrize(("recipe", "given"), OUT_OF_RANGE)
def test_values_out_of_range_are_refused_by_name(recipe, given):
    faults: list[str] = []
    build(recipe, given, "part", faults)
    name = list(given)[-1]
    assert any(fault.startswith(f"part.{name}") for fault in faults), faults


@pytest.mark.parametrize(("recipe", "given"), AT_THE_EDGE)
def test_the_last_values_in_range_are_taken(recipe, given):
    faults: list[str] = []
    assert build(recipe, given, "part", faults) is not None
    assert faults == []
