"""What a training leaves behind: averaged weights as standard diffusers folders."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor

from invmm.data.manifest import TrainingManifest
from invmm.training.architectures import Trainee
from invmm.training.folder import MANIFEST, link_final, note_export
from invmm.training.settings import TrainingSettings


def _average(
    averaged: list[Tensor], current: list[Tensor], num_averaged: Any, *, decay: float
) -> None:
    step = float(num_averaged)
    torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + step) / (10 + step)))


class AveragedWeights(WeightAveraging):
    """Exponential moving average whose decay rises from the start, so short runs profit too."""

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=partial(_average, decay=decay))

    def averaged_trainee(self) -> Trainee:
        """What is trained, with the averaged weights."""
        assert self._average_model is not None
        trainee: Any = self._average_model.module.trainee
        return trainee


class Finiteness(pl.Callback):
    """Ends a training whose weights are not finite, before they are saved or exported.

    So it must come before the callbacks that save. It checks the averaged weights, which stay
    non-finite once a trained weight was.

    Args:
        settings: the steps at which something is saved.
        averaged: keeps the averaged weights.
        every: number of steps between further checks.
    """

    def __init__(self, settings: TrainingSettings, averaged: AveragedWeights, every: int) -> None:
        self.averaged, self.settings, self.every = averaged, settings, every
        self.steps = {*settings.export_steps, settings.num_steps}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Checks the weights at this step if it is due; all processes have the same weights.

        Raises:
            ValueError: a weight is not finite.
        """
        step, every = trainer.global_step, (self.every, self.settings.checkpoint_every)
        if step not in self.steps and all(step % interval for interval in every):
            return
        weights = self.averaged.averaged_trainee().parameters()
        if not all(bool(weight.isfinite().all()) for weight in weights):
            raise ValueError(
                f"training.learning_rate={self.settings.learning_rate:g} made the weights "
                f"non-finite by step {step}; lower it, or training.gradient_clip, or begin with "
                "training.warmup_steps"
            )


class Export(pl.Callback):
    """Writes diffusers folders at the chosen steps.

    It stands after the averaging in the list of callbacks, else it would see the step before.

    Args:
        run_dir: gets step_000001 and so on, and the link `final`.
        settings: which steps.
        averaged: the weights.
        manifest: goes into each folder.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: TrainingSettings,
        averaged: AveragedWeights,
        manifest: TrainingManifest,
    ) -> None:
        self.run_dir, self.averaged, self.manifest = run_dir, averaged, manifest
        self.last = settings.num_steps
        self.steps = {*settings.export_steps, self.last}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Exports if this step is one to export."""
        step = trainer.global_step
        if step in self.steps and trainer.is_global_zero:
            name = f"step_{step:06d}"
            self._export(self.run_dir / name)
            note_export(self.run_dir, self.run_dir / name)
            if step == self.last:
                link_final(self.run_dir, name)

    def _export(self, folder: Path) -> None:
        """Whole or not at all."""
        temporary = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        self.averaged.averaged_trainee().pipeline().save_pretrained(temporary)
        self.manifest.write(temporary / MANIFEST)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
