"""The harness of all commands: help, the check of every job, dry runs, then Hydra."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invmm import __version__
from invmm.cli.entry import guarded, run_command
from invmm.exits import HELP, Exit, worst
from invmm.faults import Fault, Kind

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from invmm.config.compose import Composed


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command built on a primary config.

    Attributes:
        name: as typed in a shell.
        config_name: the primary config in conf/.
        groups: config groups that it composes.
        help: what it does, with examples.
        check: builds the run from a plain config and appends all faults; None if faulty.
        dry_run: describes a checked run without running it: (run, plain config) -> text.
        execute: (checked run, folder) -> exit code.
        check_machine: appends a fault for each device that a plain config asks for and that this
            machine does not have.
    """

    name: str
    config_name: str
    groups: tuple[str, ...]
    help: str
    check: Callable[[Mapping[str, Any], list[Fault]], Any]
    dry_run: Callable[[Any, Mapping[str, Any]], str]
    execute: Callable[[Any, Path], int]
    check_machine: Callable[[Mapping[str, Any], list[Fault]], None] = lambda config, faults: None

    def main(self) -> None:
        """Entry point of the console script."""
        sys.exit(run_command(self.name, lambda: self.run(sys.argv[1:])))

    def run(self, arguments: list[str]) -> int:
        """Runs the command and returns its exit code."""
        if {"-h", "--help"} & set(arguments):
            print(self._help())
            return 0
        parser = argparse.ArgumentParser(
            self.name, usage=f"{self.name} [--multirun] [KEY=VALUE ...]"
        )
        parser.add_argument("-m", "--multirun", action="store_true")
        parser.add_argument("--version", action="version", version=f"invmm {__version__}")
        parser.add_argument("overrides", nargs="*")
        flags = parser.parse_intermixed_args(arguments)
        checked = self._checked_jobs(flags.overrides, multirun=flags.multirun)
        if checked is None:
            return Exit.FAULTY
        if any(config.plain["dry_run"] for config, _ in checked):
            shown = [
                guarded(self.name, lambda r=run, c=config: _print(self.dry_run(r, c.plain)))
                for config, run in checked
            ]
            return worst(shown)
        if flags.multirun:
            return self._run_sweep(flags.overrides)
        ((config, run),) = checked
        return self._run(config, run)

    def _checked_jobs(
        self, overrides: list[str], *, multirun: bool
    ) -> list[tuple[Composed, Any]] | None:
        """(config, run) of every job; None, and all faults printed, if there are any."""
        from invmm.config.compose import composed_job, is_launched, jobs, launcher_faults
        from invmm.config.runs import forget_built

        forget_built()
        by_fault: dict[Fault, list[str]] = {}
        general: list[Fault] = []
        unreadable: list[str] = []
        checked = []
        for job in jobs(overrides, multirun=multirun, faults=general, left_out=unreadable):
            faults: list[Fault] = []
            of_config: list[Fault] = []
            left_out = [*unreadable]
            config = composed_job(self.config_name, job, faults, left_out)
            run = self.check(config.plain, of_config) if config.plain else None
            if config.plain and not config.plain["dry_run"]:
                if multirun and is_launched(job):
                    of_config.extend(launcher_faults(job))
                else:
                    self.check_machine(config.plain, of_config)
            checked.append((config, run))
            for fault in [*faults, *_without_consequences(of_config, left_out)]:
                by_fault.setdefault(fault, []).append(" ".join(job))
        if not general and not by_fault:
            return checked
        total = len(general) + len(by_fault)
        print(f"{self.name}: {total} fault{'s' if total > 1 else ''}", file=sys.stderr)
        for fault in general:
            print(f"  {fault}", file=sys.stderr)
        for fault, where in by_fault.items():
            only = f"   [job {where[0]}]" if len(checked) > 1 and len(where) < len(checked) else ""
            print(f"  {fault}{only}", file=sys.stderr)
        return None

    def _run(self, config: Composed, run: Any) -> int:
        from invmm.cli.job import run_composed

        def work(folder: Path) -> int:
            return guarded(self.name, lambda: self.execute(run, folder))

        assert config.whole is not None
        whole = config.whole
        return guarded(self.name, lambda: run_composed(whole, work))

    def _run_sweep(self, overrides: list[str]) -> int:
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")
        import hydra

        from invmm.cli.job import HydraJob, JobFailed
        from invmm.config.compose import permissive

        job = HydraJob(self.work)

        def task(config: DictConfig) -> None:
            job(config)

        def run() -> int:
            try:
                decorated()  # Hydra makes the folders of the jobs
            except JobFailed as failure:
                print(
                    f"{self.name}: that job ended with exit code {failure.code}; its own log says "
                    "why",
                    file=sys.stderr,
                )
                return failure.code
            return 0

        sys.argv = [self.name, "--multirun", *permissive(overrides)]
        decorated = hydra.main("pkg://invmm.conf", self.config_name, version_base="1.3")(task)
        return worst([guarded(self.name, run), *job.codes])

    def work(self, config: Mapping[str, Any], folder: Path) -> int:
        """Executes one job of a sweep and returns its exit code."""
        faults: list[Fault] = []
        self.check_machine(config, faults)
        run = self.check(config, faults)
        if faults:  # a launcher may have taken the job to a machine with other devices or files
            print(f"{self.name}: {'; '.join(faults)}", file=sys.stderr)
            return Exit.FAULTY
        return guarded(self.name, lambda: self.execute(run, folder))

    def _help(self) -> str:
        lines = [self.help.strip(), "", "Config groups (GROUP=OPTION):"]
        for group in self.groups:
            folder = files("invmm.conf") / group
            options = sorted(
                item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml")
            )
            lines.append(f"  {group:12} {' '.join(options)}")
        lines += [
            "",
            "Any value: KEY=VALUE. Several: --multirun KEY=A,B. Look first: dry_run=true.",
            HELP,
        ]
        return "\n".join(lines)


def _without_consequences(faults: Sequence[Fault], left_out: Sequence[str]) -> list[Fault]:
    """Faults of a config, less those that only say that a key or group was left out of it."""

    def is_left_out(key: str) -> bool:
        return any(key == whole or key.startswith(f"{whole}.") for whole in left_out)

    return [
        fault
        for fault in faults
        if fault.kind is Kind.VALUE or not any(map(is_left_out, fault.keys))
    ]


def _print(text: str) -> int:
    print(text)
    return 0
