"""Verifying a run from what it saved: fresh samples of each distribution, without the search."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from invmm.data.dataset import ImageEntry, ImageError, LoadedImage
from invmm.data.images import load_image, read_bytes
from invmm.data.manifest import list_digest
from invmm.diffusion.guidance import Condition
from invmm.engine.engine import Engine
from invmm.engine.outcomes import Outcome, Status
from invmm.engine.protocols import Searching, Setting, Target
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job
from invmm.exits import Exit
from invmm.files import record_key, write_atomically
from invmm.inversion.confirmation import Basis, Confirmation, confirm
from invmm.inversion.saved import check_picture, saved_noise, saved_tensors
from invmm.models.execution import LoadedNetwork
from invmm.results.collect import table_faults
from invmm.results.damage import SCHEMA_VERSION
from invmm.results.records import read_records, unreadable_records
from invmm.results.seal import seal_faults
from invmm.runtime.conditions import Conditions
from invmm.runtime.run import MeasureRun
from invmm.runtime.worker import image_generator
from invmm.verification.evidence import DRAWN_FROM, checked_network
from invmm.verification.findings import Finding, table
from invmm.verification.verdict import Claim, Rules, Verdict, unfound

_BRIEFLY = 16
"""Fresh samples of a distribution that the search did not call a replica."""
_PACKAGES = ("invmm", "torch", "diffusers", "onnxruntime", "pillow")


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What is to be verified, and how.

    Attributes:
        run_dir: folder of the run.
        run: what was run, with a model and a similarity network that the verifier trusts.
        manifest: of the run.
        records: to be verified, see `chosen_records`.
        is_all: they are all records of the run.
        rules: what is asked of the run.
        num_samples: fresh ones for each image; None takes as many as the rules need.
        has_images: the data set of the run is the verifier's own.
        seed: of the fresh samples. Their randomness is never that of the run, whatever its seed.
        device: of the network.
        command: for the report.
        root_hash: which the run printed; None leaves unverified that no record is missing.
    """

    run_dir: Path
    run: MeasureRun
    manifest: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    is_all: bool
    rules: Rules
    num_samples: int | None
    has_images: bool
    seed: int
    device: torch.device
    command: str
    root_hash: str | None = None


def verify(task: Verification) -> int:
    """Verifies, prints a table and writes verification.json into the folder of the run.

    Returns:
        The exit code: 0 the files are those of the root hash, and every record holds or has no
        score that could; 1 some record does not hold, or files were altered; 4 some cannot be
        verified or there is no root hash to compare with, and all others hold.

    Raises:
        ValueError: nothing can be verified: another model or similarity network than that of the
            run, a measurement that saves no distribution, or a run that asked for less than the
            rules do.
    """
    run_dir = task.run_dir
    searching, criterion = task.run.repeated, task.run.replication
    if not isinstance(searching, Searching):
        raise ValueError(f"{run_dir} is of a measurement that leaves no distributions")
    scales = len(task.run.sampler.guidance_scales)
    task.rules.refuse(searching.passing(criterion, scales, sys.maxsize), criterion.threshold)
    network = checked_network(run_dir, task.run, task.manifest, task.device)
    verifier = Verifier(task, searching, network)
    findings = verifier.findings()
    if task.is_all:
        findings += [_unreadable(path) for path in unreadable_records(run_dir)]
        findings += verifier.without_record()
    faults = seal_faults(run_dir, task.manifest, task.root_hash) + table_faults(run_dir)
    report = {
        "command": task.command,
        "root_hash": task.root_hash,
        "rules": asdict(task.rules),
        "faults": faults,
        "seed": task.seed,
        "num_samples": verifier.num_samples,
        "device": str(task.device),
        "config_digest": task.manifest["config_digest"],
        "versions": {package: version(package) for package in _PACKAGES},
        "images": [finding.as_dict() for finding in findings],
    }
    print(table(findings), *_claimed(task, findings), *faults, sep="\n")
    print(_sealed(task.root_hash, faults))
    path = run_dir / "verification.json"
    try:
        write_atomically(path, json.dumps(report, indent=1, allow_nan=False).encode())
        print(f"written: {path}")
    except OSError as error:
        print(f"not written: {path}: {error.strerror or error}")
    verdicts = {finding.verdict for finding in findings}
    if faults or Verdict.FAILS in verdicts:
        return Exit.DOES_NOT_HOLD
    is_whole = task.root_hash is not None and Verdict.UNVERIFIED not in verdicts
    return Exit.DONE if is_whole else Exit.UNDECIDED


