"""Reads captions, labels and copies from metadata, where 4 may be 4.0 (pandas) or "4" (csv)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from invmm.data.problems import short_repr

_WHOLE = re.compile(r"\s*(\d{1,9})(\.0*)?\s*", re.ASCII)
_LIMIT = 10**9
"""Labels and copies are smaller; larger numbers are mistakes and may overflow."""


def is_absent(value: Any) -> bool:
    """Whether a value is null, or NaN, which pandas writes in its place."""
    return value is None or (isinstance(value, float) and value != value)


def caption_of(value: Any) -> str | None:
    """A caption; None if it is absent or empty.

    Raises:
        ValueError: it is not a text, but a class number for example.
    """
    if is_absent(value):
        return None
    if not isinstance(value, str):
        raise ValueError(f"caption {short_repr(value)} is not a text")
    return value or None


def label_of(value: Any) -> int | None:
    """A class number; None if it is absent.

    Raises:
        ValueError: it is not a whole number from 0 to 10^9 - 1.
    """
    return _whole(value, "label", "the number of a class (0, 1, ...)")


def copies_of(value: Any) -> int | None:
    """A number of copies; None if it is absent.

    Raises:
        ValueError: it is not a whole number from 0 to 10^9 - 1.
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
    raise ValueError(f"{name} {short_repr(value)} is not {meaning}")


@dataclass
class Tally:
    """Counts the usable values of a column; a column that the user named must have some.

    Attributes:
        option: caption or label.
        column: its name; None if the user did not name it.
        num_used: values that were read.
        unusable: the first value that could not be read; None if there was none.
    """

    option: str
    column: str | None
    num_used: int = 0
    unusable: Any = None

    def count(self, raw: Any, value: Any) -> None:
        """Counts one value.

        Args:
            raw: as the file holds it.
            value: what it was read as; None if it is absent or cannot be read.
        """
        if value is not None:
            self.num_used += 1
        elif not is_absent(raw) and self.unusable is None:
            self.unusable = raw

    def check(self) -> None:
        """Refuses a column that the user named if none of its values could be read.

        Raises:
            ValueError: naming the key, the column, its first value and the cure.
        """
        if self.column is not None and not self.num_used and self.unusable is not None:
            meaning = {"caption": "captions", "label": "numbers of classes"}[self.option]
            raise ValueError(
                f"dataset.{self.option}={self.column} is a column without {meaning}: its first "
                f"value is {short_repr(self.unusable)}; give another one, or "
                f"dataset.{self.option}=null"
            )
