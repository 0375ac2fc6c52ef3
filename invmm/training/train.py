"""`trainer.fit` trains: a small diffusion model whose training set is known, copies included."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor

from invmm.data.dataset import ImageDataset
from invmm.data.manifest import TrainingManifest
from invmm.exits import Exit
from invmm.results.ownership import OwnedRunFolder
from invmm.runtime.processes import (
    WORKER_DEATHS,
    last_line,
    own_processes,
)
from invmm.runtime.progress import TrainingBar
from invmm.runtime.signals import Interrupted, interruptible, raise_on_signals
from invmm.training.architectures import Trainee
from invmm.training.export import AveragedWeights, Export, Finiteness
from invmm.training.folder import (
    FINAL,
    check_images,
    first_to_make,
    newest_checkpoint,
)
from invmm.training.images import TrainingImages, read_training_set
from invmm.training.run import TrainRun

_LOG_EVERY = 50


def train(run: TrainRun, run_dir: Path) -> int:
    """Trains, or goes on training, and exports diffusers folders.

    Args:
        run: what to train.
        run_dir: exports, checkpoints and the loss curve go here.

    Returns:
        The exit code: 0 done; 3 a process died; 130 or 143 interrupted by a signal.

    Raises:
        ValueError: the folder belongs to another config, the data set cannot be used, by this
            model or at all, or the weights became non-finite, which are not exported.
    """
    run.training.check_devices(run.trainer.devices)
    with OwnedRunFolder(run_dir, config=run.identity, digest=run.digest) as folder:
        dataset = run.dataset.open(run.model.image_size)
        images, manifest = read_training_set(dataset, run.seed)
        check_images(folder.path, manifest)
        first = first_to_make(folder.path, run.training.num_steps)
        if first is None:
            print(f"already trained: {folder.path / FINAL}")
            return Exit.DONE
        checkpoint = newest_checkpoint(folder.path, before=first)
        pl.seed_everything(run.seed, verbose=False)
        trainee = run.model.start(_captions(dataset, manifest))
        exit_code, reason = Exit.INCOMPLETE, "a process ended early"
        try:
            with interruptible():
                _fit(TrainModule(trainee, run, images), run, folder.path, manifest, checkpoint)
        except Interrupted as signal:
            exit_code, reason = signal.exit_code, f"stopped by {signal}"
        except WORKER_DEATHS as error:
            reason = f"a worker died: {last_line(error)}"
        if not (folder.path / FINAL).exists():
            print(f"{reason}; the same command goes on from the last checkpoint", file=sys.stderr)
            return exit_code
        print(f"trained: {folder.path / FINAL}")
    return Exit.DONE


def _captions(dataset: ImageDataset, manifest: TrainingManifest) -> list[str | None]:
    """Those of the training images, then those of the other ones that have one."""
    further = [entry.caption for entry in dataset.entries if entry.caption is not None]
    return [*(entry.caption for entry in manifest.entries), *further]


class TrainModule(pl.LightningModule):
    """Denoising as in DDPM; the batch of a step is a function of seed and step.

    Args:
        trainee: what is trained.
        run: hyperparameters and threads.
        images: the training set.
    """

    def __init__(self, trainee: Trainee, run: TrainRun, images: TrainingImages) -> None:
        super().__init__()
        self.trainee = trainee
        self.settings = run.training
        self.num_threads = run.trainer.num_threads
        self.images = images

    def on_fit_start(self) -> None:
        """Takes the signals back from Lightning, in every process."""
        raise_on_signals()
        torch.set_num_threads(self.num_threads)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of this process's share of the step's batch; `batch` is a placeholder."""
        scheduler = self.trainee.scheduler
        whole = self.images.batch(
            self.global_step,
            self.settings.batch_size,
            num_timesteps=scheduler.config.num_train_timesteps,
            mirror=self.settings.horizontal_flip,
            caption_dropout=self.trainee.caption_dropout,
            caption_templates=self.trainee.caption_templates,
        )
        share = slice(self.trainer.global_rank, None, self.trainer.world_size)
        pixels, noise, timesteps = (
            value[share].to(self.device) for value in (whole.pixels, whole.noise, whole.timesteps)
        )
        # Dropout draws from the global generator: tie it to the step too, so resuming is exact.
        torch.manual_seed(whole.dropout_seed + self.trainer.global_rank)
        clean = self.trainee.encode(pixels)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        output = self.trainee(noisy, timesteps, whole.captions[share])
        match scheduler.config.prediction_type:
            case "epsilon":
                wanted = noise
            case "v_prediction":
                wanted = scheduler.get_velocity(clean, noise, timesteps)
            case _:
                wanted = clean
        loss = F.mse_loss(output, wanted)
        if (self.global_step + 1) % _LOG_EVERY == 0:
            self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """The optimiser and a learning rate per step."""
        settings = self.settings
        trained = [weights for weights in self.trainee.parameters() if weights.requires_grad]
        if settings.optimizer == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                trained, settings.learning_rate, weight_decay=settings.weight_decay
            )
        else:
            optimizer = torch.optim.Adam(trained, settings.learning_rate)
        from diffusers.optimization import get_scheduler

        name = "constant_with_warmup" if settings.lr_schedule == "constant" else "cosine"
        schedule = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=settings.num_steps,
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class _Steps:
    """A loader of placeholders: each process makes its batches from the step's number."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._count))


def _fit(
    module: TrainModule,
    run: TrainRun,
    run_dir: Path,
    manifest: TrainingManifest,
    checkpoint: str | None,
) -> None:
    averaged = AveragedWeights(run.training.ema_decay)
    with own_processes(
        run.trainer,
        max_steps=run.training.num_steps,
        gradient_clip_val=run.training.gradient_clip,
        log_every_n_steps=_LOG_EVERY,
        logger=CSVLogger(run_dir, name="log"),
        enable_progress_bar=False,
        callbacks=[
            averaged,
            Finiteness(run.training, averaged, _LOG_EVERY),
            Export(run_dir, run.training, averaged, manifest),
            TrainingBar(),
            ModelCheckpoint(
                dirpath=run_dir / "checkpoints",
                filename="{step:08d}",
                monitor="step",
                mode="max",
                save_top_k=2,
                every_n_train_steps=run.training.checkpoint_every,
                enable_version_counter=False,
            ),
        ],
    ) as trainer:
        trainer.fit(module, _Steps(run.training.num_steps), ckpt_path=checkpoint)
