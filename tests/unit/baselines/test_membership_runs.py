"""Membership scores by the command: what a run writes, and that it goes on where it stopped."""

from __future__ import annotations

import shutil
import sys

import pytest
import tiny

from invmm.cli import measure


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(folder name, overrides) -> the folder of a finished run."""
    monkeypatch.setattr(sys, "argv", ["invmm"])
    model = tiny.save_model(tmp_path / "model")
    images = tiny.save_images(tmp_path / "png", 3)

    def finished(name: str, *overrides: str):
        quick = [text for text in tiny.command(model, images, tmp_path / name)[3:]
                 if not text.startswith("inversion.")]  # fmt: skip
        assert measure.COMMAND.run([*quick, *overrides]) == 0
        return tmp_path / name

    return finished


@pytest.mark.parametrize("name", ["denoising_loss", "secmi", "pia", "pian"])
def test_a_run_scores_every_image_and_resumes(name, run, capsys):
    folder = run("one", f"measurement={name}", "engine.slots=1")
    shown = capsys.readouterr()
    assert "membership scores: lower is more like a training image" in shown.out
    assert "with a score=3" in shown.err
    table = tiny.scores(folder).set_index("image_id")
    assert table.status.value_counts().to_dict() == {"SCORED": 3, "FAILED": 1}
    assert table.score.notna().sum() == 3
    assert table.score.nunique() == 3
    assert (table.evaluations_forward.sum(), table.evaluations_sampler.sum()) == (
        3 * {"denoising_loss": 32, "secmi": 12, "pia": 2, "pian": 2}[name], 0,
    )  # fmt: skip
    whole = tiny.records(folder)
    shutil.rmtree(next((folder / "records").glob("image-01*")))
    run("one", f"measurement={name}", "engine.slots=1")
    assert "3 of them measured before" in capsys.readouterr().out
    assert tiny.records(folder) == whole


def test_the_noises_follow_the_seed_of_the_run(run):
    losses = [tiny.scores(run(str(seed), "measurement=denoising_loss", f"seed={seed}"))
              for seed in (0, 1)]  # fmt: skip
    assert (losses[0].score != losses[1].score).all()
