"""One job of a run or a sweep, in this process or wherever a launcher of Hydra takes it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import initialize_config_module
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, read_write

from invmm.config.compose import CONF, job_config, register_resolvers
from invmm.config.lists import contents
from invmm.config.runs import run_digest

register_resolvers(run_digest)  # a launcher's process gets them by unpickling a job


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
    """Does the work of one composed config.

    Attributes:
        work: (plain config, folder of the job) -> exit code.
        codes: exit codes of the jobs that ran in the launching process.
        launched_by: id of that process.
        lists: what the command read from files, see `invmm.config.lists`; pickled with the job.
    """

    work: Callable[[Mapping[str, Any], Path], int]
    codes: list[int] = field(default_factory=list)
    launched_by: int = field(default_factory=os.getpid)
    lists: dict[str, list[Any]] = field(default_factory=contents)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Registers the lists in the process in which a launcher runs the job."""
        self.__dict__.update(state)
        contents().update(self.lists)

    def __call__(self, config: DictConfig) -> None:
        """Runs the job.

        Raises:
            JobFailed: it failed in another process than the launching one.
            SystemExit: a signal stopped it in the launching process; ends the sweep.
        """
        hydra = HydraConfig.get()
        code = self.work(job_config(config, hydra), Path(hydra.runtime.output_dir))
        if os.getpid() != self.launched_by:
            if code:
                raise JobFailed(code)
            return
        self.codes.append(code)
        if code > 128:
            sys.exit(code)


def run_composed(config: DictConfig, work: Callable[[Path], int]) -> int:
    """Does the work of one config that is composed already, within Hydra as `hydra.main` would.

    So the folder of the job, its log, its environment and callbacks are those of the node `hydra`.

    Args:
        config: the whole config, with the node `hydra`.
        work: folder of the job -> exit code.
    """
    with read_write(config.hydra):
        config.hydra.mode = RunMode.RUN
    name = config.hydra.job.config_name
    with initialize_config_module(CONF, version_base="1.3", job_name=name):
        loader = GlobalHydra.instance().config_loader()
        callbacks = Callbacks(config)
        callbacks.on_run_start(config=config, config_name=name)
        ended = run_job(
            lambda _: work(Path(HydraConfig.get().runtime.output_dir)),
            config,
            job_dir_key="hydra.run.dir",
            job_subdir_key=None,
            hydra_context=HydraContext(config_loader=loader, callbacks=callbacks),
        )
        callbacks.on_run_end(config=config, config_name=name, job_return=ended)
    return ended.return_value
