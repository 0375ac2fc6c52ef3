"""From the records of all estimators to summary.json, and their figures against the count."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd

from invmm.analysis.statistics import image_groups, rank_correlation
from invmm.analysis.study import finish, found_by_group, read_run, rounded, shown_estimate
from invmm.analysis.style import COLOURS, LABELS, style, subplots
from invmm.probability.certificate import bernoulli_divergence, tightness

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STUDY = Path(__file__).parent
RESULTS = Path("results/calibration")
LIKELY, COUNTABLE = 0.02, 1e-3
DIMENSIONS = 768


def main() -> int:
    """Draws and checks the study."""
    counted = read_run(RESULTS / "counted")
    runs = {
        name: against(counted, read_run(RESULTS / name))
        for name in ("splitting", "trajectory", "published")
    }
    seeds = [runs["published"]] + [
        against(counted, read_run(RESULTS / f"published_seed_{seed}")) for seed in (1, 2)
    ]
    summary = {
        "counted": of_count(counted),
        "splitting": of_splitting(runs["splitting"], counted),
        "trajectory": of_inversion(runs["trajectory"], counted)
        | of_certificate(runs["trajectory"]),
        "published": of_inversion(runs["published"], counted) | {"between_seeds": between(seeds)},
        "trajectory_against_published": compared("trajectory", runs, counted),
        "splitting_against_published": compared("splitting", runs, counted),
    }
    with style():
        figures = {
            "probability": probability_figure(runs["splitting"]),
            "score": score_figure(runs["published"], runs["trajectory"]),
        }
        tables = {"probability": probability_table(runs["splitting"]), "score": score_table(runs)}
        return finish(STUDY, RESULTS, summary, figures, tables)


def against(counted: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """A run's table with the counted probability of each image beside its own columns."""
    columns = ["log_p", "log_p_low", "log_p_high", "count"]
    truth = counted.set_index("image_id")[columns]
    return frame.join(truth.add_prefix("counted_"), on="image_id").assign(
        evaluations=frame.evaluations_forward + frame.evaluations_backward,
        busy_seconds=frame.filter(regex="^seconds_").sum(axis=1),
    )


def of_count(frame: pd.DataFrame) -> dict[str, object]:
    """How the truth is spread."""
    p = np.exp(frame.log_p.dropna().to_numpy(float))
    decades = {"above_1e-1": 0.1, "above_1e-2": 1e-2, "above_1e-3": 1e-3, "above_1e-4": 1e-4}
    above = {name: int((p >= low).sum()) for name, low in decades.items()}
    return {
        "free_samples": int(frame.num_free_samples.max()),
        "images": len(frame),
        "seen": len(p),
        **above,
    }


def of_splitting(frame: pd.DataFrame, counted: pd.DataFrame) -> dict[str, object]:
    """Errors of log p where the count is sure of it."""
    known = frame.loc[frame.counted_log_p >= np.log(COUNTABLE)]
    estimated = known.loc[known.log_p.notna()]
    errors = (estimated.log_p - estimated.counted_log_p).abs()
    overlap = (known.log_p_high >= known.counted_log_p_low) & (
        known.log_p_low.fillna(-np.inf) <= known.counted_log_p_high
    )
    seen = frame.loc[frame.counted_log_p.notna() & frame.log_p.notna()]
    return {
        **cost(frame),
        "countable": len(known),
        "estimated": len(estimated),
        "error_median": rounded(errors.median()),
        "error_largest": rounded(errors.max()),
        "share_within_0_7_nats": rounded((errors <= 0.7).sum() / len(known)),
        "intervals_overlap": rounded(overlap.mean()),
        "spearman_countable": shown_estimate(rank_correlation(estimated, counted, tie_break=True)),
        "spearman_seen": shown_estimate(rank_correlation(seen, counted, tie_break=True)),
        "cost_of_countable": cost(known),
        "cost_of_countable_split": cost(known.loc[known.method == "split"]),
    }


