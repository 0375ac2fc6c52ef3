"""`invmm-train`: trains a model whose training set is known, copies included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invmm.cli.command import Command

if TYPE_CHECKING:
    from invmm.faults import Fault
    from invmm.training.run import TrainRun

HELP = """
invmm-train trains a small diffusion model on images of which some are planted many times, and
exports it as diffusers folders with the list of what it saw. A run that was stopped goes on.

Examples:
  invmm-train experiment=demo_model                         the model of `make demo`
  invmm-train dataset.num_train=128 training.num_steps=4000 run_dir=results/bigger
  invmm-train dataset=folder dataset.path=IMAGES model.image_size=32
  invmm-train training.export_steps=[200,400,800] seed=1
  invmm-train --multirun seed=0,1,2
"""


def _check(config: Mapping[str, Any], faults: list[Fault]) -> TrainRun | None:
    from invmm.config.runs import check_train

    return check_train(config, faults)


def _check_machine(config: Mapping[str, Any], faults: list[Fault]) -> None:
    from invmm.config.runs import check_machine

    check_machine(config, faults)


def _dry_run(run: TrainRun, config: Mapping[str, Any]) -> str:
    import yaml

    images = run.dataset.open(run.model.image_size).training_entries()
    if not images:
        raise ValueError("the data set has no image to train on")
    run.model.check_captions([entry.caption for entry in images])
    shown = sum(entry.copies or 0 for entry in images)
    return "\n".join(
        (
            yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
            f"training images: {len(images)}, {shown} with copies",
            f"steps: {run.training.num_steps} of batch {run.training.batch_size}",
        )
    )


def _execute(run: TrainRun, folder: Path) -> int:
    from invmm.runtime.launch import refuse_copies
    from invmm.training.train import train

    refuse_copies(can_shard=False)
    return train(run, folder)


COMMAND = Command(
    name="invmm-train",
    config_name="train",
    groups=("model", "dataset", "training", "trainer", "experiment"),
    help=HELP,
    check=_check,
    dry_run=_dry_run,
    execute=_execute,
    check_machine=_check_machine,
)


def main() -> None:
    """Console script."""
    COMMAND.main()


if __name__ == "__main__":
    main()
