"""Remarks on a data set: one line for each kind of remark, however many images it concerns."""

from __future__ import annotations

from dataclasses import dataclass, field

_EXAMPLES = 3


@dataclass
class _Kind:
    sentence: str
    examples: list[str] = field(default_factory=list)
    count: int = 0


@dataclass
class Problems:
    """Collects remarks; the first of a kind is shown in full, the others are counted."""

    _kinds: dict[str, _Kind] = field(default_factory=dict)

    def add(self, subject: str, rest: str, *, kind: str | None = None) -> None:
        """Adds a remark.

        Args:
            subject: the image or file that it is about; begins the sentence.
            rest: of the sentence, starting with its space or colon.
            kind: remarks of one kind make one line; None groups them by `rest`.
        """
        group = self._kinds.setdefault(kind or rest or subject, _Kind(subject + rest))
        group.count += 1
        if 1 < group.count <= _EXAMPLES + 1:
            group.examples.append(subject)

    def lines(self) -> list[str]:
        """One line for each kind, in the order of their first remarks."""
        lines = []
        for group in self._kinds.values():
            more, shown = group.count - 1, ", ".join(group.examples)
            dots = ", ..." if more > len(group.examples) else ""
            lines.append(group.sentence + (f"; likewise {more:,} more: {shown}{dots}" * bool(more)))
        return lines


def names(values: list[str]) -> str:
    """The number of names and the first of them, as in "(2): 'a', 'b'"."""
    dots = ", ..." if len(values) > _EXAMPLES else ""
    return f"({len(values):,}): {', '.join(map(repr, values[:_EXAMPLES]))}{dots}"


def short_repr(value: object) -> str:
    """The repr of a value, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
