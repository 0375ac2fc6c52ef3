"""Checking a config against the classes that it builds, and building them.

YAML holds values, Python holds types: a node is checked against the dataclass that its `_target_`
names. All faults are listed, not the first; nothing but dataclasses of this package is ever
imported or called.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import get_protocol_members

from invmm.faults import Fault, Kind, fault_of, shown

ROOMS = (
    "diffusion",
    "engine",
    "inversion",
    "probability",
    "baselines",
    "models",
    "data",
    "replication",
    "runtime",
    "training",
)
"""Rooms of the package whose dataclasses a config may name."""
_TARGET = re.compile(rf"invmm\.({'|'.join(ROOMS)})(\.[a-z_]\w*)+\.[A-Z]\w*")
_MISSING = "???"
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


class NotBuilt(Exception):
    """A node has faults and could not be built."""


@dataclasses.dataclass(frozen=True)
class Faulty:
    """Stands for a node whose faults are listed already."""

    node: Any


def build(expected: type, config: Any, key: str, faults: list[Fault]) -> Any:
    """Builds the object that a node describes.

    Args:
        expected: the dataclass of a node without `_target_`, or the Protocol or type that the
            built object must have.
        config: the node, resolved to plain containers.
        key: where the node stands, "" at the top.
        faults: every fault found is appended, one line with key, value and cure.

    Returns:
        The object, None if the node has faults.
    """
    try:
        return _build(expected, config, key, faults)
    except NotBuilt:
        return None


def _build(expected: type, config: Any, key: str, faults: list[Fault]) -> Any:
    if not isinstance(config, Mapping):
        cure = f"{key}.KEY=VALUE" if dataclasses.is_dataclass(expected) else f"{key}._target_=CLASS"
        line = f"{key}={shown(config)} is not a group of settings; give {cure}"
        faults.append(Fault(line, key))
        raise NotBuilt
    node_class: Any
    if "_target_" in config:
        node_class = _target(expected, config["_target_"], key, faults)
    elif dataclasses.is_dataclass(expected):
        node_class = expected
    else:
        faults.append(Fault(f"{key} has no _target_; choose {key}=OPTION", key))
        raise NotBuilt
    fields = {field.name: field for field in dataclasses.fields(node_class) if field.init}
    hints = get_type_hints(node_class, include_extras=True)
    values: dict[str, Any] = {}
    faulty: list[str] = []
    listed = len(faults)
    for name, value in config.items():
        if name == "_target_":
            continue
        path = f"{key}.{name}".lstrip(".")
        if name not in fields:
            faults.append(_unknown(path, name, value, fields))
            continue
        try:
            values[name] = _value(hints[name], value, path, faults)
        except NotBuilt:
            faulty.append(name)
    for name, field in fields.items():
        if name not in config and _is_required(field):
            path = f"{key}.{name}".lstrip(".")
            faults.append(_missing(path))
            faulty.append(name)
    if any(_is_required(fields[name]) for name in faulty):
        raise NotBuilt
    try:
        built = node_class(**values)
    except ValueError as error:
        fault = fault_of(error)
        told = {name.rpartition(".")[2] for name in fault.keys}
        if not faulty or (told and told.isdisjoint(faulty)):
            faults.append(fault)
        raise NotBuilt from None
    if len(faults) > listed:
        raise NotBuilt
    return built


def _value(hint: Any, value: Any, path: str, faults: list[Fault]) -> Any:
    if isinstance(value, str) and value == _MISSING:
        faults.append(_missing(path))
        raise NotBuilt
    if isinstance(value, Faulty):
        raise NotBuilt
    node = _node_type(hint)
    if node is not None:
        if isinstance(value, node):  # built by whoever calls from Python
            return value
        is_optional = type(None) in getattr(hint, "__args__", ())
        return None if value is None and is_optional else _build(node, value, path, faults)
    try:
        return TypeAdapter(hint, config=_STRICT).validate_python(value)
    except ValidationError as error:
        advice: dict[tuple[str, str], list[str]] = {}
        for detail in error.errors():
            where = ".".join((path, *(str(part) for part in detail["loc"] if part in _keys(value))))
            given = shown(detail["input"])
            cure = re.sub(r"^(Input|String) should", "it should", detail["msg"])
            if detail["type"] == "string_type" and isinstance(value, int | float):
                cure += f"; in quotes it is one: '{where}=\"{given}\"'"
            advice.setdefault((where, given), []).append(cure)
        # One value may fail each of several types that would do.
        faults += [
            Fault(f"{where}={given} is not possible: {', or '.join(cures)}", where)
            for (where, given), cures in advice.items()
        ]
        raise NotBuilt from None


def _target(expected: type, name: Any, key: str, faults: list[Fault]) -> type[Any]:
    """The dataclass that a `_target_` names, if a config may name it here."""
    where = f"{key}._target_={shown(name)}".lstrip(".")
    if not isinstance(name, str) or not _TARGET.fullmatch(name):
        faults.append(Fault(f"{where} is not allowed; it must be a settings class of invmm", key))
        raise NotBuilt
    module, _, class_name = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), class_name)
    except (ModuleNotFoundError, AttributeError):
        faults.append(Fault(f"{where} does not exist; choose {key}=OPTION", key))
        raise NotBuilt from None
    is_settings_class = isinstance(found, type) and dataclasses.is_dataclass(found)
    if not is_settings_class or found.__module__ != module:
        faults.append(Fault(f"{where} is not allowed; it must be a settings class of invmm", key))
        raise NotBuilt
    if not _is_kind(found, expected):
        line = f"{where} is no {expected.__name__}; choose another {key}=OPTION"
        faults.append(Fault(line, key))
        raise NotBuilt
    return found


def _is_kind(found: type[Any], expected: type) -> bool:
    """Whether a dataclass is what a key expects, told before it is built."""
    if not getattr(expected, "_is_protocol", False):
        return issubclass(found, expected)
    fields = {field.name for field in dataclasses.fields(found)}
    return all(name in fields or hasattr(found, name) for name in get_protocol_members(expected))


def _node_type(hint: Any) -> type | None:
    """The Protocol or dataclass in a hint such as `Objective` or `SimilarityRecipe | None`."""
    candidates = getattr(hint, "__args__", (hint,))
    for candidate in candidates:
        is_protocol = getattr(candidate, "_is_protocol", False)
        if isinstance(candidate, type) and (is_protocol or dataclasses.is_dataclass(candidate)):
            return candidate
    return None


def _missing(path: str) -> Fault:
    return Fault(f"{path} is missing; give {path}=VALUE", path, kind=Kind.MISSING)


def _unknown(path: str, name: str, value: Any, known: Mapping[str, Any]) -> Fault:
    from invmm.config.compose import options_with

    group = path.rpartition(".")[0]
    if others := options_with(group, name):
        other = " or ".join(f"{group}={option}" for option in others)
        line = f"{path}={shown(value)} is not a key of this {group}; add {other}, which has it"
        return Fault(line, path, kind=Kind.UNKNOWN)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    cure = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
    return Fault(f"{path}={shown(value)} is not a key; {cure}", path, kind=Kind.UNKNOWN)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _keys(value: Any) -> Sequence[Any]:
    """Keys or indices that exist in a value, to tell them from pydantic's own labels."""
    if isinstance(value, Mapping):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []
