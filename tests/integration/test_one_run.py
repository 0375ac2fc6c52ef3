"""A run is composed once, built once, and its model is described from one reading."""

from __future__ import annotations

from collections import Counter

import tiny
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from invmm.cli.measure import COMMAND
from invmm.inversion.inversion import Inversion
from invmm.models import json_files


def counting(monkeypatch, counts: Counter, owner, name: str, what) -> None:
    """Counts the calls of a function under what it is called with, None for those that pass."""
    called = getattr(owner, name)

    def counted(*arguments, **options):
        counts[what(*arguments)] += 1
        return called(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)


def test_one_run_composes_builds_and_reads_once(model, images, tmp_path, monkeypatch):
    counts: Counter = Counter()
    counting(monkeypatch, counts, ConfigLoaderImpl, "load_configuration", lambda *_: "composed")
    counting(monkeypatch, counts, Inversion, "__post_init__", lambda *_: "built")
    counting(monkeypatch, counts, json_files, "read_file", lambda path: path.name)
    json_files._object.cache_clear()
    assert COMMAND.run(tiny.command(model, images, tmp_path / "run", "repeats=2")[3:]) == 0
    records = tiny.records(tmp_path / "run").values()
    assert len(records) > 4
    measured = [record for record in records if record["status"] != "FAILED"]
    assert {record["columns"]["repeats"] for record in measured} == {2}
    assert {name: counts[name] for name in ("composed", "built", "model_index.json")} == {
        "composed": 1, "built": 1, "model_index.json": 1,
    }  # fmt: skip
