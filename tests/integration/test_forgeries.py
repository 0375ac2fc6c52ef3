"""Forged runs: each is refuted, refused, or listed as claimed; none passes silently.

Every forgery is tried twice: as made after the run had printed its root hash, and by somebody who
hands over the root hash of the forged folder.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import written
from safetensors.torch import load_file, save_file

from invmm.cli import verify
from invmm.files import record_key
from invmm.identity import digest_of, identity_of
from invmm.probability.certificate import clopper_pearson, log_p_certified, lower_rate
from invmm.results.collect import collect
from invmm.results.records import read_records
from invmm.results.seal import contents, root_hash


class Folder:
    """A copied run, its honest root hash, and ways of changing it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = json.loads((path / "manifest.json").read_bytes())
        self.honest = self.manifest["root_hash"]
        records = read_records(path)
        self.found = next(r for r in records if r["status"] == "REPLICATED" and r["score"] > 0)
        self.unfound = next(r for r in records if r["status"] == "NOT_REPLICATED")

    def place(self, record: dict) -> Path:
        return self.path / "records" / record["folder"]

    def edit(self, record: dict, **changes: Any) -> None:
        path = self.place(record) / "record.json"
        columns = {**record["columns"], **changes.pop("columns", {})}
        kept = {name: value for name, value in columns.items() if value is not DROPPED}
        path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes, "columns": kept}))

    def arrays(self, record: dict, change: Callable[[dict], Any]) -> None:
        path = self.place(record) / "arrays.safetensors"
        arrays = load_file(path)
        change(arrays)
        save_file(arrays, path)

    def configure(self, key: str, value: Any) -> None:
        """Changes the config wherever it is written, with its digest."""
        config = self.manifest["config"]
        *path, last = key.split(".")
        node = {**config, "inversion": config["measurement"]} if path else config
        for name in path:
            node = node[name]
        node[last] = value
        self.manifest["config_digest"] = digest_of(config)
        stored = json.loads((self.path / "config.json").read_bytes())
        stored |= {"config": identity_of(config), "digest": digest_of(config)}
        (self.path / "config.json").write_text(json.dumps(stored))

    def seal(self) -> str:
        """Makes all fit together again; the root hash that a forger would hand over."""
        for path in self.path.glob("records/*/record.json"):
            written.vouch(path.parent)
        try:
            collect(self.path)
        except (ValueError, TypeError, OverflowError):  # of numbers that no table can hold
            for name in ("scores.csv", "scores.parquet"):
                (self.path / name).unlink()
        self.manifest["contents"] = contents(self.path)
        self.manifest["root_hash"] = root_hash(self.manifest)
        self.write()
        return self.manifest["root_hash"]

    def write(self) -> None:
        (self.path / "manifest.json").write_text(json.dumps(self.manifest))


DROPPED = object()


def edit(**changes: Any) -> Callable[[Folder], None]:
    return lambda run: run.edit(run.found, **changes)


def column(name: str, value: Any) -> Callable[[Folder], None]:
    return lambda run: run.edit(run.found, columns={name: value})


def configure(key: str, value: Any) -> Callable[[Folder], None]:
    return lambda run: run.configure(key, value)


def counted(count: int, of: int, confidence: float = 0.95, kl_nats: float = 0.0) -> dict:
    """Columns that fit to a count and to each other."""
    low, high = clopper_pearson(count, of, confidence)
    certified = log_p_certified(kl_nats, lower_rate(count, of, confidence))
    return {"confirm_passed": count, "confirm_drawn": of, "confirm_confidence": confidence,
            "rate_low": low, "rate_high": high,
            "log_p_certified": certified if math.isfinite(certified) else None}  # fmt: skip


def claim_all(run: Folder) -> None:
    """64 of 64 for what replicates in a third of the draws, all columns consistent."""
    columns = counted(64, 64, kl_nats=run.found["score_nats"])
    run.edit(run.found, replication_rate=1.0, columns=columns)


