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
        graph_rows: rows of the network whose graph is kept for a later backward.
        holds_graph: whether any graph is kept, of the network or of a text encoder.
        seconds: by kind of work.
    """

    forward: int = 0
    backward: int = 0
    sampler: int = 0
    graph_rows: int = 0
    holds_graph: bool = False
    seconds: Counter[Spent] = field(default_factory=Counter)

    def evaluated(self, rows: int, *, keep_graph: bool, in_sampler: bool = False) -> None:
        """Adds rows that went through the network."""
        self.forward += rows
        self.sampler += rows * in_sampler
        self.graph_rows += rows * keep_graph
        self.holds_graph |= keep_graph

    def backpropagated(self) -> None:
        """Adds the backward of all rows whose graph was kept."""
        self.backward += self.graph_rows
        self.forget_graph()

    def forget_graph(self) -> None:
        """Counts kept graphs as gone, after a backward or when an image starts anew."""
        self.graph_rows, self.holds_graph = 0, False

    def evaluations(self) -> Evaluations:
        """The rows as they go into the outcome."""
        return Evaluations(forward=self.forward, backward=self.backward, sampler=self.sampler)

    def spent(self, total: float) -> Seconds:
        """The seconds as they go into the outcome."""
        return Seconds(total=total, on=dict(self.seconds))


class Stopwatch:
    """Splits the time of shared calls among their images, in proportion to their rows.

    On a GPU the host runs ahead of the device, so calls are timed by CUDA events. They are read
    when the device has passed them; the host waits for them only in `settle(wait=True)`.

    Args:
        device: of the network.
    """

    def __init__(self, device: torch.device) -> None:
        self.total: Counter[Spent] = Counter()
        self._on_gpu = device.type == "cuda"
        self._running: list[tuple[Spent, Any, Any, Mapping[Tally, float]]] = []

    @contextmanager
    def time(self, kind: Spent, rows: Mapping[Tally, float]) -> Iterator[None]:
        """Adds the time of the block to the tallies, even if it raises."""
        start = self._now()
        try:
            yield
        finally:
            self._running.append((kind, start, self._now(), rows))
            self.settle(wait=False)

    def settle(self, *, wait: bool) -> None:
        """Adds the time of every block that the device has finished, or waits for all blocks."""
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
            total_rows = sum(rows.values())
            for tally, own_rows in rows.items():
                tally.seconds[kind] += seconds * own_rows / total_rows

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
        images: number of images that ended.
        slots: largest number of images in flight.
        seconds: wall time.
        by_kind: seconds by kind of work; packing rows and waiting for the disk have no kind.
        consumer: seconds that the caller took to process outcomes, such as writing them.
        idle_slot_seconds: slots without an image while more images waited.
        tail_slot_seconds: slots without an image because none was left.
        calls: groups of requests answered.
        rows: rows of their network calls, without padding.
        padding: rows added to fill those calls.
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
