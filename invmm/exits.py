"""The exit codes of all commands, in one table."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum


class Exit(IntEnum):
    """What the exit code of a command means."""

    DONE = 0
    """The work is done; of `invmm-verify` and studies: everything holds."""
    DOES_NOT_HOLD = 1
    """A record or a figure of a study does not hold."""
    FAULTY = 2
    """The config, the inputs or the machine are unsuitable; a rerun would end in the same way."""
    INCOMPLETE = 3
    """Results are missing: a process died, a disk is full, or every image failed."""
    UNDECIDED = 4
    """Some records could not be verified, and all others hold."""
    INTERRUPTED = 130
    """SIGINT (Ctrl-C) ended it."""
    TERMINATED = 143
    """SIGTERM ended it."""


HELP = (
    "Exit codes: 0 done, or all holds; 1 something does not hold; 2 faulty config or inputs; "
    "3 results are missing; 4 undecided; 130, 143 ended by SIGINT, SIGTERM."
)
"""The table in one line, for the help of each command."""

_MILDEST_FIRST = (Exit.DONE, Exit.UNDECIDED, Exit.DOES_NOT_HOLD, Exit.INCOMPLETE, Exit.FAULTY)


def worst(codes: Iterable[int]) -> int:
    """The exit code of several jobs: the one that the user must act on first; 0 without jobs.

    The order: a signal, after which some jobs never started; faulty inputs, which a rerun does not
    cure; missing results, which a rerun does; then what does not hold; then what is undecided.
    """
    given = list(codes)
    signals = [code for code in given if code > 128]
    return max(signals) if signals else max(given, key=_MILDEST_FIRST.index, default=Exit.DONE)
