"""From the records of all checkpoints to summary.json, a table of images, and curves by step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from invmm.analysis.sheet import Row, image_over_runs, sheet
from invmm.analysis.statistics import (
    Estimate,
    Proportion,
    median_interval,
    proportion,
    rank_correlation,
)
from invmm.analysis.study import (
    finish,
    found_by_group,
    read_run,
    rounded,
    separation,
    share_table,
    shown_estimate,
)
from invmm.analysis.style import COLOURS, LABELS, copies_label, one_line, style, subplots
from invmm.results.records import read_replicas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STUDY = Path(__file__).parent
RESULTS = Path("results/training_steps")
MEASUREMENTS = {
    "counted": "counted: least possible",
    "splitting": "splitting: least possible",
    "trajectory": "inversion=trajectory",
    "adaptive": "inversion=adaptive",
}
SPLIT_FROM = 400
"""Step of the first checkpoint at which run.sh splits."""
COPIES = (32, 16, 8, 4, 2, 1, 0)
THRESHOLD = 0.5

Runs = dict[int, dict[str, pd.DataFrame]]
"""Training step -> measurement -> score table."""


def main() -> int:
    """Draws and checks the study."""
    runs: Runs = {
        step: {
            name: read_run(run_dir(name, step))
            for name in MEASUREMENTS
            if name != "splitting" or step >= SPLIT_FROM
        }
        for step in steps()
    }
    summary = {f"step_{step:06d}": of_step(step, frames) for step, frames in runs.items()}
    tables = {"sampling": sampling_table(summary), "images": images(runs), "shares": shares(runs)}
    with style():
        figures = {
            "icons": icon_sheet(runs),
            "sampling": sampling_figure(runs),
            "scores": score_figure(runs),
        }
        return finish(STUDY, RESULTS, summary, figures, tables)


def steps() -> list[int]:
    """At which the model was exported."""
    folders = (RESULTS / "model").glob("step_*")
    found = sorted(int(folder.name.removeprefix("step_")) for folder in folders)
    if not found:
        raise SystemExit(
            f"{RESULTS / 'model'} has no checkpoints; `make study STUDY=training_steps` trains them"
        )
    return found


def run_dir(measurement: str, step: int) -> Path:
    """Where run.sh measured a checkpoint."""
    return RESULTS / f"{measurement}_{step:06d}"


def images(runs: Runs) -> pd.DataFrame:
    """One line an image, measurement and step."""
    columns = ["image_id", "caption", "copies", "status", "score", "best_similarity"]
    probability = ["log_p", "log_p_low", "log_p_high"]
    return pd.concat(
        frame.reindex(columns=columns + probability).assign(step=step, measurement=name)
        for step, frames in runs.items()
        for name, frame in frames.items()
    )


def shares(runs: Runs) -> pd.DataFrame:
    """Images with a score of those that the trajectories measured, by step and measurement."""
    return pd.concat(
        share_table(of_subset(runs, name), "step").assign(measurement=name) for name in MEASUREMENTS
    )


def sampling_table(summary: dict[str, dict]) -> pd.DataFrame:
    """What free samples return, one line a step and number of copies."""
    lines = []
    for step, found in summary.items():
        for copies in COPIES:
            statistics = found[f"copies_{copies}"]
            lines.append({"step": int(step.removeprefix("step_")), "copies": copies})
            for name in ("returned", "p_mean", "best_similarity"):
                ends = statistics[name] or {"value": None, "low": None, "high": None}
                lines[-1] |= {f"{name}_{end}": value for end, value in ends.items()}
    return pd.DataFrame(lines)


def of_step(step: int, frames: dict[str, pd.DataFrame]) -> dict[str, object]:
    """What a checkpoint returns, by number of copies, and what the inversions find in it."""
    counted = frames["counted"]
    by_copies = {
        f"copies_{copies}": {
            "images": len(mine),
            "returned": shown_estimate(returned(step, mine)),
            "p_mean": shown_estimate(mean_probability(step, mine)),
            "best_similarity": shown_estimate(best_similarity(step, mine)),
        }
        for copies, mine in of_copies(counted)
    }
    inversions = {
        name: {
            "found": found_by_group(frame),
            **separation(frame),
            "score_median": rounded(frame.score.median(), 5),
            "spearman_with_p": shown_estimate(rank_correlation(frame, counted, tie_break=True)),
            "spearman_with_p_score_alone": shown_estimate(
                rank_correlation(frame, counted, tie_break=False)
            ),
            "evaluations_median": float(
                (frame.evaluations_forward + frame.evaluations_backward).median()
            ),
            "failed": int(frame.status.isin(["FAILED", "DIVERGED"]).sum()),
        }
        for name, frame in frames.items()
        if name in ("trajectory", "adaptive")
    }
    split = (
        {"splitting": of_splitting(frames["splitting"], counted)} if "splitting" in frames else {}
    )
    return {
        "free_samples": int(counted.num_free_samples.max()),
        **by_copies,
        **split,
        **inversions,
    }


def of_splitting(split: pd.DataFrame, counted: pd.DataFrame) -> dict[str, object]:
    """How many icons splitting gives a probability, and in how many it contradicts the count."""
    both = split.merge(counted, on="image_id", suffixes=("", "_counted"))
    contradicted = (both.log_p_high < both.log_p_low_counted) | (
        both.log_p_low > both.log_p_high_counted
    )
    return {
        "icons": len(split),
        "estimated": int(split.score.notna().sum()),
        "contradicted": int(contradicted.sum()),
        "one_in": {
            f"copies_{copies}": rounded(mine.one_in.median(), 1)
            for copies, mine in of_copies(split)
            if len(mine)
        },
    }


def of_copies(frame: pd.DataFrame) -> Iterator[tuple[int, pd.DataFrame]]:
    """The images of each number of copies, from the most."""
    for copies in COPIES:
        yield copies, frame.loc[frame.copies == copies]


def returned(step: int, mine: pd.DataFrame) -> Estimate:
    """Share of the images that any free sample replicates."""
    return as_estimate(proportion(len(mine.loc[mine["count"] > 0]), len(mine)))


def mean_probability(step: int, mine: pd.DataFrame) -> Estimate:
    """Share of the free samples that replicate any of the images, an image.

    Its interval is exact for these images, whose counts come from one bank.
    """
    found = {
        int(index)
        for record in mine.to_dict("records")
        for index in read_replicas(run_dir("counted", step), record)
    }
    share = as_estimate(proportion(len(found), int(mine.num_free_samples.max())))
    return Estimate(*(end / len(mine) for end in (share.value, share.low, share.high)))


def best_similarity(step: int, mine: pd.DataFrame) -> Estimate | None:
    """Median over the images of the closest free sample's similarity."""
    return median_interval(mine.best_similarity.to_numpy(float))


