"""One process's share of a run: claim an image, prepare it, measure it, write its record."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from invmm.data.dataset import ImageDataset, ImageEntry, LoadedImage
from invmm.engine.engine import Engine
from invmm.engine.finiteness import Stage, are_finite
from invmm.engine.outcomes import NonFiniteError, Outcome, Status
from invmm.engine.protocols import Setting, Similarity, Target
from invmm.engine.requests import Denoise
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job
from invmm.probability.bank import BankMeasurement, SharedBank
from invmm.results.locks import Lease
from invmm.results.run_folder import RunFolder
from invmm.runtime.bank import draw_bank
from invmm.runtime.conditions import Conditions
from invmm.runtime.processes import peak_memory_bytes
from invmm.runtime.recording import write_record
from invmm.runtime.run import MeasureRun


def image_generator(seed: int, image_id: str) -> torch.Generator:
    """The source of all randomness of one image, whatever its place in the queue."""
    digest = hashlib.sha256(f"{seed}:{image_id}".encode(errors="surrogatepass")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Worker:
    """Drains the images that no other process has claimed.

    Args:
        run: the recipes.
        folder: where records go.
        dataset: opened.
        entries: the images still to measure, the same list in every process.
        device: of the network.
    """

    def __init__(
        self,
        run: MeasureRun,
        folder: RunFolder,
        dataset: ImageDataset,
        entries: Sequence[ImageEntry],
        device: torch.device,
    ) -> None:
        self.run, self.folder, self.dataset, self.entries = run, folder, dataset, entries
        self.network = run.execution.prepare(run.model.load(device))
        self.conditions = Conditions(self.network, run.prompt)
        self.similarity: Similarity = run.replication.similarity.load(device)
        second = run.replication.second_opinion
        self.second_opinion: Similarity | None = second.load(device) if second else None
        self.setting = Setting(
            schedule=self.network.schedule, sampler=run.sampler, criterion=run.replication
        )
        self.measurement = run.repeated
        self._bank_fault: NonFiniteError | None = None
        self._claims: dict[str, tuple[ImageEntry, Lease]] = {}
        self._loaded: dict[str, LoadedImage] = {}

    def drain(self) -> None:
        """Measures until the queue is empty; each record is on disk before the next image ends."""
        engine = Engine(self.network, self.similarity, self._settings())
        started = time.time()
        self._draw_bank(engine)
        for job, outcome in engine.run(self._jobs()):
            self._finish(job.key, outcome)
        self.folder.note_process(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "device": str(self.network.device),
                "threads": torch.get_num_threads(),
                "started": started,
                "ended": time.time(),
                "rows_denoise": engine.rows[Denoise],
                "peak_memory_bytes": peak_memory_bytes(),
                **engine.summary.as_dict(),
            }
        )

    def _draw_bank(self, engine: Engine) -> None:
        """Free samples that all images share are drawn first, by all processes."""
        recipe, prompt = self.run.measurement, self.run.prompt
        if isinstance(recipe, BankMeasurement) and prompt.is_shared:
            blank = ImageEntry(image_id="", path="", label=prompt.label)
            shape = self.network.latent_shape
            with torch.no_grad():
                target = Target(
                    image_id="free samples",
                    pixels=torch.zeros(0),
                    latents=torch.zeros(1, *shape, device=self.network.device),
                    embedding=torch.zeros(0),
                    condition=self.conditions.of(blank),
                    negative=self.conditions.negative,
                )
            seed = image_generator(self.run.seed, "free samples").initial_seed()
            bank = recipe.bank(seed, shape, self.run.sampler)
            try:
                target.check_finite()
                drawn = draw_bank(bank, target, self.setting, engine, self.folder)
            except NonFiniteError as error:
                self._bank_fault = error
            else:
                self.measurement = SharedBank(drawn, recipe)

    def _settings(self) -> EngineSettings:
        """Row counts left open are measured by one process of the run, and kept."""
        settings = self.run.engine
        if not settings.rows_to_measure:
            return settings

        def measured() -> dict[str, int]:
            blank = {"none": None, "class_label": 0}.get(self.run.prompt.kind, "")
            with torch.no_grad():
                condition = self.network.condition(blank)
            chosen = settings.chosen(self.network, self.similarity, condition)
            return {name: getattr(chosen, name) for name in settings.rows_to_measure}

        rows = self.folder.settled("rows.json", measured)
        shown = ", ".join(f"{name} {count}" for name, count in rows.items())
        print(f"rows per call, measured once for this run: {shown}", flush=True)
        self.folder = replace(self.folder, digest=self.run.digest_with(rows))
        return replace(settings, **rows)

    def _jobs(self) -> Iterator[Job]:
        for entry in self.entries:
            claim = self.folder.claim(entry.image_id)
            if claim is None:
                continue
            self._claims[entry.image_id] = (entry, claim)
            yield Job(entry.image_id, lambda entry=entry: self._start(entry))

    def _start(self, entry: ImageEntry) -> Coroutine[Any, Any, Outcome]:
        loaded = self._loaded[entry.image_id] = self.dataset.load(entry)
        if self._bank_fault is not None:
            raise self._bank_fault
        rng = image_generator(self.run.seed, entry.image_id)
        return self.measurement(self._target(entry, loaded), self.setting, rng)

    def _target(self, entry: ImageEntry, loaded: LoadedImage) -> Target:
        pixels = loaded.pixels[None].to(self.network.device)
        with torch.no_grad():
            target = Target(
                image_id=entry.image_id,
                pixels=pixels[0],
                latents=self.network.encode(pixels),
                embedding=self.similarity.embed(pixels)[0],
                condition=self.conditions.of(entry),
                negative=self.conditions.negative,
                tokens=self.conditions.tokens(entry),
            )
        target.check_finite()
        return target

    def _finish(self, image_id: str, outcome: Outcome) -> None:
        entry, claim = self._claims.pop(image_id)
        loaded = self._loaded.pop(image_id, None)
        with claim:
            second_opinion = None
            try:
                second_opinion = self._second_opinion(loaded, outcome)
            except NonFiniteError as error:
                outcome = Outcome(
                    status=Status.DIVERGED,
                    steps=outcome.steps,
                    error=str(error),
                    evaluations=outcome.evaluations,
                    seconds=outcome.seconds,
                )
            write_record(
                self.folder,
                entry,
                outcome,
                loaded=loaded,
                seed=self.run.seed,
                second_opinion=second_opinion,
            )

    def _second_opinion(self, loaded: LoadedImage | None, outcome: Outcome) -> float | None:
        """Similarity of the closest sample by the control measure.

        Raises:
            NonFiniteError: an embedding is not finite.
        """
        if self.second_opinion is None or loaded is None or outcome.samples is None:
            return None
        pair = torch.stack([loaded.pixels, outcome.samples[0]]).to(self.network.device)
        with torch.no_grad():
            vectors = self.second_opinion.embed(pair)
        if not all(are_finite([vectors])):
            raise NonFiniteError(Stage.SECOND_OPINION)
        target, sample = vectors
        return float(target @ sample)
