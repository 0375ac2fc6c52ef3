"""Every picture and text of the report, whole: what stands where, how large and in which colour.

A change that is meant is looked at, and kept by ACCEPT=1 in the environment of this test.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

from invmm.analysis import pictures
from invmm.analysis.report import report
from invmm.analysis.sheet import EMPTY, Row, Tile, sheet
from invmm.analysis.style import style

GOLDEN = Path(__file__).parent / "layouts"
RUNS = ("run_dir", "bank_dir", "scored_dir")


def numbers(values: Any) -> list[float]:
    return [round(float(value), 4) for value in np.ravel(values)]


def text_layout(text: Text) -> list[Any]:
    return [
        text.get_text(), numbers(text.get_position()), text.get_fontsize(),
        to_hex(text.get_color()), text.get_ha(), text.get_va(), text.get_rotation(),
        text.get_parse_math(),
    ]  # fmt: skip


def legend_layout(legend: Legend) -> list[Any]:
    handles = [to_hex(handle.get_facecolor()) for handle in legend.get_patches()]
    anchor = numbers(legend.get_bbox_to_anchor()._bbox.bounds)
    texts = [text.get_text() for text in legend.get_texts()]
    return [texts, handles, anchor, legend._ncols, legend.get_frame_on(), legend.borderaxespad]


def patch_layout(patch: Any) -> list[Any]:
    corners = patch.xy1 + patch.xy2 if hasattr(patch, "xy1") else patch.get_bbox()
    colours = to_hex(patch.get_facecolor()), to_hex(patch.get_edgecolor())
    return [numbers(corners), *colours, patch.get_linewidth()]


def axes_layout(axes: Axes) -> dict[str, Any]:
    shown = {name: spine for name, spine in axes.spines.items() if spine.get_visible()}
    return {
        "bounds": numbers(axes.get_position(original=True).bounds),
        "visible": [axes.get_visible(), axes.axison],
        "limits": numbers([axes.get_xlim(), axes.get_ylim()]),
        "ticks": [text.get_text() for text in axes.get_xticklabels()],
        "labels": [text_layout(axes.title), axes.get_xlabel(), text_layout(axes.yaxis.label)],
        "texts": [text_layout(text) for text in axes.texts],
        "images": [
            [image.get_array().shape, image.get_interpolation()] for image in axes.get_images()
        ],
        "patches": [patch_layout(patch) for patch in axes.patches],
        "spines": {
            name: [spine.get_linewidth(), to_hex(spine.get_edgecolor())]
            for name, spine in shown.items()
        },
        "legend": legend_layout(axes.legend_) if axes.legend_ else None,
    }  # fmt: skip


def layout(figure: Figure) -> str:
    """A line of JSON for the figure, then one for each of its axes."""
    whole = {
        "inches": numbers(figure.get_size_inches()),
        "title": text_layout(figure._suptitle) if figure._suptitle else None,
        "legends": [legend_layout(legend) for legend in figure.legends],
    }
    parts = [whole, *(axes_layout(axes) for axes in figure.axes)]
    return "".join(json.dumps(part) + "\n" for part in parts)


def check(name: str, found: str) -> None:
    """Compares with what was accepted, or accepts it."""
    path = GOLDEN / name
    if os.environ.get("ACCEPT"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(found)
    assert found == path.read_text()


@pytest.mark.parametrize("run", RUNS)
def test_the_report_and_its_pictures(run, request, monkeypatch):
    run_dir, drawn = request.getfixturevalue(run), {}
    monkeypatch.setattr(
        pictures, "save_figure", lambda figure, path: drawn.update({path.stem: layout(figure)})
    )
    text = report(run_dir)
    check(f"{run}.txt", text.replace(str(run_dir), "RUN") + "\n")
    assert drawn.keys() == {"gallery", "scores"}
    for name, found in drawn.items():
        check(f"{run}-{name}.jsonl", found)


def test_a_sheet():
    grey = np.full((2, 2, 3), 99, np.uint8)
    tile = Tile(picture=grey, title="$a", framed=True)
    rows = [
        Row(tiles=[tile, EMPTY], name="first", colour="#123456"),
        Row(tiles=[EMPTY, Tile(picture=grey, title="b", colour="red")], name=""),
    ]
    with style():
        found = layout(sheet(["one", "two"], rows))
        unnamed = layout(sheet(["one"], [Row(tiles=[tile])]))
    check("sheet.jsonl", found + unnamed)


def test_the_style():
    with style():
        names = ("font.size", "axes.spines.top", "axes.spines.right", "figure.dpi", "savefig.bbox")
        found = {name: rcParams[name] for name in (*names, "pdf.fonttype")}
    assert found == {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 120,
        "savefig.bbox": "tight", "pdf.fonttype": 42,
    }  # fmt: skip
