"""The table and the summary that are printed at the end of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invmm.analysis.separation import contrast
from invmm.analysis.statistics import found_shares, image_groups, proportion
from invmm.analysis.style import LABELS, one_line
from invmm.engine.outcomes import Spent, Status
from invmm.results.collect import (
    has_score,
    has_shared_bank,
    is_censored,
    is_membership,
    ranked,
)
from invmm.results.records import read_replicas

if TYPE_CHECKING:
    import pandas as pd

MAX_ROWS = 40
_NAME_WIDTH = 34
_COLUMNS = {
    "image": f"<{_NAME_WIDTH}",
    "copies": ">6",
    "status": "<14",
    "score": ">8",
    "nats": ">8",
    "similarity": ">10",
    "steps": ">6",
    "evaluations": ">11",
}
"""Columns of the table -> their format."""
_OF_MEMBERSHIP = ("image", "copies", "status", "score", "evaluations")
"""Columns of the table for membership scores."""
_ERROR_WIDTH = 300
_GROUP_WIDTH = 300
_LARGEST_EXPONENT = 700.0  # of what a double can hold


def table(frame: pd.DataFrame) -> str:
    """The most memorized images, one line each, or those most like a training image."""
    names = _OF_MEMBERSHIP if is_membership(frame) else tuple(_COLUMNS)
    last = {column: shown for column, shown in _LAST.items() if column in frame}
    header = " ".join(f"{name:{_COLUMNS[name]}}" for name in names)
    header += "".join(
        f"  {name.format(**frame.max(numeric_only=True))}" for name, _ in last.values()
    )
    lines = [header, "-" * len(header)]
    for _, row in ranked(frame).head(MAX_ROWS).iterrows():
        cells = _cells(row)
        line = " ".join(f"{cells[name]:{_COLUMNS[name]}}" for name in names)
        lines.append(line + "".join(f"  {shown(row)}" for _, shown in last.values()))
    if len(frame) > MAX_ROWS:
        lines.append(f"... and {len(frame) - MAX_ROWS} more in scores.csv")
    return "\n".join(lines)


def shown_score(row: pd.Series) -> str:
    """A score to three decimals, a membership score to three digits; "" if there is none."""
    if row.isna().score:
        return ""
    return f"{row.score:.3g}" if row.status == Status.SCORED else f"{row.score:.3f}"


def shown_draws(row: pd.Series) -> str:
    """Draws per replica with their 95 % interval, or a bound if censored; "" if not estimated."""
    empty = row.isna()
    if not empty.get("one_in", True):
        few, many = math.exp(-row.log_p_high), math.exp(min(-row.log_p_low, _LARGEST_EXPONENT))
        return f"{row.one_in:,.0f} ({few:,.0f} to {many:,.0f})"
    if not empty.get("log_p_high", True):
        return f"more than {math.exp(min(-row.log_p_high, _LARGEST_EXPONENT)):,.0f}"
    return ""


def shown_confirmation(row: pd.Series) -> str:
    """The fresh samples that replicated, with their interval; "" if none were drawn."""
    if row.isna().confirm_drawn:
        return ""
    counted = f"{row.confirm_passed:.0f} of {row.confirm_drawn:.0f}"
    return f"{counted} ({row.rate_low:.0%} to {row.rate_high:.0%})"


def shown_repeats(row: pd.Series) -> str:
    """How many repeats found a score, and the least and largest of them; "" without repeats."""
    if row.isna().num_found:
        return ""
    count = f"{row.num_found:.0f}"
    return (
        count if row.isna().score_low else f"{count}, {row.score_low:.3f} to {row.score_high:.3f}"
    )


_LAST = {
    "num_found": ("found, score of {repeats:.0f} repeats", shown_repeats),
    "one_in": ("one in ... draws (95 %)", shown_draws),
    "confirm_drawn": ("fresh replicas (95 %)", shown_confirmation),
}
"""Column of a score table -> header and text of the last column of the table that it adds."""


def summary(frame: pd.DataFrame) -> str:
    """Results by group, how well the score separates the groups, and images without a result."""
    scored = has_score(frame)
    measured = scored | is_censored(frame)
    groups = image_groups(frame)
    if is_membership(frame):
        lines = _membership(frame.loc[scored], groups.loc[scored])
    else:
        lines = _memorization(frame.loc[measured], groups.loc[measured])
    unmeasured = frame[~measured]
    for _, row in unmeasured.head(MAX_ROWS).iterrows():
        name, error = one_line(row.image_id, _NAME_WIDTH), one_line(str(row.error), _ERROR_WIDTH)
        lines.append(f"{row.status} {name}: {error}")
    if len(unmeasured) > MAX_ROWS:
        lines.append(f"... and {len(unmeasured) - MAX_ROWS} more without a result in scores.csv")
    return "\n".join(lines)


def _memorization(measured: pd.DataFrame, groups: pd.Series) -> list[str]:
    """Replicated images by group, false alarms, and both rankings."""
    of_probability = measured.status.isin((Status.ESTIMATED, Status.CENSORED)).any()
    success = "p estimated for" if of_probability else "replicated"
    lines = []
    for group, share in found_shares(measured).items():
        if share.total:
            name = "held_out (false alarms)" if group == "held_out" else group
            lines.append(f"{name}: {success} {share}")
    for tie_break in (True, False):
        how = ", score, ties broken by best similarity" if tie_break else ", score alone"
        lines += _separation(measured, groups, ("duplicated",), how, tie_break=tie_break)
    return lines


def _membership(scored: pd.DataFrame, groups: pd.Series) -> list[str]:
    """Scores by group, and how well they separate training images from held-out ones."""
    lines = ["membership scores: lower is more like a training image"]
    for group in LABELS:
        mine = scored.score[groups == group]
        if len(mine):
            low, median, high = mine.quantile([0.25, 0.5, 0.75])
            lines.append(
                f"{group}: median {median:.3g} (quartiles {low:.3g} to {high:.3g}) of {len(mine)}"
            )
    for members in (("duplicated", "single"), ("duplicated",)):
        lines += _separation(scored, groups, members, "", tie_break=False)
    return lines


def _separation(
    measured: pd.DataFrame, groups: pd.Series, members: Sequence[str], how: str, *, tie_break: bool
) -> list[str]:
    """The lines of an AUROC against held_out; none if a side is empty."""
    result = contrast(measured, groups.isin(members), groups == "held_out", tie_break=tie_break)
    if result is None:
        return []
    name = members[0] if len(members) == 1 else "training"
    area, rate = result.auroc, result.tpr_at_fpr_1
    return [
        f"AUROC {name} against held_out{how}: {area.value:.3f} "
        f"(95 % interval {area.low:.2f} to {area.high:.2f})",
        f"  true positives at <= 1 % false ones: {rate.value:.0%} "
        f"(95 % interval {rate.low:.0%} to {rate.high:.0%})",
    ]


def replicating_share(run_dir: Path, frame: pd.DataFrame) -> str:
    """The share of free samples that replicate any image, by group; "" without a shared bank."""
    if not has_shared_bank(run_dir) or "num_free_samples" not in frame:
        return ""
    total = int(frame.num_free_samples.max())
    lines = []
    groups = image_groups(frame).replace({"duplicated": "training", "single": "training"})
    for group in ("training", "held_out", "unknown"):
        mine = frame[(groups == group) & frame.num_free_samples.notna()]
        if len(mine):
            replicas = {
                int(index)
                for _, record in mine.iterrows()
                for index in read_replicas(run_dir, record.to_dict())
            }
            share = proportion(len(replicas), total)
            lines.append(f"free samples that replicate any {group} image: {share}")
    return "\n".join(lines)


def duplicate_groups(frame: pd.DataFrame) -> str:
    """The near-duplicates among the images, most memorized first; "" if there are none."""
    groups = ranked(frame).groupby("near_duplicate_group", sort=False)
    if not len(groups):
        return ""
    lines = [
        f"near-duplicates, replicated by the same free samples: {groups.size().sum()} images in "
        f"{len(groups)} group{'s' if len(groups) > 1 else ''}"
    ]
    for _, members in list(groups)[:MAX_ROWS]:
        names = (one_line(_name(row), _NAME_WIDTH) for _, row in members.iterrows())
        lines.append(f"  {one_line(', '.join(names), _GROUP_WIDTH)}")
    if len(groups) > MAX_ROWS:
        lines.append(f"... and {len(groups) - MAX_ROWS} more in scores.csv")
    return "\n".join(lines)


def accounting(processes: Sequence[Mapping[str, Any]], frame: pd.DataFrame) -> str:
    """Network evaluations of the records, and how the processes that ended spent their time."""
    columns = [f"evaluations_{kind}" for kind in ("forward", "sampler", "backward")]
    forward, sampler, backward = (int(rows) for rows in frame[columns].sum())
    lines = [
        f"network evaluations: {forward:,} forward ({sampler:,} of them in samplers) and "
        f"{backward:,} backward rows"
    ]
    seconds = sum(process["seconds"] for process in processes)
    if not seconds:
        return lines[0]
    spent = {
        str(kind): sum(process["by_kind"].get(kind, 0) for process in processes) / seconds
        for kind in Spent
    }
    spent["writing"] = sum(process["consumer"] for process in processes) / seconds
    shares = ", ".join(f"{name} {share:.1%}" for name, share in spent.items())
    idle, tail = (
        sum(process[f"{kind}_slot_seconds"] for process in processes) for kind in ("idle", "tail")
    )
    slots = sum(process["slots"] * process["seconds"] for process in processes) or 1
    padding = sum(process["padding"] for process in processes)
    rows = sum(process["rows"] for process in processes) + padding
    lines += [
        f"time of {len(processes)} process{'es' if len(processes) > 1 else ''}, "
        f"{seconds:,.0f} s: {shares}, rest {1 - sum(spent.values()):.1%}",
        f"slots idle: {idle:,.1f} slot-seconds while images waited, {tail / slots:.1%} of all in "
        f"the tail; {padding / max(rows, 1):.1%} of the rows computed were padding",
    ]
    return "\n".join(lines)


def _cells(row: pd.Series) -> dict[str, str]:
    """Column -> text of one image."""
    empty = row.isna()
    return {
        "image": one_line(_name(row), _NAME_WIDTH),
        "copies": "" if empty.copies else str(row.copies),
        "status": row.status,
        "score": shown_score(row),
        "nats": _number(row.score_nats, 1),
        "similarity": _number(row.best_similarity, 2),
        "steps": str(row.steps),
        "evaluations": str(row.evaluations_forward + row.evaluations_backward),
    }


def _name(row: pd.Series) -> str:
    return row.image_id if row.isna().caption else f"{row.caption} ({row.image_id})"


def _number(value: float, digits: int) -> str:
    return "" if value != value else f"{value:.{digits}f}"
