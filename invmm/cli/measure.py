"""`invmm`: measures every image of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invmm.cli.command import Command

if TYPE_CHECKING:
    from invmm.faults import Fault
    from invmm.runtime.run import MeasureRun

HELP = """
invmm tells which images a diffusion model has memorized, and how strongly: it searches the noise
distribution nearest to the prior whose samples all replicate the image. Lower scores mean more
memorized.

Examples:
  invmm experiment=demo                                     the icons of `make demo`
  invmm model.path=DDPM_FOLDER dataset=folder dataset.path=IMAGES
  invmm model.path=... dataset=folder dataset.path=... run_dir=results/mine logger=wandb
  invmm --multirun inversion.check_every=10,50 seed=0,1 model.path=...
  invmm inversion=paper_ddpm sampler.num_inference_steps=200 model.path=... dry_run=true
"""


def _check(config: Mapping[str, Any], faults: list[Fault]) -> MeasureRun | None:
    from invmm.config.runs import check_measure

    return check_measure(config, faults)


def _check_machine(config: Mapping[str, Any], faults: list[Fault]) -> None:
    from invmm.config.runs import check_machine

    check_machine(config, faults)


def _dry_run(run: MeasureRun, config: Mapping[str, Any]) -> str:
    from invmm.cli.estimate import describe

    return describe(run, config)


def _execute(run: MeasureRun, folder: Path) -> int:
    from invmm.runtime.launch import refuse_copies
    from invmm.runtime.measure import measure

    refuse_copies(run.shard)
    return measure(run, folder)


COMMAND = Command(
    name="invmm",
    config_name="measure",
    groups=(
        "measurement",
        "inversion",
        "model",
        "dataset",
        "prompt",
        "sampler",
        "replication",
        "trainer",
        "logger",
        "experiment",
    ),
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
