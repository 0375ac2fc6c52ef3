"""The table and the summary that a run ends with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invmm.analysis.statistics import (
    auroc,
    image_groups,
    memorization_order,
    proportion,
    tpr_at_fpr,
)
from invmm.analysis.style import one_line
from invmm.results.collect import has_score, is_censored, ranked
from invmm.results.records import read_replicas

if TYPE_CHECKING:
    import pandas as pd

MAX_ROWS = 40
_NAME_WIDTH = 34
_ERROR_WIDTH = 300
_LARGEST_EXPONENT = 700.0  # of what a double can hold


def table(frame: pd.DataFrame) -> str:
    """The most memorized images, one line each."""
    with_probability = "one_in" in frame
    header = (
        f"{'image':{_NAME_WIDTH}} {'copies':>6} {'status':14} {'score':>7} {'nats':>8} "
        f"{'similarity':>10} {'steps':>6} {'evaluations':>11}"
    )
    if with_probability:
        header += "  one in ... draws (95 %)"
    lines = [header, "-" * len(header)]
    for _, row in ranked(frame).head(MAX_ROWS).iterrows():
        empty = row.isna()
        name = row.image_id if empty.caption else f"{row.caption} ({row.image_id})"
        lines.append(
            f"{one_line(name, _NAME_WIDTH):{_NAME_WIDTH}} {'' if empty.copies else row.copies:>6} "
            f"{row.status:14} {_number(row.score, 3):>7} {_number(row.score_nats, 1):>8} "
            f"{_number(row.best_similarity, 2):>10} {row.steps:>6} "
            f"{row.evaluations_forward + row.evaluations_backward:>11}"
            + (f"  {_one_in(row)}" if with_probability else "")
        )
    if len(frame) > MAX_ROWS:
        lines.append(f"... and {len(frame) - MAX_ROWS} more in scores.csv")
    return "\n".join(lines)


def summary(frame: pd.DataFrame) -> str:
    """Replicated images by group, false alarms, how well the groups separate, what failed."""
    groups = image_groups(frame)
    scored = has_score(frame)
    measured = scored | is_censored(frame)
    found = "p estimated for" if (frame.status == "ESTIMATED").any() else "replicated"
    lines = []
    for group in ("duplicated", "single", "held_out", "unknown"):
        mine = measured & (groups == group)
        if mine.any():
            share = proportion(int((mine & scored).sum()), int(mine.sum()))
            name = "held_out (false alarms)" if group == "held_out" else group
            lines.append(f"{name}: {found} {share}")
    for tie_break in (True, False):
        order = memorization_order(frame.loc[measured], tie_break=tie_break)
        of_measured = groups.loc[measured].to_numpy()
        duplicated, held_out = order[of_measured == "duplicated"], order[of_measured == "held_out"]
        value = auroc(duplicated, held_out)
        if value is not None:
            how = "score, ties broken by best similarity" if tie_break else "score alone"
            lines.append(
                f"AUROC duplicated against held_out, {how}: {value:.3f} "
                f"(true positives at <= 1 % false ones: {tpr_at_fpr(duplicated, held_out):.0%})"
            )
    unmeasured = frame[~measured]
    for _, row in unmeasured.head(MAX_ROWS).iterrows():
        name, error = one_line(row.image_id, _NAME_WIDTH), one_line(str(row.error), _ERROR_WIDTH)
        lines.append(f"{row.status} {name}: {error}")
    if len(unmeasured) > MAX_ROWS:
        lines.append(f"... and {len(unmeasured) - MAX_ROWS} more without a result in scores.csv")
    return "\n".join(lines)


def replicating_share(run_dir: Path, frame: pd.DataFrame) -> str:
    """Free samples that replicate any image of a group; "" if none were counted."""
    if "num_free_samples" not in frame or frame.num_free_samples.isna().all():
        return ""
    total = int(frame.num_free_samples.max())
    lines = []
    groups = image_groups(frame).replace({"duplicated": "training", "single": "training"})
    for group in ("training", "held_out", "unknown"):
        mine = frame[(groups == group) & frame.num_free_samples.notna()]
        if len(mine):
            found = {
                int(index)
                for _, record in mine.iterrows()
                for index in read_replicas(run_dir, record.to_dict())
            }
            share = proportion(len(found), total)
            lines.append(f"free samples that replicate any {group} image: {share}")
    return "\n".join(lines)


def accounting(processes: Sequence[Mapping[str, Any]], frame: pd.DataFrame) -> str:
    """What the records cost, and how the processes that came to their end spent their time."""
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
        kind: sum(process["by_kind"].get(kind, 0) for process in processes) / seconds
        for kind in ("network", "sampler", "similarity", "measurement", "preparation")
    }
    spent["writing"] = sum(process["consumer"] for process in processes) / seconds
    shares = ", ".join(f"{name} {share:.1%}" for name, share in spent.items())
    idle, tail = (
        sum(process[f"{kind}_slot_seconds"] for process in processes) for kind in ("idle", "tail")
    )
    slots = sum(process["slots"] * process["seconds"] for process in processes)
    padding = sum(process["padding"] for process in processes)
    rows = sum(process["rows"] for process in processes) + padding
    lines += [
        f"time of {len(processes)} process{'es' if len(processes) > 1 else ''}, "
        f"{seconds:,.0f} s: {shares}, rest {1 - sum(spent.values()):.1%}",
        f"slots idle: {idle:,.1f} slot-seconds while images waited, {tail / slots:.1%} of all in "
        f"the tail; {padding / max(rows, 1):.1%} of the rows computed were padding",
    ]
    return "\n".join(lines)


def _one_in(row: pd.Series) -> str:
    """The probability as draws for one replica, with its interval; or the bound of a censored."""
    empty = row.isna()
    if not empty.one_in:
        few, many = math.exp(-row.log_p_high), math.exp(min(-row.log_p_low, _LARGEST_EXPONENT))
        return f"{row.one_in:,.0f} ({few:,.0f} to {many:,.0f})"
    if not empty.log_p_high:
        return f"more than {math.exp(min(-row.log_p_high, _LARGEST_EXPONENT)):,.0f}"
    return ""


def _number(value: float, digits: int) -> str:
    return "" if value != value else f"{value:.{digits}f}"
