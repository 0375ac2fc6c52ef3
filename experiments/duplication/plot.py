"""From the records of all trainings to summary.json, tables, and what copies do to p and scores."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from invmm.analysis.sheet import EMPTY, Row, Tile, image_and_closest, sheet
from invmm.analysis.statistics import Estimate, memorization_order, proportion
from invmm.analysis.study import finish, read_run, rounded, shown_estimate
from invmm.analysis.style import COLOURS, copies_label, one_line, style, subplots
from invmm.results.collect import has_score, is_censored

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STUDY = Path(__file__).parent
RESULTS = Path("results/duplication")
TRAININGS = (0, 1, 2)
COPIES = (0, 1, 2, 4, 8, 16, 32, 64)
MEASUREMENTS = {
    "counted": ("counted, 4,096 free samples", COLOURS["unknown"]),
    "trajectory": ("inversion=trajectory", COLOURS["single"]),
    "adaptive": ("inversion=adaptive", COLOURS["duplicated"]),
}


def main() -> int:
    """Draws and checks the study."""
    runs = {name: of_all_trainings(name) for name in MEASUREMENTS}
    table = estimates(runs)
    summary = {name: of_measurement(name, frame, table) for name, frame in runs.items()}
    summary["same_icon"] = same_icon(runs["counted"])
    with style():
        figures = {
            "copies": copies_figure(runs, table),
            "icons": icon_sheet(runs["counted"]),
        }
        tables = {"images": images(runs), "estimates": table}
        return finish(STUDY, RESULTS, summary, figures, tables)


def of_all_trainings(name: str) -> pd.DataFrame:
    """A measurement's score tables, with the seed of the training."""
    return pd.concat(
        [read_run(RESULTS / f"{name}_{seed}").assign(training=seed) for seed in TRAININGS],
        ignore_index=True,
    )


def images(runs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One line an icon, measurement and training."""
    columns = ["measurement", "training", "image_id", "caption", "copies", "status", "score"]
    columns += ["best_similarity", "count", "num_free_samples"]
    frames = [frame.assign(measurement=name) for name, frame in runs.items()]
    return pd.concat(frames).reindex(columns=columns)


def estimates(runs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One line a measurement, number of copies and statistic, with its 95 % interval."""
    lines = []
    for name, frame in runs.items():
        measured = frame.loc[has_score(frame) | is_censored(frame)]
        for copies in COPIES:
            mine = measured.loc[measured.copies == copies]
            if mine.empty:
                continue
            about = {"measurement": name, "copies": copies, "images": len(mine)}
            lines += [
                {**about, "statistic": statistic, **asdict(estimate)}
                for statistic, estimate in of_copies(mine).items()
                if estimate is not None
            ]
    return pd.DataFrame(lines)


def of_copies(mine: pd.DataFrame) -> dict[str, Estimate | None]:
    """What icons of one number of copies have in common; scores of those that have one."""
    scored = mine.loc[has_score(mine)]
    found = proportion(len(scored), len(mine))
    estimated: dict[str, Estimate | None] = {
        "found": Estimate(found.count / found.total, found.low, found.high),
        "score_median": nested_interval(np.median, by_training(scored, scored.score)),
        "similarity_median": nested_interval(np.median, by_training(mine, mine.best_similarity)),
    }
    if "count" in mine:
        p = by_training(mine, mine["count"] / mine.num_free_samples)
        estimated["p_median"] = nested_interval(np.median, p)
        estimated["p_mean"] = nested_interval(np.mean, p)
    return estimated


def by_training(frame: pd.DataFrame, values: pd.Series) -> list[np.ndarray]:
    """The values of each training's icons."""
    return [values.loc[frame.training == seed].to_numpy(float) for seed in TRAININGS]


def nested_interval(
    statistic: Callable[[np.ndarray], float],
    trainings: Sequence[np.ndarray],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate | None:
    """A statistic over the icons of all trainings, with its 95 % percentile interval.

    Trainings are drawn with replacement, and from each of them its icons, since icons of one
    training share a model. Few trainings make such an interval too narrow rather than too wide.

    Args:
        statistic: of the rows of all icons; NaN where it is not defined.
        trainings: of each training, one row an icon.
        resamples: drawn with replacement.
        seed: of them.

    Returns:
        None if fewer than two trainings have icons, or the statistic is not defined.
    """
    trainings = [rows for rows in trainings if len(rows)]
    if len(trainings) < 2 or np.isnan(value := statistic(np.concatenate(trainings))):
        return None
    rng = np.random.default_rng(seed)

    def drawn() -> np.ndarray:
        chosen = rng.integers(len(trainings), size=len(trainings))
        return np.concatenate([rng.choice(trainings[i], len(trainings[i])) for i in chosen])

    found = [statistic(drawn()) for _ in range(resamples)]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))


def of_measurement(name: str, frame: pd.DataFrame, table: pd.DataFrame) -> dict[str, object]:
    """What a measurement says of each number of copies, and how its ranks follow them."""
    found: dict[str, object] = {
        "images": len(frame),
        "failed": int(frame.status.isin(["FAILED", "DIVERGED"]).sum()),
        "spearman_with_copies": shown_estimate(correlation(frame, tie_break=True)),
        "spearman_with_copies_score_alone": shown_estimate(correlation(frame, tie_break=False)),
    }
    own = table.loc[table.measurement == name]
    for copies, lines in own.groupby("copies"):
        found[f"copies_{copies}"] = {"images": int(lines.images.iloc[0])} | {
            line["statistic"]: {end: rounded(line[end], 5) for end in ("value", "low", "high")}
            for line in lines.to_dict("records")
        }
    return found


