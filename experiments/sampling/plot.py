"""From the records of all samplers and scales to summary.json, tables, and two figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from invmm.analysis.sheet import Row, image_over_runs, sheet
from invmm.analysis.statistics import Proportion, proportion
from invmm.analysis.study import finish, found_by_group, read_run, rounded
from invmm.analysis.style import COLOURS, LABELS, one_line, style, subplots
from invmm.results.records import read_replicas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STUDY = Path(__file__).parent
RESULTS = Path("results/sampling")
SAMPLERS = {
    "ddim_20": "DDIM",
    "ddim_eta_half": r"DDIM, $\eta$ = 0.5",
    "ddim_eta_one": r"DDIM, $\eta$ = 1",
    "ddpm": "DDPM",
    "dpmsolver": "DPM-Solver++",
    "euler": "Euler",
    "heun": "Heun",
    "unipc": "UniPC",
}
"""At 20 steps."""
STEPS = {"ddim_10": 10, "ddim_20": 20, "ddim_50": 50, "ddim_100": 100, "ddim_200": 200}
"""Of DDIM without noise."""
SCALES = (0, 1, 2, 3, 5, 7)
GROUPS = {
    "copies_8_to_32": (8, 32, "8 to 32 copies", COLOURS["duplicated"]),
    "copies_2_to_4": (2, 4, "2 or 4 copies", "#E69F00"),  # of Okabe and Ito's palette too
    "single": (1, 1, LABELS["single"], COLOURS["single"]),
    "held_out": (0, 0, LABELS["held_out"], COLOURS["held_out"]),
}
"""Of the text model's icons: fewest and most copies, name and colour."""

Rates = dict[str, dict[str, Proportion]]
"""What was drawn -> how, or at which scale -> the share that replicates."""


def main() -> int:
    """Draws and checks the study."""
    trajectory = read_run(RESULTS / "trajectory")
    names = dict.fromkeys((*SAMPLERS, *STEPS))
    replayed = {name: read_run(RESULTS / f"replay_{name}") for name in names}
    free = {name: read_run(RESULTS / f"free_{name}") for name in names}
    guided = {f"guidance_{scale}": read_run(RESULTS / f"guidance_{scale}") for scale in SCALES}
    rates = {
        "replay": {name: replay_rate(frame) for name, frame in replayed.items()},
        "free": {name: any_rate(f"free_{name}", frame) for name, frame in free.items()},
        **{name: by_copies(name, frame) for name, frame in guided.items()},
    }
    icons = pd.concat(
        [
            *(of_replay(f"replay_{name}", frame) for name, frame in replayed.items()),
            *(of_counts(f"free_{name}", frame) for name, frame in free.items()),
            *(of_counts(name, frame) for name, frame in guided.items()),
        ]
    ).astype({"replicas": "Int64", "samples": "Int64"})
    summary = {
        "found": found_by_group(trajectory)["duplicated"],
        **{what: {name: shown(rate) for name, rate in own.items()} for what, own in rates.items()},
    }
    table = pd.DataFrame(
        {"what": what, "how": name, **shown(rate)}
        for what, own in rates.items()
        for name, rate in own.items()
    )
    print(table.to_string(index=False))
    with style():
        figures = {
            "samplers": sampler_figure(rates, icons),
            "guidance": guidance_figure(rates),
            "icons": icon_sheet(guided),
        }
        is_guided = table.what.str.startswith("guidance")
        tables = {"samplers": table[~is_guided], "guidance": table[is_guided], "icons": icons}
        return finish(STUDY, RESULTS, summary, figures, tables)


def replay_rate(frame: pd.DataFrame) -> Proportion:
    """Mean rate at which the distributions replicate, each sampled equally often.

    The interval is for these icons, and rather too wide than too narrow, as their rates differ.
    """
    drawn = frame.loc[frame.confirm_drawn.notna()]
    return proportion(int(drawn.confirm_passed.sum()), int(drawn.confirm_drawn.sum()))


def any_rate(run: str, frame: pd.DataFrame) -> Proportion:
    """Share of a shared bank of free samples that replicates any of the icons."""
    replicas = {
        int(index)
        for record in frame.to_dict("records")
        for index in read_replicas(RESULTS / run, record)
    }
    return proportion(len(replicas), int(frame.num_free_samples.max()))


def by_copies(run: str, frame: pd.DataFrame) -> dict[str, Proportion]:
    """Group -> mean rate at which samples replicate the icon that they were drawn for.

    At scale 0 all icons share their samples; one counts once, whichever icon it replicates.
    """
    rates = {}
    for group, (fewest, most, _, _) in GROUPS.items():
        mine = frame.loc[frame.copies.between(fewest, most)]
        if run != "guidance_0":
            rates[group] = proportion(int(mine["count"].sum()), int(mine.num_free_samples.sum()))
            continue
        share, icons = any_rate(run, mine), len(mine)
        ends = share.low / icons, share.high / icons
        rates[group] = Proportion(share.count, icons * share.total, *ends)
    return rates


