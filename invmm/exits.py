"""How a command ends: one table of exit codes for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum


class Exit(IntEnum):
    """What the exit code of a command says."""

    DONE = 0
    """Done; or all that was asked about holds."""
    DOES_NOT_HOLD = 1
    """Something that was asked about does not hold."""
    FAULTY = 2
    """The config, the inputs or the machine are not fit for it; the same command ends so again."""
    INCOMPLETE = 3
    """Results are missing: a process died, a disk is full, or every image failed."""
    UNDECIDED = 4
    """There is too little evidence to say whether it holds."""
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
    """The exit code of several jobs: what a person has to act upon first.

    A signal, whatever else happened, since jobs that never began say nothing; then faulty inputs,
    which no rerun cures; then missing results, without which the others are no answer; then what
    does not hold; then what is undecided. 0 if there is no job.
    """
    given = list(codes)
    signals = [code for code in given if code > 128]
    return max(signals) if signals else max(given, key=_MILDEST_FIRST.index, default=Exit.DONE)