def correlation(frame: pd.DataFrame, *, tie_break: bool) -> Estimate | None:
    """Spearman's with the number of copies, over the icons trained on, censored ones last."""
    trained = frame.loc[(has_score(frame) | is_censored(frame)) & (frame.copies > 0)]
    rows = np.column_stack(
        [memorization_order(trained, tie_break=tie_break), trained.copies.to_numpy(float)]
    )
    return nested_interval(spearman, [rows[trained.training == seed] for seed in TRAININGS])


def spearman(rows: np.ndarray) -> float:
    """Spearman's correlation of the two columns of (n, 2); NaN if one of them is constant."""
    if (rows == rows[0]).all(0).any():
        return float("nan")
    found: Any = spearmanr(rows)
    return float(found.statistic)


def same_icon(counted: pd.DataFrame) -> dict[str, object]:
    """Does the training with more copies of an icon return it more often than another one?

    Over all pairs of trainings that both saw an icon, in different numbers; an icon's own nature
    cancels out.
    """
    pairs = counted.merge(counted, on="image_id", suffixes=("_more", "_fewer"))
    pairs = pairs.loc[(pairs.copies_more > pairs.copies_fewer) & (pairs.copies_fewer > 0)]
    more = int((pairs.count_more > pairs.count_fewer).sum())
    fewer = int((pairs.count_more < pairs.count_fewer).sum())
    share = proportion(more, more + fewer)
    return {
        "pairs": len(pairs),
        "returned_more_often": more,
        "returned_less_often": fewer,
        "share_low": rounded(share.low),
        "share_high": rounded(share.high),
    }


def copies_figure(runs: dict[str, pd.DataFrame], table: pd.DataFrame) -> Figure:
    """Probabilities, shares found and scores against the number of copies."""
    figure, (probabilities, shares, scores) = subplots(1, 3, figsize=(9.6, 3.4))
    counted = runs["counted"]
    samples = int(counted.num_free_samples.max())
    p = counted["count"] / counted.num_free_samples
    icons(probabilities, counted, p, COLOURS["unknown"], spread=0.18)
    intervals(probabilities, table.loc[table.statistic == "p_median"], "black", 0.35)
    for offset, (name, (label, colour)) in zip(
        (-0.22, 0.0, 0.22), MEASUREMENTS.items(), strict=True
    ):
        own = table.loc[table.measurement == name]
        icons(scores, runs[name], runs[name].score, colour, spread=0.06, offset=offset)
        intervals(scores, own.loc[own.statistic == "score_median"], colour, offset)
        intervals(shares, own.loc[own.statistic == "found"], colour, offset, label)
    probabilities.set_yscale("symlog", linthresh=1 / samples)
    probabilities.set_ylim(bottom=-0.2 / samples)
    probabilities.set_ylabel(f"counted probability ({samples:,} free samples)")
    shares.set_ylim(-0.03, 1.03)
    shares.set_ylabel("icons with a score (exact 95 % interval)")
    scores.set_yscale("log")
    scores.set_ylabel("score, nats per latent dimension")
    for axis in (probabilities, shares, scores):
        axis.set_xticks(range(len(COPIES)), ["held out", *map(str, COPIES[1:])], fontsize=7)
        axis.set_xlabel("copies in the training set")
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.legend(
        *shares.get_legend_handles_labels(), loc="upper center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def icon_sheet(counted: pd.DataFrame) -> Figure:
    """The first icon of each training and number of copies, beside the closest free sample."""
    rows = []
    for copies in reversed(COPIES):
        tiles: list[Tile] = []
        for seed in TRAININGS:
            mine = counted.loc[(counted.training == seed) & (counted.copies == copies)]
            if mine.empty:
                tiles += [EMPTY, EMPTY]
                continue
            icon = mine.iloc[0]
            image, closest = image_and_closest(RESULTS / f"counted_{seed}", icon)
            tiles += [replace(image, title=one_line(str(icon.caption), 14)), closest]
        rows.append(Row(tiles=tiles, name=copies_label(copies)))
    columns = [name for seed in TRAININGS for name in (f"training {seed}", "its closest")]
    return sheet(columns, rows)


def icons(
    axis: Axes,
    frame: pd.DataFrame,
    values: pd.Series,
    colour: str,
    *,
    spread: float,
    offset: float = 0.0,
) -> None:
    """A dot an icon, trainings side by side; icons without a value have none."""
    places = frame.copies.map(COPIES.index) + offset + spread * (frame.training - 1)
    axis.scatter(places, values, s=7, color=colour, alpha=0.35, linewidths=0)


def intervals(
    axis: Axes, lines: pd.DataFrame, colour: str, offset: float, label: str | None = None
) -> None:
    """An estimate with its 95 % interval at each number of copies."""
    places = lines.copies.map(COPIES.index) + offset
    axis.vlines(places, lines.low, lines.high, color=colour, linewidth=1.0)
    axis.plot(places, lines.value, "_", markersize=7, color=colour, label=label)


if __name__ == "__main__":
    sys.exit(main())
