"""Ending on request: the first SIGINT or SIGTERM stops a run at once and in good order."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """A signal asked the run to end; no `except Exception` may swallow it.

    Attributes:
        exit_code: 128 + the signal's number, as shells report it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


def _raise(signum: int, frame: FrameType | None) -> None:
    queue_again = _queue_again() if signum == signal.SIGTERM else None
    ignore_signals()
    if queue_again is not None:
        queue_again(signum, frame)  # ends in SystemExit
    raise Interrupted(signum)


def raise_on_signals() -> None:
    """Turns SIGINT and SIGTERM into `Interrupted`, in place of the handlers before.

    In a job of submitit, SIGTERM queues the job again, as submitit's own signal (USR2) does.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _raise)
    requeue = _requeue_signal()
    if requeue is not None and signal.getsignal(requeue) == signal.SIG_DFL:
        signal.signal(requeue, signal.SIG_IGN)  # in a worker: its parent handles the signal


def ignore_signals() -> None:
    """Lets a run finish its goodbye even when the key is pressed twice."""
    requeue = _requeue_signal()
    for signum in (signal.SIGINT, signal.SIGTERM, *([requeue] if requeue is not None else [])):
        signal.signal(signum, signal.SIG_IGN)


def _requeue_signal() -> signal.Signals | None:
    """The signal on which submitit queues a job again; None outside of submitit's jobs."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    name = os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")
    return getattr(signal, f"SIG{name}", signal.SIGUSR2)


def _queue_again() -> Callable[[int, FrameType | None], Any] | None:
    """Submitit's handler that queues this job again; None without one, or if the job is to end.

    SLURM announces a preemption by SIGTERM, and by another signal only if its administrator set
    one. A cancelled job gets SIGTERM too, but squeue does not list it as running any more.
    """
    requeue = _requeue_signal()
    handler = signal.getsignal(requeue) if requeue is not None else None
    return handler if callable(handler) and _counts_as_running() else None


def _counts_as_running() -> bool:
    """Whether SLURM, if this is one of its jobs, still counts the job as running."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return True
    job = os.environ.get("SLURM_JOB_ID", "")
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return answer.stdout.strip() == "RUNNING"


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it signals raise `Interrupted`; afterwards the former handlers are back."""
    former = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    raise_on_signals()
    try:
        yield
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)
