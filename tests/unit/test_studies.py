"""The scripts of `experiments/`: what is given to a study reaches its runs, and nothing else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from studies import EXPERIMENTS, calls_of

from invmm.config.compose import compose_job
from invmm.config.runs import run_digest

ROOT = EXPERIMENTS.parent
STUDIES = sorted(
    path.parent.name for path in EXPERIMENTS.glob("*/run.sh") if path.parent.name != "bench"
)
OPTIONS = ["logger=wandb", "logger.mode=offline"]


@pytest.mark.parametrize("study", STUDIES)
def test_options_reach_every_run_and_nothing_else(tmp_path, study):
    with_options, without = calls_of(study, tmp_path, *OPTIONS), calls_of(study, tmp_path)
    measured = [call for call in without if call[0] == "invmm"]
    assert measured
    expected = [[*call, *OPTIONS] if call[0] == "invmm" else call for call in without]
    assert sorted(with_options) == sorted(expected)  # two trainings at a time come in any order
    assert without[-1] == ["python", f"experiments/{study}/plot.py"]


@pytest.mark.parametrize("study", ["demo", "membership"])
def test_a_logger_leaves_a_run_what_it_is(tmp_path, study):
    """So a finished run is not measured again, but only shown."""
    _, *overrides = next(call for call in calls_of(study, tmp_path) if call[0] == "invmm")
    faults: list[str] = []
    digests = {run_digest("measure", compose_job("measure", [*overrides, *more], faults))
               for more in ([], OPTIONS)}  # fmt: skip
    assert faults == []
    assert len(digests) == 1


def make(*arguments: str, cwd: Path = ROOT) -> str:
    """What `make` prints, the same whether another make runs these tests or not."""
    command = ["make", "--no-print-directory", "-f", ROOT / "Makefile", "-o", ".venv/.ready"]
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        [*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_make_study_publishes_what_is_to_be_shown():
    def recipe(*variables: str) -> str:
        return make("-n", "study", "STUDY=demo", *variables)

    shown = recipe("OPTIONS=logger=wandb logger.mode=offline").splitlines()
    assert shown[-2:] == [
        "WANDB_RUN_GROUP=demo bash experiments/demo/run.sh logger=wandb logger.mode=offline",
        ".venv/bin/python experiments/publish.py demo logger=wandb logger.mode=offline",
    ]
    assert "publish.py" not in recipe()
    assert "publish.py" not in recipe("OPTIONS=logger=csv")


def test_make_figures_draws_the_studies_that_ran(tmp_path):
    """A study's model alone, which others measure too, is no study that ran."""
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    (tmp_path / ".venv" / ".ready").touch()
    (commands / "python").write_text('#!/usr/bin/env bash\necho "$@"\n')
    (commands / "python").chmod(0o755)
    (tmp_path / "experiments").symlink_to(EXPERIMENTS)
    for study in ("demo/model", "membership", "sampling"):
        (tmp_path / "results" / study).mkdir(parents=True)
    for study in ("membership", "sampling"):
        (tmp_path / "results" / study / "summary.json").touch()
    assert make("figures", cwd=tmp_path).splitlines() == [
        "experiments/membership/plot.py",
        "experiments/sampling/plot.py",
    ]
