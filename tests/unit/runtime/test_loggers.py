"""Views of a run: what they show is what the records say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import written
from PIL import Image

from invmm.analysis.report import report
from invmm.engine.outcomes import Status
from invmm.results.ownership import OwnedRunFolder
from invmm.runtime.loggers import CsvLog, RunLog, TensorBoardLog, WandbLog

PUBLISH = Path(__file__).parents[3] / "experiments" / "publish.py"


@pytest.fixture
def run_dir(tmp_path):
    path = written.write_run(tmp_path / "run")
    report(path)
    return path


@pytest.fixture
def study(tmp_path):
    """What a study left: a run, its summary, a table, two figures."""
    place = tmp_path / "results" / "study"
    report(written.write_run(place / "counted"))
    (place / "summary.json").write_text('{"caption": {"auroc": 0.75, "low": null}}')
    (place / "shares.csv").write_text("copies,share\n2,0.5\n4,\n")
    for name in ("shares", "scores"):
        Image.new("RGB", (6, 8)).save(place / f"{name}.png")
    return place


def test_csv_holds_every_curve_with_its_steps(run_dir):
    CsvLog().publish(run_dir, {})
    frame = pd.read_csv(run_dir / "curves.csv")
    assert list(frame.columns) == ["image_id", "curve", "step", "value"]
    few = frame[frame.image_id == "few"]
    assert few[few.curve == "loss"][["step", "value"]].values.tolist() == [[1, 2.0], [2, 1.0]]
    assert few[few.curve == "similarity"][["step", "value"]].values.tolist() == [
        [0, 0.1],
        [2, 0.25],
    ]
    assert "z-failed" not in set(frame.image_id)
    assert len(frame) == 5 * 4


def test_csv_of_nothing_has_its_header(tmp_path):
    with OwnedRunFolder(tmp_path, config={}, digest="d"):
        pass
    CsvLog().publish(tmp_path, {})
    assert (tmp_path / "curves.csv").read_text() == "image_id,curve,step,value\n"


def test_tensorboard_events_can_be_read_and_a_rerun_does_not_double_them(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):
        TensorBoardLog().publish(run_dir, {})
    assert len(list((run_dir / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/few")] == [(1, 2.0), (2, 1.0)]
    assert [e.step for e in events.Scalars("similarity/few")] == [0, 2]
    assert set(events.Tags()["images"]) == {"gallery", "scores"}


@pytest.fixture
def fake_wandb(monkeypatch):
    """Records what is said to W&B."""

    class Run:
        def __init__(self):
            self.logged, self.summary = [], {}

        def define_metric(self, *arguments, **options):
            pass

        def log(self, values):
            if "optimiser_step" in values and "fail" in self.summary:
                raise RuntimeError("network down")
            self.logged.append(values)

    class Module:
        Error = RuntimeError
        run = Run()
        finished = 0
        options: dict = {}  # noqa: RUF012

        def init(self, **options):
            self.options = options
            return self.run

        def finish(self):
            self.finished += 1

        def Table(self, dataframe):
            return dataframe

        def Image(self, picture):
            return picture.shape

    module = Module()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_one_table_curves_by_step_and_pictures(run_dir, fake_wandb):
    log = WandbLog(group="study", name="seed=3", mode="offline")
    log.publish(run_dir, written.CONFIG)
    options = fake_wandb.options
    assert (options["group"], options["name"], options["mode"]) == ("study", "seed=3", "offline")
    assert options["config"] == written.CONFIG
    table, *by_step, pictures = fake_wandb.run.logged
    assert len(table["scores"]) == 6
    assert [values["optimiser_step"] for values in by_step] == [0, 1, 2]
    assert by_step[2]["loss/few"] == 1.0
    assert by_step[2]["similarity/few"] == 0.25
    assert "loss/few" not in by_step[0]
    assert set(pictures) == {"gallery", "scores"}
    assert fake_wandb.run.summary["images"] == 6
    assert fake_wandb.run.summary["with_score"] == 2
    assert fake_wandb.run.summary["score_median_of_those"] == pytest.approx(0.635)
    assert fake_wandb.finished == 1


def test_wandb_is_finished_even_if_it_fails(run_dir, fake_wandb):
    fake_wandb.run.summary["fail"] = True
    with pytest.raises(RuntimeError, match="network down"):
        WandbLog(mode="offline").publish(run_dir, {})
    assert fake_wandb.finished == 1


@pytest.mark.parametrize(
    ("group", "environment", "expected"),
    [("mine", "theirs", "mine"), (None, "theirs", "theirs"), (None, None, "study")],
)
def test_runs_of_a_study_share_a_group(
    study, fake_wandb, monkeypatch, group, environment, expected
):
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    if environment:
        monkeypatch.setenv("WANDB_RUN_GROUP", environment)
    log = WandbLog(group=group, mode="offline")
    log.publish(study / "counted", written.CONFIG)
    assert (fake_wandb.options["group"], fake_wandb.options["job_type"]) == (expected, "run")
    log.publish_study(study)
    assert (fake_wandb.options["group"], fake_wandb.options["job_type"]) == (expected, "study")
    monkeypatch.chdir(study / "counted")
    log.publish(Path("."), {})
    assert fake_wandb.options["group"] == expected


def test_what_a_study_found_is_a_run_too(study, fake_wandb):
    WandbLog(mode="offline").publish_study(study)
    assert fake_wandb.options["name"] == "study"
    assert fake_wandb.run.summary == {"caption": {"auroc": 0.75, "low": None}}
    logged = {name: value for values in fake_wandb.run.logged for name, value in values.items()}
    assert logged.keys() == {"shares", "shares_table", "scores"}
    assert logged["shares_table"].to_dict("records") == [
        {"copies": 2, "share": 0.5}, {"copies": 4, "share": None},
    ]  # fmt: skip
    assert logged["shares"] == (8, 6, 3)
    assert fake_wandb.finished == 1


def test_a_study_in_the_folder_of_a_run_shows_its_own(run_dir, fake_wandb):
    CsvLog().publish(run_dir, {})
    (run_dir / "summary.json").write_text("{}")
    (run_dir / "demo.csv").write_text("p\n1\n")
    WandbLog(mode="offline").publish_study(run_dir)
    assert [list(values) for values in fake_wandb.run.logged] == [["demo_table"]]


def test_a_study_without_a_summary_names_the_cure(tmp_path, fake_wandb):
    with pytest.raises(ValueError, match=r"summary\.json is missing; run the study's plot\.py"):
        WandbLog(mode="offline").publish_study(tmp_path)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """W&B with all its files in the test's folder; it reads the environment once a process."""
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    wandb.teardown()
    return wandb


