"""One look for all figures: colour-blind safe, and the same bytes from the same records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "duplicated": "#D55E00",
    "single": "#0072B2",
    "held_out": "#009E73",
    "unknown": "#666666",
}
"""Of the groups of images (Okabe and Ito's palette)."""
LABELS = {
    "duplicated": "duplicated in training",
    "single": "one copy in training",
    "held_out": "held out",
    "unknown": "split unknown",
}


def copies_label(copies: int) -> str:
    """How often an image stood in the training set, for a legend."""
    if copies <= 1:
        return LABELS["single" if copies else "held_out"]
    return f"{copies} copies"


def one_line(text: str, width: int) -> str:
    """A caption or id of any origin, printable and at most `width` characters."""
    printable = "".join(char if char.isprintable() else "?" for char in text)
    return printable if len(printable) <= width else printable[: width - 3] + "..."


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib without a screen, in the project's style, whatever the user's own says."""
    import matplotlib as mpl
    from matplotlib.style import context

    mpl.use("Agg")
    own = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.dpi": 120,
        "savefig.bbox": "tight",
        "pdf.fonttype": 42,
    }
    with context(["default", own]):
        yield


def save_figure(figure: Figure, *paths: Path) -> tuple[Path, ...]:
    """Writes it in the format of each path, without dates, closes it and returns the paths."""
    import matplotlib.pyplot as plt

    undated = {".png": {"Software": None}, ".pdf": {"CreationDate": None, "Producer": None}}
    for path in paths:
        figure.savefig(path, metadata=undated[path.suffix])
    plt.close(figure)
    return paths
