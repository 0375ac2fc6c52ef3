"""Captions and numbers as files hold them: pandas writes 4 as 4.0, a csv file "4"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from invmm.data.problems import shortly

_WHOLE = re.compile(r"\s*(\d{1,9})(\.0*)?\s*", re.ASCII)
_LIMIT = 10**9
"""Labels and copies are below this: larger ones are a mistake, and may overflow."""


def is_absent(value: Any) -> bool:
    """Whether a value stands for none: null, or NaN, as pandas writes it."""
    return value is None or (isinstance(value, float) and value != value)


def caption_of(value: Any) -> str | None:
    """A caption; None if it is absent or empty.

    Raises:
        ValueError: something else than a text, such as the number of a class.
    """
    if is_absent(value):
        return None
    if not isinstance(value, str):
        raise ValueError(f"caption {shortly(value)} is not a text")
    return value or None


def label_of(value: Any) -> int | None:
    """The number of a class; None if it is absent.

    Raises:
        ValueError: no whole number, or a negative one.
    """
    return _whole(value, "label", "the number of a class")


def copies_of(value: Any) -> int | None:
    """A number of copies; None if it is absent.

    Raises:
        ValueError: no whole number, or a negative one.
    """
    return _whole(value, "copies", "a number of copies")


def _whole(value: Any, name: str, meaning: str) -> int | None:
    if is_absent(value):
        return None
    if isinstance(value, str) and (match := _WHOLE.fullmatch(value)):
        return int(match[1])
    number: Any = value
    is_number = isinstance(value, Integral | Real) and not isinstance(value, bool)
    if is_number and 0 <= number < _LIMIT and number == int(number):
        return int(number)
    raise ValueError(f"{name} {shortly(value)} is not {meaning}")


@dataclass
class Tally:
    """Counts the values of a column that a person named, to refuse one without any use.

    Attributes:
        option: caption or label.
        column: its name; None if nobody named it.
    """

    option: str
    column: str | None
    num_used: int = 0
    unusable: Any = None

    def count(self, raw: Any, value: Any) -> None:
        """Counts a value as it stands in the file, and what it was read as."""
        if value is not None:
            self.num_used += 1
        elif not is_absent(raw) and self.unusable is None:
            self.unusable = raw

    def check(self) -> None:
        """Refuses a named column without a single value that can be used.

        Raises:
            ValueError: naming the first value.
        """
        if self.column is not None and not self.num_used and self.unusable is not None:
            meaning = {"caption": "captions", "label": "numbers of classes"}[self.option]
            raise ValueError(
                f"dataset.{self.option}={self.column} is a column without {meaning}: its first "
                f"value is {shortly(self.unusable)}; give another one, or "
                f"dataset.{self.option}=null"
            )