def of_inversion(frame: pd.DataFrame, counted: pd.DataFrame) -> dict[str, object]:
    """What an inversion finds, how tight its scores are, and how they rank."""
    likely = frame.loc[frame.counted_log_p >= np.log(LIKELY)]
    countable = frame.loc[frame.counted_log_p >= np.log(COUNTABLE)]
    scored = countable.loc[countable.score.notna()]
    rates = scored.replication_rate.astype(float)
    tight = [
        tightness(row.score_nats, rate, np.exp(row.counted_log_p))
        for rate, (_, row) in zip(rates, scored.iterrows(), strict=True)
    ]
    return {
        **cost(frame),
        "found": found_by_group(frame),
        "likely": len(likely),
        "likely_found": rounded(likely.score.notna().mean()),
        "countable": len(countable),
        "countable_found": int(countable.score.notna().sum()),
        "score_median": rounded(scored.score.median(), 5),
        "tightness_median": rounded(float(np.median(tight)) if tight else None, 1),
        "spearman_with_p": shown_estimate(rank_correlation(frame, counted, tie_break=True)),
        "spearman_with_p_score_alone": shown_estimate(
            rank_correlation(frame, counted, tie_break=False)
        ),
        "cost_of_found": cost(frame.loc[frame.score.notna()]),
    }


def of_certificate(frame: pd.DataFrame) -> dict[str, object]:
    """Certified bounds against the upper end of the count."""
    certified = frame.loc[frame.log_p_certified.notna()]
    gap = certified.counted_log_p - certified.log_p_certified
    return {
        "certified": len(certified),
        "contradicted": int((certified.log_p_certified > certified.counted_log_p_high).sum()),
        "certified_below_p_median_nats": rounded(gap.median(), 1),
    }


def compared(name: str, runs: dict[str, pd.DataFrame], counted: pd.DataFrame) -> dict[str, object]:
    """A run and the published inversion, on the icons that both measured."""
    both = runs[name].merge(runs["published"], on="image_id", suffixes=("", "_published"))
    scored = both.loc[both.score.notna() & both.score_published.notna()]
    countable = both.loc[both.counted_log_p >= np.log(COUNTABLE), "image_id"]
    ranks = {
        key: rank_correlation(
            runs[run].loc[runs[run].image_id.isin(countable)], counted, tie_break=True
        )
        for key, run in (("", name), ("_published", "published"))
    }
    return {
        "both_measured": len(both),
        "both_found": len(scored),
        "times_lower_median": rounded((scored.score_published / scored.score).median(), 1),
        "evaluations_ratio_median": rounded(
            (both.evaluations / both.evaluations_published).median(), 2
        ),
        "seconds_ratio_median": rounded(
            (both.busy_seconds / both.busy_seconds_published).median(), 2
        ),
        "seconds_ratio_of_all": rounded(
            both.busy_seconds.sum() / both.busy_seconds_published.sum(), 2
        ),
        "countable": len(countable),
        **{f"spearman_with_p{key}": shown_estimate(value) for key, value in ranks.items()},
    }


def between(seeds: list[pd.DataFrame]) -> dict[str, object]:
    """Rank correlation of the published score between seeds, on the icons that all measured."""
    shared = set.intersection(*(set(frame.image_id) for frame in seeds))
    of_pairs = [rank_correlation(a, b, tie_break=True) for a, b in combinations(seeds, 2)]
    return {"images": len(shared), "spearman": [shown_estimate(value) for value in of_pairs]}


def cost(frame: pd.DataFrame) -> dict[str, float | int | None]:
    """Of an image, the bank that all of them share not counted; seconds of one core."""
    evaluations, seconds = frame.evaluations, frame.busy_seconds
    return {
        "images": len(frame),
        "evaluations_median": rounded(evaluations.median(), 1),
        "evaluations_largest": rounded(evaluations.max(), 1),
        "seconds_median": rounded(seconds.median(), 1),
        "seconds_mean": rounded(seconds.mean(), 1),
        "seconds_largest": rounded(seconds.max(), 1),
    }


