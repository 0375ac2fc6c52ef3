"""Ending on request: the first SIGINT or SIGTERM stops a run at once and in good order."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """A signal asked the run to end; no `except Exception` may swallow it.

    Attributes:
        exit_code: 128 + the signal's number, as shells report it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


def _raise(signum: int, frame: FrameType | None) -> None:
    ignore_signals()
    raise Interrupted(signum)


def raise_on_signals() -> None:
    """Turns SIGINT and SIGTERM into `Interrupted`, in place of whatever handled them."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _raise)


def ignore_signals() -> None:
    """Lets a run finish its goodbye even when the key is pressed twice."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


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
