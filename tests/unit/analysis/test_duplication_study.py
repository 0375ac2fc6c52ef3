"""The duplication study: its intervals, and its numbers from records written by hand."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import written

from invmm.engine.outcomes import Status
from invmm.results.collect import collect
from invmm.results.ownership import OwnedRunFolder

PLOT = Path(__file__).parents[3] / "experiments" / "duplication" / "plot.py"


@pytest.fixture(scope="module")
def plot():
    return runpy.run_path(str(PLOT), run_name="plot")


def test_trainings_are_drawn_before_their_icons(plot):
    # Of the 27 ways to draw three trainings, 7 have their median in the lowest, 7 in the highest.
    trainings = [np.full(4, value) for value in (1.0, 2.0, 3.0)]
    found = plot["nested_interval"](np.median, trainings)
    assert (found.value, found.low, found.high) == (2, 1, 3)


def test_an_interval_has_the_width_of_both_stages(plot):
    rng = np.random.default_rng(1)
    trainings = list(rng.normal(size=(30, 20)) + rng.normal(size=(30, 1)))
    found = plot["nested_interval"](np.mean, trainings, resamples=4000)
    between = np.var([rows.mean() for rows in trainings])
    within = np.mean([rows.var() for rows in trainings]) / 20
    spread = np.sqrt((between + within) / 30)
    assert found.value == pytest.approx(np.mean(trainings))
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.05)


def test_one_training_alone_has_no_interval(plot):
    assert plot["nested_interval"](np.median, [np.arange(5.0), np.empty(0), np.empty(0)]) is None


COPIES = {"a": (64, 64, 1), "b": (64, 1, 64), "c": (1, 64, 64), "d": (0, 0, 0)}
COUNTS = {"a": (10, 20, 2), "b": (20, 0, 10), "c": (15, 10, 20), "d": (0, 0, 0)}
SCORES = {"a": (0.1, 0.2, None), "b": (0.3, None, 0.4), "c": (None, None, 0.5), "d": (None,) * 3}


def counted(count: int):
    columns = {"count": count, "num_free_samples": 100}
    if not count:
        return written.outcome(Status.CENSORED, similarity=0.3, columns=columns)
    score = -np.log(count / 100) / 48
    return written.outcome(Status.ESTIMATED, score=score, similarity=0.8, columns=columns)


def inverted(score: float | None):
    if score is None:
        return written.outcome(Status.NOT_REPLICATED, similarity=0.3)
    return written.outcome(Status.REPLICATED, score=score, similarity=0.9)


def test_numbers_of_copies_by_hand(plot, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for training in range(3):
        outcomes = {
            "counted": {icon: counted(COUNTS[icon][training]) for icon in COPIES},
            "trajectory": {icon: inverted(SCORES[icon][training]) for icon in COPIES},
            "adaptive": {icon: inverted(None) for icon in COPIES},
        }
        for name, of_icons in outcomes.items():
            path = Path(f"results/duplication/{name}_{training}")
            with OwnedRunFolder(path, config=written.CONFIG, digest=written.DIGEST) as folder:
                for icon, outcome in of_icons.items():
                    written.write(folder, written.entry(icon, COPIES[icon][training]), outcome)
            collect(path)
    # These are not the records of the study: the numbers it is to find are not in them.
    assert plot["main"]() == 1
    assert "images.csv" in capsys.readouterr().out
    summary = json.loads(Path("results/duplication/summary.json").read_text())
    many, single = (summary["counted"][f"copies_{copies}"] for copies in (64, 1))
    assert many["p_median"]["value"] == many["p_mean"]["value"] == 0.15
    assert (single["p_median"]["value"], single["p_mean"]["value"]) == (0.02, 0.05667)
    assert single["found"]["value"] == 0.66667
    # Six icons of 64 copies, of which one is censored: in no median.
    found = summary["trajectory"]["copies_64"]
    assert (found["images"], found["found"]["value"]) == (6, 0.83333)
    assert found["score_median"]["value"] == 0.3
    assert summary["adaptive"]["copies_64"]["found"] == {"value": 0, "low": 0, "high": 0.45926}
    assert "score_median" not in summary["adaptive"]["copies_64"]
    # Nine trained icons; ranks of copies 2 and 6.5, of scores 9 to 5 and, tied, 2.5.
    scores = np.array([9, 8, 7, 6, 5, 2.5, 2.5, 2.5, 2.5])
    copies = np.array([6.5, 6.5, 6.5, 6.5, 6.5, 6.5, 2, 2, 2])
    alone = summary["trajectory"]["spearman_with_copies_score_alone"]
    assert alone["value"] == pytest.approx(np.corrcoef(scores, copies)[0, 1], abs=1e-5)
    assert summary["adaptive"]["spearman_with_copies"] is None
    # Each of a, b and c stood in two trainings 64 times and in one once; c came back less once.
    same = summary["same_icon"]
    assert (same["pairs"], same["returned_more_often"], same["returned_less_often"]) == (6, 5, 1)
