"""Writes docs/settings.md, the page of every setting, from the classes that a config names.

    python tests/settings_page.py

The page is part of what users rely on: a default or a range that changes changes it too, where a
reviewer sees it.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Len, Lt, MinLen

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "settings.md"
HEAD = """\
# Every setting

The values a setting takes, its default, and what it means, class by class. A config names its class
by `_target_`; `conf/GROUP/OPTION.yaml` may set another default than the class. Written by
`python tests/settings_page.py`.
"""
_TARGET = re.compile(r"^\s*_target_: (invmm\.\S+)", re.MULTILINE)
_BOUNDS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}


def settings_page() -> str:
    """The whole page in Markdown."""
    groups: dict[str, set[str]] = {}
    for file in sorted((ROOT / "conf").rglob("*.yaml")):
        for target in _TARGET.findall(file.read_text()):
            groups.setdefault(target, set()).add(file.parent.name)
    sections = [
        _section(_recipe(target), f"`_target_: {target}`, in {', '.join(sorted(groups[target]))}")
        for target in sorted(groups)
    ]
    parts = {part for target in groups for part in _parts(_recipe(target))}
    for part in sorted(parts, key=lambda part: part.__name__):
        sections.append(_section(part, "A group of settings without `_target_`"))
    return HEAD + "".join(sections)


def _recipe(target: str) -> type:
    module, name = target.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def _parts(recipe: type) -> Iterator[type]:
    for hint in get_type_hints(recipe).values():
        for part in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                yield part


def _section(recipe: type, where: str) -> str:
    summary = (inspect.getdoc(recipe) or "").partition("\n\n")[0].replace("\n", " ")
    lines = [f"\n## {recipe.__name__}\n", f"{where}. {summary}"]
    fields = [field for field in dataclasses.fields(recipe) if field.init]
    if fields:
        meanings = _meanings(recipe)
        hints = get_type_hints(recipe, include_extras=True)
        lines += ["\n| setting | values | default | meaning |", "| --- | --- | --- | --- |"]
        for field in fields:
            meaning = meanings[field.name].replace("|", "\\|")
            values = _values(hints[field.name])
            lines.append(f"| `{field.name}` | {values} | {_default(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _meanings(recipe: type) -> dict[str, str]:
    """What `Attributes:` of the class and of its parents says about each setting."""
    meanings: dict[str, str] = {}
    for parent in reversed(recipe.__mro__):
        doc = inspect.cleandoc(parent.__doc__ or "")
        section = re.search(r"^Attributes:\n((?:    .*\n?|\n)*)", doc, re.MULTILINE)
        found = re.split(r"^    (\w+): ", section[1] if section else "", flags=re.MULTILINE)
        for name, text in zip(found[1::2], found[2::2], strict=True):
            meanings[name] = " ".join(text.split())
    return meanings


def _values(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{_values(arguments[0])} {_range(arguments[1:])}"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_values(argument) for argument in arguments)
    if origin is dict:
        return "mapping"
    if origin is not None:
        return f"list of {_values(arguments[0])}"
    if hint is type(None):
        return "`null`"
    return "part" if dataclasses.is_dataclass(hint) else hint.__name__


def _range(marks: tuple[Any, ...]) -> str:
    return ", ".join(_bound(mark) for mark in marks)


def _bound(mark: Any) -> str:
    if isinstance(mark, MinLen):
        return "(not empty)" if mark.min_length == 1 else f"({mark.min_length} or more)"
    if isinstance(mark, Len):
        return f"({mark.min_length} to {mark.max_length} of them)"
    (limit,) = dataclasses.astuple(mark)
    return f"{_BOUNDS[type(mark)]} {limit}"


def _default(field: dataclasses.Field[Any]) -> str:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is dataclasses.MISSING:
        return "none, required"
    if default is None or isinstance(default, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[default]
    if isinstance(default, (list, tuple)):
        return f"`[{', '.join(str(item) for item in default)}]`"
    return f"`{default}`" if default != "" else "`''`"


if __name__ == "__main__":
    PAGE.write_text(settings_page())
