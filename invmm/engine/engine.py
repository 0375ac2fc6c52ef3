"""Many measurements on one network.

The engine drives coroutines with `send`, no asyncio. It holds a number of slots, each with one
image's measurement waiting for an answer, packs waiting requests of a kind into network calls,
and resumes each measurement with its own rows. A slot that becomes free is refilled at once.

Three rules make an image's result independent of its neighbours, to the last bit on a CPU:
calls of one kind always have the same number of rows (the last is padded), no layer of a
denoiser in eval mode mixes rows, and each measurement draws from its own generator.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from invmm.diffusion.sampling import draw
from invmm.diffusion.schedule import Prediction
from invmm.engine.batching import condition_values, in_calls, needs_grad, num_rows, signature
from invmm.engine.outcomes import Evaluations, NonFiniteError, Outcome, Status
from invmm.engine.protocols import Network, Similarity
from invmm.engine.requests import Denoise, Embed, Embedding, Minimise, Request, Sample

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How images share the network.

    Attributes:
        slots: images in flight; changes the speed, never a result.
        rows_denoise: rows per call of the denoiser; memory grows with it. A result is bitwise
            reproducible at the same number of rows only, so it belongs to a run's identity.
        rows_sample: rows per run of the sampler.
        rows_embed: rows per call of the similarity network.
    """

    slots: Annotated[int, Ge(1)] = 8
    rows_denoise: Annotated[int, Ge(1)] = 16
    rows_sample: Annotated[int, Ge(1)] = 8
    rows_embed: Annotated[int, Ge(1)] = 8


@dataclass(frozen=True, eq=False)
class Job:
    """One image to measure.

    Attributes:
        key: the image id.
        start: prepares the image and returns its measurement; called again on a restart.
    """

    key: str
    start: Callable[[], Coroutine[Any, Any, Outcome]]


@dataclass(eq=False)
class _Slot:
    """A job in flight, the request it waits for, and what it has cost."""

    job: Job
    started: float = field(default_factory=time.monotonic)
    coroutine: Coroutine[Any, Any, Outcome] | None = None
    request: Request[Any] | None = None
    ticket: int = 0
    graph_rows: int = 0
    forward: int = 0
    backward: int = 0
    outcome: Outcome | None = None


