"""Verifying a run from what it saved: fresh samples of each distribution, without the search."""

from __future__ import annotations

import json
import re
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from invmm.data.dataset import ImageDataset, ImageEntry, ImageError, LoadedImage
from invmm.data.images import load_image, read_bytes
from invmm.data.manifest import list_digest
from invmm.diffusion.guidance import Condition
from invmm.engine.engine import Engine
from invmm.engine.outcomes import Outcome, Status
from invmm.engine.protocols import Setting, Target
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job
from invmm.exits import Exit
from invmm.files import record_key, write_atomically
from invmm.inversion.confirmation import confirm
from invmm.inversion.saved import CHECKS, saved_noise, saved_tensors
from invmm.models.execution import LoadedNetwork
from invmm.results.records import damaged_records
from invmm.results.seal import seal_faults
from invmm.runtime.conditions import Conditions
from invmm.runtime.evidence import checked_network, chosen_records
from invmm.runtime.findings import Finding, table
from invmm.runtime.plan import MeasureRun
from invmm.runtime.verdict import Claim, Verdict
from invmm.runtime.worker import image_generator

_PACKAGES = ("invmm", "torch", "diffusers", "onnxruntime", "pillow")


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What is to be verified, and how.

    Attributes:
        run: the recipes of the run, its model wherever it is now.
        manifest: of the run.
        image_ids: only these; all if empty.
        num_samples: fresh ones for each image.
        seed: of the fresh samples. Their randomness is never that of the run, whatever its seed.
        device: of the network.
        command: for the report.
        root_hash: which the run printed; None leaves unverified that no record is missing.
    """

    run: MeasureRun
    manifest: Mapping[str, Any]
    image_ids: Sequence[str]
    num_samples: int
    seed: int
    device: torch.device
    command: str
    root_hash: str | None = None


def verify(task: Verification) -> int:
    """Verifies, prints a table and writes verification.json into the folder of the run.

    Returns:
        The exit code: 0 every record holds, or has no score that could; 1 some record does not
        hold, or the files are not those of the root hash; 4 some cannot be verified, and all others
        hold.

    Raises:
        ValueError: nothing can be verified: no such image, records of a measurement that saves no
            distribution, or another model or similarity network than that of the run.
    """
    run_dir = task.run.run_dir
    records = chosen_records(run_dir, task.image_ids)
    network = checked_network(task.run, task.manifest, task.device)
    findings = Verifier(task, network).findings(records)
    if not task.image_ids:
        findings += [_unreadable(path) for path in damaged_records(run_dir)]
    faults = seal_faults(run_dir, task.manifest, task.root_hash) if task.root_hash else []
    report = {
        "command": task.command,
        "root_hash": task.root_hash,
        "faults": faults,
        "seed": task.seed,
        "num_samples": task.num_samples,
        "device": str(task.device),
        "config_digest": task.manifest["config_digest"],
        "versions": {package: version(package) for package in _PACKAGES},
        "images": [finding.as_dict() for finding in findings],
    }
    path = run_dir / "verification.json"
    write_atomically(path, json.dumps(report, indent=1, allow_nan=False).encode())
    print(table(findings), *(faults or [_sealed(task.root_hash)]), f"written: {path}", sep="\n")
    verdicts = {finding.verdict for finding in findings}
    if faults or Verdict.FAILS in verdicts:
        return Exit.DOES_NOT_HOLD
    return Exit.UNDECIDED if Verdict.UNVERIFIED in verdicts else Exit.DONE


class Verifier:
    """Draws from saved distributions on one device.

    Args:
        task: what to verify.
        network: the model of the run.
    """

    def __init__(self, task: Verification, network: LoadedNetwork) -> None:
        run = task.run
        self.task, self.run = task, run
        self.network = run.execution.prepare(network)
        self.similarity = run.replication.similarity.load(task.device)
        self.setting = Setting(
            schedule=network.schedule, sampler=run.sampler, criterion=run.replication
        )
        self.conditions = Conditions(self.network, run.prompt)
        self.image_size = run.model.describe().image_size
        self.dataset = self._dataset()
        entries = self.dataset.entries if self.dataset else ()
        self.entries = {record_key(entry.image_id): entry for entry in entries}
        self.is_same_list = list_digest(entries) == task.manifest["inputs"]["dataset"]
        self._judged: dict[str, Finding] = {}

    def findings(self, records: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """One for each record, in their order."""
        scored = [record for record in records if record["status"] == Status.REPLICATED]
        engine = Engine(self.network, self.similarity, self._settings())
        jobs = (
            Job(record["folder"], lambda record=record: self._start(record)) for record in scored
        )
        ended = tqdm(engine.run(jobs), total=len(scored), unit="image", disable=None)
        errors = {job.key: outcome.error for job, outcome in ended}
        return [self._finding(record, errors) for record in records]

    def _finding(self, record: Mapping[str, Any], errors: Mapping[str, str | None]) -> Finding:
        key = record["folder"]
        if key not in errors:
            return Finding(record=record, verdict=Verdict.NO_SCORE)
        if error := errors[key]:
            reason = re.sub(r"^(Value|Image)Error: ", "", error)
            return Finding(record=record, verdict=Verdict.UNVERIFIED, reasons=[reason])
        return self._judged[key]

    def _start(self, record: Mapping[str, Any]) -> Coroutine[Any, Any, Outcome]:
        """Reads what was found and prepares the image.

        Raises:
            ValueError: with one line that says why the record cannot be verified.
        """
        tensors = saved_tensors(self._place(record), self.network.latent_shape)
        criterion, scales = self.setting.criterion, self.setting.sampler.guidance_scales
        looks = len(tensors[CHECKS]) * len(scales)
        claim = Claim.of(record, num_samples=criterion.num_samples, looks=looks)
        scale = record["columns"].get("guidance_scale")
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

        async def judged() -> Outcome:
            fresh = await confirm(
                noise,
                target,
                self.setting,
                # Of a name that no image has, so that no seed gives the numbers of the run.
                image_generator(self.task.seed, f"verification of {entry.image_id}"),
                num_samples=self.task.num_samples,
                guidance_scale=scale,
                basis=record["columns"].get("basis", "pixel"),
            )
            faults = claim.faults(fresh, noise.mean.numel())
            self._judged[record["folder"]] = Finding(
                record=record,
                verdict=Verdict.FAILS if faults else Verdict.HOLDS,
                reasons=faults,
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
        if self.dataset is None or entry is None:
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
        if prompt.kind in ("caption", "learned") and entry.caption != record["caption"]:
            raise ImageError(f"its caption was {record['caption']!r} and is {entry.caption!r}")
        return entry, loaded, "data set"

    def _place(self, record: Mapping[str, Any]) -> Path:
        return self.run.run_dir / "records" / record["folder"]

    def _dataset(self) -> ImageDataset | None:
        try:
            return self.run.dataset.open(self.image_size)
        except ValueError as error:
            print(f"the data set cannot be opened: {error}")
            return None

    def _settings(self) -> EngineSettings:
        """Those of the run, without the row counts that it measured on its own device."""
        given = self.run.engine
        return replace(given, **{name: getattr(EngineSettings(), name) for name in given.open})


def _sealed(root_hash: str | None) -> str:
    if root_hash:
        return f"files: those of the run with the root hash {root_hash}"
    return (
        "files: not verified that none is missing and none another's; give --expect ROOT_HASH, "
        "which the run printed"
    )


def _unreadable(path: Path) -> Finding:
    return Finding(
        record={"image_id": path.parent.name},
        verdict=Verdict.UNVERIFIED,
        reasons=[f"{path} cannot be read"],
    )
