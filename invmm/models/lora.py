"""Loads LoRA weights into a pipeline; refuses files of which any weight fits no layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from invmm.models.weights import refuse_non_finite


def check_lora(path: str) -> None:
    """Refuses a path that is not a safetensors file; does not open it.

    Raises:
        ValueError: it is a folder, missing, or a file of another kind.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"model.lora={path} is a folder; give the .safetensors file in it")
    if not file.is_file():
        raise ValueError(f"model.lora={path} does not exist; give a safetensors file")
    if file.suffix != ".safetensors":
        raise ValueError(
            f"model.lora={path} is no safetensors file; a pickle is never loaded, save it again"
        )


def add_lora(pipeline: Any, path: str) -> None:
    """Loads LoRA weights into a pipeline; every weight must belong to a layer of it.

    Raises:
        ValueError: it is not a safetensors file, or some of its weights belong to no layer or are
            not finite.
    """
    from safetensors import SafetensorError, safe_open

    check_lora(path)
    try:
        with safe_open(path, "pt") as file:
            keys = [key for key in file.keys() if not key.endswith(".alpha")]  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"model.lora={path} is damaged ({error}); fetch it again") from error
    before = _num_adapters(pipeline)
    try:
        pipeline.load_lora_weights(str(Path(path).parent), weight_name=Path(path).name)
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"model.lora={path} cannot be loaded: {reason}") from error
    found = _num_adapters(pipeline) - before
    if found != len(keys):
        raise ValueError(
            f"model.lora={path} has {len(keys)} weights, of which {found} found a layer in this "
            f"model: {_cause(pipeline, keys)}"
        )
    for part in _parts(pipeline).values():
        refuse_non_finite(part, f"model.lora={path}", "train it again")


def _cause(pipeline: Any, keys: Sequence[str]) -> str:
    """Why some weights belong to no layer, and the cure."""
    parts = _parts(pipeline)
    layers = {name: {layer for layer, _ in part.named_modules()} for name, part in parts.items()}
    flat = {layer.replace(".", "_") for own in layers.values() for layer in own}
    foreign, absent = set(), []
    for key in keys:
        layer = re.split(r"\.(?:lora|dora|hada|lokr)", key)[0]
        name, _, inner = layer.partition(".")
        # kohya's scripts join the names of a layer with underscores.
        kohya = re.fullmatch(r"lora_(?:unet|te\d?|transformer)_(.*)", layer)
        if not kohya and name not in layers:
            foreign.add(name)
        elif not (kohya and kohya[1] in flat) and inner not in layers.get(name, ()):
            absent.append(layer)
    if foreign:
        return (
            f"keys begin with {', '.join(sorted(foreign)[:3])}, and the parts of this model are "
            f"{', '.join(layers)}; rename the keys, or save them by pipeline.save_lora_weights"
        )
    if absent:
        return (
            f"it has no {', '.join(absent[:2])}{' ...' if len(absent) > 2 else ''}; give the LoRA "
            "of a model of this architecture"
        )
    return "diffusers did not read the others; save them by pipeline.save_lora_weights"


def _num_adapters(pipeline: Any) -> int:
    names = [name for part in _parts(pipeline).values() for name, _ in part.named_parameters()]
    return sum(".lora_" in name for name in names)


def _parts(pipeline: Any) -> dict[str, torch.nn.Module]:
    components = pipeline.components.items()
    return {name: part for name, part in components if isinstance(part, torch.nn.Module)}
