"""Runs the console scripts, so that all end alike: exit code, errors in one line, closed pipes."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import IO, Any

from invmm.exits import Exit


def run_command(name: str, action: Callable[[], int]) -> int:
    """Runs a console script and returns its exit code, see `invmm.exits`.

    Args:
        name: as typed in a shell.
        action: the command; it returns the exit code.
    """
    # Commands only draw into files. A notebook's shell may name a backend that is not installed
    # here; then even importing matplotlib fails, which Lightning does.
    os.environ["MPLBACKEND"] = "Agg"
    # Importing diffusers asks older versions of torch for a GPU that may not be there.
    warnings.filterwarnings("ignore", "User provided device_type of 'cuda'")
    out, err = (stream and _ClosablePipe(stream) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return guarded(name, action)
        except KeyboardInterrupt:
            return Exit.INTERRUPTED
        finally:
            for stream in filter(None, (out, err)):
                stream.flush()


def guarded(name: str, action: Callable[[], int]) -> int:
    """Runs an action; its OSError or ValueError is printed in one line and gives `Exit.FAULTY`.

    Args:
        name: of the command, with which the line begins.
        action: returns an exit code.
    """
    try:
        return action()
    except (OSError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return Exit.FAULTY


class _ClosablePipe:
    """A stream that discards its output once its reader has ended, as in `invmm ... | head`.

    A run takes hours and prints a few lines; a reader that ends early must not end the run.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes text and returns its length."""
        with self._discarding_when_closed():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        with self._discarding_when_closed():
            self._stream.flush()

    @contextlib.contextmanager
    def _discarding_when_closed(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, self._stream.fileno())
            os.close(silence)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
