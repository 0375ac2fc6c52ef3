"""Runs written by hand: of an inversion, of counts over one bank, and of a membership score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import written

from invmm.engine.outcomes import Outcome, Status
from invmm.results.ownership import OwnedRunFolder


@pytest.fixture
def run_dir(tmp_path):
    return written.write_run(tmp_path / "run")


@pytest.fixture
def scored_dir(tmp_path):
    """A run of a membership score: two duplicated, one single, two held-out, one that diverged."""
    with OwnedRunFolder(tmp_path / "scored", config={}, digest="d") as folder:
        for name, copies, score in (("dup", 8, 1.5e-7), ("twice", 2, 0.0125), ("once", 1, 0.5),
                                    ("out", 0, 0.25), ("far", 0, 12.0)):  # fmt: skip
            result = Outcome(status=Status.SCORED, score=score)
            written.write(folder, written.entry(name, copies), result, second_opinion=None)
        diverged = Outcome(status=Status.DIVERGED, error="the score is nan")
        written.write(folder, written.entry("nan", 1), diverged, second_opinion=None)
    return tmp_path / "scored"


BANK = {
    "twin": (2, [5, 6]),
    "rare": (1, [9]),
    "never": (0, []),
    "common": (8, [1, 2, 3, 4, 10, 11]),
    "alike": (4, [1, 2, 7]),
    "alike too": (0, [5, 6]),
}
"""Image id -> its copies, and the free samples of 100 that replicate it."""


@pytest.fixture
def bank_dir(tmp_path):
    """A run of counts over one bank."""
    with OwnedRunFolder(tmp_path / "bank", config={}, digest="d") as folder:
        folder.bank_block(0).parent.mkdir()
        for name, (copies, replicas) in BANK.items():
            log_p = np.log(len(replicas) / 100) if replicas else None
            result = written.outcome(
                Status.ESTIMATED if replicas else Status.CENSORED,
                score=None if log_p is None else -log_p / 48,
                similarity=0.75,
                tensors={"replicas": torch.tensor(replicas, dtype=torch.int64)},
                columns={
                    "log_p": log_p,
                    "log_p_low": None if log_p is None else log_p - np.log(2),
                    "log_p_high": np.log(0.025) if log_p is None else log_p + np.log(2),
                    "one_in": None if log_p is None else np.exp(-log_p),
                    "count": len(replicas),
                    "num_free_samples": 100,
                },
            )
            written.write(folder, written.entry(name, copies), result)
        failed = Outcome(status=Status.FAILED, error="truncated")
        written.write(folder, written.entry("broken", 1), failed, loaded=None, second_opinion=None)
    return tmp_path / "bank"
