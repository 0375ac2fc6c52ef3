"""What a measuring run consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from invmm.data.dataset import DatasetRecipe, ImageEntry
from invmm.data.prompt import Prompt
from invmm.diffusion.sampling import Sampler
from invmm.engine.protocols import Measurement
from invmm.engine.repeated import Repeated
from invmm.engine.settings import EngineSettings
from invmm.faults import Refusal
from invmm.files import json_digest
from invmm.identity import Run, added
from invmm.models.adapter import ModelRecipe
from invmm.models.execution import Execution
from invmm.replication.replication import Replication
from invmm.runtime.loggers import RunLog
from invmm.runtime.trainer import TrainerSettings


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of a list of images, for machines that do not know of each other.

    Attributes:
        index: from 0.
        count: of all parts.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Reads "0/4".

        Raises:
            ValueError: no such part.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise Refusal(
                f"shard={text} is no part; use shard=0/4, shard=1/4, ... for four machines", "shard"
            )
        return cls(int(index), int(count))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, entries: Sequence[ImageEntry]) -> Sequence[ImageEntry]:
        """Every count-th image."""
        return entries[self.index :: self.count]


@dataclass(frozen=True, kw_only=True)
class MeasureRun(Run):
    """Everything `invmm` can be told. Nothing heavy is loaded yet, and all of it can be pickled.

    Attributes, beside those of every run:
        measurement: the question asked of each image.
        model: the model under measurement.
        dataset: the images.
        prompt: what the model is told to draw.
        sampler: how the model draws.
        replication: what counts as a replica.
        execution: how the denoiser is computed.
        engine: slots and rows per call.
        trainer: devices.
        logger: views of the records.
        repeats: measurements of each image.
        shard: "0/4" for the first of four parts of the images, None for all.
        retry_failed: measure images again that FAILED in an earlier run of the folder.
    """

    measurement: Measurement
    model: ModelRecipe
    dataset: DatasetRecipe
    prompt: Prompt
    sampler: Sampler
    replication: Replication
    execution: Execution
    engine: EngineSettings
    trainer: TrainerSettings
    logger: RunLog
    repeats: Annotated[int, Ge(1)] = added(1)
    shard: str | None = None
    retry_failed: bool = False

    @property
    def repeated(self) -> Measurement:
        """What is done to each image."""
        if self.repeats == 1:
            return self.measurement
        return Repeated(measurement=self.measurement, repeats=self.repeats)

    @property
    def part(self) -> Shard | None:
        """The part of the images that is measured, None for all."""
        return None if self.shard is None else Shard.parse(self.shard)

    def digest_with(self, rows: Mapping[str, int]) -> str:
        """Of what records rest on: the identity, and the rows of a call that it left open.

        Args:
            rows: setting of the engine -> rows, as they were measured for this run.
        """
        return json_digest({**self.identity, "engine": {**self.identity["engine"], **rows}})
