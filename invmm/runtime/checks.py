"""Checks of a machine: what each of them found, and the table of all. No check raises or hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


class State(Enum):
    """How a check ended."""

    WORKS = "works"
    FAILS = "does not"
    SKIPPED = "skipped"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the table.

    Attributes:
        name: what was tried.
        state: how it ended.
        detail: what was found, or the reason and the cure.
        essential: whether nothing can be measured without it.
    """

    name: str
    state: State
    detail: str
    essential: bool = False


class Skip(Exception):
    """Raised by a check that cannot be made here; the message says why."""


def tried(name: str, action: Callable[[], str], *, essential: bool = False) -> Check:
    """Makes a check and records how it ended; it never raises.

    Args:
        name: of the check.
        action: makes it and returns what it found.
        essential: see `Check`.
    """
    try:
        state, detail = State.WORKS, action()
    except Skip as reason:
        state, detail = State.SKIPPED, str(reason)
    except (Exception, SystemExit) as error:  # an unusable package may raise anything on import
        line = (str(error).strip().splitlines() or [""])[0]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        state, detail = State.FAILS, f"{kind}{line}"
    return Check(name=name, state=state, detail=detail, essential=essential)


def within(seconds: float, action: Callable[[], str]) -> str:
    """Returns `action()`, or gives up: looking up the name of a host may take minutes.

    Args:
        seconds: after which it gives up.
        action: runs in a thread of its own.

    Raises:
        Skip: it took too long.
    """
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.append(action())
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise Skip(f"no answer within {seconds:g} s; give models and data as folders")
    if isinstance(ended[0], Exception):
        raise ended[0]
    return ended[0]


def table(found: Sequence[Check]) -> str:
    """One line a check."""
    width = max(len(check.name) for check in found)
    return "\n".join(
        f"{check.state.value:9} {check.name:{width}}  {check.detail}".rstrip() for check in found
    )


def can_measure(found: Sequence[Check]) -> bool:
    """Whether every essential check works."""
    return all(check.state is State.WORKS for check in found if check.essential)
