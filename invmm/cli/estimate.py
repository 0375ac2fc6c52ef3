"""What `dry_run=true` tells of a run: its config, and what it will cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from invmm.cli.compose import digest_of
from invmm.cli.recipes import MeasureConfig
from invmm.engine.outcomes import CostRange, Evaluations
from invmm.models.cost import CallCost
from invmm.runtime.plan import Shard


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The size of a run.

    Attributes:
        images: of all shards.
        devices: of one shard.
        shards: machines that share the images.
        cost: of an image that is never replicated; others stop earlier.
        row: of one network evaluation.
        tflops: that a device sustains, None if nobody said.
    """

    images: int
    devices: int
    shards: int
    cost: CostRange
    row: CallCost
    tflops: float | None

    @property
    def flop_at_most(self) -> float:
        """Of all images; a backward pass to the latents counts as one more forward."""
        return float(self.images * self.cost.most.in_forwards * self.row.flop)

    @property
    def hours_at_most(self) -> float | None:
        """If no image replicates and every device always has work."""
        if self.tflops is None:
            return None
        return self.flop_at_most / (self.tflops * 1e12 * self.devices * self.shards) / 3600

    def lines(self) -> list[str]:
        """For people."""
        fewest, most = self.cost.fewest, self.cost.most
        workers = self.devices * self.shards
        one = f"evaluations of an image that is never replicated: {_shown(most)}"
        if fewest != most:
            one += f", or {_shown(fewest)} if the first sample decides each check"
        lines = [
            one,
            f"evaluations in all, at most: {most.forward * self.images:,} forward and "
            f"{most.backward * self.images:,} backward rows",
            f"arithmetic in all, at most: {self.flop_at_most:.3g} floating-point operations "
            f"({self.row.flop:,} an evaluation)",
            f"devices: {workers:,} ({self.devices:,} x {self.shards:,} shards), "
            f"{-(-self.images // workers):,} images each",
        ]
        if self.hours_at_most is None:
            lines.append("time: give trainer.tflops=... of one device to see hours")
        else:
            lines.append(
                f"time, at most: {self.hours_at_most:,.3g} hours at a sustained {self.tflops:g} "
                "TFLOP/s a device, the similarity network not counted"
            )
        return lines


def describe(recipes: MeasureConfig, config: Mapping[str, Any]) -> str:
    """Config, images, evaluations, time and memory of a run. Loads no weights."""
    info = recipes.model.describe()
    dataset = recipes.dataset.open(info.image_size)
    rows = 1 if recipes.engine.rows_denoise == "auto" else recipes.engine.rows_denoise
    call = recipes.model.call_cost(rows, recipes.execution)
    plan = Plan(
        images=len(dataset.entries),
        devices=recipes.trainer.devices,
        shards=Shard.parse(recipes.shard).count if recipes.shard else 1,
        cost=recipes.measurement.cost(recipes.sampler, recipes.replication),
        row=CallCost(
            activation_bytes=call.activation_bytes // rows,
            flop=call.flop // rows,
        ),
        tflops=recipes.trainer.tflops,
    )
    weights = "unknown" if info.weight_bytes is None else f"{info.weight_bytes / 2**20:.1f} MiB"
    return "\n".join(
        (
            yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).strip(),
            "",
            *(f"data set: {problem}" for problem in dataset.problems),
            f"config digest: {digest_of(config)}",
            f"images: {plan.images:,} of {info.image_size}x{info.image_size} pixels",
            *plan.lines(),
            f"memory, beside the libraries: {weights} of weights and "
            f"{call.activation_bytes / 2**20:.1f} MiB of activations ({rows} rows with gradients)",
        )
    )


def _shown(cost: Evaluations) -> str:
    return (
        f"{cost.forward:,} forward ({cost.sampler:,} of them in samplers) and "
        f"{cost.backward:,} backward"
    )
