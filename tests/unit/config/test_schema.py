"""A node against the class that it builds: every fault, and nothing foreign touched."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Le

from invmm.config.schema import build
from invmm.diffusion.sampling import Sampler
from invmm.engine.protocols import Measurement
from invmm.inversion.controllers import AdaptiveKLWeight
from invmm.inversion.inversion import Inversion
from invmm.inversion.objectives import DenoisingObjective
from invmm.models.adapter import ModelRecipe

SAMPLER = {"_target_": "invmm.diffusion.sampling.Sampler"}
INVERSION = {
    "_target_": "invmm.inversion.inversion.Inversion",
    "num_steps": 100,
    "check_every": 10,
    "objective": {"_target_": "invmm.inversion.objectives.DenoisingObjective", "batch_size": 4},
    "kl_weight": {"_target_": "invmm.inversion.controllers.AdaptiveKLWeight", "window": 7},
}


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """A node without `_target_`."""

    sampler: Sampler
    width: Annotated[int, Ge(1)]
    label: str = "a"
    load: Annotated[float, Ge(0), Le(1)] = 0.5
    kind: Literal["oak", "ash"] = "oak"
    is_open: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    names: list[str] | None = None
    spare: Sampler | None = None

    def __post_init__(self) -> None:
        if self.width < len(self.label):
            raise ValueError(f"shelf.width={self.width} is less than shelf.label needs")


def built(config, expected=Shelf, key="shelf"):
    faults: list[str] = []
    return build(expected, config, key, faults), faults


def test_a_nested_node_becomes_its_objects():
    inversion, faults = built(INVERSION, Measurement, "inversion")
    assert faults == []
    assert inversion == Inversion(
        objective=DenoisingObjective(batch_size=4),
        kl_weight=AdaptiveKLWeight(window=7),
        num_steps=100,
        check_every=10,
    )


def test_numbers_are_taken_where_they_fit():
    shelf, faults = built({"sampler": SAMPLER, "width": 3, "load": 1, "names": ["x"]})
    assert faults == []
    assert (shelf.width, shelf.load, shelf.names) == (3, 1.0, ["x"])
    assert shelf.sampler == Sampler()


@pytest.mark.parametrize(("key", "value", "shown"), [
    ("width", "abc", "shelf.width=abc is not possible: it should be a valid integer"),
    ("width", "3", "shelf.width=3 is not possible: it should be a valid integer"),
    ("width", 1.5, "shelf.width=1.5 is not possible: it should be a valid integer"),
    ("width", True, "shelf.width=true is not possible: it should be a valid integer"),
    ("width", None, "shelf.width=null is not possible: it should be a valid integer"),
    ("width", [3], "shelf.width=[3] is not possible: it should be a valid integer"),
    ("width", 0, "shelf.width=0 is not possible: it should be greater than or equal to 1"),
    ("width", "???", "shelf.width is missing; give shelf.width=VALUE"),
    ("load", 1.01, "shelf.load=1.01 is not possible: it should be less than or equal to 1"),
    ("load", float("nan"), "shelf.load=nan is not possible: it should be a finite number"),
    ("load", float("inf"), "shelf.load=inf is not possible: it should be a finite number"),
    ("load", "0.5", "shelf.load=0.5 is not possible: it should be a valid number"),
    ("kind", "elm", "shelf.kind=elm is not possible: it should be 'oak' or 'ash'"),
    ("is_open", 1, "shelf.is_open=1 is not possible: it should be a valid boolean"),
    ("is_open", "yes", "shelf.is_open=yes is not possible: it should be a valid boolean"),
    ("counts", {"a": "b"}, "shelf.counts.a=b is not possible: it should be a valid integer"),
    ("counts", 3, "shelf.counts=3 is not possible: it should be a valid dictionary"),
    ("names", ["a", 2], "shelf.names.1=2 is not possible: it should be a valid string"),
    ("label", 2024, "shelf.label=2024 is not possible: it should be a valid string; in quotes "
                    "it is one: 'shelf.label=\"2024\"'"),
    ("labell", "b", "shelf.labell=b is not a key; did you mean label?"),
    ("sampler", 3, "shelf.sampler=3 is not a group of settings; give shelf.sampler.KEY=VALUE"),
    ("sampler", None, "shelf.sampler=null is not a group of settings; give "
                      "shelf.sampler.KEY=VALUE"),
    ("spare", "x", "shelf.spare=x is not a group of settings; give shelf.spare.KEY=VALUE"),
    ("sampler", {**SAMPLER, "eta": 2},
     "shelf.sampler.eta=2 is not possible: it should be less than or equal to 1"),
])  # fmt: skip
def test_each_fault_names_key_value_and_cure(key, value, shown):
    shelf, faults = built({"sampler": SAMPLER, "width": 3, key: value})
    assert shelf is None
    assert faults == [shown]


def test_an_unknown_key_far_from_all_is_answered_with_all():
    _, faults = built({**SAMPLER, "colour": 1}, Sampler, "sampler")
    assert faults == [
        "sampler.colour=1 is not a key; known are clip_sample, eta, guidance_scales, "
        "num_inference_steps, scheduler, timestep_spacing"
    ]


def test_what_has_no_default_must_be_given():
    _, faults = built({}, Shelf, "")
    assert faults == [
        "sampler is missing; give sampler=VALUE",
        "width is missing; give width=VALUE",
    ]


def test_all_faults_at_all_depths_come_at_once():
    config = {
        **INVERSION,
        "num_steps": 0,
        "objective": {**INVERSION["objective"], "batch_size": "many", "batch_sice": 3},
        "kl_weight": {**INVERSION["kl_weight"], "tolerance": -1, "progress": "slow"},
        "speed": 1,
    }
    _, faults = built(config, Measurement, "inversion")
    assert [fault.split()[0] for fault in faults] == [
        "inversion.num_steps=0",
        "inversion.objective.batch_size=many",
        "inversion.objective.batch_sice=3",
        "inversion.kl_weight.tolerance=-1",
        "inversion.kl_weight.progress=slow",
        "inversion.speed=1",
    ]


def test_a_contradiction_is_found_beside_other_faults():
    node = {**SAMPLER, "scheduler": "euler", "eta": 0.5, "num_inference_steps": "x", "step": 1}
    _, faults = built(node, Sampler, "sampler")
    assert len(faults) == 3
    assert "sampler.num_inference_steps=x" in faults[0]
    assert "sampler.step=1 is not a key" in faults[1]
    assert "sampler.eta=0.5 has no meaning for sampler.scheduler=euler" in faults[2]


def test_a_default_in_place_of_a_faulty_value_starts_no_new_complaint():
    _, faults = built({**SAMPLER, "scheduler": "eular", "eta": 0.5}, Sampler, "sampler")
    assert len(faults) == 1
    assert "sampler.scheduler=eular is not possible" in faults[0]


@pytest.mark.parametrize("target", [
    "os.system", "torch.load", "pathlib.Path", "builtins.eval", "subprocess.Popen", "Sampler",
    "invmm.cli.measure.main", "invmm.cli.command.Command", "invmm.runtime.measure.measure",
    "invmm.files.os.system", "invmm.__version__", "invmm.models.pixel.ModelInfo",
    "invmm.models.pixel.Path", "invmm.models.pixel.Tensor", "invmm.engine.engine.Engine",
    "invmm.diffusion.sampling.Sampler.build", "invmm..diffusion.sampling.Sampler",
    "invmm.diffusion.sampling.Sampler ", "invmm.diffusion.sampling.Sampler\n", "", None, 3, ["a"],
])  # fmt: skip
def test_only_settings_classes_of_the_package_may_be_named(target):
    node, faults = built({"_target_": target, "x": 1}, ModelRecipe, "model")
    assert node is None
    assert len(faults) == 1
    assert faults[0].startswith("model._target_=")
    assert "is not allowed; it must be a settings class of invmm" in faults[0]


def test_nothing_foreign_is_imported(tmp_path, monkeypatch):
    trap = tmp_path / "evil_settings.py"
    trap.write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for target in ("evil_settings.Thing", "invmm.models.evil_settings.Thing"):
        _, faults = built({"_target_": target}, ModelRecipe, "model")
        assert len(faults) == 1
    assert "evil_settings" not in sys.modules


def test_a_class_that_is_not_there_is_a_fault():
    for target in (
        "invmm.models.pixel.PixelUnet",
        "invmm.models.pixels.PixelUNet",
        "invmm.models.pixel.torch.Generator",
    ):
        _, faults = built({"_target_": target}, ModelRecipe, "model")
        assert faults == [f"model._target_={target} does not exist; choose model=OPTION"]


@pytest.mark.parametrize(("expected", "target", "kind"), [
    (ModelRecipe, "invmm.training.architectures.UNet", "ModelRecipe"),
    (Measurement, "invmm.diffusion.sampling.Sampler", "Measurement"),
    (Sampler, "invmm.data.dataset.ImageEntry", "Sampler"),
])  # fmt: skip
def test_the_wrong_kind_of_class_is_the_only_fault(expected, target, kind):
    _, faults = built({"_target_": target, "path": 3}, expected, "node")
    assert faults == [f"node._target_={target} is no {kind}; choose another node=OPTION"]
