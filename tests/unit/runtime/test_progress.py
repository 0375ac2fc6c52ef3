"""A bar that goes on knows its total, where it began, and how fast it is since then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from invmm.runtime import progress


def test_a_training_that_goes_on_shows_its_total_and_the_speed_since_then():
    clock = [1000.0]
    trainer: Any = SimpleNamespace(
        max_steps=1000, global_step=900, is_global_zero=True,
        progress_bar_metrics={"loss": torch.tensor(0.25)},
    )  # fmt: skip
    module: Any = None
    callback = progress.TrainingBar()
    callback.on_train_start(trainer, module)
    bar = callback._bar
    assert bar is not None
    bar._time, bar.start_t = lambda: clock[0], clock[0]
    for trainer.global_step in (910, 920):
        clock[0] += 5
        callback.on_train_batch_end(trainer, module, None, None, 0)
    shown = str(bar)
    callback.teardown(trainer, module, "fit")
    assert "920/1000" in shown
    assert "[00:10<00:40,  2.00step/s" in shown
    assert "loss=0.25" in shown
