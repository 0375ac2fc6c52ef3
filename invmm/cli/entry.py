"""The door of every command: one way to end, whatever goes wrong."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

from invmm.exits import Exit


def run_command(name: str, action: Callable[[], int]) -> int:
    """Runs a console script and returns its exit code, see `invmm.exits`.

    Args:
        name: as typed in a shell.
        action: the command; it returns the exit code.
    """
    # Commands draw into files. Matplotlib refuses even its import where a notebook's shell names a
    # backend that is not installed here, and Lightning imports it.
    os.environ["MPLBACKEND"] = "Agg"
    out, err = (stream and _Patient(stream) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return guarded(name, action)
        except KeyboardInterrupt:
            return Exit.INTERRUPTED
        finally:
            for stream in filter(None, (out, err)):
                stream.flush()


def guarded(name: str, action: Callable[[], int]) -> int:
    """Faults of the user's inputs and folders end in one line, not in a traceback."""
    try:
        return action()
    except (OSError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return Exit.FAULTY


class _Patient:
    """A stream that turns silent when its reader has gone, as in `invmm ... | head`.

    A run measures for hours and prints a few lines: losing them must not end it.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As of the stream."""
        with self._readers_may_leave():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As of the stream."""
        with self._readers_may_leave():
            self._stream.flush()

    @contextlib.contextmanager
    def _readers_may_leave(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, self._stream.fileno())
            os.close(silence)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