def invent(**columns: Any) -> Callable[[Folder], None]:
    """An image that was not found gets the best score of all: that of the prior."""

    def forge(run: Folder) -> None:
        run.arrays(run.unfound, lambda arrays: (
            arrays["mean"].zero_(), arrays["log_variance"].zero_(),
            arrays.update({"curve/similarity_step": torch.arange(50_000.0)}),
        ))  # fmt: skip
        run.edit(run.unfound, status="REPLICATED", score=0.0, score_nats=0.0,
                 replication_rate=1.0, columns={"guidance_scale": 1.0, **columns})  # fmt: skip

    return forge


NOTHING = {"score": None, "score_nats": None, "replication_rate": None}


def rename(run: Folder, image_id: str, *, is_copied: bool = False) -> None:
    """The record under another name, in the folder that belongs to it."""
    source, place = run.place(run.found), run.path / "records" / record_key(image_id)
    shutil.copytree(source, place)
    record = {**json.loads((place / "record.json").read_bytes()), "image_id": image_id}
    (place / "record.json").write_text(json.dumps(record))
    if not is_copied:
        shutil.rmtree(source)


def keep_one(run: Folder) -> None:
    for record in read_records(run.path):
        if record["folder"] != run.found["folder"]:
            shutil.rmtree(run.place(record))


def swap(*names: str) -> Callable[[Folder], None]:
    def forge(run: Folder) -> None:
        for name in names:
            shutil.copyfile(run.place(run.unfound) / name, run.place(run.found) / name)

    return forge


def program(name: str, target: str) -> Callable[[Folder], None]:
    """A similarity network that comes with the folder, and says that all images are alike."""

    def forge(run: Folder) -> None:
        class Alike(torch.nn.Module):
            def forward(self, pixels: torch.Tensor) -> torch.Tensor:
                return torch.ones(pixels.shape[0], 2)

        torch.jit.script(Alike()).save(run.path / name)
        node = {"_target_": target, "path": str(run.path / name), "size": 32}
        if target.endswith("TorchScript"):
            node["sha256"] = "0" * 64
        run.configure("replication.similarity", node)

    return forge


def inputs(name: str, value: Any) -> Callable[[Folder], None]:
    return lambda run: run.manifest["inputs"].update({name: value})


def table(run: Folder) -> None:
    frame = pd.read_csv(run.path / "scores.csv")
    frame.assign(score=0.0).to_csv(run.path / "scores.csv", index=False)


def parquet(run: Folder) -> None:
    frame = pd.read_parquet(run.path / "scores.parquet")
    frame.assign(status="NOT_REPLICATED").to_parquet(run.path / "scores.parquet", index=False)