class Verifier:
    """Draws from saved distributions on one device.

    Args:
        task: what to verify.
        searching: the measurement of the run.
        network: the model of the run.
    """

    def __init__(self, task: Verification, searching: Searching, network: LoadedNetwork) -> None:
        run = task.run
        self.task, self.run, self.searching = task, run, searching
        self.network = run.execution.prepare(network)
        self.similarity = run.replication.similarity.load(task.device)
        self.setting = Setting(
            schedule=network.schedule, sampler=run.sampler, criterion=run.replication
        )
        self.conditions = Conditions(self.network, run.prompt)
        self.image_size = run.model.describe().image_size
        self.dataset = run.dataset.open(self.image_size)
        entries = self.dataset.entries
        self.entries = {record_key(entry.image_id): entry for entry in entries}
        self.is_same_list = list_digest(entries) == task.manifest["inputs"]["dataset"]
        num_records = len(read_records(task.run_dir, only_whole=False))
        self.alpha = task.rules.alpha(num_records)
        self.num_samples = task.num_samples or task.rules.fresh_samples(num_records)
        self._judged: dict[str, Finding] = {}

    def findings(self) -> list[Finding]:
        """One for each record, in their order."""
        records = self.task.records
        searched = [record for record in records if record["status"] in DRAWN_FROM]
        engine = Engine(self.network, self.similarity, self._settings())
        jobs = (
            Job(record["folder"], lambda record=record: self._start(record)) for record in searched
        )
        ended = tqdm(engine.run(jobs), total=len(searched), unit="image", disable=None)
        errors = {job.key: outcome.error for job, outcome in ended}
        return [self._finding(record, errors) for record in records]

    def without_record(self) -> Iterator[Finding]:
        """One for each image of the verifier's own that the run should have measured."""
        if not self.task.has_images:
            return
        known = {record["folder"] for record in self.task.records}
        if not self.is_same_list:
            yield Finding(
                record={"image_id": "(all images)"},
                verdict=Verdict.UNVERIFIED,
                reasons=["the list of images here is not that of the run"],
            )
        yield from (
            Finding(
                record={"image_id": entry.image_id},
                verdict=Verdict.UNVERIFIED,
                reasons=["the run has no record of this image"],
            )
            for key, entry in self.entries.items()
            if key not in known
        )

    def _finding(self, record: Mapping[str, Any], errors: Mapping[str, str | None]) -> Finding:
        key = record["folder"]
        if faults := self._misplaced(record):
            return Finding(record=record, verdict=Verdict.FAILS, reasons=faults)
        if errors.get(key) and record["status"] == Status.REPLICATED:
            reason = re.sub(r"^(Value|Image)Error: ", "", errors[key] or "")
            return Finding(record=record, verdict=Verdict.UNVERIFIED, reasons=[reason])
        return self._judged.get(key, Finding(record=record, verdict=Verdict.NO_SCORE))

    def _misplaced(self, record: Mapping[str, Any]) -> list[str]:
        """What a record says of itself and its image that is known to be otherwise."""
        key, faults = record["folder"], []
        if key != record_key(record["image_id"]):
            faults.append(f"its folder is {key}, that of {record['image_id']} another one")
        if record.get("seed") != (known := self.task.manifest.get("seed")):
            faults.append(f"its seed is {record.get('seed')}, that of the run {known}")
        if (version := record.get("schema_version")) not in (2, SCHEMA_VERSION):
            faults.append(f"its schema_version is {version}, known are 2 and {SCHEMA_VERSION}")
        entry = self.entries.get(key)
        if entry is not None and self.task.has_images:
            for name in ("caption", "split", "copies"):
                here = getattr(entry, name)
                if here not in (None, "unknown") and record.get(name) != here:
                    faults.append(f"its {name} is {record.get(name)!r}, and {here!r} here")
        return faults

    def _start(self, record: Mapping[str, Any]) -> Coroutine[Any, Any, Outcome]:
        """Reads what was found and prepares the image.

        Raises:
            ValueError: with one line that says why the record cannot be verified.
        """
        tensors = saved_tensors(self._place(record), self.network.latent_shape)
        criterion, scales = self.setting.criterion, self.setting.sampler.guidance_scales
        steps = record["steps"]
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(f"its steps are {str(steps)[:30]}, no number of steps")
        passing = self.searching.passing(criterion, len(scales), steps)
        is_found = record["status"] == Status.REPLICATED
        claim = Claim.of(record, passing, criterion.num_confirm) if is_found else None
        scale = record["columns"].get("guidance_scale")
        basis = record["columns"].get("basis", "pixel")
        if basis not in get_args(Basis):
            raise ValueError(f"its basis={basis} is none of {', '.join(get_args(Basis))}")
        if scale not in scales:
            raise ValueError(f"its guidance_scale={scale} is none of the run's {list(scales)}")
        entry, loaded, pixels_from = self._image(record)
        pixels = loaded.pixels[None].to(self.network.device)
        with torch.no_grad():
            target = Target(
                image_id=entry.image_id,
                pixels=pixels[0],
                latents=self.network.encode(pixels),
                embedding=self.similarity.embed(pixels)[0],
                condition=self._condition(entry, tensors),
                negative=self.conditions.negative,
            )
        target.check_finite()
        noise = saved_noise(tensors, self.network.device)

        async def drawn(num_samples: int) -> Confirmation:
            return await confirm(
                noise,
                target,
                self.setting,
                # Of a name that no image has, so that no seed gives the numbers of the run.
                image_generator(self.task.seed, f"verification of {entry.image_id}"),
                num_samples=num_samples,
                guidance_scale=scale,
                basis=basis,
            )

        async def judged() -> Outcome:
            # What was not found is looked at briefly; hardly any of it replicates.
            fresh = await drawn(self.num_samples if claim else _BRIEFLY)
            if claim is None and fresh.rate >= passing.rate / 2:
                fresh = await drawn(self.num_samples)
            if claim is None:
                verdict, reasons = unfound(fresh, passing)
            else:
                reasons = claim.faults(fresh, noise.mean.numel(), passing, self.alpha)
                verdict = Verdict.FAILS if reasons else Verdict.HOLDS
            self._judged[record["folder"]] = Finding(
                record=record,
                verdict=verdict,
                reasons=reasons,
                claim=claim,
                fresh=fresh,
                pixels_from=pixels_from,
            )
            return Outcome(status=Status.REPLICATED)

        return judged()

    def _condition(self, entry: ImageEntry, tensors: Mapping[str, Tensor]) -> Condition | None:
        """What the samples of the record were drawn under."""
        if self.run.prompt.search is None:
            return self.conditions.of(entry)
        if "prompt_embedding" not in tensors:
            raise ValueError("its arrays.safetensors has no prompt_embedding")
        return self.conditions.found(entry, tensors["prompt_embedding"])

    def _image(self, record: Mapping[str, Any]) -> tuple[ImageEntry, LoadedImage, str]:
        """The image that was measured, and where it came from.

        Images are decoded to 8 bits before they are measured, so target.png holds the very pixels;
        it stands in where the image is not in the data set, but no hash vouches for it.
        """
        prompt, key = self.run.prompt, record["folder"]
        if prompt.kind == "class_label" and prompt.label is None and not self.is_same_list:
            raise ImageError("the data set is another one, and records do not hold its labels")
        entry = self.entries.get(key)
        if entry is None and self.task.has_images:
            raise ImageError("it is none of the images here")
        if entry is None:
            content = read_bytes(self._place(record) / "target.png")
            entry = ImageEntry(
                image_id=record["image_id"], path=record["path"], caption=record["caption"]
            )
            return entry, load_image(content, size=self.image_size, resize="crop"), "target.png"
        loaded = self.dataset.load(entry)
        if loaded.sha256 != record["sha256"]:
            raise ImageError(
                f"its image had the SHA-256 {record['sha256']} and has {loaded.sha256}"
            )
        check_picture(self._place(record), loaded.pixels)
        if prompt.kind in ("caption", "learned") and entry.caption != record["caption"]:
            raise ImageError(f"its caption was {record['caption']!r} and is {entry.caption!r}")
        return entry, loaded, "data set"

    def _place(self, record: Mapping[str, Any]) -> Path:
        return self.task.run_dir / "records" / record["folder"]

    def _settings(self) -> EngineSettings:
        """Those of the run, without the row counts that it measured on its own device."""
        given, default = self.run.engine, EngineSettings()
        return replace(given, **{name: getattr(default, name) for name in given.rows_to_measure})


def _claimed(task: Verification, findings: Sequence[Finding]) -> list[str]:
    """What nothing here vouches for, one line a kind."""
    lines = []
    if unscored := sum(finding.verdict is Verdict.NO_SCORE for finding in findings):
        lines.append(
            f"claimed, not verified: that the search found nothing for {unscored} of the images"
        )
    of_images = "captions, splits and copies of images" + (
        " where the images here have none" if task.has_images else ", and their pictures"
    )
    lines.append(
        "claimed, not verified: steps, evaluations and similarities of the searches, drawings and "
        f"samples.png, seconds, hardware, git and versions; {of_images}"
    )
    return lines


def _sealed(root_hash: str | None, faults: Sequence[str]) -> str:
    if root_hash is None:
        return (
            "files: not verified that none is missing and none another's; give --expect ROOT_HASH, "
            "which the run printed"
        )
    if faults:
        return f"files: not those of the run with the root hash {root_hash}"
    return f"files: those of the run with the root hash {root_hash}"


def _unreadable(path: Path) -> Finding:
    return Finding(
        record={"image_id": path.parent.name},
        verdict=Verdict.UNVERIFIED,
        reasons=[f"{path} cannot be read"],
    )
