"""What is wrong with a config, as values: the keys at fault beside the line that is printed."""

from __future__ import annotations

from enum import Enum
from typing import Any


class Kind(Enum):
    """What a fault is about."""

    MISSING = "a key that must be given is not"
    UNKNOWN = "there is no such key"
    VALUE = "a value that is not possible, alone or beside others"


class Fault(str):
    """One line for whoever gave the config: key, value, what is wrong, and the cure.

    Attributes:
        keys: dotted, those that the line speaks of; first the one at fault. () if it is none.
        kind: what the fault is about.
    """

    keys: tuple[str, ...]
    kind: Kind

    def __new__(cls, line: str, *keys: str, kind: Kind = Kind.VALUE) -> Fault:
        """See the class."""
        fault = super().__new__(cls, line)
        fault.keys, fault.kind = keys, kind
        return fault


class Refusal(ValueError):
    """A value that cannot be used, alone or beside others; its message is the line of a `Fault`.

    Args:
        line: key, value, what is wrong, and the cure.
        keys: see `Fault`.
    """

    def __init__(self, line: str, *keys: str) -> None:
        super().__init__(line)
        self.fault = Fault(line, *keys)


def fault_of(error: ValueError) -> Fault:
    """The fault that an error tells of, without keys if it is no `Refusal`."""
    return error.fault if isinstance(error, Refusal) else Fault(str(error))


def shown(value: Any) -> str:
    """A value as a person would type it, cut to 80 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
