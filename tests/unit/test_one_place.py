"""What a developer adds often is added in one place."""

from __future__ import annotations

from pathlib import Path

import written
from unit.diffusion.test_sampling import NOISE, run
from worlds import IdealNetwork

import invmm
from invmm.diffusion import schedulers
from invmm.engine.outcomes import Spent, Status
from invmm.results import columns
from invmm.results.collect import score_table
from invmm.results.ownership import OwnedRunFolder

PACKAGE = Path(invmm.__file__).parent


def places(text: str, *, beside: tuple[str, ...] = ()) -> set[str]:
    """Files of the package and of its configs that contain a text."""
    found = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "conf").rglob("*.yaml")]
    found = [path for path in found if text in path.read_text(encoding="utf-8")]
    return {path.relative_to(PACKAGE.parent).as_posix() for path in found} - {*beside}


def test_a_scheduler_is_one_row(monkeypatch):
    """DEIS, which the package does not have, follows the probability flow from its row alone."""
    row = schedulers.Scheduler(class_name="DEISMultistepScheduler", rescales_betas=False)
    monkeypatch.setitem(schedulers.SCHEDULERS, "deis", row)
    network = IdealNetwork(mean=0.2, std=0.3)
    drawn = run(network, scheduler="deis", num_inference_steps=100)
    assert (drawn - (0.2 + 0.3 * NOISE)).abs().max() < 0.02
    of_models = (
        "invmm/diffusion/schedule.py", "invmm/diffusion/scheduler_config.py",
        "invmm/models/loading.py",
    )  # fmt: skip
    for name, known in schedulers.SCHEDULERS.items():
        if name != "deis":
            found = places(f'"{known.class_name}"', beside=of_models)
            assert found == {"invmm/diffusion/schedulers.py"}


def test_a_kind_of_time_is_one_member():
    for kind in Spent:
        assert f"seconds_{kind}" in columns.COLUMNS
        assert places(f"seconds_{kind}") == set()
    assert places('"preparation"') == {"invmm/engine/outcomes.py"}


def test_a_column_is_one_row(monkeypatch, tmp_path):
    monkeypatch.setitem(columns.COLUMNS, "peak", columns.Column("float64", "outcome.score_nats"))
    with OwnedRunFolder(tmp_path / "run", config={}, digest="0") as folder:
        outcome = written.outcome(Status.REPLICATED, score=0.5, similarity=0.9)
        written.write(folder, written.entry("it"), outcome)
    table = score_table([tmp_path / "run"])
    assert table["peak"].tolist() == [24.0]


def test_a_membership_score_is_one_class_and_its_preset():
    assert places("SecMI") == {"invmm/baselines/secmi.py", "conf/measurement/secmi.yaml"}
