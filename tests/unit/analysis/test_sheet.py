"""Sheets of pictures: what stands where, and what is framed."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import written

from invmm.analysis.sheet import EMPTY, Row, Tile, image_and_closest, sheet
from invmm.analysis.study import read_run
from invmm.analysis.style import style
from invmm.engine.outcomes import Outcome, Status
from invmm.results.collect import collect
from invmm.results.ownership import OwnedRunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One icon that came back once, one that never did, and one that could not be loaded."""
    path = tmp_path_factory.mktemp("run")
    samples = torch.stack([torch.zeros(3, 4, 4), -torch.ones(3, 4, 4)])
    with OwnedRunFolder(path, config=written.CONFIG, digest=written.DIGEST) as folder:
        for image_id, status, similarity, count in (
            ("returned", Status.ESTIMATED, 0.5, 1),
            ("never", Status.CENSORED, 0.49, 0),
        ):
            result = written.outcome(
                status, similarity=similarity, samples=samples, columns={"count": count}
            )
            written.write(folder, written.entry(image_id), result)
        broken = Outcome(status=Status.FAILED, error="truncated")
        written.write(folder, written.entry("broken"), broken, loaded=None, second_opinion=None)
    collect(path)
    return path


@pytest.mark.parametrize(
    ("image_id", "title", "framed"), [("returned", "0.50", True), ("never", "0.49", False)]
)
def test_the_closest_sample_is_the_first_and_framed_if_it_is_a_replica(
    run, image_id, title, framed
):
    icon = read_run(run).set_index("image_id", drop=False).loc[image_id]
    image, closest = image_and_closest(run, icon)
    assert image.picture is not None
    assert (image.picture.min(), image.title, image.framed) == (255, "", False)
    assert closest.picture is not None
    assert np.unique(closest.picture).tolist() == [128]
    assert (closest.title, closest.framed) == (title, framed)


def test_an_image_that_was_never_loaded_leaves_its_place_empty(run):
    icon = read_run(run).set_index("image_id", drop=False).loc["broken"]
    image, closest = image_and_closest(run, icon)
    assert (image.picture, closest.picture, closest.framed) == (None, None, False)


def test_rows_and_columns_stand_in_order():
    grey = np.full((2, 2, 3), 99, np.uint8)
    rows = [
        Row(tiles=[Tile(picture=grey, title="$a", framed=True), EMPTY], name="first"),
        Row(tiles=[EMPTY, Tile(picture=grey, title="b", colour="red")], name="second"),
    ]
    with style():
        figure = sheet(["one", "two"], rows)
        figure.canvas.draw()
    axes = figure.axes
    assert [axis.get_title() for axis in axes] == ["$a", "", "", "b"]
    assert [len(axis.images) for axis in axes] == [1, 0, 0, 1]
    spines = [axis.spines["left"] for axis in axes]
    assert [spine.get_visible() for spine in spines] == [True, False, False, True]
    assert [spines[place].get_linewidth() for place in (0, 3)] == [2, 0.5]
    assert [axes[0].get_ylabel(), axes[2].get_ylabel()] == ["first", "second"]
    assert [text.get_text() for axis in axes for text in axis.texts] == ["one", "two"]
    left = [axis.get_position().x0 for axis in axes]
    assert left[0] < left[1]
    sides = [axis.get_window_extent() for axis in axes]
    assert all(side.width > 0.7 * figure.dpi for side in sides)
    assert figure.get_size_inches().tolist() == pytest.approx([1.5 + 2 * 0.95, 2 * 0.95 + 0.4])
    plt.close(figure)


def test_a_row_holds_a_tile_for_every_column():
    with style(), pytest.raises(ValueError, match="zip"):
        sheet(["one", "two"], [Row(tiles=[EMPTY])])
    plt.close("all")
