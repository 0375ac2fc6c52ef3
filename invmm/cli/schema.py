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
)
"""Rooms of the package whose dataclasses a config may name."""
_TARGET = re.compile(rf"invmm\.({'|'.join(ROOMS)})(\.[a-z_]\w*)+\.[A-Z]\w*")
_MISSING = "???"


class NotBuilt(Exception):
    """A node has faults and could not be built."""


def build(expected: Any, config: Any, key: str, faults: list[str]) -> Any:
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


def _build(expected: Any, config: Any, key: str, faults: list[str]) -> Any:
    if not isinstance(config, Mapping):
        faults.append(f"{key}={_shown(config)} is not a group of settings; choose {key}=OPTION")
        raise NotBuilt
    node_class: Any
    if "_target_" in config:
        node_class = _target(config["_target_"], key, faults)
    elif dataclasses.is_dataclass(expected):
        node_class = expected
    else:
        faults.append(f"{key} has no _target_; choose {key}=OPTION")
        raise NotBuilt
    fields = {field.name: field for field in dataclasses.fields(node_class) if field.init}
    hints = get_type_hints(node_class, include_extras=True)
    values: dict[str, Any] = {}
    faulty: list[str] = []
    for name, value in config.items():
        if name == "_target_":
            continue
        path = f"{key}.{name}".lstrip(".")
        if name not in fields:
            faults.append(_unknown(path, name, fields))
            continue
        try:
            values[name] = _value(hints[name], value, path, faults)
        except NotBuilt:
            faulty.append(name)
    for name, field in fields.items():
        if name not in config and _is_required(field):
            faults.append(f"{key}.{name} is missing; give {key}.{name}=VALUE".lstrip("."))
            faulty.append(name)
    if any(_is_required(fields[name]) for name in faulty):
        raise NotBuilt
    try:
        built = node_class(**values)
    except ValueError as error:
        if not any(f".{name}=" in str(error) for name in faulty):
            faults.append(str(error))
        raise NotBuilt from None
    if faulty:
        raise NotBuilt
    if isinstance(expected, type) and not isinstance(built, expected):
        faults.append(
            f"{key}._target_={config.get('_target_')} is not a {expected.__name__}; choose "
            f"another {key}=OPTION"
        )
        raise NotBuilt
    return built


def _value(hint: Any, value: Any, path: str, faults: list[str]) -> Any:
    if isinstance(value, str) and value == _MISSING:
        faults.append(f"{path} is missing; give {path}=VALUE")
        raise NotBuilt
    node = _node_type(hint)
    if node is not None and isinstance(value, Mapping):
        return _build(node, value, path, faults)
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, strict=True))
        return adapter.validate_python(value)
    except ValidationError as error:
        for detail in error.errors():
            where = ".".join((path, *(str(part) for part in detail["loc"] if part in _keys(value))))
            advice = detail["msg"].replace("Input should", "it should")
            faults.append(f"{where}={_shown(detail['input'])} is not possible: {advice}")
        raise NotBuilt from None


def _target(name: Any, key: str, faults: list[str]) -> type[Any]:
    """The dataclass that a `_target_` names, if a config may name it."""
    where = f"{key}._target_={_shown(name)}".lstrip(".")
    if not isinstance(name, str) or not _TARGET.fullmatch(name):
        faults.append(f"{where} is not allowed; it must be a settings class of invmm")
        raise NotBuilt
    module, _, class_name = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), class_name)
    except (ModuleNotFoundError, AttributeError):
        faults.append(f"{where} does not exist; choose {key}=OPTION")
        raise NotBuilt from None
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        faults.append(f"{where} is not allowed; it must be a settings class of invmm")
        raise NotBuilt
    return found


def _node_type(hint: Any) -> type | None:
    """The Protocol or dataclass in a hint such as `Objective` or `SimilarityRecipe | None`."""
    candidates = getattr(hint, "__args__", (hint,))
    for candidate in candidates:
        is_protocol = getattr(candidate, "_is_protocol", False)
        if isinstance(candidate, type) and (is_protocol or dataclasses.is_dataclass(candidate)):
            return candidate
    return None


def _unknown(path: str, name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    cure = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
    return f"{path} is not a key; {cure}"


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _keys(value: Any) -> Sequence[Any]:
    """Keys or indices that exist in a value, to tell them from pydantic's own labels."""
    if isinstance(value, Mapping):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