def probability_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Both probabilities of each icon, their logarithms with 95 % intervals."""
    ends = ["log_p", "log_p_low", "log_p_high"]
    columns = ["image_id", "copies", *(f"counted_{end}" for end in ends), *ends]
    return frame.loc[:, columns]


def score_table(runs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Scores of both inversions beside the counts, one line an icon and inversion."""
    columns = ["image_id", "copies", "counted_log_p", "status", "score"]
    names = ("published", "trajectory")
    return pd.concat(runs[name][columns].assign(inversion=name) for name in names)


def probability_figure(frame: pd.DataFrame) -> Figure:
    """Splitting against the count, with 95 % intervals; what was not seen stands at its limit."""
    figure, axis = subplots(figsize=(4.8, 4.2))
    unseen, censored = frame.counted_log_p.isna(), frame.log_p.isna()
    floor = frame.counted_log_p_high.min()
    logs = {
        "truth": frame.counted_log_p.fillna(floor),
        "truth_low": frame.counted_log_p_low.where(~unseen, floor),
        "truth_high": frame.counted_log_p_high,
        "found": frame.log_p.fillna(frame.log_p_high),
        "found_low": frame.log_p_low.fillna(frame.log_p_high),
        "found_high": frame.log_p_high,
    }
    p = pd.DataFrame(logs).astype(float).apply(np.exp)
    for key, mine in p.groupby([image_groups(frame), unseen, censored]):
        group, is_unseen, is_censored = cast("tuple[str, bool, bool]", key)
        colour = COLOURS[group]
        axis.errorbar(
            mine.truth,
            mine.found,
            xerr=[mine.truth - mine.truth_low, mine.truth_high - mine.truth],
            yerr=[mine.found - mine.found_low, mine.found_high - mine.found],
            fmt="v" if is_censored else "o",
            markersize=4,
            color=colour,
            markerfacecolor="none" if is_unseen else colour,
            ecolor=(colour, 0.35),
            elinewidth=0.8,
        )
    for group, colour in list(COLOURS.items())[:3]:
        axis.scatter([], [], 14, color=colour, label=LABELS[group])
    grey = COLOURS["unknown"]
    axis.scatter([], [], 14, edgecolors=grey, facecolors="none", label="never counted: its limit")
    axis.scatter([], [], 14, color=grey, marker="v", label="censored: its limit")
    axis.axline((1e-3, 1e-3), slope=1, color="#999999", linewidth=0.8)
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel("counted probability")
    axis.set_ylabel("probability by splitting")
    axis.legend(frameon=False, fontsize=7, loc="upper left")
    return figure


def score_figure(published: pd.DataFrame, ours: pd.DataFrame) -> Figure:
    """Scores against counted probability, with the least score that is possible."""
    figure, axis = subplots(figsize=(4.6, 3.6))
    for frame, name, marker, colour in (
        (published, "published", "s", COLOURS["duplicated"]),
        (ours, "trajectory", "o", COLOURS["single"]),
    ):
        scored = frame.loc[frame.score.notna() & frame.counted_log_p.notna()]
        axis.scatter(
            np.exp(scored.counted_log_p.to_numpy(float)),
            scored.score,
            s=16,
            marker=marker,
            color=colour,
            label=f"{name} ({len(scored)} of {int(frame.counted_log_p.notna().sum())} found)",
        )
    p = np.geomspace(1e-4, 0.3, 100)
    floor = [bernoulli_divergence(0.9, value) / DIMENSIONS for value in p]
    axis.plot(p, floor, color="#444444", linewidth=1, label="least possible at a rate of 0.9")
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel("counted probability")
    axis.set_ylabel("score, nats per latent dimension")
    axis.legend(frameon=False, fontsize=7)
    return figure


if __name__ == "__main__":
    sys.exit(main())
