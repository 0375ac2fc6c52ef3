"""The adaptive KL weight against a transcription of the published rule."""

from __future__ import annotations

import random

import pytest

from invmm.inversion.controllers import AdaptiveKLWeight, FixedKLWeight, Losses


def transcribed(losses, *, check_every, initial, increment, tolerance, window=100):
    """The published rule, written down once more: weights before each step and after the last."""
    weight, previous, history, weights = initial, float("inf"), [], [initial]
    for step, loss in enumerate(losses, start=1):
        history.append(loss)
        if step % check_every != 0:
            weight += increment
        else:
            last = history[-window:]
            now = sum(last) / len(last)
            if previous - now < tolerance:
                weight /= 2
            else:
                weight += increment
            previous = now
        weights.append(weight)
    return weights


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("progress", ["reconstruction", "total"])
def test_traces_equal_the_transcription(seed, progress):
    draw = random.Random(seed)
    rule = {
        "check_every": draw.choice([1, 3, 10, 50]),
        "initial": draw.choice([0.1, 1.0]),
        "increment": draw.choice([0.0, 1e-4, 1e-2]),
        "tolerance": draw.choice([0.0, 1e-3, 0.1]),
    }
    slope = draw.uniform(-0.02, 0.02)
    losses = [max(0.0, 2 + slope * step + draw.gauss(0, 0.3)) for step in range(400)]
    others = [draw.random() for _ in losses]
    controller = AdaptiveKLWeight(
        **{key: value for key, value in rule.items() if key != "check_every"}, progress=progress
    )
    state = controller.init()
    found = [state.value]
    for step in range(1, len(losses) + 1):
        judged, other = losses[:step], others[:step]
        seen = (
            Losses(reconstruction=judged, total=other)
            if progress == "reconstruction"
            else Losses(reconstruction=other, total=judged)
        )
        state = controller.update(state, seen if step % rule["check_every"] == 0 else None)
        found.append(state.value)
    assert found == pytest.approx(transcribed(losses, **rule), rel=1e-12)


def test_the_first_check_never_halves_and_a_stalled_one_does():
    controller = AdaptiveKLWeight(initial=1.0, increment=0.25, tolerance=1e-3)
    state = controller.init()
    values = []
    for step in range(1, 5):
        losses = Losses(reconstruction=[1.0] * step, total=[9.0] * step)
        state = controller.update(state, losses if step % 2 == 0 else None)
        values.append(state.value)
    assert values == [1.25, 1.5, 1.75, 0.875]


def test_update_leaves_the_old_state_alone():
    controller = AdaptiveKLWeight()
    before = controller.init()
    controller.update(before, Losses(reconstruction=[1.0], total=[1.0]))
    assert before == controller.init()


def test_a_fixed_weight_stays():
    controller = FixedKLWeight(value=0.3)
    state = controller.init()
    for losses in (None, Losses(reconstruction=[1.0], total=[2.0])):
        state = controller.update(state, losses)
    assert state.value == 0.3
