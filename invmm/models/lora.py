"""Loads LoRA weights into a pipeline; refuses files of which any weight fits no layer."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from invmm.files import file_sha256
from invmm.models.peft_adapter import CONFIG, WEIGHTS, load_peft, peft_digest
from invmm.models.weights import refuse_non_finite

# It says of each further LoRA that those before it were drawn anew; see `_sums`.
logging.getLogger("transformers.integrations.peft").setLevel(logging.ERROR)

LoraSetting = str | list[Any] | None
"""What `model.lora` may be: a path, or a list of paths and of {path: PATH, weight: NUMBER}."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """One LoRA of a model.

    Attributes:
        path: a safetensors file, or a folder that peft wrote.
        weight: its strength: any finite number, 1 as it was trained.
        key: of the config that names it, for messages.
    """

    path: str
    weight: float = 1.0
    key: str = "model.lora"

    @property
    def named(self) -> str:
        """The setting in messages."""
        return f"{self.key}={self.path}"


def loras_of(setting: LoraSetting) -> tuple[Lora, ...]:
    """The LoRAs that `model.lora` names, in its order; () for null.

    Raises:
        ValueError: an entry of a list is no path, or its weight no finite number.
    """
    if setting is None:
        return ()
    if isinstance(setting, str):
        return (Lora(path=setting),)
    if not setting:
        raise ValueError("model.lora=[] names no file; give null for none")
    return tuple(_entry(entry, f"model.lora.{place}") for place, entry in enumerate(setting))


def check_loras(loras: Sequence[Lora]) -> None:
    """Refuses paths that hold no safetensors file; does not open them.

    Raises:
        ValueError: a folder without an adapter, missing, a file of another kind, or named twice.
    """
    seen: dict[Path, Lora] = {}
    for lora in loras:
        file = _file(lora).resolve()
        if file in seen:
            raise ValueError(
                f"{lora.named} is the file that {seen[file].named} names; name it once, with the "
                "sum of both weights"
            )
        seen[file] = lora


def add_loras(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Loads LoRA weights into a pipeline, each with its strength.

    Args:
        pipeline: of diffusers; its parts may be on the meta device, where shapes alone are checked.
        loras: in the order in which diffusers adds them up.

    Raises:
        ValueError: one is not a safetensors file, or some of its weights belong to no layer or are
            not finite.
    """
    if not loras:
        return
    check_loras(loras)
    names = [f"default_{number}" for number in range(len(loras))]  # as diffusers calls them
    before = _sums(pipeline) if len(loras) > 1 else {}
    for lora, name in zip(loras, names, strict=True):
        _add(pipeline, lora, name)
        after = _sums(pipeline) if len(loras) > 1 else {}
        # transformers says that it draws anew what a file lacks, such as the LoRAs before it.
        if changed := [key for key, value in before.items() if after[key] != value]:
            raise ValueError(
                f"{lora.named}: to load it changed {changed[0]}, which is not its own, a fault of "
                "this version of transformers or diffusers; merge the LoRAs into one file"
            )
        before = after
    if [lora.weight for lora in loras] != [1]:
        _set_weights(pipeline, names, [lora.weight for lora in loras])


def lora_fingerprint(loras: Sequence[Lora]) -> dict[str, str]:
    """Name -> SHA-256 of each LoRA's file, and its weight; a single one of weight 1 is "lora".

    Raises:
        ValueError: see `check_loras`; or what peft wrote cannot be read.
    """
    check_loras(loras)
    is_plain = len(loras) == 1 and loras[0].weight == 1
    found = {}
    for place, lora in enumerate(loras):
        name = "lora" if is_plain else f"lora.{place}"
        file = _file(lora)
        found[name] = file_sha256(file)
        if digest := peft_digest(file, lora.named):
            found[f"{name} {CONFIG}"] = digest
        if not is_plain:
            found[f"{name} weight"] = repr(lora.weight)
    return found


def _entry(entry: Any, key: str) -> Lora:
    """One entry of a list.

    Raises:
        ValueError: naming its key.
    """
    if isinstance(entry, str):
        return Lora(path=entry, key=key)
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"{key}={entry} is not possible: give a path, or {{path: PATH, weight: 1}}"
        )
    for name in entry:
        if name not in ("path", "weight"):
            raise ValueError(f"{key}.{name}={entry[name]} is not a key; known are path, weight")
    path, weight = entry.get("path"), entry.get("weight", 1.0)
    if not isinstance(path, str):
        raise ValueError(f"{key}.path={path} is not possible: give a safetensors file")
    if type(weight) not in (int, float) or not _is_finite(weight):
        raise ValueError(f"{key}.weight={weight} is not possible: give a finite number")
    return Lora(path=path, weight=float(weight), key=key)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond the largest float
        return False


