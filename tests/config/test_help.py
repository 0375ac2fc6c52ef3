"""Help answers at once, and shows what there is."""

from __future__ import annotations

import re
import sys
import time
from importlib.resources import files

import pytest
import tiny

from invmm.exits import HELP

COMMANDS = ["measure", "train", "threshold", "collect", "verify"]


def help_of(module: str, tmp_path) -> str:
    result = tiny.invmm([sys.executable, "-m", f"invmm.cli.{module}", "--help"], cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.parametrize("module", COMMANDS)
def test_help_takes_no_time(module, tmp_path):
    start = time.monotonic()
    help_of(module, tmp_path)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("module", COMMANDS[:3])
def test_help_imports_nothing_of_weight(module, tmp_path):
    script = (
        f"import sys; from invmm.cli.{module} import COMMAND; COMMAND.run(['-h'])\n"
        "heavy = {'torch', 'hydra', 'omegaconf', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    assert tiny.invmm([sys.executable, "-c", script], cwd=tmp_path).stderr == "[]\n"


@pytest.mark.parametrize("module", COMMANDS[:3])
def test_help_shows_five_examples_and_every_option_of_its_groups(module, tmp_path):
    shown = help_of(module, tmp_path)
    name = "invmm" if module == "measure" else f"invmm-{module}"
    examples = shown.split("Examples:\n")[1].split("\n\n")[0].splitlines()
    assert len(examples) == 5
    assert all(re.match(rf"  {name}( |$)", example) for example in examples)
    defaults = (files("invmm.conf") / f"{module}.yaml").read_text().split("defaults:")[1]
    groups = re.findall(r"^  - (\w+): ", defaults.split("\n\n")[0], re.MULTILINE)
    assert len(groups) >= 2
    for group in groups:
        options = sorted(
            file.name.removesuffix(".yaml") for file in (files("invmm.conf") / group).iterdir()
            if file.name.endswith(".yaml")
        )  # fmt: skip
        assert f"\n  {group:12} {' '.join(options)}\n" in shown


@pytest.mark.parametrize("module", COMMANDS)
def test_help_holds_the_exit_codes_and_may_be_cut_off(module, tmp_path):
    command = f"{sys.executable} -m invmm.cli.{module} --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    result = tiny.invmm(["bash", "-c", command], cwd=tmp_path)
    assert (result.stdout.splitlines()[-1], result.stderr) == ("0", "")
    assert " ".join(HELP.split()) in " ".join(help_of(module, tmp_path).split())


def test_version(tmp_path):
    result = tiny.invmm([sys.executable, "-m", "invmm.cli.measure", "--version"], cwd=tmp_path)
    assert re.fullmatch(r"invmm \d+\.\d+\.\d+\n", result.stdout)