def stored_by(wandb, folder: Path) -> Path:
    """The one run below a folder; W&B writes the last bytes when its service ends."""
    assert wandb.run is None
    wandb.teardown()
    (stored,) = (folder / "wandb").glob("offline-run-*")
    assert next(stored.glob("run-*.wandb")).stat().st_size > 1000
    return stored


def test_the_study_is_really_written_offline(study, offline):
    """By the command that `make study` calls."""
    command = [sys.executable, str(PUBLISH), "study", "logger=wandb", "logger.mode=offline"]
    subprocess.run(command, cwd=study.parent.parent, check=True)
    stored = stored_by(offline, study)
    (table,) = (stored / "files" / "media" / "table").glob("shares_table_*.table.json")
    assert json.loads(table.read_text())["data"] == [[2, 0.5], [4, None]]
    assert len(list((stored / "files" / "media" / "images").glob("*.png"))) == 2


def test_a_faulty_logger_is_named(study):
    command = [sys.executable, str(PUBLISH), "study", "logger=wandb", "logger.mod=offline"]
    done = subprocess.run(command, cwd=study.parent.parent, capture_output=True, text=True)
    assert done.returncode == 2
    assert "logger.mod=offline is not a key; did you mean mode?" in done.stderr


@pytest.mark.parametrize(("mode", "environment"), [("offline", None), (None, "offline")])
def test_wandb_really_writes_offline(run_dir, monkeypatch, mode, environment, offline):
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    WandbLog(mode=mode).publish(run_dir, written.CONFIG)
    stored = stored_by(offline, run_dir)
    (table,) = (stored / "files" / "media" / "table").glob("scores_*.table.json")
    content = json.loads(table.read_text())
    assert len(content["data"]) == 6
    by_name = dict(zip(content["columns"], content["data"][0], strict=True))
    assert by_name["image_id"] == "few"
    assert by_name["score"] == 1.25
    assert len(list((stored / "files" / "media" / "images").glob("*.png"))) == 2


def test_wandb_without_a_login_names_the_cure(run_dir, fake_wandb, monkeypatch):
    def refuse(**options):
        raise fake_wandb.Error("No API key configured.\nlong story")

    monkeypatch.setattr(fake_wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"No API key configured.*logger\.mode=offline") as error:
        WandbLog().publish(run_dir, {})
    assert "long story" not in str(error.value)


@pytest.mark.parametrize(
    ("log", "module", "command"),
    [
        (WandbLog(), "wandb", r"pip install 'invmm\[wandb\]'"),
        (TensorBoardLog(), "torch.utils.tensorboard", r"pip install 'invmm\[tensorboard\]'"),
    ],
)
def test_a_missing_package_names_the_command(log, module, command, run_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=command):
        log.publish(run_dir, {})


@pytest.mark.parametrize("log", [CsvLog(), TensorBoardLog(), WandbLog()])
def test_logs_fulfil_their_protocol(log):
    assert isinstance(log, RunLog)


def test_one_value_that_is_not_finite_does_not_stop_a_view(tmp_path):
    with OwnedRunFolder(tmp_path, config={}, digest="d") as folder:
        diverged = written.outcome(Status.DIVERGED, curves={"loss": [1.0, float("nan")]})
        written.write(folder, written.entry("a"), diverged)
    CsvLog().publish(tmp_path, {})
    values = pd.read_csv(tmp_path / "curves.csv").value
    assert values[0] == 1.0
    assert values.isna().tolist() == [False, True]
