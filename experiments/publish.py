"""Shows what a study found in Weights & Biases, beside its runs: `publish.py STUDY logger=wandb`.

`make study STUDY=... OPTIONS='logger=wandb ...'` calls it with the options of the runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from invmm.config.compose import compose_job
from invmm.config.schema import build
from invmm.exits import Exit
from invmm.faults import Fault
from invmm.runtime.loggers import RunLog, WandbLog


def main() -> None:
    """Any other logger shows the runs alone."""
    study, *overrides = sys.argv[1:]
    faults: list[Fault] = []
    config = compose_job("measure", overrides, faults)
    log = build(RunLog, config["logger"], "logger", faults) if config else None
    if faults:
        print("\n".join(faults), file=sys.stderr)
        sys.exit(Exit.FAULTY)
    if isinstance(log, WandbLog):
        try:
            log.publish_study(Path("results") / study)
        except ValueError as error:
            print(error, file=sys.stderr)
            sys.exit(Exit.FAULTY)


if __name__ == "__main__":
    main()
