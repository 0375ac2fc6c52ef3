"""`measurement=replay` on a tiny real model: other samplers, the same one, and refusals."""

from __future__ import annotations

import shutil
import sys

import pytest
import tiny

from invmm.cli import measure, verify


@pytest.fixture
def replay(finished, model, images, tmp_path, monkeypatch):
    """(folder name, overrides) -> exit code; the folder is below tmp_path."""
    monkeypatch.setattr(sys, "argv", ["invmm"])
    quick = [text for text in tiny.QUICK if not text.startswith("inversion.")]

    def replay(name: str, *overrides: str) -> int:
        return measure.COMMAND.run([
            f"model.path={model}", "dataset=folder", f"dataset.path={images}",
            f"run_dir={tmp_path / name}", *quick, "measurement=replay",
            f"measurement.source={finished[0]}", *overrides,
        ])  # fmt: skip

    return replay


def test_under_its_own_sampler_a_distribution_replicates_as_often(finished, replay, tmp_path):
    assert replay("same") == 0
    source = tiny.scores(finished[0]).set_index("image_id")
    found = tiny.scores(tmp_path / "same").set_index("image_id")
    assert set(found.index) == set(source.index)
    replicated = source.index[source.status == "REPLICATED"]
    others = source.index[source.status == "NOT_REPLICATED"]
    assert len(replicated) >= 2
    assert len(others) >= 1
    ours, theirs = found.loc[replicated], source.loc[replicated]
    assert set(ours.status) == {"ESTIMATED"}
    assert (ours.confirm_drawn == 64).all()
    assert (ours.rate_low <= theirs.rate_high).all()
    assert (ours.rate_high >= theirs.rate_low).all()
    assert ours.kl_nats.to_list() == pytest.approx(theirs.score_nats.to_list(), rel=1e-5)
    assert (ours.source_rate == theirs.replication_rate).all()
    assert (ours.source_digest == theirs.config_digest).all()
    assert (ours.score_nats == -ours.log_p_certified).all()
    assert (ours.evaluations_forward == 64 * 4).all()
    assert set(found.loc[others].status) == {"NOT_REPLICATED"}
    assert found.loc[others].replication_rate.isna().all()
    assert set(found.loc[others].source_status) == {"NOT_REPLICATED"}
    assert found.loc["broken.png"].status == "FAILED"


def test_other_samplers_other_rates_and_a_rerun_goes_on(finished, replay, tmp_path, capsys):
    options = ("sampler=ddpm", "sampler.num_inference_steps=7", "measurement.num_samples=16")
    assert replay("ddpm", *options) == 0
    assert "p estimated for" in capsys.readouterr().out
    found = tiny.scores(tmp_path / "ddpm").set_index("image_id")
    drawn = found[found.confirm_drawn.notna()]
    assert (drawn.confirm_drawn == 16).all()
    assert (drawn.evaluations_sampler == 16 * 7).all()
    assert replay("same", "measurement.num_samples=16") == 0
    same = tiny.scores(tmp_path / "same").set_index("image_id")
    assert (same.loc[drawn.index].best_similarity != drawn.best_similarity).all()
    whole = tiny.records(tmp_path / "ddpm")
    shutil.rmtree(next((tmp_path / "ddpm" / "records").glob("image-01*")))
    assert replay("ddpm", *options) == 0
    assert "7 of them measured before" in capsys.readouterr().out
    assert tiny.records(tmp_path / "ddpm") == whole


def test_a_dry_run_prices_it(replay, capsys):
    assert replay("dry", "sampler=heun", "sampler.num_inference_steps=4", "dry_run=true") == 0
    shown = capsys.readouterr().out
    # 64 samples of 4 steps, of which all but the last evaluate the network twice
    assert "at most: 448 forward (448 of them in samplers) and 0 backward\n" in shown


def test_wrong_sources_are_refused_before_anything_runs(
    finished, replay, model, images, tmp_path, capsys
):
    def fault(*overrides: str) -> str:
        capsys.readouterr()
        assert replay("refused", *overrides) == 2
        assert not (tmp_path / "refused").exists()
        headline, *lines = capsys.readouterr().err.splitlines()
        assert headline == "invmm: 1 fault"
        return lines[0].strip()

    assert fault("measurement.source=???") == (
        "measurement.source is missing; give measurement.source=VALUE"
    )
    assert fault(f"measurement.source={tmp_path}/nowhere") == (
        f"measurement.source={tmp_path}/nowhere cannot be replayed: {tmp_path}/nowhere/"
        "manifest.json is missing; give the folder of a run"
    )
    assert replay("again") == 0
    assert fault(f"measurement.source={tmp_path}/again") == (
        f"measurement.source={tmp_path}/again cannot be replayed: it holds no distributions; give "
        "a run with measurement=inversion"
    )
    other = tiny.save_model(tmp_path / "other", seed=1)
    weights = "unet/diffusion_pytorch_model.safetensors"
    line = fault(f"model.path={other}")
    assert line.startswith(
        f"measurement.source={finished[0]} searched another model (model.{weights} was "
    )
    assert line.endswith("; give the model.path of that run, or a run of this model")
    assert replay("planned", f"model.path={other}", "dry_run=true") == 0  # reads no weights


def test_a_replay_left_nothing_to_verify(replay, tmp_path, monkeypatch, capsys):
    assert replay("same") == 0
    monkeypatch.setattr(sys, "argv", ["invmm-verify", str(tmp_path / "same")])
    with pytest.raises(SystemExit) as ended:
        verify.main()
    assert ended.value.code == 2
    assert "without noise distributions to draw from" in capsys.readouterr().err
