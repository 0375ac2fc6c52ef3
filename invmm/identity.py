"""What identifies a run: the values that it was built from, not how a config spelled them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path, PurePath
from typing import Annotated, Any, Protocol, runtime_checkable

from annotated_types import Ge, MinLen

from invmm.files import json_digest

MACHINE_KEYS = ("out", "run_dir", "shard", "logger", "trainer", "dry_run", "retry_failed")
"""Settings of a run that change where and how it happens, never its results."""
_ADDED = "added"


@runtime_checkable
class DescribesItself(Protocol):
    """An object that no config can build, such as a pipeline in memory."""

    def described(self) -> Any:
        """Plain containers that identify it."""
        ...


def described(value: Any) -> Any:
    """A built object as plain containers; a config of these values builds an equal object.

    Raises:
        TypeError: it contains something that a config cannot.
    """
    if isinstance(value, DescribesItself):
        return value.described()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        target = f"{type(value).__module__}.{type(value).__qualname__}"
        return {"_target_": target, **fields_of(value)}
    if isinstance(value, Mapping):
        return {str(key): described(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [described(one) for one in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} is nothing that a config can hold")


def added(default: Any) -> Any:
    """A setting that its class did not have at first.

    At its default it is no part of what identifies a run, so that folders of before go on.
    """
    return dataclasses.field(default=default, metadata={_ADDED: True})


def fields_of(settings: Any) -> dict[str, Any]:
    """The fields that a dataclass was built from, each `described`; see `added`."""
    return {
        field.name: described(value)
        for field in dataclasses.fields(settings)
        if field.init
        and not (
            (value := getattr(settings, field.name)) == field.default and _ADDED in field.metadata
        )
    }


def identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a described run that decides what it computes."""
    identity = {key: value for key, value in config.items() if key not in MACHINE_KEYS}
    if "measurement" in identity:
        identity.pop("inversion", None)  # in the manifests of earlier versions
    if identity.get("repeats") == 1:  # in the manifests of earlier versions
        del identity["repeats"]
    if "engine" in identity:
        identity["engine"] = {k: v for k, v in identity["engine"].items() if k != "slots"}
    return identity


def digest_of(config: Mapping[str, Any]) -> str:
    """12 hex digits over the identity of a described run."""
    return json_digest(identity_of(config))


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every run is told.

    Attributes:
        seed: of everything random.
        out: a run without a run_dir gets a folder of its own in here.
        run_dir: where results go; it belongs to one config.
        dry_run: print what the run would do, and end.
    """

    seed: Annotated[int, Ge(0)]
    out: Annotated[str, MinLen(1)] = "results/runs"
    run_dir: Annotated[str, MinLen(1)] | None = None
    dry_run: bool = False

    @cached_property
    def config(self) -> dict[str, Any]:
        """The run as plain containers, from which it can be built again."""
        return fields_of(self)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides its results; the run folder belongs to it."""
        return identity_of(self.config)

    @cached_property
    def digest(self) -> str:
        """Of the identity."""
        return json_digest(self.identity)

    @property
    def folder(self) -> Path:
        """Where results go, unless a sweep gives it another folder."""
        return Path(self.run_dir) if self.run_dir else Path(self.out) / self.digest
