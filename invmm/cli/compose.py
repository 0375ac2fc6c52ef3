"""Composing configs before a run, so that all faults of all jobs are known in time."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from invmm.cli.lists import contents, with_lists
from invmm.files import json_digest

CONF = "invmm.conf"
MACHINE_KEYS = (
    "hydra",
    "out",
    "run_dir",
    "shard",
    "logger",
    "trainer",
    "dry_run",
    "retry_failed",
)
"""Top-level keys that change where and how a run happens, never its results."""


def groups() -> dict[str, list[str]]:
    """Config group -> its options."""
    found = {}
    for folder in sorted(files(CONF).iterdir(), key=lambda item: item.name):
        if folder.is_dir():
            options = [item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml")]
            if options:
                found[folder.name] = sorted(options)
    return found


def jobs(overrides: Sequence[str], *, multirun: bool, faults: list[str]) -> list[list[str]]:
    """The overrides of each job of a sweep, or of the one job; unreadable ones are left out."""
    contents().clear()  # a command reads the files of lists anew
    with initialize_config_module(CONF, version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        split: list[list[str]] = []
        for text in overrides:
            try:
                override = parser.parse_overrides([text])[0]
                values = [job[0] for job in BasicSweeper.split_arguments([override], None)[0]]
            except HydraException as error:
                faults.append(f"'{text}' cannot be read: {_first_line(error)}")
                continue
            if override.is_sweep_override() and not multirun:
                faults.append(f"{text} names several values; add --multirun to run one job each")
                continue
            split.append(values if multirun else [text])
    return [list(job) for job in itertools.product(*split)]


def compose_job(config_name: str, overrides: Sequence[str], faults: list[str]) -> dict[str, Any]:
    """The resolved config of a job as plain containers; {} if it does not compose.

    Keys that no group knows are let in here, for the check against the classes to find them all.
    """
    known = groups()
    faulty = {override: fault for override in overrides if (fault := _group_fault(override, known))}
    faults += faulty.values()
    accepted = permissive([override for override in overrides if override not in faulty])
    try:
        with initialize_config_module(CONF, version_base="1.3"):
            config = compose(config_name, accepted)
        return plain(config, faults)
    except OmegaConfBaseException as error:
        faults.append(f"{error.full_key or 'the config'} does not resolve: {_first_line(error)}")
    except HydraException as error:
        faults.append(_with_package(_first_line(error)))
    return {}


def permissive(overrides: Sequence[str]) -> list[str]:
    """Overrides that may add keys: what is no key is the check's to say, with all else."""
    known = groups()
    return [_permissive(override, known) for override in overrides]


def plain(config: DictConfig, faults: list[str] | None = None) -> dict[str, Any]:
    """A composed config as plain containers, without Hydra's own node; see `with_lists`."""
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    container = OmegaConf.to_container(own, resolve=True)
    assert isinstance(container, dict)
    return with_lists({str(key): value for key, value in container.items()}, faults)


def identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config that decide what a run computes."""
    identity = {key: value for key, value in config.items() if key not in MACHINE_KEYS}
    if "measurement" in identity:
        identity.pop("inversion", None)
    if "engine" in identity:
        identity["engine"] = {k: v for k, v in identity["engine"].items() if k != "slots"}
    return identity


def digest_of(config: Mapping[str, Any]) -> str:
    """12 hex digits over the identity of a config."""
    return json_digest(identity_of(config))


def register_resolvers() -> None:
    """Makes ${digest:}, ${run_folder:} and ${sweep_folder:} known to Hydra."""

    def digest(*, _root_: DictConfig) -> str:
        return digest_of(plain(_root_))

    def run_folder(*, _root_: DictConfig) -> str:
        return _root_.run_dir or f"{_root_.out}/{digest_of(plain(_root_))}"

    def sweep_folder(*, _root_: DictConfig) -> str:
        return _root_.run_dir or _root_.out

    for resolver in (digest, run_folder, sweep_folder):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def _group_fault(override: str, known: Mapping[str, list[str]]) -> str | None:
    """Whether an override names an option that its group does not have."""
    name, _, option = override.lstrip("+").partition("=")
    options = known.get(name.partition("@")[0])
    if options is None or option in options or override.startswith("~"):
        return None
    near = difflib.get_close_matches(option, options, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? There are" if near else "there are"
    return f"{name}={option} is not an option; {hint} {', '.join(options)}"


def _permissive(override: str, known: Mapping[str, list[str]]) -> str:
    name = override.lstrip("+").partition("=")[0].partition("@")[0]
    if override.startswith("~") or name in known or name.partition("/")[0] == "hydra":
        return override
    return override if name.startswith("hydra.") else "++" + override.lstrip("+")


def _with_package(fault: str) -> str:
    """Names what to install where a launcher's plugin is missing."""
    for plugin, extra in (("slurm", "slurm"), ("submitit", "slurm"), ("ray", "ray")):
        if "Could not find" in fault and f"hydra/launcher/{plugin}" in fault:
            return f"{fault}; pip install 'invmm[{extra}]'"
    return fault


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
