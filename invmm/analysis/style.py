"""The style of all figures: colour-blind safe, and the same bytes from the same records."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invmm.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "duplicated": "#D55E00",
    "single": "#0072B2",
    "held_out": "#009E73",
    "unknown": "#666666",
}
"""Colours of the groups of images (Okabe and Ito's palette)."""
LABELS = {
    "duplicated": "duplicated in training",
    "single": "one copy in training",
    "held_out": "held out",
    "unknown": "split unknown",
}


def copies_label(copies: int) -> str:
    """The label of a number of copies in the training set, for a legend."""
    if copies <= 1:
        return LABELS["single" if copies else "held_out"]
    return f"{copies} copies"


def one_line(text: str, width: int) -> str:
    """A caption or id of any origin, printable and at most `width` characters."""
    printable = "".join(char if char.isprintable() else "?" for char in text)
    return printable if len(printable) <= width else printable[: width - 3] + "..."


@contextmanager
def style() -> Iterator[None]:
    """Figures drawn within it have the project's style, whatever the user's matplotlibrc says."""
    _import_matplotlib()
    from matplotlib.style import context

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


def new_figure(**options: Any) -> Figure:
    """A figure to be saved; unlike pyplot's, it needs neither a screen nor the user's backend."""
    _import_matplotlib()
    from matplotlib.figure import Figure

    return Figure(**options)


def subplots(
    rows: int = 1,
    columns: int = 1,
    *,
    figsize: tuple[float, float],
    layout: str | None = None,
    **options: Any,
) -> tuple[Figure, Any]:
    """A new figure and its axes, with the options of `Figure.subplots`."""
    figure = new_figure(figsize=figsize, layout=layout)
    return figure, figure.subplots(rows, columns, **options)


def save_figure(figure: Figure, *paths: Path) -> tuple[Path, ...]:
    """Writes a figure in the format of each path, without dates; returns the paths."""
    undated = {".png": {"Software": None}, ".pdf": {"CreationDate": None, "Producer": None}}
    for path in paths:
        drawn = io.BytesIO()
        figure.savefig(drawn, format=path.suffix[1:], metadata=undated[path.suffix])
        write_atomically(path, drawn.getvalue())
    return paths


def _import_matplotlib() -> None:
    """Imports matplotlib even where MPLBACKEND names a backend that is not installed.

    A notebook's shell passes its MPLBACKEND to every process that is started in it. The variable
    and the backend, where it is installed, are the same afterwards.
    """
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
