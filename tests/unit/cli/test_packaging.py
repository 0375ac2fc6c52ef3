"""What pyproject.toml and the Makefile promise."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


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
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["wandb"]]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in wanted}
    assert names <= pins.keys()
    assert pins["torch"] == "2.13.0"
    assert "torchvision" not in names | pins.keys()


def test_every_target_of_the_makefile_is_explained():
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    explained = re.findall(r"^  make ([a-z-]+) +\S", result.stdout, re.MULTILINE)
    assert explained == [
        "help", "setup", "demo", "test", "test-all", "test-gpu", "lint", "format", "bench",
        "bench-gpu", "study", "figures", "clean",
    ]  # fmt: skip


def test_continuous_integration_runs_what_people_run():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make lint test" in script.read_text().splitlines()