HOLDS, FAILS, REFUSED, UNDECIDED = 0, 1, 2, 4
"""HOLDS: what was changed is listed as claimed."""
CLAIMED = "claimed, not verified: "
FORGERIES: dict[str, tuple[Callable[[Folder], Any], int, str]] = {
    # numbers of a record
    "score 0": (edit(score=0.0), FAILS, "score is 0, the KL of the saved"),
    "half the score": (lambda run: run.edit(run.found, score=run.found["score"] / 2), FAILS, "KL"),
    "score NaN": (edit(score=math.nan), FAILS, "its score is nan"),
    "score infinite": (edit(score=math.inf), FAILS, "its score is inf"),
    "score as text": (edit(score="0.01"), FAILS, "score is 0.01"),
    "score a list": (edit(score=[0.1]), FAILS, "incomplete"),
    "score dropped": (edit(score=None), UNDECIDED, "incomplete"),
    "nats": (edit(score_nats=0.1), FAILS, "score_nats is 0.1"),
    "rate": (edit(replication_rate=1.0), FAILS, "replication_rate is 1, its count"),
    "count": (column("confirm_passed", 64), FAILS, "replication_rate is"),
    "count and all that follows": (claim_all, FAILS, "recorded are 64 of 64: these are not of one"),
    "count beyond the samples": (column("confirm_passed", 65), UNDECIDED, "its count is 65 of 64"),
    "count below zero": (column("confirm_passed", -1), UNDECIDED, "its count is -1"),
    "count beyond 64 bits": (column("confirm_passed", 10**30), FAILS, "its count is 1"),
    "samples": (column("confirm_drawn", 10**6), UNDECIDED, "its fresh samples are 1000000"),
    "0 of 16": (
        lambda run: run.edit(run.found, columns=counted(0, 16)), UNDECIDED, "samples are 16"
    ),
    "1 of 1": (lambda run: run.edit(run.found, columns=counted(1, 1)), UNDECIDED, "samples are 1"),
    "2 of 2 at a confidence of its own": (
        lambda run: run.edit(run.found, columns=counted(2, 2, 0.9999)), UNDECIDED, "of 0.9999"
    ),
    "confidence": (column("confirm_confidence", 0.5), UNDECIDED, "at a confidence of 0.5"),
    "no count": (column("confirm_passed", DROPPED), UNDECIDED, "incomplete"),
    "no samples": (column("confirm_drawn", DROPPED), UNDECIDED, "incomplete"),
    "lower end": (column("rate_low", 0.9), FAILS, "its interval is (0.9"),
    "upper end": (column("rate_high", 1.0), FAILS, "its interval is"),
    "certificate": (column("log_p_certified", -0.5), FAILS, "log_p_certified is -0.5"),
    "no certificate": (column("log_p_certified", None), FAILS, "log_p_certified is None"),
    "guidance scale": (column("guidance_scale", 7.0), UNDECIDED, "none of the run's [1.0]"),
    "guidance scale as text": (column("guidance_scale", "x"), UNDECIDED, "none of the run's"),
    "basis": (column("basis", "wavelet"), UNDECIDED, "its basis=wavelet"),
    "steps below zero": (edit(steps=-1), UNDECIDED, "its steps are -1"),
    "steps as text": (edit(steps="many"), FAILS, "its steps are many"),
    "seed": (edit(seed=7), FAILS, "its seed is 7"),
    "schema": (edit(schema_version=99), FAILS, "its schema_version is 99"),
    # statuses
    "a score of 0 without columns": (invent(), UNDECIDED, "incomplete"),
    "a score of 0 that 64 of 64 confirm": (
        invent(**counted(64, 64)), FAILS, "recorded are 64 of 64: these are not of one rate"
    ),
    "a score of 0 that 0 of 64 confirm": (invent(**counted(0, 64)), FAILS, "replication_rate is 1"),
    "a score of 0 that 0 of 16 confirm": (invent(**counted(0, 16)), UNDECIDED, "samples are 16"),
    "a score of 0 that 1 of 1 confirms": (invent(**counted(1, 1)), UNDECIDED, "samples are 1"),
    "a score of 0 with a confidence": (invent(**counted(2, 2, 0.9999)), UNDECIDED, "of 0.9999"),
    "not replicated": (
        edit(status="NOT_REPLICATED", **NOTHING), HOLDS, "search found nothing for 6"
    ),
    "failed": (edit(status="FAILED", error="no memory", **NOTHING), HOLDS, "found nothing for 6"),
    "diverged": (edit(status="DIVERGED", **NOTHING), HOLDS, "found nothing for 6"),
    "of another measurement": (edit(status="ESTIMATED"), REFUSED, "holds ESTIMATED records"),
    "unknown": (edit(status="FOUND"), UNDECIDED, "record.json cannot be read"),
    # the set of records
    "one removed": (
        lambda run: shutil.rmtree(run.place(run.found)), UNDECIDED, "has no record of this image"
    ),
    "all but one removed": (keep_one, UNDECIDED, "the run has no record of this image"),
    "an invented image": (
        lambda run: rename(run, "new.png", is_copied=True), UNDECIDED, "none of the images here"
    ),
    "under another name": (
        lambda run: rename(run, "new.png"), UNDECIDED, "the run has no record of this image"
    ),
    "another name inside": (edit(image_id="image-06.png"), FAILS, "its folder is"),
    "copied": (
        lambda run: shutil.copytree(run.place(run.found), run.path / "records" / "copy"),
        FAILS, "its folder is copy",
    ),
    # images
    "hash of the image": (edit(sha256="0" * 64), UNDECIDED, "its image had the SHA-256 000"),
    "picture": (swap("target.png"), UNDECIDED, "target.png shows another image"),
    "no picture": (
        lambda run: (run.place(run.found) / "target.png").unlink(), UNDECIDED, "target.png is miss"
    ),
    "picture and distribution": (swap("target.png", "arrays.safetensors"), UNDECIDED, "target.png"),
    "copies": (edit(copies=99), HOLDS, "captions, splits and copies of images"),
    "split": (edit(split="held_out"), HOLDS, "captions, splits and copies of images"),
    "caption": (edit(caption="a fox"), HOLDS, "captions, splits and copies of images"),
    # distributions
    "distribution of another": (swap("arrays.safetensors"), FAILS, "the KL of the saved"),
    "mean": (
        lambda run: run.arrays(run.found, lambda a: a["mean"].mul_(0.5)), FAILS, "the KL of the sav"
    ),
    "variance": (
        lambda run: run.arrays(run.found, lambda a: a["log_variance"].add_(0.1)), FAILS, "KL"
    ),
    "mean NaN": (
        lambda run: run.arrays(run.found, lambda a: a["mean"].fill_(math.nan)),
        UNDECIDED, "its mean is not finite",
    ),
    "mean of another shape": (
        lambda run: run.arrays(run.found, lambda a: a.update(mean=a["mean"][:1].clone())),
        UNDECIDED, "its mean has the shape",
    ),
    "no mean": (
        lambda run: run.arrays(run.found, lambda a: a.pop("mean")), UNDECIDED, "has no mean"
    ),
    "no arrays": (
        lambda run: (run.place(run.found) / "arrays.safetensors").unlink(),
        FAILS, "arrays.safetensors is missing",
    ),
    # the config, its digest computed again
    "threshold": (configure("replication.threshold", -1.0), REFUSED, "a threshold of -1"),
    "samples of a check": (configure("replication.num_samples", 1), REFUSED, "of a check: 1"),
    "no fresh samples": (configure("replication.num_confirm", 0), FAILS, "replication_rate is"),
    "budget": (configure("inversion.num_steps", 10**6), REFUSED, "checks of an image: 200001"),
    "budget beyond 64 bits": (configure("inversion.num_steps", 10**30), REFUSED, "of an image"),
    "config seed": (configure("seed", 7), REFUSED, "its seed is 0, that of its config 7"),
    "sampler": (configure("sampler._target_", "os.system"), REFUSED, "not allowed"),
    "similarity at one pixel": (
        configure("replication.similarity.size", 1), REFUSED, "at which most images are alike"
    ),
    "a program": (
        program("evil.pt", "invmm.replication.sscd.SscdTorchScript"), REFUSED, "only the folder"
    ),
    "a network": (
        program("evil.onnx", "invmm.replication.sscd.SscdOnnx"), REFUSED, "which only the folder"
    ),
    "a foreign similarity": (
        configure("replication.similarity", {"_target_": "evil.Alike"}), REFUSED, "'evil.Alike'"
    ),
    "a foreign model": (configure("model._target_", "evil.Model"), REFUSED, "evil.Model"),
    "a foreign data set": (configure("dataset._target_", "evil.Images"), REFUSED, "evil.Images"),
    "a foreign search": (
        configure("measurement", {"_target_": "evil.Search"}), REFUSED, "evil.Search"
    ),
    "a LoRA": (configure("model.lora", "evil.safetensors"), REFUSED, "give --lora FILE"),
    "LoRAs": (
        configure("model.lora", ["evil.safetensors", {"path": "evil"}]), REFUSED, "give --lora FILE"
    ),
    "a U-Net": (configure("model.unet", "evil"), REFUSED, "give --unet FOLDER"),
    "a single file": (configure("model.config", "evil"), REFUSED, "give --config FOLDER"),
    "no config": (lambda run: run.manifest.update(config={}), REFUSED, "altered"),
    "config and no digest": (
        lambda run: run.manifest["config"].update(seed=3), REFUSED, "does not have the digest"
    ),
    # inputs
    "weights": (inputs("model", {"unet": "0" * 64}), REFUSED, "measured with other inputs"),
    "no weights": (inputs("model", {}), REFUSED, "measured with other inputs"),
    "similarity": (inputs("similarity", {"name": "x"}), REFUSED, "measured with other inputs"),
    "list of images": (inputs("dataset", "0" * 64), UNDECIDED, "is not that of the run"),
    # what nobody can recompute
    "steps": (edit(steps=1), HOLDS, f"{CLAIMED}steps"),
    "similarity of the search": (edit(best_similarity=1.0), HOLDS, "similarities of the searches"),
    "evaluations": (edit(evaluations_forward=0), HOLDS, "evaluations and similarities"),
    "seconds": (edit(seconds=0.0), HOLDS, "seconds, hardware, git and versions"),
    "versions": (
        lambda run: run.manifest["versions"].update(torch="9"), HOLDS, "git and versions"
    ),
    "git": (lambda run: run.manifest.update(git=None), HOLDS, "git and versions"),
    "drawing": (lambda run: (run.path / "gallery.png").write_bytes(b"x"), HOLDS, "drawings"),
}  # fmt: skip
UNSEALED = {"versions", "git"}
"""Not part of the root hash: another run of the same command has others."""
QUICK = ("count and all that follows", "a score of 0 that 64 of 64 confirm", "one removed",
         "not replicated", "an invented image", "picture", "threshold", "a program",
         "list of images", "distribution of another")  # fmt: skip


