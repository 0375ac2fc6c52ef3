"""The plots of the studies, on records written by hand."""

from __future__ import annotations

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import written
from matplotlib.figure import Figure
from studies import EXPERIMENTS, calls_of

from invmm.analysis import study as study_module
from invmm.engine.outcomes import Evaluations, Outcome, Status
from invmm.results.collect import collect
from invmm.results.ownership import OwnedRunFolder

ICONS = [(copies, twin) for copies in (64, 32, 16, 8, 4, 2, 1, 0) for twin in (0, 1)]
FREE_SAMPLES = 1000
DRAW = """
import runpy, sys
for plot in sys.argv[1:]:
    try:
        runpy.run_path(plot, run_name="__main__")
    except SystemExit as end:
        assert end.code in (0, 1), end  # the numbers of these records are not expected
"""


def counted(copies: int, twin: int) -> Outcome:
    """Twins share their replicas; those of the most copies are the likeliest."""
    count = 2 * copies
    log_p = math.log(count / FREE_SAMPLES) if count else None
    return written.outcome(
        Status.ESTIMATED if count else Status.CENSORED,
        score=None if log_p is None else -log_p / 48,
        similarity=0.3 + copies / 128 + twin / 100,
        tensors={"replicas": torch.arange(100 * copies % 900, 100 * copies % 900 + count)},
        columns={
            "log_p": log_p,
            "log_p_low": None if log_p is None else log_p - 0.5,
            "log_p_high": math.log(0.0037) if log_p is None else log_p + 0.5,
            "one_in": None if log_p is None else math.exp(-log_p),
            "method": "counted",
            "count": count,
            "num_free_samples": FREE_SAMPLES,
        },
    )


def found(copies: int, twin: int) -> Outcome:
    """An inversion that finds what has more than two copies."""
    if copies <= 2:
        return written.outcome(
            Status.NOT_REPLICATED,
            similarity=0.2 + copies / 10 + twin / 100,
            evaluations=Evaluations(forward=600, backward=100),
            columns={"guidance_scale": None, "prompt": "a word", "log_p_certified": None},
        )
    return written.outcome(
        Status.REPLICATED,
        score=(1 + twin) / copies,
        similarity=0.9,
        evaluations=Evaluations(forward=2000 // copies, backward=100 * twin),
        columns={"guidance_scale": 3.0, "prompt": "a word", "log_p_certified": -9.0},
    )


def scored(copies: int, twin: int) -> Outcome:
    return Outcome(status=Status.SCORED, score=1 / (1 + copies) + twin / 10)


def replayed(copies: int, twin: int) -> Outcome:
    """Of what was found, half replicates."""
    if copies <= 2:
        return Outcome(status=Status.NOT_REPLICATED, columns={"source_status": "NOT_REPLICATED"})
    columns = {"confirm_passed": 32 + twin, "confirm_drawn": 64, "source_status": "REPLICATED"}
    return written.outcome(Status.ESTIMATED, score=0.1, similarity=0.9, columns=columns)


def outcome_of(overrides: list[str]) -> Callable[[int, int], Outcome]:
    """What a run with these overrides leaves of an icon."""
    measurement = dict(override.split("=", 1) for override in overrides).get("measurement")
    if measurement in ("free_sampling", "probability"):
        return counted
    if measurement == "replay":
        return replayed
    return found if measurement is None else scored


STUDIES = sorted(path.parent.name for path in EXPERIMENTS.glob("*/plot.py"))


def write_study(folder: Path, study: str) -> None:
    """The records of all runs that its run.sh makes, below results/ in a working folder."""
    if study == "training_steps":
        for step in (200, 400, 800, 1200, 1700):  # splitting begins at 400
            (folder / f"results/training_steps/model/step_{step:06d}").mkdir(parents=True)
    for command, *overrides in calls_of(study, folder):
        if command != "invmm":
            continue
        outcome = outcome_of(overrides)
        given = dict(override.split("=", 1) for override in overrides)
        run_dir = folder / given.get("run_dir", f"results/{study}")
        with OwnedRunFolder(run_dir, config={}, digest="d") as run:
            if outcome is counted:
                run.bank_block(0).parent.mkdir()
            for copies, twin in ICONS:
                icon = written.entry(f"{copies}-{twin}", copies, f"icon of {copies}")
                written.write(run, icon, outcome(copies, twin))
        collect(run_dir)


def drawn_in(folder: Path, **environment: str) -> dict[str, bytes]:
    """What all plots write in a working folder, in a process of its own."""
    plots = [str(EXPERIMENTS / study / "plot.py") for study in STUDIES]
    command = [sys.executable, "-W", "error::UserWarning", "-c", DRAW, *plots]
    before = set(folder.rglob("*.*"))
    subprocess.run(command, cwd=folder, env=os.environ | environment, check=True)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(set(folder.rglob("*.*")) - before)
    }