def _file(lora: Lora) -> Path:
    """The safetensors file that holds its weights; not opened.

    Raises:
        ValueError: there is none.
    """
    path = file = Path(lora.path)
    if path.is_dir():
        file = path / WEIGHTS
        if not (path / CONFIG).is_file():
            raise ValueError(f"{lora.named} is a folder; give the .safetensors file in it")
        if not file.is_file():
            raise ValueError(
                f"{lora.named} has {CONFIG} and no {WEIGHTS}; a pickle is never loaded, save it "
                "again by save_pretrained"
            )
    if not file.is_file():
        raise ValueError(f"{lora.named} does not exist; give a safetensors file")
    if file.suffix != ".safetensors":
        raise ValueError(
            f"{lora.named} is no safetensors file; a pickle is never loaded, save it again"
        )
    return file


def _add(pipeline: Any, lora: Lora, name: str) -> None:
    """Loads one LoRA as the adapter of a name; every weight must belong to a layer."""
    from safetensors import SafetensorError, safe_open

    file = _file(lora)
    try:
        with safe_open(file, "pt") as tensors:
            keys = list(tensors.keys())
            infinite = [key for key in keys if not tensors.get_tensor(key).float().isfinite().all()]
    except SafetensorError as error:
        raise ValueError(f"{lora.named} is damaged ({error}); fetch it again") from error
    if infinite:
        raise ValueError(
            f"{lora.named} holds NaN or infinite weights ({', '.join(infinite[:3])}"
            f"{' ...' if len(infinite) > 3 else ''}); train it again"
        )
    keys = [key for key in keys if not key.endswith(".alpha")]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            if not load_peft(pipeline, file, lora.named, name):
                folder = str(file.parent)
                pipeline.load_lora_weights(folder, weight_name=file.name, adapter_name=name)
    except ValueError as error:
        raise error if str(error).startswith(lora.named) else _failed(lora, error) from error
    except Exception as error:
        raise _failed(lora, error) from error
    found = len(list(_adapter_weights(pipeline, name)))
    if found != len(keys):
        raise ValueError(
            f"{lora.named} has {len(keys)} weights, of which {found} found a layer in this "
            f"model: {_cause(pipeline, keys)}"
        )
    for part in _parts(pipeline).values():
        if not any(parameter.is_meta for parameter in part.parameters()):
            refuse_non_finite(part, lora.named, "train it again")


def _failed(lora: Lora, error: Exception) -> ValueError:
    return ValueError(f"{lora.named} cannot be loaded: {' '.join(str(error).split())[:400]}")


def _set_weights(pipeline: Any, names: Sequence[str], weights: Sequence[float]) -> None:
    """Gives each adapter its strength, a factor of what its rank and alpha ask for."""
    before = {key: scaling[name] for key, scaling, name in _scalings(pipeline, names)}
    pipeline.set_adapters(list(names), list(weights))
    factors = dict(zip(names, weights, strict=True))
    for key, scaling, name in _scalings(pipeline, names):
        if not math.isclose(scaling[name], before[key] * factors[name]):
            raise ValueError(
                f"model.lora: {key} is scaled by {scaling[name]} instead of "
                f"{before[key] * factors[name]}, a fault of this version of peft; update peft"
            )


def _scalings(pipeline: Any, names: Sequence[str]) -> Iterator[tuple[str, dict[str, float], str]]:
    """(layer and adapter, the layer's adapter -> factor, adapter) of every adapted layer."""
    for part_name, part in _parts(pipeline).items():
        for layer_name, layer in part.named_modules():
            scaling = getattr(layer, "scaling", None)
            if isinstance(scaling, dict):
                for name in names:
                    if name in scaling:
                        yield f"{part_name}.{layer_name} of {name}", scaling, name


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


def _adapter_weights(pipeline: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Key and value of each weight of an adapter in the pipeline's parts."""
    own = re.compile(rf"\.lora_\w+\.{name}(\.|$)")
    for part_name, part in _parts(pipeline).items():
        for key, value in part.named_parameters():
            if own.search(key):
                yield f"{part_name}.{key}", value


def _sums(pipeline: Any) -> dict[str, float]:
    """Weight -> sum of its values, under its name without adapters; none on the meta device."""
    return {
        f"{part_name}.{key.replace('.base_layer.', '.')}": value.double().sum().item()
        for part_name, part in _parts(pipeline).items()
        for key, value in part.named_parameters()
        if not value.is_meta
    }


def _parts(pipeline: Any) -> dict[str, torch.nn.Module]:
    components = pipeline.components.items()
    return {name: part for name, part in components if isinstance(part, torch.nn.Module)}
