"""From records to one table: its columns, types, order, and that it never changes by itself."""

from __future__ import annotations

import os

import pandas as pd
import pytest
import written

from invmm.engine.outcomes import Status
from invmm.results.collect import (
    COLUMNS,
    collect,
    has_score,
    is_censored,
    is_membership,
    ranked,
    score_table,
)
from invmm.results.ownership import OwnedRunFolder

ASKED_FOR = [
    "image_id",
    "path",
    "caption",
    "split",
    "copies",
    "status",
    "score",
    "score_nats",
    "replication_rate",
    "best_similarity",
    "steps",
    "evaluations_forward",
    "evaluations_backward",
    "evaluations_sampler",
    "seconds",
    "seconds_network",
    "seconds_sampler",
    "seconds_similarity",
    "seconds_measurement",
    "seconds_preparation",
    "error",
    "seed",
    "config_digest",
    "schema_version",
]


@pytest.fixture
def run_dir(tmp_path):
    return written.write_run(tmp_path / "run")


def test_the_columns_are_those_promised(run_dir):
    frame = collect(run_dir)
    assert list(frame.columns[: len(ASKED_FOR)]) == ASKED_FOR
    assert len(frame) == 6
    stored = pd.read_parquet(run_dir / "scores.parquet")
    pd.testing.assert_frame_equal(stored, frame)
    row = stored.set_index("image_id").loc["few"]
    assert (row.copies, row.status, row.score, row.score_nats) == (2, "REPLICATED", 1.25, 60.0)
    csv = pd.read_csv(run_dir / "scores.csv")
    assert csv.score.dropna().tolist() == [1.25, 0.02]


def test_collecting_again_changes_no_byte(run_dir):
    names = ("scores.parquet", "scores.csv")
    collect(run_dir)
    before = [(run_dir / name).read_bytes() for name in names]
    collect(run_dir)
    assert [(run_dir / name).read_bytes() for name in names] == before


def test_no_record_makes_the_same_table_without_rows(tmp_path, run_dir):
    with OwnedRunFolder(tmp_path / "empty", config={}, digest="d"):
        pass
    empty = collect(tmp_path / "empty")
    assert len(empty) == 0
    assert dict(empty.dtypes) == dict(collect(run_dir).dtypes)
    stored = pd.read_parquet(tmp_path / "empty" / "scores.parquet")
    assert list(stored.columns) == list(COLUMNS)


def test_several_runs_are_joined_with_their_names(tmp_path, run_dir):
    other = written.write_run(tmp_path / "other")
    frame = score_table([run_dir, other])
    assert len(frame) == 12
    assert frame.groupby("run").size().to_dict() == {str(run_dir): 6, str(other): 6}


def test_columns_of_a_measurement_come_last_and_hide_nothing(tmp_path):
    with OwnedRunFolder(tmp_path, config={}, digest="d") as folder:
        mine = {"log_p": -4.0, "status": "wrong"}
        result = written.outcome(Status.REPLICATED, score=0.5, columns=mine)
        written.write(folder, written.entry("a"), result)
    frame = collect(tmp_path)
    assert frame.columns[-1] == "log_p"
    assert frame.log_p.tolist() == [-4.0]
    assert frame.status.tolist() == ["REPLICATED"]


def test_a_file_name_that_is_not_utf8_is_shown_escaped(tmp_path):
    with OwnedRunFolder(tmp_path, config={}, digest="d") as folder:
        image = written.entry(os.fsdecode(b"caf\xe9.png"))
        written.write(folder, image, written.outcome(Status.NOT_REPLICATED))
    collect(tmp_path)
    assert pd.read_parquet(tmp_path / "scores.parquet").image_id.tolist() == ["caf\\udce9.png"]


def test_most_memorized_first(run_dir):
    order = ranked(score_table([run_dir])).image_id.tolist()
    assert order == ["many", "few", "held-near", "single", "held-far", "z-failed"]


def test_every_status_is_with_a_score_censored_or_without_a_result():
    frame = pd.DataFrame({"status": [status.value for status in Status]})
    scored, censored = frame.status[has_score(frame)], frame.status[is_censored(frame)]
    assert set(scored) == {"REPLICATED", "ESTIMATED", "SCORED"}
    assert set(censored) == {"NOT_REPLICATED", "CENSORED"}
    assert is_membership(frame)
    assert not is_membership(frame[frame.status != "SCORED"])