def as_estimate(share: Proportion) -> Estimate:
    """A share with its exact interval."""
    return Estimate(share.count / share.total, share.low, share.high)


def sampling_figure(runs: Runs) -> Figure:
    """What free samples return over the training, by number of copies."""
    figure, (shares, probabilities, similarities) = subplots(1, 3, figsize=(9.6, 3.2))
    curves(shares, runs, returned)
    shares.set_ylabel("share of icons returned")
    probabilities.set_yscale("log")
    curves(probabilities, runs, mean_probability)
    probabilities.set_ylabel("mean probability of an icon")
    curves(similarities, runs, best_similarity)
    similarities.axhline(THRESHOLD, color="#999999", linewidth=0.8)
    similarities.set_ylabel("closest sample, median similarity")
    return with_legend(figure, shares)


def curves(
    axis: Axes, runs: Runs, statistic: Callable[[int, pd.DataFrame], Estimate | None]
) -> None:
    """A statistic of the counts with its 95 % interval, one line a number of copies.

    On a logarithmic axis, zeros are drawn hollow at their upper limit.
    """
    is_log = axis.get_yscale() == "log"
    for place, copies in enumerate(COPIES):
        colour, shift = colour_of(copies), 1.03 ** (place - len(COPIES) // 2)
        found = [
            (step * shift, point)
            for step, frames in runs.items()
            if (point := statistic(step, dict(of_copies(frames["counted"]))[copies])) is not None
        ]
        drawn = [(at, point) for at, point in found if point.value > 0 or not is_log]
        limits = [(at, point.high) for at, point in found if point.value == 0 and is_log]
        axis.errorbar(
            [at for at, _ in drawn],
            [point.value for _, point in drawn],
            yerr=[
                [point.value - point.low for _, point in drawn],
                [point.high - point.value for _, point in drawn],
            ],
            fmt="o-",
            markersize=3,
            linewidth=0.8,
            elinewidth=0.5,
            color=colour,
            label=copies_label(copies),
        )
        axis.scatter(*np.reshape(limits, (-1, 2)).T, s=9, facecolors="none", edgecolors=colour)
    by_step(axis, list(runs))


def icon_sheet(runs: Runs) -> Figure:
    """An icon of each number of copies beside the closest free sample of each checkpoint."""
    last = list(runs.values())[-1]
    measured = last["counted"].loc[last["counted"].image_id.isin(last["trajectory"].image_id)]
    counted = {run_dir("counted", step): frames["counted"] for step, frames in runs.items()}
    rows = []
    for copies, mine in of_copies(measured):
        for _, icon in mine.head(1).iterrows():
            name = f"{one_line(str(icon.caption), 22)}\n{copies_label(copies)}"
            tiles = image_over_runs(counted, str(icon.image_id))
            rows.append(Row(tiles=tiles, name=name, colour=colour_of(copies)))
    return sheet(["icon", *(f"step {step:,}" for step in runs)], rows)


def score_figure(runs: Runs) -> Figure:
    """Scores of the same icons over the training, and how many of them have one."""
    figure, axes = subplots(
        2, 4, figsize=(9.6, 4.6), sharex=True, sharey="row", height_ratios=[2, 1]
    )
    for (above, below), name in zip(axes.T, MEASUREMENTS, strict=True):
        frames = of_subset(runs, name)
        table = pd.concat(frame.assign(step=step) for step, frame in frames.items())
        for copies in COPIES:
            for _, mine in table.loc[table.copies == copies].groupby("image_id"):
                above.plot(
                    mine.step,
                    mine.score,
                    "o-",
                    markersize=3,
                    linewidth=0.8,
                    color=colour_of(copies),
                )
            above.plot(
                [], [], "o-", markersize=3, color=colour_of(copies), label=copies_label(copies)
            )
        shares_of_groups(below, frames)
        above.set_yscale("log")
        above.set_title(f"{MEASUREMENTS[name]} ({len(next(iter(frames.values())))})", fontsize=8)
        by_step(below, list(runs))
    axes[0, 0].set_ylabel("score, nats per latent dimension")
    axes[1, 0].set_ylabel("share with a score")
    return with_legend(figure, *axes[:, 0])


def of_subset(runs: Runs, name: str) -> dict[int, pd.DataFrame]:
    """Step -> a measurement's table; of the counts, the images that the trajectories measured."""
    return {
        step: frames[name].loc[frames[name].image_id.isin(frames["trajectory"].image_id)]
        for step, frames in runs.items()
        if name in frames
    }


def shares_of_groups(axis: Axes, frames: dict[int, pd.DataFrame]) -> None:
    """Share of the images of each group with a score; the others are censored."""
    for place, group in enumerate(list(COLOURS)[:3]):
        found = [found_by_group(frame)[group] for frame in frames.values()]
        if not any(one["of"] for one in found):
            continue
        share = np.array([one["found"] / max(one["of"], 1) for one in found])
        ends = np.array([[one["low"], one["high"]] for one in found]).T
        axis.errorbar(
            np.array(list(frames)) * 1.05 ** (place - 1),
            share,
            yerr=np.abs(ends - share),
            fmt="o-",
            markersize=3,
            linewidth=0.8,
            elinewidth=0.5,
            color=COLOURS[group],
            label=LABELS[group],
        )


def by_step(axis: Axes, steps: list[int]) -> None:
    """The axis of training steps."""
    axis.set_xscale("log")
    axis.set_xticks(steps, [str(step) for step in steps], fontsize=6)
    axis.minorticks_off()
    axis.set_xlabel("training step")


def with_legend(figure: Figure, *axes: Axes) -> Figure:
    """What the colours mean, each once, above the whole figure."""
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="upper center",
        ncols=len(handles),
        frameon=False,
        fontsize=7,
    )
    return figure


def colour_of(copies: int) -> str:
    """The darker, the more copies; of one copy and none, those of their groups."""
    if copies <= 1:
        return COLOURS["single" if copies else "held_out"]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["YlOrBr"](0.3 + 0.14 * np.log2(copies)))


if __name__ == "__main__":
    sys.exit(main())
