"""Opening diffusers folders, and trusting nothing in them.

Class names and component folders come from a JSON file that anyone can write. They are checked
here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from invmm.models.json_files import read_json
from invmm.models.known import known_architecture
from invmm.models.parts import ABSENT, SCHEDULERS, pipeline_name, reason_against
from invmm.models.weights import STEMS, check_loaded, no_weights, weight_files

PIPELINES = ("DDPMPipeline", "DDIMPipeline")
"""Pipelines that hold a pixel U-Net."""

BARE = " and a bare UNet2DModel folder"
"""Ends the list of supported pipelines in errors."""

COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "unet": ("UNet2DModel",),
    "scheduler": tuple(name.removeprefix("diffusers.") for name in SCHEDULERS),
}
"""The parts of these pipelines -> the classes that they may have."""

_FOLDERS_ONLY = (
    "models are folders as save_pretrained writes them; give a single safetensors file with "
    "model.config=FOLDER, a folder of its configs, or convert it by diffusers' "
    "from_single_file(...).save_pretrained(FOLDER); give a LoRA as model.lora"
)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model on disk, its JSON files read.

    Attributes:
        path: of the folder.
        unet: subfolder of the network, "" for a bare network.
        unet_config: its config.json.
        scheduler_config: None if the folder has none.
    """

    path: Path
    unet: str
    unet_config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any] | None

    def weights(self, variant: str | None) -> list[Path]:
        """The safetensors files of the network.

        Raises:
            ValueError: there are none, or it is not clear which; see `weight_files`.
        """
        files = weight_files(self.path / self.unet, "diffusers.UNet2DModel", variant)
        if not files:
            raise no_weights(str(self.path), self.path / self.unet, self.unet or None, variant)
        return files


def open_folder(
    path: str, *, revision: str | None, variant: str | None, weights: bool
) -> ModelFolder:
    """Finds the folder (fetching a hub id if need be) and reads its JSON files.

    Args:
        path: a folder, or a hub id such as google/ddpm-cifar10-32.
        revision: of the hub repository.
        variant: of the weight files, such as fp16.
        weights: whether the weights must be there too.

    Raises:
        ValueError: neither a folder nor a hub id, or not a supported model.
    """
    folder = fetched(path, revision=revision, variant=variant, weights=weights)
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        pipeline_name(f"model.path={path}", index, PIPELINES, BARE)
        check_components(f"model.path={path}", index)
        # Old repositories keep the parts side by side, as diffusers still accepts.
        unet, scheduler = (
            folder / name if (folder / name).is_dir() else folder for name in COMPONENTS
        )
        scheduler_config = scheduler_json(scheduler, index)
    elif (folder / "config.json").is_file():
        unet, scheduler_config = folder, None
    else:
        raise ValueError(
            f"model.path={path} has neither model_index.json (a pipeline) nor config.json (a "
            "network); give a folder written by save_pretrained"
        )
    unet_config = read_json(unet / "config.json")
    said = None if scheduler_config is None else "UNet2DModel"  # by the index
    if (own := unet_config.get("_class_name", said)) != "UNet2DModel":
        part = "; a part of a pipeline cannot be measured alone: give the pipeline's folder"
        raise ValueError(
            f"model.path={path} holds a {own}; supported is UNet2DModel{part if own else ''}"
        )
    if unet == folder and scheduler_config is None:
        _refuse_part_of_latent_pipeline(path, folder)
    return ModelFolder(
        path=folder,
        unet="" if unet == folder else "unet",
        unet_config=unet_config,
        scheduler_config=scheduler_config,
    )


