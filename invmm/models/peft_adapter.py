"""LoRA adapters as peft's save_pretrained writes them: weights, and a config that scales them.

Their weights are named after the layers of the denoiser alone, and the scale alpha/r of each layer
is in adapter_config.json, not in the file of the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from invmm.models.json_files import read_json, settings_digest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
"""Keys of the config that scale the weights."""
_NOT_READ = (
    *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "lora_dropout"),
    *("base_model_name_or_path", "revision", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern"),
)
"""Keys that say how it was trained: which layers it adapts is in the names of its weights."""


def load_peft(pipeline: Any, file: Path, named: str, name: str) -> bool:
    """Loads an adapter of peft into the denoiser of a pipeline.

    Args:
        pipeline: of diffusers.
        file: of the weights.
        named: the setting that names it, for messages.
        name: that the adapter gets.

    Returns:
        Whether the file is one of peft; any other is left alone.

    Raises:
        ValueError: its config asks for more than scaled weights, or a weight fits no layer.
    """
    from safetensors.torch import load_file

    if not _is_peft(file):
        return False
    options = _options(file, named)
    part = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
    denoiser = getattr(pipeline, part)
    layers = {layer for layer, _ in denoiser.named_modules()}
    weights, targets = {}, set()
    for key, value in load_file(file).items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_[AB]\.weight", key)
        if match is None:
            raise ValueError(
                f"{named} holds {key}, which is no LoRA weight of a layer; save it again without"
            )
        if match[1] not in layers:
            raise ValueError(
                f"{named} has weights of {match[1]}, and the {part} of this model has no such "
                "layer; give the LoRA of a model of this architecture"
            )
        weights[key.removeprefix(_PREFIX)] = value
        targets.add(match[1])
    denoiser.load_lora_adapter(
        weights,
        prefix=None,
        adapter_name=name,
        metadata={**options, "target_modules": sorted(targets)},
        low_cpu_mem_usage=True,  # as the pipeline loads other files; needed on the meta device
    )
    return True


def peft_digest(file: Path, named: str) -> str | None:
    """SHA-256 of what scales an adapter of peft; None for any other file.

    Raises:
        ValueError: see `load_peft`.
    """
    return settings_digest(_options(file, named)) if _is_peft(file) else None


def _is_peft(file: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            return any(key.startswith(_PREFIX) for key in tensors.keys())  # noqa: SIM118
    except SafetensorError:
        return False  # refused where it is loaded


def _options(file: Path, named: str) -> dict[str, Any]:
    """The keys of the config that scale the weights.

    Raises:
        ValueError: it is missing, or one of its keys is not supported.
    """
    from peft import LoraConfig

    path = file.with_name(CONFIG)
    if not path.is_file():
        raise ValueError(
            f"{named} was written by peft ({_PREFIX}...), which scales its weights by {CONFIG}; "
            "put that file beside it"
        )
    config, defaults = read_json(path), LoraConfig().to_dict()
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{named} has peft_type={config.get('peft_type')} in its {CONFIG}; supported is LORA"
        )
    for key, value in config.items():
        is_off = value in (None, False, "", [], {}) or value == defaults.get(key)
        is_start = key == "init_lora_weights" and value == "gaussian"
        if key not in (*_READ, *_NOT_READ) and not is_off and not is_start:
            raise ValueError(
                f"{named} has {key}={str(value)[:100]} in its {CONFIG}, which is not supported; "
                "merge the adapter into its model (merge_and_unload), and give that"
            )
    for key in _READ[:4]:
        _check_numbers(key, config.get(key), named)
    if type(config.get("use_rslora", False)) is not bool:
        raise ValueError(
            f"{named} has use_rslora={config['use_rslora']} in its {CONFIG}; use true or false"
        )
    return {key: config[key] for key in _READ if key in config}


def _check_numbers(key: str, value: Any, named: str) -> None:
    """Refuses a rank below 1, an alpha that is no number, and patterns with such values."""
    is_rank, is_pattern = key in ("r", "rank_pattern"), key.endswith("_pattern")
    if is_pattern and value is None:
        return
    for number in value.values() if is_pattern and isinstance(value, Mapping) else [value]:
        is_number = type(number) is int or (type(number) is float and math.isfinite(number))
        if not is_number or (is_rank and (type(number) is not int or number < 1)):
            kind = "an integer of 1 or more" if is_rank else "a finite number"
            raise ValueError(
                f"{named} has {key}={str(value)[:100]} in its {CONFIG}; {kind} is needed"
            )