SHOWN = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FORGERIES
]


@pytest.fixture
def verified(model, images, monkeypatch, capsys):
    """Verifies a run by what the verifier brings; (exit code, output)."""

    def verified(run: Folder, root: str, *arguments: object) -> tuple[int, str]:
        own = ("--model", model, "--images", images, "--min-threshold", 0.05, "--min-samples", 3)
        command = ["invmm-verify", run.path, *own, "--expect", root, *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        with pytest.raises(SystemExit) as ended:
            verify.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(ended.value.code or 0), captured.out + captured.err

    return verified


@pytest.fixture
def run(finished, tmp_path):
    return Folder(Path(shutil.copytree(finished[0], tmp_path / "run")))


def test_an_honest_run_holds(run, verified):
    code, output = verified(run, run.honest)
    assert code == HOLDS, output
    code, output = verified(run, run.seal())
    assert code == HOLDS, output


@pytest.mark.parametrize("name", SHOWN)
def test_a_run_that_was_changed_afterwards(name, run, verified):
    forge, _, _ = FORGERIES[name]
    forge(run)
    run.write()
    code, output = verified(run, run.honest, "--num-samples", 1)
    assert code in ((HOLDS,) if name in UNSEALED else (FAILS, REFUSED)), output


@pytest.mark.parametrize("change", [table, parquet])
def test_a_table_that_was_changed_afterwards(change, run, verified):
    """It is no part of the root hash, but follows from the records."""
    change(run)
    code, output = verified(run, run.honest, "--num-samples", 1)
    assert code == FAILS
    assert "is not the table of the records" in output


@pytest.mark.parametrize("name", SHOWN)
def test_a_run_that_was_forged_with_its_root_hash(name, run, verified):
    forge, expected, words = FORGERIES[name]
    forge(run)
    code, output = verified(run, run.seal())
    assert words in output, output
    assert code == expected, output


def test_nothing_of_the_folder_is_executed(run, verified, tmp_path):
    """A program that would leave a trace: it leaves none, whatever names it."""
    trace = tmp_path / "trace"
    (run.path / "evil.py").write_text(f"open({str(trace)!r}, 'w')")
    for target in ("evil.Search", "invmm.evil.Search"):
        run.configure("measurement", {"_target_": target})
        code, _ = verified(run, run.seal())
        assert code == REFUSED
    assert not trace.exists()


def test_enough_forgeries():
    assert len(FORGERIES) >= 64
    assert np.mean([expected == HOLDS for _, expected, _ in FORGERIES.values()]) < 0.2
