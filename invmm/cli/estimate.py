"""What `dry_run=true` tells of a run: its config, and what it will cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from invmm.config.lists import shortened
from invmm.data.parquet_files import NotReachedError
from invmm.engine.outcomes import CostRange, Evaluations
from invmm.models.adapter import ModelInfo, ModelRecipe
from invmm.models.cost import CallCost
from invmm.models.known import is_from_table
from invmm.models.loading import fetched
from invmm.probability.bank import BankMeasurement
from invmm.runtime.run import MeasureRun

_LIBRARIES_BYTES = 2**30
"""CUDA's own, and what cuDNN works in."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The size of a run.

    Attributes:
        images: of all shards.
        devices: of one shard.
        shards: machines that share the images.
        cost: of an image that is never replicated; others stop earlier.
        shared: of what all images share.
        row: of one network evaluation.
        tflops: that a device sustains, None if nobody said.
        recomputed: whether a backward pass begins with another forward one.
    """

    images: int
    devices: int
    shards: int
    cost: CostRange
    row: CallCost
    tflops: float | None
    shared: Evaluations = field(default_factory=Evaluations)
    recomputed: bool = False

    @property
    def evaluations_at_most(self) -> Evaluations:
        """Of all images, and what they share."""
        most = self.cost.most
        return self.shared + Evaluations(
            forward=self.images * most.forward,
            backward=self.images * most.backward,
            sampler=self.images * most.sampler,
        )

    @property
    def flop_at_most(self) -> float:
        """Of all images; a backward pass to the latents counts as one more forward."""
        most = self.evaluations_at_most
        again = most.backward if self.recomputed else 0
        return float((most.in_forwards + again) * self.row.flop)

    @property
    def hours_at_most(self) -> float | None:
        """If no image replicates and every device always has work."""
        if self.tflops is None:
            return None
        return self.flop_at_most / (self.tflops * 1e12 * self.devices * self.shards) / 3600

    def lines(self) -> list[str]:
        """For people."""
        fewest, most = self.cost.fewest, self.cost.most
        workers, all_of_them = self.devices * self.shards, self.evaluations_at_most
        one = f"evaluations of an image, at most: {_shown(most)}"
        if fewest != most:
            one += f", or {_shown(fewest)} where the first samples decide"
        lines = [one]
        if self.shared.forward:
            lines.append(
                f"evaluations of what all images share: {self.shared.forward:,} forward "
                "(free samples)"
            )
        lines += [
            f"evaluations in all, at most: {all_of_them.forward:,} forward and "
            f"{all_of_them.backward:,} backward rows",
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


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a run needs on each device, in bytes.

    Attributes:
        weights: of all parts of the model.
        activations: held by a call of the denoiser with gradients and its backward pass.
        rows: of that call.
        decoding: most that a call of the autoencoder holds.
        decoded: latents of that call.
    """

    weights: int
    activations: int
    rows: int
    decoding: int
    decoded: int

    @property
    def device(self) -> int:
        """Weights and the larger call, a tenth more for what is not foreseen, and the libraries."""
        most = self.weights + max(self.activations, self.decoding)
        return int(1.1 * most) + _LIBRARIES_BYTES

    def lines(self) -> list[str]:
        """For people."""
        parts = (
            f"memory, beside the libraries: {_size(self.weights)} of weights and "
            f"{_size(self.activations)} of activations ({self.rows} rows with gradients)"
        )
        if self.decoding:
            parts += f"; {_size(self.decoding)} to decode {self.decoded} images"
        return [parts, f"memory of a GPU: about {_size(self.device)}, a tenth and 1 GiB in reserve"]


def describe(run: MeasureRun, config: Mapping[str, Any]) -> str:
    """Config, images, evaluations, time and memory of a run. Loads no weights."""
    info = run.model.describe()
    images, remarks = _images(run, info.image_size)
    rows = 1 if run.engine.rows_denoise == "auto" else run.engine.rows_denoise
    call = run.model.call_cost(rows, run.execution)
    cost, shared = _cost(run)
    plan = Plan(
        images=images,
        devices=run.trainer.devices,
        shards=run.part.count if run.part else 1,
        cost=cost,
        shared=shared,
        row=replace(call, activation_bytes=call.activation_bytes // rows, flop=call.flop // rows),
        tflops=run.trainer.tflops,
        recomputed=run.execution.gradient_checkpointing,
    )
    decoded = 1 if run.engine.rows_embed == "auto" else run.engine.rows_embed
    memory = Memory(
        weights=call.weight_bytes,
        activations=call.activation_bytes,
        rows=rows,
        decoding=decoded * call.decode_bytes,
        decoded=decoded,
    )
    return "\n".join(
        (
            yaml.safe_dump(shortened(config), sort_keys=False, allow_unicode=True).strip(),
            "",
            *remarks,
            *_architecture(run.model),
            f"config digest: {run.digest}",
            f"images: {plan.images:,} of {info.image_size}x{info.image_size} pixels",
            *_latents(info),
            *plan.lines(),
            *memory.lines(),
        )
    )


def _latents(info: ModelInfo) -> list[str]:
    """One line with the shape and the scale of the latents; none for a model of pixels."""
    if info.latent_scale is None:
        return []
    shape = "x".join(map(str, info.latent_shape))
    return [f"latents: {shape}, the autoencoder's output times {info.latent_scale:g}"]


def _cost(run: MeasureRun) -> tuple[CostRange, Evaluations]:
    """Of an image, and of what all images share."""
    measurement, sampler = run.measurement, run.sampler
    if isinstance(measurement, BankMeasurement) and run.prompt.is_shared:
        return measurement.cost_from_bank(sampler), measurement.bank(0, (), sampler).cost
    return run.repeated.cost(sampler, run.replication), Evaluations()


def _images(run: MeasureRun, size: int) -> tuple[int, list[str]]:
    """How many images a run measures, and remarks on them.

    Raises:
        ValueError: the data set cannot be used, lacks what the prompt needs, or is not here and
            nobody said how large it is.
    """
    try:
        opened = run.dataset.open(size)
    except NotReachedError as error:
        if error.num_images is None:
            raise
        return error.num_images, [f"data set: not here, its size is taken as stated; {error}"]
    run.prompt.check(opened.entries)  # people gate on a dry run: it ends as the run would
    return len(opened.entries), [f"data set: {problem}" for problem in opened.problems]


def _architecture(model: ModelRecipe) -> list[str]:
    """Says so if a model is known from the package's own table alone."""
    path, revision = getattr(model, "path", None), getattr(model, "revision", None)
    if path is None or Path(path).is_file():
        return []
    if not is_from_table(fetched(path, revision=revision, variant=None, weights=False)):
        return []
    return [
        f"model: architecture from the package's own table; {path} is not here, and the hub was "
        "not reached or did not give it"
    ]


def _shown(cost: Evaluations) -> str:
    return (
        f"{cost.forward:,} forward ({cost.sampler:,} of them in samplers) and "
        f"{cost.backward:,} backward"
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
