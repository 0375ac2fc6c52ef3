"""What a measuring run consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invmm.data.dataset import DatasetRecipe
from invmm.diffusion.sampling import Sampler
from invmm.engine.protocols import Measurement
from invmm.engine.settings import EngineSettings
from invmm.models.adapter import ModelRecipe
from invmm.replication.replication import Replication
from invmm.runtime.loggers import RunLog
from invmm.runtime.trainer import TrainerSettings


@dataclass(frozen=True, kw_only=True)
class MeasureRun:
    """The recipes of a run. Nothing heavy is loaded yet, and all of it can be pickled.

    Attributes:
        measurement: the question asked of each image.
        model: the model under measurement.
        dataset: the images.
        sampler: how the model draws.
        replication: what counts as a replica.
        engine: slots and rows per call.
        trainer: devices.
        logger: views of the records.
        seed: of everything random, together with the image id.
        run_dir: where the records go; it belongs to one config.
        retry_failed: measure images again that FAILED in an earlier run of the folder.
        config: the resolved config, for the manifest.
        identity: the config without its machine-only keys; the run folder belongs to it.
        digest: of the identity.
    """

    measurement: Measurement
    model: ModelRecipe
    dataset: DatasetRecipe
    sampler: Sampler
    replication: Replication
    engine: EngineSettings
    trainer: TrainerSettings
    logger: RunLog
    seed: int
    run_dir: Path
    retry_failed: bool
    config: Mapping[str, Any]
    identity: Mapping[str, Any]
    digest: str
