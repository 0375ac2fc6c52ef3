"""The scripts of `experiments/`: what is given to a study reaches its runs, and nothing else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from invmm.cli.compose import compose_job, digest_of

ROOT = Path(__file__).parents[2]
STUDIES = sorted(
    path.parent.name for path in ROOT.glob("experiments/*/run.sh") if path.parent.name != "bench"
)
OPTIONS = ["logger=wandb", "logger.mode=offline"]
NOTE_THE_CALL = """#!/usr/bin/env bash
printf '%s\\0' "${0##*/}" "$@" >> calls
echo >> calls
"""


@pytest.fixture
def calls(tmp_path):
    """Runs a study's script where every command only notes how it was called."""
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name in ("invmm", "invmm-train", "python"):
        (commands / name).write_text(NOTE_THE_CALL)
        (commands / name).chmod(0o755)

    def run(study: str, *options: str) -> list[list[str]]:
        script = ROOT / "experiments" / study / "run.sh"
        subprocess.run(["bash", script, *options], cwd=tmp_path, check=True)
        lines = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").unlink()
        return [line.split("\0")[:-1] for line in lines]

    return run


@pytest.mark.parametrize("study", STUDIES)
def test_options_reach_every_run_and_nothing_else(calls, study):
    with_options, without = calls(study, *OPTIONS), calls(study)
    measured = [call for call in without if call[0] == "invmm"]
    assert measured
    assert with_options == [[*call, *OPTIONS] if call[0] == "invmm" else call for call in without]
    assert without[-1] == ["python", f"experiments/{study}/plot.py"]


@pytest.mark.parametrize("study", ["demo", "membership"])
def test_a_logger_leaves_a_run_what_it_is(calls, study):
    """So a finished run is not measured again, but only shown."""
    _, *overrides = next(call for call in calls(study) if call[0] == "invmm")
    faults: list[str] = []
    digests = {digest_of(compose_job("measure", [*overrides, *more], faults))
               for more in ([], OPTIONS)}  # fmt: skip
    assert faults == []
    assert len(digests) == 1


def test_make_study_publishes_what_is_to_be_shown():
    def recipe(*variables: str) -> str:
        command = [
            "make",
            "-n",
            "--no-print-directory",
            "-o",
            ".venv/.ready",
            "study",
            "STUDY=demo",
            *variables,
        ]
        environment = {k: v for k, v in os.environ.items() if k != "MAKEFLAGS"}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stdout

    shown = recipe("OPTIONS=logger=wandb logger.mode=offline").splitlines()
    assert shown[-2:] == [
        "WANDB_RUN_GROUP=demo bash experiments/demo/run.sh logger=wandb logger.mode=offline",
        ".venv/bin/python experiments/publish.py demo logger=wandb logger.mode=offline",
    ]
    assert "publish.py" not in recipe()
    assert "publish.py" not in recipe("OPTIONS=logger=csv")
