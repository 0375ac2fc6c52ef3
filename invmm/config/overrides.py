"""Reads the overrides of a command line, and says how to write those that cannot be read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

_OUTSIDE_QUOTES = re.compile(r""",(?=(?:[^"']|"[^"]*"|'[^']*')*$)""")


def key_of(override: str) -> str:
    """The key or group of KEY=VALUE, +KEY=VALUE, ++KEY=VALUE or ~KEY."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


@dataclass(frozen=True)
class OverrideReader:
    """Splits an override with several values into one override for each job of a sweep.

    Attributes:
        parser: Hydra's.
        groups: names of config groups; quotes cannot make their options readable.
        multirun: whether several values make several jobs.
    """

    parser: OverridesParser
    groups: Collection[str]
    multirun: bool

    def read(self, text: str) -> tuple[list[str], str | None]:
        """Splits one override.

        Returns:
            One override for each job, and a fault or None. If only quotes are missing, the
            overrides have them beside the fault, so that no second fault follows; they are []
            if nothing makes the text readable.
        """
        key = key_of(text)
        try:
            override = self._parsed(text)
        except HydraException as error:
            if key in self.groups:
                return [text], None  # refused later, as an option that the group does not have
            quoted = self._quoted(text)
            fault = f"'{text}' cannot be read: {self._cure(text, quoted, error)}"
            return (self._values(self._parsed(quoted)) if quoted else []), fault
        if override.is_sweep_override() and not self.multirun:
            return [], f"{text} names several values; add --multirun to run one job each" + (
                "" if key in self.groups else self._hint_of_one_value(override)
            )
        try:
            values = self._values(override)
        except HydraException as error:
            return [], f"'{text}' cannot be read: {first_line(error)}"
        if not values:
            return [], f"{text} names no value, so there is no job to run; name one or more"
        return (values if self.multirun else [text]), None

    def _parsed(self, text: str) -> Override:
        return self.parser.parse_overrides([text])[0]

    def _values(self, override: Override) -> list[str]:
        return [job[0] for job in BasicSweeper.split_arguments([override], None)[0]]

    def _cure(self, text: str, quoted: str | None, error: HydraException) -> str:
        key, sign, _ = text.partition("=")
        if quoted:
            return f"give {shlex.quote(quoted)}"
        if not sign and not text.startswith("~"):
            return "give KEY=VALUE"
        if not self._is_readable(f"{key}=1"):
            return f"'{key}' is no key; keys are letters, digits, _ and ."
        if key in self.groups or self._is_call(text):
            return first_line(error)
        return "check its brackets, and put each text within them in quotes"

    def _is_call(self, text: str) -> bool:
        """Whether the value calls a function of Hydra's, such as range(0,3)."""
        name = re.match(r"[^=]*=(\w+)\(", text)
        return bool(name) and name[1] in self.parser.functions.functions

    def _quoted(self, text: str) -> str | None:
        """The override with quotes where they are needed; None if they do not make it readable."""
        key, sign, value = text.partition("=")
        is_list = value.startswith("[") and value.endswith("]")
        inner = value[1:-1] if is_list else value
        pieces = _OUTSIDE_QUOTES.split(inner) if is_list or self.multirun else [inner]
        pieces = [piece.strip() for piece in pieces]
        joined = ",".join(p if self._is_readable(f"k={p}") else _quote(p) for p in pieces)
        quoted = f"{key}{sign}[{joined}]" if is_list else f"{key}{sign}{joined}"
        if not sign or self._is_call(text) or not all(pieces):
            return None
        if not is_list and any(piece.startswith(("[", "{")) for piece in pieces):
            return None  # a list or a mapping with a fault in it
        return quoted if self._is_readable(quoted) else None

    def _is_readable(self, text: str) -> bool:
        try:
            self._parsed(text)
        except HydraException:
            return False
        return True

    def _hint_of_one_value(self, override: Override) -> str:
        key, _, value = (override.input_line or "").partition("=")
        if self._is_call(f"{key}={value}") or not re.search(r"[^\d\s,.+-]", value):
            return ""
        return f", or give one value in quotes: {shlex.quote(f'{key}={_quote(value)}')}"


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().splitlines()[0]


def _quote(value: str) -> str:
    return QuotedString(text=value, quote=Quote.double).with_quotes()
