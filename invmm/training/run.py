"""What a training consists of."""

from __future__ import annotations

from dataclasses import dataclass

from invmm.data.dataset import DatasetRecipe
from invmm.identity import Run
from invmm.runtime.trainer import TrainerSettings
from invmm.training.architectures import TrainableModel
from invmm.training.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class TrainRun(Run):
    """Everything `invmm-train` can be told.

    Attributes, beside those of every run:
        model: architecture and noise schedule.
        dataset: images and copies.
        training: hyperparameters.
        trainer: devices.
    """

    model: TrainableModel
    dataset: DatasetRecipe
    training: TrainingSettings
    trainer: TrainerSettings