def of_replay(run: str, frame: pd.DataFrame) -> pd.DataFrame:
    """One line an icon: what its distribution does; empty if there is none."""
    names = {"confirm_passed": "replicas", "confirm_drawn": "samples", "rate_low": "low",
             "rate_high": "high"}  # fmt: skip
    kept = ["replication_rate", *names.values(), "kl_nats", "log_p_certified", "source_rate"]
    return of_icons(run, frame, frame.rename(columns=names).reindex(columns=kept))


def of_counts(run: str, frame: pd.DataFrame) -> pd.DataFrame:
    """One line an icon: what free samples do."""
    shares = [
        proportion(int(row["count"]), int(row["num_free_samples"]))
        for row in frame.to_dict("records")
    ]
    found = pd.DataFrame(
        {
            "replication_rate": frame.replication_rate,
            "replicas": frame["count"],
            "samples": frame.num_free_samples,
            "low": [share.low for share in shares],
            "high": [share.high for share in shares],
        }
    )
    return of_icons(run, frame, found)


def of_icons(run: str, frame: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """Which icon each line is about, before what was found."""
    icon = frame[["image_id", "caption", "copies", "status", "best_similarity"]]
    return pd.concat([icon.assign(run=run), found], axis=1)


def sampler_figure(rates: Rates, icons: pd.DataFrame) -> Figure:
    """Replays above, grey for each icon, free samples below; all samplers, then steps of DDIM."""
    figure, axes = subplots(
        2, 2, figsize=(8.0, 4.8), sharex="col", sharey="row", width_ratios=[3, 2]
    )
    by_name = {name: place for place, name in enumerate(SAMPLERS)}
    for column, places in zip(axes.T, (by_name, STEPS), strict=True):
        for name, place in places.items():
            mine = icons.loc[icons.run == f"replay_{name}"]
            column[0].scatter([place] * len(mine), mine.replication_rate, s=9, color="#BBBBBB")
        for axis, what in zip(column, ("replay", "free"), strict=True):
            draw(axis, list(places.values()), [rates[what][name] for name in places])
    axes[0, 0].set(ylim=(-0.03, 1.03), ylabel="samples of the distributions\nthat replicate")
    axes[1, 0].set(ylim=(0, None), ylabel="free samples that\nreplicate any icon")
    axes[1, 0].set_xticks(range(len(SAMPLERS)), list(SAMPLERS.values()), rotation=35, ha="right")
    axes[0, 0].set_title("20 steps", fontsize=8)
    axes[0, 1].set_title("DDIM", fontsize=8)
    axes[1, 1].set(xscale="log", xlabel="steps")
    axes[1, 1].set_xticks(list(STEPS.values()), [str(steps) for steps in STEPS.values()])
    axes[1, 1].minorticks_off()
    figure.tight_layout()
    return figure


def guidance_figure(rates: Rates) -> Figure:
    """How often an icon's own caption returns it, by guidance scale and copies."""
    figure, axis = subplots(figsize=(4.6, 3.2))
    for shift, (group, (_, _, name, colour)) in enumerate(GROUPS.items()):
        places = [scale + 0.08 * (shift - 1.5) for scale in SCALES]
        mine = [rates[f"guidance_{scale}"][group] for scale in SCALES]
        draw(axis, places, mine, colour=colour, linestyle="-", label=name)
    axis.set(ylim=(-0.03, 1.03), xticks=SCALES, xlabel="guidance scale")
    axis.set_ylabel("samples that replicate\nthe icon of their caption")
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.legend(loc="upper center", ncols=2, frameon=False, fontsize=7)
    return figure


def icon_sheet(guided: dict[str, pd.DataFrame]) -> Figure:
    """The first two icons of each group beside the closest sample at each guidance scale."""
    first = guided["guidance_1"]
    runs = {RESULTS / run: frame for run, frame in guided.items()}
    rows = []
    for fewest, most, name, colour in GROUPS.values():
        mine = first.loc[first.copies.between(fewest, most)].head(2)
        for _, icon in mine.iterrows():
            caption = f"{one_line(str(icon.caption), 22)}\n{name}"
            tiles = image_over_runs(runs, str(icon.image_id))
            rows.append(Row(tiles=tiles, name=caption, colour=colour))
    return sheet(["icon", "no caption", *(f"guidance {scale}" for scale in SCALES[1:])], rows)


def draw(
    axis: Axes,
    places: Sequence[float],
    rates: Sequence[Proportion],
    *,
    colour: str = "black",
    linestyle: str = "none",
    label: str | None = None,
) -> None:
    """Shares with their exact 95 % intervals."""
    shares = [rate.count / rate.total for rate in rates]
    below = [share - rate.low for share, rate in zip(shares, rates, strict=True)]
    above = [rate.high - share for share, rate in zip(shares, rates, strict=True)]
    axis.errorbar(
        places,
        shares,
        yerr=[below, above],
        marker="o",
        markersize=4,
        capsize=2,
        linewidth=0.8,
        color=colour,
        linestyle=linestyle,
        label=label,
    )


def shown(rate: Proportion) -> dict[str, float | None]:
    """With its interval, for the summary and the table."""
    return {
        "count": rate.count,
        "of": rate.total,
        "rate": rounded(rate.count / rate.total, 5),
        "low": rounded(rate.low, 5),
        "high": rounded(rate.high, 5),
    }


if __name__ == "__main__":
    sys.exit(main())
