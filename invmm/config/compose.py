"""Composes the configs of all jobs before the first one starts, to report all faults at once."""

from __future__ import annotations

import difflib
import itertools
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from invmm.config.lists import contents, with_lists
from invmm.config.overrides import OverrideReader, first_line, key_of
from invmm.config.precedence import options_win
from invmm.faults import Fault

CONF = "invmm.conf"


@dataclass(frozen=True)
class Composed:
    """The config of a job.

    Attributes:
        plain: resolved, as plain containers without Hydra's own node; {} if it does not compose.
        whole: as Hydra composed it, its own node included; None if it does not compose.
    """

    plain: dict[str, Any]
    whole: DictConfig | None


def groups() -> dict[str, list[str]]:
    """Config group -> its options."""
    found = {}
    for folder in sorted(files(CONF).iterdir(), key=lambda item: item.name):
        if folder.is_dir():
            options = [item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml")]
            if options:
                found[folder.name] = sorted(options)
    return found


def options_with(group: str, key: str) -> list[str]:
    """Options of a config group that have a key, sorted; none where there is no such group."""
    found = []
    for option in groups().get(group, []):
        text = (files(CONF) / group / f"{option}.yaml").read_text(encoding="utf-8")
        if key in OmegaConf.create(text).keys():  # noqa: SIM118 - `in` leaves out missing values
            found.append(option)
    return found


def jobs(
    overrides: Sequence[str],
    *,
    multirun: bool,
    faults: list[Fault],
    left_out: list[str] | None = None,
) -> list[list[str]]:
    """The overrides of each job of a sweep, or of the one job.

    Args:
        overrides: as given on the command line.
        multirun: whether a list of values makes a job of each.
        faults: gets a line for each override that cannot be read. If quotes make it readable,
            the jobs contain it with quotes, so that it causes no second fault.
        left_out: gets the keys of all other unreadable overrides; the jobs do not contain them.
    """
    contents().clear()  # a command reads the files of lists anew
    with initialize_config_module(CONF, version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        reader = OverrideReader(parser, groups().keys(), multirun)
        split: list[list[str]] = []
        for text in overrides:
            values, fault = reader.read(text)
            if fault:
                faults.append(Fault(fault, key_of(text)))
            if values:
                split.append(values)
            elif left_out is not None:
                left_out.append(key_of(text))
    return [list(job) for job in itertools.product(*split)]


def compose_job(config_name: str, overrides: Sequence[str], faults: list[Fault]) -> dict[str, Any]:
    """The plain config of a job, see `composed_job`."""
    return composed_job(config_name, overrides, faults).plain


def composed_job(
    config_name: str,
    overrides: Sequence[str],
    faults: list[Fault],
    left_out: list[str] | None = None,
) -> Composed:
    """Composes the config of a job.

    Unknown keys are accepted here; the check of the config against the classes reports them all.

    Args:
        config_name: the primary config.
        overrides: of the job.
        faults: gets a line for each fault.
        left_out: gets the groups for which an unknown option was given; the config contains
            their default options.
    """
    known = groups()
    faulty = {override: fault for override in overrides if (fault := _group_fault(override, known))}
    faults += faulty.values()
    if left_out is not None:
        left_out += map(key_of, faulty)
    accepted = permissive([override for override in overrides if override not in faulty])
    try:
        with initialize_config_module(CONF, version_base="1.3", job_name=config_name):
            config = compose(config_name, accepted, return_hydra_config=True)
            return Composed(plain(_options_win(config, config_name, accepted), faults), config)
    except OmegaConfBaseException as error:
        cure = f"; give {error.full_key}=VALUE" if error.full_key else ""
        key = error.full_key or "the config"
        faults.append(Fault(f"{key} does not resolve: {first_line(error)}{cure}", key))
    except HydraException as error:
        faults.append(Fault(_with_package(first_line(error))))
    return Composed({}, None)


def permissive(overrides: Sequence[str]) -> list[str]:
    """Overrides with `++`, by which Hydra accepts unknown keys; the later check reports those."""
    known = groups()
    return [_permissive(override, known) for override in overrides]


def plain(config: DictConfig, faults: list[Fault] | None = None) -> dict[str, Any]:
    """A composed config as plain containers, without Hydra's own node.

    Args:
        config: as Hydra composed it.
        faults: see `with_lists`, which reads the lists that the config names by a file.
    """
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    container = OmegaConf.to_container(own, resolve=True)
    assert isinstance(container, dict)
    return with_lists({str(key): value for key, value in container.items()}, faults)


def job_config(config: DictConfig, hydra: Any) -> dict[str, Any]:
    """The config of a job that Hydra composed, as `compose_job` gives it.

    Args:
        config: as Hydra composed it.
        hydra: its node `hydra`.
    """
    return plain(_options_win(config, hydra.job.config_name, list(hydra.overrides.task)))


def is_launched(overrides: Sequence[str]) -> bool:
    """Whether a launcher runs the job of a sweep in another process, maybe on another machine."""
    return any(
        key_of(override) == "hydra/launcher" and not override.endswith("=basic")
        for override in overrides
    )


def launcher_faults(overrides: Sequence[str]) -> list[Fault]:
    """Why a job cannot be launched from this machine."""
    given = {key_of(override): override.partition("=")[2] for override in overrides}
    launcher = given.get("hydra/launcher")
    if launcher in ("slurm", "submitit_slurm") and shutil.which("srun") is None:
        line = (
            f"hydra/launcher={launcher} needs srun, which is not here; start the sweep where SLURM "
            "is, such as on a login node of the cluster, or plan it with dry_run=true"
        )
        return [Fault(line, "hydra/launcher")]
    return []


def register_resolvers(digest_of: Callable[[str, Mapping[str, Any]], str]) -> None:
    """Registers ${digest:}, ${run_folder:} and ${sweep_folder:} with Hydra.

    Args:
        digest_of: (name of the primary config, plain config) -> digest of the run.
    """

    def digest(*, _root_: DictConfig) -> str:
        hydra = _root_.hydra
        return digest_of(hydra.job.config_name, job_config(_root_, hydra))

    def run_folder(*, _root_: DictConfig) -> str:
        return _root_.run_dir or f"{_root_.out}/{digest(_root_=_root_)}"

    def sweep_folder(*, _root_: DictConfig) -> str:
        return _root_.run_dir or _root_.out

    for resolver in (digest, run_folder, sweep_folder):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def _options_win(config: DictConfig, config_name: str, overrides: Sequence[str]) -> DictConfig:
    return options_win(config, config_name, overrides, conf=CONF, groups=groups())


def _group_fault(override: str, known: Mapping[str, list[str]]) -> Fault | None:
    """The fault of an override whose group does not have the named option; None if it has."""
    name, _, option = override.lstrip("+").partition("=")
    options = known.get(key_of(override))
    if options is None or option.strip("\"'") in options or override.startswith("~"):
        return None
    near = difflib.get_close_matches(option, options, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? There are" if near else "there are"
    return Fault(f"{name}={option} is not an option; {hint} {', '.join(options)}", name)


def _permissive(override: str, known: Mapping[str, list[str]]) -> str:
    name = key_of(override)
    if override.startswith("~") or name in known or name.partition("/")[0] == "hydra":
        return override
    return override if name.startswith("hydra.") else "++" + override.lstrip("+")


def _with_package(fault: str) -> str:
    """Adds the pip command to a fault that says that a launcher's plugin is missing."""
    for plugin, extra in (("slurm", "slurm"), ("submitit", "slurm"), ("ray", "ray")):
        if "Could not find" in fault and f"hydra/launcher/{plugin}" in fault:
            return f"{fault}; pip install 'invmm[{extra}]'"
    if unknown := re.match(r"Could not override '([^']*)'\. No match", fault):
        return f"{unknown[1]} is no group of options of this command; --help lists them"
    return fault
