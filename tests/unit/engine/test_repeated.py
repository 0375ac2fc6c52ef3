"""Repeats of a measurement: which of them the image ends as, and what the others leave."""

from __future__ import annotations

import pytest
import torch

from invmm.engine.outcomes import CostRange, Evaluations, Outcome, Status
from invmm.engine.repeated import Repeated


class Scripted:
    """A measurement whose outcomes are known beforehand."""

    def __init__(self, *outcomes: Outcome) -> None:
        self.outcomes, self.drawn = list(outcomes), []

    async def __call__(self, target, setting, rng):
        self.drawn.append(torch.rand((), generator=rng).item())
        return self.outcomes[len(self.drawn) - 1]

    def cost(self, sampler, criterion):
        one = Evaluations(forward=3, backward=2, sampler=1)
        return CostRange(fewest=one, most=one + one)


def found(score: float) -> Outcome:
    return Outcome(
        status=Status.REPLICATED, score=score, steps=int(score), columns={"basis": "dct"}
    )


def lost(similarity: float | None) -> Outcome:
    return Outcome(status=Status.NOT_REPLICATED, best_similarity=similarity)


def ended(*outcomes: Outcome, seed: int = 5) -> tuple[Outcome, list[float]]:
    measurement = Scripted(*outcomes)
    repeated = Repeated(measurement=measurement, repeats=len(outcomes))
    with pytest.raises(StopIteration) as stop:
        repeated(None, None, torch.Generator().manual_seed(seed)).send(None)
    return stop.value.value, measurement.drawn


@pytest.mark.parametrize(
    ("scores", "median", "low", "high"),
    [((3, 1, 2), 2, 1, 3), ((4, 1, 3, 2), 2, 1, 4), ((4, None, 1), 4, 1, 4), ((7,), 7, 7, 7),
     ((None, 4, None), None, 4, 4), ((4, None, None, 1), 4, 1, 4),
     ((None, None), None, None, None)],
)  # fmt: skip
def test_an_image_ends_as_its_median_repeat(scores, median, low, high):
    """The lower of the two middle ones; repeats without a score stand behind all others."""
    outcome, _ = ended(*(lost(0.5) if score is None else found(score) for score in scores))
    assert outcome.score == median
    num_found = sum(score is not None for score in scores)
    own = {"repeats": len(scores), "num_found": num_found, "score_low": low, "score_high": high}
    if median is None:
        assert outcome.status is Status.NOT_REPLICATED
        assert outcome.columns == own
    else:
        assert (outcome.status, outcome.steps) == (Status.REPLICATED, median)
        assert outcome.columns == {"basis": "dct", **own}


def test_of_repeats_that_find_nothing_the_median_is_by_similarity():
    assert ended(lost(0.3), lost(None), lost(0.2))[0].best_similarity == 0.2


def test_a_repeat_that_diverges_ends_the_image():
    outcome, drawn = ended(found(1), Outcome(status=Status.DIVERGED, error="nan"), found(1))
    assert (outcome.status, outcome.error) == (Status.DIVERGED, "repeat 2 of 3: nan")
    assert outcome.score is None
    assert len(drawn) == 2


def test_each_repeat_has_randomness_of_its_own():
    _, drawn = ended(found(1), found(1), found(1))
    assert len(set(drawn)) == 3
    assert ended(found(1), found(2))[1] == drawn[:2]  # whatever their number
    assert not set(ended(found(1), found(1), seed=6)[1]) & set(drawn)


def test_repeats_cost_so_often():
    cost = Repeated(measurement=Scripted(), repeats=4).cost(None, None)
    assert cost.fewest == Evaluations(forward=12, backward=8, sampler=4)
    assert cost.most == Evaluations(forward=24, backward=16, sampler=8)
