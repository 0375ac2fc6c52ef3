"""Which waiting requests go into the next network call."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from invmm.engine.accounting import Tally
from invmm.engine.batching import num_rows, rows_like
from invmm.engine.finiteness import Watch
from invmm.engine.outcomes import Outcome
from invmm.engine.requests import Denoise, Embed, EncodePrompt, Minimise, Request, Sample

PATIENCE = 64
"""Most calls that a request waits before it is answered in one that is not full (ours)."""


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
class Slot:
    """A job in flight, the request it waits for, and what it has cost.

    Attributes:
        job: the image.
        coroutine: its measurement.
        request: what it waits for.
        signature: of the request; requests with the same one can share a call.
        asked: number of calls that the engine had made when the request came.
        outcome: set when the measurement has ended.
        tally: its cost so far.
        watch: records whether its answers were finite.
        started: seconds on the monotonic clock.
    """

    job: Job
    coroutine: Coroutine[Any, Any, Outcome] | None = None
    request: Request[Any] | None = None
    signature: tuple[Any, ...] = ()
    asked: int = 0
    outcome: Outcome | None = None
    tally: Tally = field(default_factory=Tally)
    watch: Watch = field(default_factory=Watch)
    started: float = field(default_factory=time.monotonic)


def next_group(
    slots: Sequence[Slot], rows: Mapping[type, int], *, calls: int
) -> tuple[list[Slot], bool]:
    """The requests to answer now, and whether they fill a call.

    Losses come first, since they free memory, then images that hold the graph of their prompt,
    so that such graphs never pile up. Then come groups that fill a call: samples before the
    denoiser before the rest. If no group does, the order is denoiser, the rest, samples, so that
    samples of several images can join; but no request waits longer than `PATIENCE` calls.

    Args:
        slots: all of them wait for an answer; the longest-waiting first.
        rows: type of request -> rows per call.
        calls: number of calls that the engine has made so far.
    """
    if losses := [slot for slot in slots if isinstance(slot.request, Minimise)]:
        return losses, True
    holding = [slot for slot in slots if slot.tally.holds_graph]
    waiting: dict[tuple[Any, ...], list[Slot]] = {}
    for slot in holding or slots:
        waiting.setdefault(slot.signature, []).append(slot)
    groups = [_fill_call(same, rows[rows_like(type(same[0].request))]) for same in waiting.values()]
    longest, _ = groups[0]
    if calls - longest[0].asked > PATIENCE:
        return longest, True
    for kind in (Sample, Denoise, EncodePrompt, Embed):
        for group, full in groups:
            if full and isinstance(group[0].request, kind):
                return group, True
    order = (Denoise, EncodePrompt, Embed, Sample)
    partial, _ = min(groups, key=lambda group: order.index(type(group[0][0].request)))
    return partial, bool(holding)


def _fill_call(waiting: Sequence[Slot], room: int) -> tuple[list[Slot], bool]:
    """The longest-waiting requests that fit into one call, and whether they fill it."""
    group: list[Slot] = []
    for slot in waiting:
        count = num_rows(slot.request)
        if group and count > room:
            return group, True
        group.append(slot)
        room -= count
    return group, room <= 0
