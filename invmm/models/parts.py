"""The parts of a diffusers pipeline: which ones a family has, and loading them without trust.

Class names and folders come from a JSON file that anyone can write. They are checked here, part by
part, and `invmm.models.weights` checks what was loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from invmm.diffusion.scheduler_config import BETA_SCHEDULERS, FLOW_SCHEDULERS, why_refused
from invmm.models.weights import check_loaded, weight_files

AUTOENCODERS = ("diffusers.VQModel", "diffusers.AutoencoderKL")
SCHEDULERS = tuple(f"diffusers.{name}" for name in BETA_SCHEDULERS)
"""Schedulers of models on a schedule of betas, in folders and in memory."""
RECTIFIED_FLOWS = tuple(f"diffusers.{name}" for name in FLOW_SCHEDULERS)
"""Schedulers of rectified flows."""
ABSENT = (None, [None, None])
"""What a model_index.json says of parts that the pipeline may have and this one has not."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Pipelines that are used in the same way.

    Attributes:
        name: as in `ModelInfo.family`.
        pipelines: their class names.
        denoiser: the part that is evaluated at every step.
        autoencoder: the part between pixels and latents.
        parts: every part -> the classes that it may have, with their library.
        optional: parts that may be absent.
        ignored: parts that are never loaded, such as safety checkers.
        settings: further keys of model_index.json, which are no parts.
        prompts: the options of the config group `prompt` that it understands.
        searched: the text encoders that read a searched prompt, unless told otherwise.
    """

    name: str
    pipelines: tuple[str, ...]
    denoiser: str
    autoencoder: str
    parts: Mapping[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ("none",)
    searched: tuple[str, ...] = ()

    def classes(self, source: str, index: Mapping[str, Any]) -> dict[str, str]:
        """Part -> its class ("library.Name") in a model_index.json; absent optional ones left out.

        Args:
            source: whose index it is, as errors name it.
            index: of a folder, or `index_of` a pipeline in memory.

        Raises:
            ValueError: a part is of another class or unknown to the family, or a setting is not
                supported.
        """
        if index.get("requires_aesthetics_score"):
            raise ValueError(
                f"{source} has requires_aesthetics_score=true in model_index.json, as a "
                "refiner has; give the base model"
            )
        zeros = index.get("force_zeros_for_empty_prompt", True)
        if type(zeros) is not bool:
            raise ValueError(
                f"{source} has force_zeros_for_empty_prompt={zeros} in model_index.json; "
                "use true or false"
            )
        for name, value in index.items():
            known = (*self.parts, *self.ignored, *self.settings, "requires_aesthetics_score")
            if not name.startswith("_") and name not in known and value not in ABSENT:
                raise ValueError(
                    f"{source} names the component {name!r} in model_index.json; "
                    f"expected are {', '.join(self.parts)}"
                )
        found = {}
        for name, classes in self.parts.items():
            value = index.get(name)
            if value in ABSENT and name in self.optional:
                continue
            joined = ".".join(map(str, value)) if isinstance(value, list) else str(value)
            if joined not in classes:
                raise ValueError(
                    f"{source} names {value!r} as its {name}{reason_against(name, joined)}; "
                    f"supported are {', '.join(known.rpartition('.')[2] for known in classes)}"
                )
            found[name] = joined
        return found


def pipeline_name(
    source: str, index: Mapping[str, Any], known: Collection[str], also: str = ""
) -> str:
    """The class name of a pipeline; refused unless it is a known one.

    Args:
        source: whose it is, as errors name it.
        index: of a folder, or `index_of` a pipeline in memory.
        known: names of the supported classes.
        also: further words after these names in the error.

    Raises:
        ValueError: another class, or one whose code comes with the repository.
    """
    name = index.get("_class_name")
    if isinstance(name, (list, dict)):
        raise ValueError(
            f"{source} has _class_name={name} in model_index.json, a community pipeline with code "
            "of its own, which is never run; load it in Python, and save the pipeline of diffusers "
            "that it is made from"
        )
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{source} holds a {name}; supported are {', '.join(known)}{also}")
    return name


def index_of(pipeline: Any) -> dict[str, Any]:
    """The model_index.json of a pipeline in memory; compiled parts have their plain classes.

    A subclass from elsewhere has its full name, and so is refused: what it changes is unknown.
    """
    own = type(pipeline)
    is_diffusers = own.__module__.partition(".")[0] in ("diffusers", "builtins")
    name = own.__name__ if is_diffusers else f"{own.__module__}.{own.__name__}"
    index: dict[str, Any] = {"_class_name": name}
    for name, part in getattr(pipeline, "components", {}).items():
        plain = type(getattr(part, "_orig_mod", part))
        index[name] = None if part is None else [plain.__module__.split(".")[0], plain.__name__]
    return index


def reason_against(part: str, class_name: str) -> str:
    """Why a scheduler's class is not supported, in brackets; "" for any other part."""
    return f" ({why_refused(class_name)})" if part == "scheduler" else ""


def part_class(class_name: str) -> Any:
    """The class "library.Name" of a family's table.

    Raises:
        ValueError: the library is not installed.
    """
    library, _, own_name = class_name.partition(".")
    try:
        return getattr(importlib.import_module(library), own_name)
    except ImportError:
        raise ValueError(
            f"{class_name} needs the package {library}; install it by `pip install 'invmm[text]'`"
        ) from None


def load_part(
    folder: Path,
    name: str,
    class_name: str,
    *,
    variant: str | None,
    dtype: Any,
    place: Path | None = None,
) -> Any:
    """One part on the CPU, every weight in its place.

    Args:
        folder: of the pipeline.
        name: of the part and its subfolder.
        class_name: from `Family.classes`.
        variant: of the weight files.
        dtype: of the weights.
        place: folder of the part, if it is not that subfolder.

    Raises:
        ValueError: it cannot be loaded, or see `check_loaded`.
    """
    found, own = part_class(class_name), place or folder / name
    owner = f"the {name} of model.path={folder}" if place is None else f"model.{name}={place}"
    library = class_name.partition(".")[0]
    options: dict[str, Any] = {"local_files_only": True}
    has_weights = issubclass(found, torch.nn.Module)
    files = weight_files(own, class_name, variant) if has_weights else []
    if has_weights:
        options |= {"variant": variant, "use_safetensors": True, "output_loading_info": True}
        options["torch_dtype" if library == "diffusers" else "dtype"] = dtype
        if library == "diffusers":
            options["low_cpu_mem_usage"] = False
    try:
        loaded = found.from_pretrained(str(own), **options)
    except Exception as error:  # whatever a foreign config makes the constructors raise
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{owner} cannot be loaded ({reason}); export the model again") from error
    if not has_weights:
        return loaded
    part, info = loaded
    check_loaded(part, info, files, owner)
    return part
