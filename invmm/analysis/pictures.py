"""Pictures of a run: a gallery of images with their closest samples, and a histogram of scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from invmm.analysis.statistics import image_groups, near_duplicate_groups
from invmm.analysis.style import COLOURS, LABELS, one_line, save_figure, style, subplots
from invmm.analysis.table import shown_draws, shown_score
from invmm.engine.outcomes import Status
from invmm.results.collect import has_score, is_censored, is_membership, ranked
from invmm.results.records import read_pictures

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MAX_GALLERY_ROWS = 32
MAX_GALLERY_SAMPLES = 8
MAX_GALLERY_DUPLICATES = 4
"""Largest number of images shown of one near-duplicate group."""
_HEADER_INCHES = 0.7


def gallery(run_dir: Path, frame: pd.DataFrame) -> Path:
    """Draws gallery.png: each image beside its closest samples, most memorized first.

    Near-duplicates follow the first of their group, with a bar at their left. Membership scores
    have no samples: the gallery shows the images alone, most like a training image first.
    """
    from matplotlib.patches import Patch

    of_membership = is_membership(frame)
    drawn = has_score(frame) if of_membership else frame.num_samples > 0
    shown = _together(ranked(frame.loc[drawn])).head(MAX_GALLERY_ROWS)
    alike = frame.near_duplicate_group.value_counts()
    columns = 1 + int(min(shown.num_samples.max() if len(shown) else 0, MAX_GALLERY_SAMPLES))
    with style():
        rows = max(len(shown), 1)
        height = rows + _HEADER_INCHES
        figure, axes = subplots(rows, columns, figsize=(columns, height), squeeze=False)
        figure.subplots_adjust(left=0, right=1, bottom=0, top=rows / height)
        for axis in axes.flat:
            axis.set_axis_off()
        groups = image_groups(shown).tolist()
        for row, group, (_, record) in zip(axes, groups, shown.iterrows(), strict=False):
            _gallery_row(row, run_dir, record, group, alike.get(record.near_duplicate_group, 1))
        for places in shown.groupby("near_duplicate_group").indices.values():
            _tie(axes[places[0], 0], axes[places[-1], 0])
        left_out = len(frame) - len(shown)
        rest = f" ({left_out} more in scores.csv)" if left_out else ""
        title = "image, then its closest samples" if len(shown) else "no image was sampled"
        if of_membership:
            title = "most like a training image first"
        figure.suptitle(f"{title}{rest}", x=0.0, y=1.0, ha="left", va="top")
        figure.legend(
            handles=[Patch(color=COLOURS[g], label=LABELS[g]) for g in COLOURS if g in groups],
            loc="upper left",
            bbox_to_anchor=(0.0, 1 - _HEADER_INCHES / 3 / height),
            ncols=len(COLOURS),
            frameon=False,
            borderaxespad=0,
        )
        save_figure(figure, run_dir / "gallery.png")
    return run_dir / "gallery.png"


def score_histogram(run_dir: Path, frame: pd.DataFrame) -> Path:
    """Draws scores.png: scores by group, with the censored images in a bar at the right."""
    groups = image_groups(frame)
    scored, censored_images = has_score(frame), is_censored(frame)
    of_membership = is_membership(frame)
    scores = frame.score[scored]
    edges = np.linspace(0, float(scores.max() if len(scores) else 1.0) or 1.0, 16)
    with style():
        figure, (axis, censored) = subplots(
            1, 2, figsize=(6.4, 2.8), width_ratios=[5, 1], sharey=True
        )
        present = [group for group in COLOURS if (groups == group).any()]
        if present:
            axis.hist(
                [frame.score[scored & (groups == group)].to_numpy() for group in present],
                bins=edges.tolist(),
                stacked=True,
                color=[COLOURS[group] for group in present],
                label=[LABELS[group] for group in present],
            )
            axis.legend(frameon=False)
        what = "-log p" if (frame.status == "ESTIMATED").any() else "InvMM"
        axis.set_xlabel(
            "membership score (lower: more like a training image)"
            if of_membership
            else f"{what}, nats per latent dimension (lower: more memorized)"
        )
        axis.set_ylabel("images")
        axis.yaxis.get_major_locator().set_params(integer=True)
        bottom = 0
        for group in present:
            count = int((censored_images & (groups == group)).sum())
            censored.bar([0], [count], bottom=bottom, color=COLOURS[group])
            bottom += count
        censored.set_xticks([0], ["not found\nwithin the budget"])
        censored.set_visible(not of_membership)
        save_figure(figure, run_dir / "scores.png")
    return run_dir / "scores.png"


def _together(frame: pd.DataFrame) -> pd.DataFrame:
    """A ranked table, regrouped so that some near-duplicates of an image follow it directly."""
    groups = frame.groupby(near_duplicate_groups(frame), sort=False)
    places = groups.ngroup()[groups.cumcount() < MAX_GALLERY_DUPLICATES]
    return frame.loc[places.sort_values(kind="stable").index]


def _gallery_row(
    row: np.ndarray, run_dir: Path, record: pd.Series, group: str, num_alike: int
) -> None:
    pictures = read_pictures(run_dir, record.to_dict())
    for axis, picture in zip(row, pictures, strict=False):
        axis.imshow(picture, interpolation="nearest" if len(picture) < 128 else "antialiased")
    _frame(row[0], COLOURS[group])
    name = record.image_id if record.caption is None or record.isna().caption else record.caption
    copies = "" if record.isna().copies else f", {record.copies}x in training"
    lines = [f"{one_line(name, 34)}{copies}", *_result_lines(record)]
    if num_alike > 1:
        lines.append(f"one of {num_alike} near-duplicates")
    row[0].text(
        -0.15,
        0.5,
        "\n".join(lines),
        parse_math=False,
        transform=row[0].transAxes,
        ha="right",
        va="center",
        fontsize=8,
    )


def _result_lines(record: pd.Series) -> list[str]:
    """The result of a measurement as lines for the gallery."""
    empty, draws = record.isna(), shown_draws(record)
    parts = [] if record.status == Status.SCORED else [record.status.lower().replace("_", " ")]
    if not empty.get("num_free_samples", True):
        parts = [f"{record['count']:,.0f} of {record.num_free_samples:,.0f} free samples"]
    elif not draws and not empty.score:
        parts.append(f"score {shown_score(record)}")
    if not empty.best_similarity:
        parts.append(f"similarity {record.best_similarity:.2f}")
    return [", ".join(parts), *([f"one in {draws} draws"] if draws else [])]


def _tie(first: Axes, last: Axes) -> None:
    """Draws a bar at the left of near-duplicates, from the first to the last."""
    from matplotlib.patches import ConnectionPatch

    first.add_artist(
        ConnectionPatch(
            (-0.07, 1), (-0.07, 0), first.transAxes, last.transAxes, color="black", linewidth=2
        )
    )


def _frame(axis: Axes, colour: str) -> None:
    axis.set_axis_on()
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(True)
        spine.set_color(colour)
        spine.set_linewidth(2)