@pytest.mark.slow
def test_all_figures_tables_and_numbers_come_out_alike_anywhere(tmp_path):
    """In another folder, with another order of sets, and under a matplotlibrc of the user's."""
    for study in STUDIES:
        write_study(tmp_path / "here", study)
    shutil.copytree(tmp_path / "here", tmp_path / "else" / "where")
    (tmp_path / "else" / "where" / "matplotlibrc").write_text("font.size: 30\nlines.linewidth: 9\n")
    here = drawn_in(tmp_path / "here", PYTHONHASHSEED="1")
    elsewhere = drawn_in(tmp_path / "else" / "where", PYTHONHASHSEED="2")
    assert here.keys() == elsewhere.keys()
    assert [name for name in here if here[name] != elsewhere[name]] == []
    for study in STUDIES:
        mine = {Path(name) for name in here if Path(name).parts[1] == study}
        kinds = [path.suffix for path in mine]
        assert {".json", ".pdf", ".png", ".csv"} == set(kinds), study
        assert kinds.count(".pdf") == kinds.count(".png") <= kinds.count(".csv")


@pytest.mark.parametrize(
    ("study", "run", "difference"),
    [
        ("demo", "", "found.duplicated.found is 9, not in [10, 10]"),
        ("text_demo", "caption", "caption.found.duplicated.found is 9, not in [10, 10]"),
        ("calibration", "trajectory", "trajectory.likely_found is 0.833, not in [1, 1]"),
        ("membership", "adaptive", "adaptive.found.duplicated.found is 9, not in [10, 10]"),
        ("sampling", "trajectory", "found.found is 9, not in [10, 10]"),
        (
            "training_steps",
            "adaptive_001700",
            "step_001700.adaptive.found.duplicated.found is 9, not in [10, 10]",
        ),
        ("duplication", "adaptive_1", "adaptive.copies_64.found.value is 0.83333, not in [1, 1]"),
    ],
)
def test_a_changed_record_fails_the_study(study, run, difference, tmp_path, monkeypatch, capsys):
    """By the very names that its expected.json holds, at the values of these records."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_module, "save_figure", closed)
    write_study(tmp_path, study)
    shutil.copytree(EXPERIMENTS / study, tmp_path / study)
    expected = tmp_path / study / "expected.json"
    names = list(json.loads(expected.read_text()))
    expected.write_text("{}")
    assert code_of(tmp_path / study / "plot.py") == 0
    summary = json.loads((tmp_path / "results" / study / "summary.json").read_text())
    values = {}
    for name in names:
        value = summary
        for key in name.split("."):
            value = value[key]
        values[name] = {"value": value, "within": 1e-9}
    expected.write_text(json.dumps(values))
    assert code_of(tmp_path / study / "plot.py") == 0
    capsys.readouterr()
    (record,) = (tmp_path / "results" / study / run).glob("records/64-0-*/record.json")
    written.vouch(record.parent, status="NOT_REPLICATED", score=None)
    assert code_of(tmp_path / study / "plot.py") == 1
    assert difference in capsys.readouterr().out


def test_no_plot_needs_torch_nor_the_backend_of_a_notebook():
    """So that figures are drawn anew in seconds, wherever the records are."""
    load = """
import runpy, sys
for plot in sys.argv[1:]:
    runpy.run_path(plot, run_name="plot")
    assert "torch" not in sys.modules, plot
    assert "matplotlib" not in sys.modules, plot  # style() and new figures import it with care
"""
    plots = sorted(map(str, EXPERIMENTS.glob("*/plot.py")))
    assert len(plots) >= len(STUDIES)
    subprocess.run([sys.executable, "-c", load, *plots], check=True)


def closed(figure: Figure, *paths: Path) -> tuple[Path, ...]:
    """Instead of a second's work to save it."""
    return paths


def code_of(plot: Path) -> int:
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(plot), run_name="__main__")
    return end.value.code
