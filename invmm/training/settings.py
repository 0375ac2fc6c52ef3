"""The hyperparameters of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from invmm.faults import Refusal


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a model is trained.

    Attributes:
        num_steps: optimiser steps.
        batch_size: images a step, drawn with replacement in proportion to their copies.
        optimizer: adamw or adam.
        learning_rate: after the warm-up.
        weight_decay: of adamw.
        lr_schedule: cosine falls to 0 at the last step; constant stays.
        warmup_steps: steps over which the learning rate rises linearly.
        gradient_clip: largest norm of the gradient.
        ema_decay: of the averaged weights that are exported; it rises towards this value as
            (1 + step) / (10 + step), so that short trainings are averaged too.
        horizontal_flip: mirror half of the images.
        export_steps: steps at which the model is exported; the last always is.
        checkpoint_every: steps between checkpoints to go on from.

    Raises:
        ValueError: an export that is never reached.
    """

    num_steps: Annotated[int, Ge(1)] = 1700
    batch_size: Annotated[int, Ge(1)] = 32
    optimizer: Literal["adamw", "adam"] = "adamw"
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    weight_decay: Annotated[float, Ge(0)] = 0.01
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: Annotated[int, Ge(0)] = 0
    gradient_clip: Annotated[float, Gt(0)] = 1.0
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.995
    horizontal_flip: bool = False
    export_steps: list[int] = field(default_factory=list)
    checkpoint_every: Annotated[int, Ge(1)] = 500

    def __post_init__(self) -> None:
        for step in self.export_steps:
            if not 1 <= step <= self.num_steps:
                raise Refusal(
                    f"training.export_steps names step {step}, which a training of "
                    f"training.num_steps={self.num_steps} never reaches; use 1 to "
                    f"{self.num_steps}",
                    "training.export_steps",
                    "training.num_steps",
                )

    def check_devices(self, devices: int) -> None:
        """Whether a batch can be shared out.

        Raises:
            ValueError: not evenly.
        """
        if self.batch_size % devices:
            raise ValueError(
                f"training.batch_size={self.batch_size} cannot be shared out over "
                f"trainer.devices={devices}; use a multiple"
            )