def fetched(path: str, *, revision: str | None, variant: str | None, weights: bool) -> Path:
    """The folder of a model, fetched from the hub if it is not on this machine.

    Args:
        path: a folder, or a hub id such as google/ddpm-cifar10-32.
        revision: of the hub repository.
        variant: of the weight files, such as fp16.
        weights: whether the weights must be there too.

    Without its weights, a public model that the hub does not give comes from the package's own
    table (`invmm.models.known`).

    Raises:
        ValueError: neither a folder nor a hub id, or the hub does not give it.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"model.path={path} is a file, and {_FOLDERS_ONLY}")
    if not weights and revision is None and known_architecture(path) is not None:
        return _described(path)
    return _download(path, revision, variant if weights else None, weights=weights)


@cache
def _described(path: str) -> Path:
    """The JSON files of a model of the table; the hub is asked once a process."""
    try:
        return _download(path, None, None, weights=False)
    except ValueError:
        known = known_architecture(path)
        assert known is not None
        return known


def load_unet(folder: ModelFolder, *, variant: str | None, dtype: Any) -> Any:
    """The network with every weight in its place, on the CPU.

    Raises:
        ValueError: it cannot be loaded, or see `check_loaded`.
    """
    from diffusers import UNet2DModel

    files = folder.weights(variant)
    try:
        loaded: Any = UNet2DModel.from_pretrained(
            str(folder.path / folder.unet),  # with subfolder=, weights beside it would come first
            variant=variant,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            low_cpu_mem_usage=False,
        )
    except Exception as error:  # whatever a foreign config makes the constructors raise
        reason = " ".join(str(error).split())[:400]
        raise ValueError(
            f"model.path={folder.path} cannot be loaded ({reason}); export the model again"
        ) from error
    unet, info = loaded
    check_loaded(unet, info, files, f"model.path={folder.path}")
    return unet


def _refuse_part_of_latent_pipeline(path: str, folder: Path) -> None:
    """Refuses the U-Net of a latent pipeline, as the index in the folder above it tells.

    With latents of three channels, its own config looks like that of a U-Net on pixels.
    """
    beside = folder.resolve().parent
    if not (beside / "model_index.json").is_file():
        return
    name = read_json(beside / "model_index.json").get("_class_name")
    if name not in PIPELINES:
        raise ValueError(
            f"model.path={path} is a part of the {name} in {beside} and draws its latents, not "
            "pixels; give that folder"
        )


def check_components(source: str, index: Mapping[str, Any]) -> None:
    """Refuses pipelines that are not just a U-Net on pixels and a supported scheduler.

    Args:
        source: whose index it is, as errors name it.
        index: of a folder, or `index_of` a pipeline in memory.

    Raises:
        ValueError: naming the part, its class and the supported ones.
    """
    present = [name for name, value in index.items() if value not in ABSENT]
    for name in [name for name in present if not name.startswith("_")] + list(COMPONENTS):
        if name not in COMPONENTS:
            raise ValueError(
                f"{source} names the component {name!r} in model_index.json; expected "
                f"are {' and '.join(COMPONENTS)}"
            )
        value = index.get(name)
        if value not in [["diffusers", known] for known in COMPONENTS[name]]:
            joined = ".".join(map(str, value)) if isinstance(value, list) else str(value)
            raise ValueError(
                f"{source} names {value!r} as its {name}{reason_against(name, joined)}; "
                f"supported are diffusers' {', '.join(COMPONENTS[name])}"
            )


def scheduler_json(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's config, with the class that the pipeline uses as `_class_name`.

    It is the class in the index, except that a DDIMPipeline converts any to a DDIMScheduler.
    """
    config = read_json(folder / "scheduler_config.json")
    is_converted = index["_class_name"] == "DDIMPipeline"
    return {**config, "_class_name": "DDIMScheduler" if is_converted else index["scheduler"][1]}


def _download(path: str, revision: str | None, variant: str | None, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not _HUB_ID.fullmatch(path):
        raise ValueError(
            f"model.path={path} is no folder here and no hub id (owner/name); give a folder that "
            "save_pretrained or invmm-train wrote"
        )
    patterns = ["*.json"]
    if weights:
        patterns += ["*/*.txt", "*/*.model"]  # of tokenizers
        files = [f"{name}.{variant}*" if variant else f"{name}*" for name in STEMS.values()]
        patterns += [f"{folder}{file}.safetensors" for folder in ("", "*/") for file in files]
    # Some repositories hold the weights many times over: whole checkpoints, other precisions.
    ignored = ["safety_checker/*.safetensors"]
    ignored += [] if variant else [f"*{name}.*.safetensors" for name in STEMS.values()]
    try:
        return Path(
            snapshot_download(
                path, revision=revision, allow_patterns=patterns, ignore_patterns=ignored
            )
        )
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.path={path} is no folder here and could not be fetched from the hub "
            f"({reason}); a gated model needs `hf auth login` first"
        ) from error
