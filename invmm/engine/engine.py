"""Many measurements on one network.

The engine drives coroutines with `send`, no asyncio. It holds a number of slots, each with one
image's measurement waiting for an answer, packs waiting requests of a kind into network calls,
and resumes each measurement with its own rows. A slot that becomes free is refilled at once.

Three rules make an image's result independent of its neighbours, to the last bit on a CPU:
calls of one kind always have the same number of rows (the last is padded), no layer of a
denoiser in eval mode mixes rows, and each measurement draws from its own generator.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from invmm.engine.accounting import EngineSummary, Stopwatch
from invmm.engine.answers import Answers
from invmm.engine.batching import num_rows, rows_like, signature
from invmm.engine.finiteness import Stage, Watch, outcome_is_finite
from invmm.engine.memory import is_out_of_memory
from invmm.engine.outcomes import NonFiniteError, Outcome, Spent, Status
from invmm.engine.protocols import Network, Similarity
from invmm.engine.requests import Denoise, Embed, EncodePrompt, Minimise, Sample
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job, Slot, next_group

log = logging.getLogger(__name__)


class Engine:
    """Runs measurements on one device.

    Args:
        network: the frozen model.
        similarity: the frozen similarity network.
        settings: slots and rows per call.

    Raises:
        ValueError: a row count is still "auto"; see `EngineSettings.chosen`.
    """

    def __init__(self, network: Network, similarity: Similarity, settings: EngineSettings) -> None:
        rows: dict[type, Any] = {
            Denoise: settings.rows_denoise,
            Sample: settings.rows_sample,
            Embed: settings.rows_embed,
        }
        if settings.rows_to_measure:
            raise ValueError(f"engine.{settings.rows_to_measure[0]}=auto was not measured")
        self.rows: dict[type, int] = rows
        self.stopwatch = Stopwatch(network.device)
        self.summary = EngineSummary()
        self._answers = Answers(network, similarity, self.rows, self.stopwatch)
        # With as many images in flight as all calls have rows, one call is always full.
        self._max_slots = sum(rows.values()) if settings.slots == "auto" else settings.slots
        self._num_slots = 1 if settings.slots == "auto" else settings.slots

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Yields each job with its outcome as soon as it ends; takes a new job per free slot."""
        queue = iter(jobs)
        slots: list[Slot] = []
        exhausted = False
        started = time.perf_counter()
        while True:
            while not exhausted and len(slots) < self._num_slots:
                if (job := next(queue, None)) is None:
                    exhausted = True
                else:
                    slots.append(self._start(Slot(job)))
            if not slots:
                break
            if not any(slot.outcome for slot in slots):
                group, full = next_group(slots, self.rows, calls=self.summary.calls)
                if not full and not exhausted and self._num_slots < self._max_slots:
                    self._num_slots += 1
                    continue
                before = time.perf_counter()
                self._serve(group, slots)
                idle = (self._num_slots - len(slots)) * (time.perf_counter() - before)
                self._note_idle(idle, in_tail=exhausted)
                slots.sort(key=lambda slot: slot.asked)
            for slot in [slot for slot in slots if slot.outcome]:
                slots.remove(slot)
                outcome = self._with_costs(slot)
                before = time.perf_counter()
                yield slot.job, outcome
                self.summary.consumer += time.perf_counter() - before
        self.stopwatch.settle(wait=True)
        self.summary.slots = self._num_slots
        self.summary.seconds += time.perf_counter() - started
        self.summary.by_kind = {str(kind): spent for kind, spent in self.stopwatch.total.items()}

    def _serve(self, group: Sequence[Slot], slots: Sequence[Slot]) -> None:
        kind = type(group[0].request)
        self._note_call(kind, group)
        try:
            answers = self._answers(group, slots)
        except Exception as error:
            if is_out_of_memory(error):
                self._make_room(kind, group, error)
                return
            answers = [error] * len(group)
        for slot, answer in zip(group, answers, strict=True):
            self._resume(slot, answer)

    # Life of a slot -------------------------------------------------------------------------

    def _start(self, slot: Slot) -> Slot:
        """Prepares the image; an error ends this image only."""
        slot.tally.forget_graph()
        slot.watch = Watch()
        try:
            with self.stopwatch.time(Spent.PREPARATION, {slot.tally: 1}):
                slot.coroutine = slot.job.start()
        except Exception as error:
            slot.outcome = _ended_by(error)
        else:
            self._resume(slot, None)
        return slot

    def _resume(self, slot: Slot, answer: Any) -> None:
        """Gives the measurement its answer (or throws an error) and runs it to its next request."""
        assert slot.coroutine is not None
        seed = torch.initial_seed()
        slot.request = None
        try:
            with self.stopwatch.time(Spent.MEASUREMENT, {slot.tally: 1}):
                if isinstance(answer, Exception):
                    slot.request = slot.coroutine.throw(answer)
                else:
                    slot.request = slot.coroutine.send(answer)
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
        elif slot.outcome is None:
            if isinstance(slot.request, (Denoise, Sample, Embed, EncodePrompt, Minimise)):
                slot.asked = self.summary.calls
                is_loss = isinstance(slot.request, Minimise)
                slot.signature = () if is_loss else signature(slot.request)
            else:
                slot.coroutine.close()
                slot.outcome = _ended_by(TypeError(f"{slot.request!r} is not a request"))

    def _make_room(self, kind: type, group: Sequence[Slot], error: Exception) -> None:
        """After out of memory, halves the rows per call; images that lost a backward start anew."""
        target = rows_like(kind)
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

    # Accounting -----------------------------------------------------------------------------

    def _note_call(self, kind: type, group: Sequence[Slot]) -> None:
        self.summary.calls += 1
        if kind in self.rows:
            rows = sum(num_rows(slot.request) for slot in group)
            self.summary.rows += rows
            self.summary.padding += -rows % self.rows[kind]

    def _note_idle(self, slot_seconds: float, *, in_tail: bool) -> None:
        if in_tail:
            self.summary.tail_slot_seconds += slot_seconds
        else:
            self.summary.idle_slot_seconds += slot_seconds

    def _with_costs(self, slot: Slot) -> Outcome:
        assert slot.outcome is not None
        self.summary.images += 1
        self.stopwatch.settle(wait=True)
        return replace(
            _diverged_unless_finite(slot.outcome, slot.watch),
            evaluations=slot.tally.evaluations(),
            seconds=slot.tally.spent(time.monotonic() - slot.started),
        )


def _ended_by(error: Exception) -> Outcome:
    if isinstance(error, NonFiniteError):
        return Outcome(status=Status.DIVERGED, error=str(error))
    return Outcome(status=Status.FAILED, error=" ".join(f"{type(error).__name__}: {error}".split()))


def _diverged_unless_finite(outcome: Outcome, watch: Watch) -> Outcome:
    """The outcome, or DIVERGED with the first stage whose numbers were not finite."""
    fault = watch.fault()
    if fault is None and (outcome.error is not None or outcome_is_finite(outcome)):
        return outcome
    reason = str(fault or Stage.RESULT)
    if outcome.status is Status.DIVERGED:
        return replace(outcome, error=f"{outcome.error}: {reason}")
    return Outcome(status=Status.DIVERGED, steps=outcome.steps, error=reason)


def _leaked_state(seed: int) -> str | None:
    """The global state that a measurement left changed when it handed control back, or None."""
    if not torch.is_grad_enabled():
        return "no_grad"
    if torch.is_inference_mode_enabled():
        return "inference_mode"
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return "autocast"
    if torch.initial_seed() != seed:
        return "a global seed"
    return None
