"""One job of a run or a sweep, in this process or wherever a launcher of Hydra takes it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from invmm.cli.command import Command
from invmm.cli.compose import identity_of, plain, register_resolvers

register_resolvers()  # a launcher's process gets them by unpickling a job


class JobFailed(Exception):
    """A job ended with an exit code that is not 0.

    Launchers carry exceptions back to the command that launched; exit codes they do not, and
    SystemExit some of them take for a crash of the machine.
    """

    @property
    def code(self) -> int:
        """The exit code."""
        return self.args[0]


@dataclass(frozen=True)
class HydraJob:
    """Checks and executes one composed config.

    Attributes:
        command: what it is a job of.
        codes: exit codes of the jobs that ran in the launching process.
        launched_by: id of that process.
    """

    command: Command
    codes: list[int] = field(default_factory=list)
    launched_by: int = field(default_factory=os.getpid)

    def __call__(self, config: DictConfig) -> None:
        """Runs the job.

        Raises:
            JobFailed: it failed in another process than the launching one.
            SystemExit: a signal stopped it in the launching process; ends the sweep.
        """
        values = plain(config)
        recipes = self.command.check(values, [])
        folder = Path(HydraConfig.get().runtime.output_dir)
        identity = identity_of(values)
        code = self.command.guarded(lambda: self.command.execute(recipes, values, folder, identity))
        if os.getpid() != self.launched_by:
            if code:
                raise JobFailed(code)
            return
        self.codes.append(code)
        if code > 128:
            sys.exit(code)
