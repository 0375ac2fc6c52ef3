"""What an image costs: evaluations and seconds, counted where they are spent."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from invmm.engine.outcomes import Evaluations, Seconds, Spent


@dataclass(eq=False)
class Tally:
    """What one image has cost so far.

    Attributes:
        forward, backward, sampler: rows; see `Evaluations`.
        graph_rows: rows whose graph is kept for a backward that has not come yet.
        holds_graph: whether there are such rows, of the network or of a text encoder.
        seconds: by kind.
    """

    forward: int = 0
    backward: int = 0
    sampler: int = 0
    graph_rows: int = 0
    holds_graph: bool = False
    seconds: Counter[Spent] = field(default_factory=Counter)

    def evaluated(self, rows: int, *, keep_graph: bool, in_sampler: bool = False) -> None:
        """Books rows that went through the network."""
        self.forward += rows
        self.sampler += rows * in_sampler
        self.graph_rows += rows * keep_graph
        self.holds_graph |= keep_graph

    def backpropagated(self) -> None:
        """Books the backward of all rows whose graph was kept."""
        self.backward += self.graph_rows
        self.forget_graph()

    def forget_graph(self) -> None:
        """After a backward, or when an image starts anew."""
        self.graph_rows, self.holds_graph = 0, False

    def evaluations(self) -> Evaluations:
        """The rows as they go into the outcome."""
        return Evaluations(forward=self.forward, backward=self.backward, sampler=self.sampler)

    def spent(self, total: float) -> Seconds:
        """The seconds as they go into the outcome."""
        return Seconds(total=total, on=dict(self.seconds))


class Stopwatch:
    """Splits the time of shared calls among their images, in proportion to their rows.

    On a GPU the host runs ahead, so time is taken by events on the device and read only when it
    has come to them; nothing ever waits for the clock.

    Args:
        device: of the network.
    """

    def __init__(self, device: torch.device) -> None:
        self.total: Counter[Spent] = Counter()
        self._on_gpu = device.type == "cuda"
        self._running: list[tuple[Spent, Any, Any, Mapping[Tally, float]]] = []

    @contextmanager
    def time(self, kind: Spent, rows: Mapping[Tally, float]) -> Iterator[None]:
        """Books the time of the block on the tallies, whether or not it raises."""
        start = self._now()
        try:
            yield
        finally:
            self._running.append((kind, start, self._now(), rows))
            self.settle(wait=False)

    def settle(self, *, wait: bool) -> None:
        """Books every block that the device has finished; on request waits for all of them."""
        while self._running:
            kind, start, end, rows = self._running[0]
            if self._on_gpu:
                if wait:
                    end.synchronize()
                elif not end.query():
                    return
                seconds = start.elapsed_time(end) / 1000
            else:
                seconds = end - start
            self._running.pop(0)
            self.total[kind] += seconds
            whole = sum(rows.values())
            for tally, share in rows.items():
                tally.seconds[kind] += seconds * share / whole

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(kw_only=True)
class EngineSummary:
    """How one engine spent its time.

    Attributes:
        images: that ended.
        slots: images in flight at most.
        seconds: wall time.
        by_kind: what it was spent on; what is missing is packing rows and waiting for the disk.
        consumer: seconds in which whoever takes the outcomes wrote them.
        idle_slot_seconds: slots without an image while more images waited.
        tail_slot_seconds: slots without an image because none was left.
        calls: of the network, by request.
        rows: real rows of those calls.
        padding: rows that filled them up.
    """

    images: int = 0
    slots: int = 0
    seconds: float = 0.0
    by_kind: dict[str, float] = field(default_factory=dict)
    consumer: float = 0.0
    idle_slot_seconds: float = 0.0
    tail_slot_seconds: float = 0.0
    calls: int = 0
    rows: int = 0
    padding: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a file."""
        return asdict(self)