class Engine:
    """Runs measurements on one device.

    Args:
        network: the frozen model.
        similarity: the frozen similarity network.
        settings: slots and rows per call.
    """

    def __init__(self, network: Network, similarity: Similarity, settings: EngineSettings) -> None:
        self.network = network
        self.similarity = similarity
        self.settings = settings
        self.rows: dict[type, int] = {
            Denoise: settings.rows_denoise,
            Sample: settings.rows_sample,
            Embed: settings.rows_embed,
        }
        self._tickets = itertools.count()

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Yields each job with its outcome as soon as it has ended; takes jobs as slots free up."""
        queue = iter(jobs)
        slots: list[_Slot] = []
        exhausted = False
        while True:
            while not exhausted and len(slots) < self.settings.slots:
                if (job := next(queue, None)) is None:
                    exhausted = True
                else:
                    slots.append(self._start(_Slot(job)))
            if not slots:
                return
            if not any(slot.outcome for slot in slots):
                self._serve(self._next_group(slots), slots)
            for slot in [slot for slot in slots if slot.outcome]:
                slots.remove(slot)
                yield slot.job, self._priced(slot)

    def _next_group(self, slots: Sequence[_Slot]) -> list[_Slot]:
        """The requests to answer now: losses, full sampler calls, the denoiser, then the rest."""
        waiting = sorted(slots, key=lambda slot: slot.ticket)
        by_kind: dict[type, list[_Slot]] = {}
        for slot in waiting:
            by_kind.setdefault(type(slot.request), []).append(slot)
        if minimise := by_kind.get(Minimise):
            return minimise
        partial = []
        for kind in (Sample, Denoise, Embed):
            group, full = self._fill_call(by_kind.get(kind, []))
            if group and (full or kind is not Sample):
                return group
            partial = partial or group
        return partial

    def _fill_call(self, waiting: Sequence[_Slot]) -> tuple[list[_Slot], bool]:
        """The oldest request and those like it that fit into one call; whether it is full."""
        if not waiting:
            return [], False
        like = signature(waiting[0].request)
        room = self.rows[type(waiting[0].request)]
        group: list[_Slot] = []
        for slot in waiting:
            if signature(slot.request) != like:
                continue
            rows = num_rows(slot.request)
            if group and rows > room:
                return group, True
            group.append(slot)
            room -= rows
        return group, room <= 0

    def _serve(self, group: Sequence[_Slot], slots: Sequence[_Slot]) -> None:
        kind = type(group[0].request)
        try:
            if kind is Minimise:
                answers = self._minimise(group, slots)
            elif kind is Denoise:
                answers = self._denoise(group)
            elif kind is Sample:
                answers = self._sample(group)
            else:
                answers = self._embed(group)
        except Exception as error:
            if _is_out_of_memory(error):
                self._make_room(kind, group, error)
                return
            answers = [error] * len(group)
        for slot, answer in zip(group, answers, strict=True):
            self._resume(slot, answer)

    # The four requests ---------------------------------------------------------------------

    def _minimise(self, group: Sequence[_Slot], slots: Sequence[_Slot]) -> list[Exception | None]:
        """Backpropagates the sum: rows do not mix, so each image gets exactly its own gradient."""
        requests: list[Minimise] = [slot.request for slot in group]  # pyright: ignore
        answers = [_refusal(request.loss) for request in requests]
        losses = [r.loss for r, refusal in zip(requests, answers, strict=True) if refusal is None]
        others_need_graph = any(slot.graph_rows for slot in slots if slot not in group)
        if losses:
            torch.autograd.backward(losses, retain_graph=others_need_graph)
        for slot in group:
            slot.backward += slot.graph_rows
            slot.graph_rows = 0
        return answers

    def _denoise(self, group: Sequence[_Slot]) -> list[Prediction]:
        requests: list[Denoise] = [slot.request for slot in group]  # pyright: ignore
        keep_graph = needs_grad(requests[0])
        columns = [[r.latents, r.timesteps, *condition_values(r)] for r in requests]
        names = tuple(requests[0].condition or ())

        def call(latents: Tensor, timesteps: Tensor, *condition: Tensor) -> Tensor:
            rows = dict(zip(names, condition, strict=True)) or None
            return self.network.predict(latents, timesteps, rows)

        with torch.set_grad_enabled(keep_graph):
            outputs = in_calls(call, columns, self.rows[Denoise])
        for slot, request in zip(group, requests, strict=True):
            slot.forward += len(request.latents)
            slot.graph_rows += len(request.latents) * keep_graph
        schedule = self.network.schedule
        return [
            Prediction(output, request.latents, request.timesteps, schedule)
            for output, request in zip(outputs, requests, strict=True)
        ]

    def _sample(self, group: Sequence[_Slot]) -> list[Tensor | NonFiniteError]:
        requests: list[Sample] = [slot.request for slot in group]  # pyright: ignore
        sampler, keep_graph = requests[0].sampler, needs_grad(requests[0])
        names = tuple(requests[0].condition or ())
        columns = [
            [r.noise, torch.tensor(r.seeds or [0] * len(r.noise)), *condition_values(r)]
            for r in requests
        ]

        def call(noise: Tensor, seeds: Tensor, *condition: Tensor) -> Tensor:
            rows = dict(zip(names, condition, strict=True)) or None
            return draw(
                lambda latents, timesteps: self.network.predict(latents, timesteps, rows),
                noise,
                sampler=sampler,
                schedule=self.network.schedule,
                seeds=seeds.tolist(),
            )

        with torch.set_grad_enabled(keep_graph):
            outputs = in_calls(call, columns, self.rows[Sample])
        answers: list[Tensor | NonFiniteError] = []
        for slot, output in zip(group, outputs, strict=True):
            evaluations = len(output) * sampler.num_evaluations
            slot.forward += evaluations
            slot.graph_rows += evaluations * keep_graph
            finite = bool(torch.isfinite(output).all())
            answers.append(output if finite else NonFiniteError("a sample is not finite"))
        return answers

    def _embed(self, group: Sequence[_Slot]) -> list[Embedding]:
        requests: list[Embed] = [slot.request for slot in group]  # pyright: ignore
        columns = [[r.latents] for r in requests]
        with torch.no_grad():
            pixels = in_calls(self.network.decode, columns, self.rows[Embed])
            columns = [[own] for own in pixels]
            vectors = in_calls(self.similarity.embed, columns, self.rows[Embed])
        return [Embedding(*pair) for pair in zip(pixels, vectors, strict=True)]

    # Life of a slot -------------------------------------------------------------------------

    def _start(self, slot: _Slot) -> _Slot:
        """Prepares the image; whatever is wrong with it ends this image only."""
        slot.graph_rows = 0
        try:
            slot.coroutine = slot.job.start()
        except Exception as error:
            slot.outcome = _ended_by(error)
        else:
            self._resume(slot, None)
        return slot

    def _resume(self, slot: _Slot, answer: Any) -> None:
        """Hands an answer (or throws an error) into the measurement, up to its next request."""
        assert slot.coroutine is not None
        seed = torch.initial_seed()
        try:
            if isinstance(answer, Exception):
                slot.request = slot.coroutine.throw(answer)
            else:
                slot.request = slot.coroutine.send(answer)
            slot.ticket = next(self._tickets)
        except StopIteration as stop:
            slot.outcome = stop.value
        except Exception as error:
            slot.outcome = _ended_by(error)
        if leak := _leaked_state(seed):
            slot.coroutine.close()
            torch.set_grad_enabled(True)
            slot.outcome = Outcome(
                status=Status.FAILED,
                error=f"{slot.coroutine.__qualname__} held {leak} across an await, which leaks "
                "into the measurements of other images; close it before the await",
            )
        elif slot.outcome is None and not isinstance(
            slot.request, (Denoise, Sample, Embed, Minimise)
        ):
            slot.coroutine.close()
            slot.outcome = _ended_by(TypeError(f"{slot.request!r} is not a request"))

    def _make_room(self, kind: type, group: Sequence[_Slot], error: Exception) -> None:
        """Out of memory: fewer rows a call; images whose backward was lost start anew."""
        target = Denoise if kind is Minimise else kind
        if self.rows[target] == 1:
            for slot in group:
                self._resume(slot, MemoryError(f"one row does not fit into memory: {error}"))
            return
        self.rows[target] = max(1, self.rows[target] // 2)
        log.warning("out of memory: going on with %d rows per call", self.rows[target])
        if kind is Minimise:
            for slot in group:
                assert slot.coroutine is not None
                slot.coroutine.close()
                self._start(slot)

    def _priced(self, slot: _Slot) -> Outcome:
        assert slot.outcome is not None
        return replace(
            slot.outcome,
            evaluations=Evaluations(forward=slot.forward, backward=slot.backward),
            seconds=time.monotonic() - slot.started,
        )


def _refusal(loss: Tensor) -> Exception | None:
    if loss.numel() != 1 or not loss.requires_grad:
        return ValueError(f"Minimise needs a scalar with gradients, not {tuple(loss.shape)}")
    return None if torch.isfinite(loss) else NonFiniteError(f"the loss is {loss.item()}")


def _ended_by(error: Exception) -> Outcome:
    if isinstance(error, NonFiniteError):
        return Outcome(status=Status.DIVERGED, error=str(error))
    return Outcome(status=Status.FAILED, error=" ".join(f"{type(error).__name__}: {error}".split()))


def _leaked_state(seed: int) -> str | None:
    """What a measurement left switched on when it handed control back."""
    if not torch.is_grad_enabled():
        return "no_grad"
    if torch.is_inference_mode_enabled():
        return "inference_mode"
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return "autocast"
    if torch.initial_seed() != seed:
        return "a global seed"
    return None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
