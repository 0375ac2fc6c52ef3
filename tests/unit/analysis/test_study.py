"""How studies end: their numbers, figures and the check of both."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import written

from invmm.analysis.study import (
    finish,
    found_by_group,
    read_run,
    separation,
    share_table,
    unexpected,
)
from invmm.analysis.style import style
from invmm.results.collect import collect


@pytest.mark.parametrize(
    ("bounds", "found", "is_expected"),
    [
        ({"value": 0.5}, 0.5, True),
        ({"value": 0.5}, 0.5001, False),
        ({"value": 0.5, "within": 0.1}, 0.45, True),
        ({"value": 0.5, "within": 0.1}, 0.61, False),
        ({"at_least": 0.85}, 0.85, True),
        ({"at_least": 0.85}, 0.84, False),
        ({"at_most": 3}, 3, True),
        ({"at_most": 3}, 4, False),
        ({"at_least": 1, "at_most": 3}, 4, False),
        ({"value": 0}, None, False),
        ({"value": 1}, True, False),
    ],
)
def test_a_number_is_held_to_its_bounds(bounds, found, is_expected):
    differences = unexpected({"caption": {"auroc": found}}, {"caption.auroc": bounds})
    assert (differences == []) is is_expected
    assert all("caption.auroc" in difference for difference in differences)


def test_a_number_that_is_gone_is_not_as_expected():
    assert unexpected({}, {"caption.auroc": {"at_least": 0}}) == [
        "caption.auroc is None, no number"
    ]


@pytest.mark.parametrize("bounds", [{}, {"min": 1}, {"within": 1}])
def test_a_bound_that_means_nothing_is_refused(bounds):
    with pytest.raises(ValueError, match="auroc has the bounds"):
        unexpected({"auroc": 1.0}, {"auroc": bounds})


def test_groups_and_separation_by_hand():
    frame = pd.DataFrame(
        {
            "image_id": list("abcde"),
            "near_duplicate_group": pd.array([None] * 5, dtype="string"),
            "status": ["REPLICATED", "REPLICATED", "NOT_REPLICATED", "NOT_REPLICATED", "FAILED"],
            "score": [0.1, 0.3, None, None, None],
            "best_similarity": [0.9, 0.6, 0.4, 0.3, None],
            "split": ["train", "held_out", "train", "held_out", "train"],
            "copies": pd.array([4, 0, 2, 0, 8], dtype="Int64"),
        }
    )
    found = found_by_group(frame)
    assert found["duplicated"] == {"found": 1, "of": 2, "low": 0.0126, "high": 0.9874}
    assert found["held_out"]["of"] == 2
    assert found["single"] == {"found": 0, "of": 0, "low": 0.0, "high": 1.0}
    # Pairs (duplicated, held out): 0.1 beats both; the censored loses one and wins, or ties, one.
    values = separation(frame)
    assert values["auroc"] == pytest.approx(3 / 4)
    assert values["auroc_score_alone"] == pytest.approx(2.5 / 4)
    assert (values["tpr_at_fpr_1"], values["tpr_at_fpr_1_low"]) == (0.5, 0.0126)
    assert values["auroc_low"] < 3 / 4 < values["auroc_high"]
    shares = share_table({"one": frame, "none": frame[:0]}, "run")
    assert shares.shape == (6, 6)
    assert shares.iloc[0].to_dict() == {"run": "one", "group": "duplicated", **found["duplicated"]}
    assert separation(frame[:0]) == dict.fromkeys(values)


def test_a_study_ends_with_its_numbers_and_the_same_figures(tmp_path, capsys):
    (tmp_path / "expected.json").write_text(json.dumps({"p": {"value": 1, "within": 0.5}}))
    written = [figures_of(tmp_path, tmp_path / name, {"p": 1.25}) for name in ("one", "two")]
    assert written[0] == written[1]
    assert {name.suffix for name in map(Path, written[0])} == {".csv", ".json", ".pdf", ".png"}
    assert written[0]["line.csv"] == b"x,p\n0,0.5\n1,\n"
    assert "as expected: 1 figures" in capsys.readouterr().out


def test_a_changed_number_fails_the_study(tmp_path, capsys):
    (tmp_path / "expected.json").write_text(json.dumps({"p": {"value": 1, "within": 0.5}}))
    assert finish(tmp_path, tmp_path / "results", {"p": 1.75}, {}, {}) == 1
    assert "p is 1.75, not in [0.5, 1.5]" in capsys.readouterr().out


def test_a_missing_run_names_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        read_run(tmp_path / "mine" / "caption")
    assert end.value.code == 3
    assert "make study STUDY=mine" in capsys.readouterr().err


def test_a_run_is_what_its_records_say(tmp_path):
    run_dir = written.write_run(tmp_path)
    collect(run_dir)
    assert read_run(run_dir).score.min() == 0.02
    (record,) = run_dir.glob("records/many-*/record.json")
    written.vouch(record.parent, score=0.01)
    assert read_run(run_dir).score.min() == 0.01


def test_a_study_never_leaves_a_damaged_record_out(tmp_path, capsys):
    run_dir = written.write_run(tmp_path / "mine" / "run")
    collect(run_dir)
    (record,) = run_dir.glob("records/many-*/record.json")
    (record.parent / "samples.png").unlink()
    with pytest.raises(SystemExit) as end:
        read_run(run_dir)
    assert end.value.code == 3
    assert f"{record.parent / 'samples.png'} is missing; `make study STUDY=mine`" in (
        capsys.readouterr().err
    )


def figures_of(study: Path, results: Path, summary: dict[str, float]) -> dict[str, bytes]:
    with style():
        figure, axis = plt.subplots()
        axis.plot([0, 1], [0, 1], label="p")
        axis.legend()
        table = pd.DataFrame({"x": [0, 1], "p": [0.5, None]})
        assert finish(study, results, summary, {"line": figure}, {"line": table}) == 0
    return {file.name: file.read_bytes() for file in sorted(results.iterdir())}
