"""Sheets of pictures for the studies: images beside the samples that a model drew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from invmm.analysis.style import subplots
from invmm.results.records import read_pictures

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

_TILE_INCHES = 0.95
_NAME_INCHES = 1.5
_HEAD_INCHES = 0.4


@dataclass(frozen=True, kw_only=True, eq=False)
class Tile:
    """One picture.

    Attributes:
        picture: (H, W, 3) uint8; None leaves the place empty.
        title: text above it.
        colour: of the title.
        framed: whether it has a black frame, which marks a replica.
    """

    picture: np.ndarray | None
    title: str = ""
    colour: str = "black"
    framed: bool = False


EMPTY = Tile(picture=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """Pictures side by side.

    Attributes:
        tiles: as many as the sheet has columns.
        name: text at their left, may have several lines.
        colour: of the name.
    """

    tiles: Sequence[Tile]
    name: str = ""
    colour: str = "black"


def image_and_closest(run_dir: Path, record: pd.Series) -> tuple[Tile, Tile]:
    """An image, and its closest free sample with its similarity, framed if it is a replica.

    Args:
        run_dir: folder of a run that counted replicas.
        record: row of the image in the run's score table.
    """
    image, closest = (*read_pictures(run_dir, record.to_dict()), None, None)[:2]
    if closest is None:
        return Tile(picture=image), EMPTY
    title = f"{record['best_similarity']:.2f}"
    returned = bool(record["count"] > 0)
    return Tile(picture=image), Tile(picture=closest, title=title, framed=returned)


def image_over_runs(runs: Mapping[Path, pd.DataFrame], image_id: str) -> list[Tile]:
    """An image, then its closest free sample in each of several runs.

    Args:
        runs: folder -> score table of runs that counted its replicas.
        image_id: of the image.
    """
    tiles = [
        image_and_closest(run_dir, frame.set_index("image_id").loc[image_id])
        for run_dir, frame in runs.items()
    ]
    return [tiles[0][0], *(closest for _, closest in tiles)]


def sheet(columns: Sequence[str], rows: Sequence[Row]) -> Figure:
    """A figure of all rows, below the names of the columns."""
    names = _NAME_INCHES if any(row.name for row in rows) else 0.1
    width, height = names + _TILE_INCHES * len(columns), _TILE_INCHES * len(rows) + _HEAD_INCHES
    figure, axes = subplots(len(rows), len(columns), figsize=(width, height), squeeze=False)
    figure.subplots_adjust(
        left=names / width,
        right=1,
        bottom=0,
        top=1 - _HEAD_INCHES / height,
        wspace=0.08,
        hspace=0.35,
    )
    for line, row in zip(axes, rows, strict=True):
        for axis, tile in zip(line, row.tiles, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(
                visible=tile.picture is not None,
                linewidth=2 if tile.framed else 0.5,
                edgecolor="black" if tile.framed else "#CCCCCC",
            )
            if tile.picture is not None:
                axis.imshow(tile.picture, interpolation="nearest")
            axis.set_title(tile.title, fontsize=7, pad=2, color=tile.colour, parse_math=False)
        line[0].set_ylabel(
            row.name,
            rotation=0,
            ha="right",
            va="center",
            fontsize=7,
            color=row.colour,
            parse_math=False,
        )
    for axis, name in zip(axes[0], columns, strict=True):
        axis.annotate(name, (0.5, 1.3), xycoords="axes fraction", ha="center", fontsize=7)
    return figure
