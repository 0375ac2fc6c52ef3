"""What a worker adds to the outcome of a measurement."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from worlds import Direction, MicroNetwork, make_target

from invmm.data.dataset import LoadedImage
from invmm.engine.outcomes import Outcome, Status
from invmm.runtime.worker import Worker


def test_the_second_opinion_is_of_the_closest_sample():
    """Samples come best first."""
    pixels = make_target(MicroNetwork()).pixels
    worker = object.__new__(Worker)
    worker.second_opinion, worker.network = Direction(), SimpleNamespace(device=torch.device("cpu"))
    loaded = LoadedImage(pixels=pixels, sha256="ab" * 32)
    others = torch.stack([pixels + 0.5, -pixels, pixels])
    outcome = Outcome(status=Status.REPLICATED, samples=others)
    expected = torch.nn.functional.cosine_similarity(
        pixels.flatten(), others[0].flatten(), dim=0
    ).item()
    assert expected < 0.99
    assert worker._second_opinion(loaded, outcome) == pytest.approx(expected)
    assert worker._second_opinion(None, outcome) is None
    assert worker._second_opinion(loaded, Outcome(status=Status.REPLICATED)) is None
