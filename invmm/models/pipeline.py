"""Latent models of any family, from a diffusers folder, a hub id or a pipeline in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from invmm.diffusion.schedule import NoiseSchedule, read_scheduler
from invmm.diffusion.scheduler_config import check_config
from invmm.faults import Refusal
from invmm.files import json_digest
from invmm.identity import added
from invmm.models.adapter import ModelInfo
from invmm.models.codec import Posterior, latent_scale
from invmm.models.components import Parts
from invmm.models.cost import CallCost, call_cost, peak_bytes, weight_bytes
from invmm.models.execution import Execution
from invmm.models.json_files import read_json, settings_digests
from invmm.models.latent import Dit, LatentDiffusion, LatentNetwork
from invmm.models.loading import fetched, scheduler_json
from invmm.models.lora import LoraSetting, add_loras, check_loras, lora_fingerprint, loras_of
from invmm.models.parts import load_part, part_class, pipeline_name
from invmm.models.single_file import (
    FAMILIES,
    check_names,
    checkpoint_file,
    config_folder,
    load_single_file,
    state_of,
)
from invmm.models.stable_diffusion import StableDiffusion, StableDiffusion3, StableDiffusionXL
from invmm.models.trial import (
    as_a_fault,
    check_shape,
    mistyped,
    try_out,
    try_out_text_encoder,
)
from invmm.models.weights import no_weights, weight_files, weights_sha256

_CLIP_TOKENS = 77
_RENAMED = ["DiTTransformer2DModel", "Transformer2DModel"]

_FITTING: set[str] = set()
"""Digests of configs whose parts this process found to fit together.

Trying out SDXL takes ten seconds, and a config is checked before each job and again within it.
"""

NETWORKS: tuple[type[LatentNetwork], ...] = (
    LatentDiffusion,
    Dit,
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
)
"""Every family; one more is one more class here."""

PIPELINES = {name: network for network in NETWORKS for name in network.family.pipelines}
"""Pipeline class name -> the class that runs it."""


@dataclass(frozen=True, kw_only=True)
class LatentPipeline:
    """A diffusers pipeline on the latents of an autoencoder.

    Attributes:
        path: a local folder, a hub id, or a safetensors file with the whole model.
        config: folder of the configs, the scheduler and the tokenizers of such a file.
        variant: of the weight files, for example fp16.
        revision: of a hub repository.
        dtype: of the weights; losses and the noise distribution stay in float32.
        lora: a safetensors file with LoRA weights for the denoiser and text encoders, or a folder
            that peft wrote; or a list of them and of {path: FILE, weight: 0.7}.
        unet: folder of a fine-tuned U-Net, or a folder with `unet` in it, in place of the model's.
        posterior: which latents stand for an image; null takes the family's (paper: the mode,
            for Stable Diffusion 3 a sample).
        latent_scale: factor of the latents of a VQ autoencoder whose config leaves it open; 1 for
            latents as they are encoded (paper).
        image_size: side of the images in pixels; null takes the denoiser's sample_size.
        vae_slicing: decode image after image, for less memory.
        vae_tiling: decode tile after tile, for large images.
    """

    path: str
    config: str | None = added(None)
    variant: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    lora: LoraSetting = None
    unet: str | None = added(None)
    posterior: Posterior | None = None
    latent_scale: Annotated[float, Gt(0)] | None = None
    image_size: Annotated[int, Ge(8)] | None = None
    vae_slicing: bool = False
    vae_tiling: bool = False

    def __post_init__(self) -> None:
        loras_of(self.lora)

    def describe(self) -> ModelInfo:
        """Reads JSON only; see `ModelRecipe`."""
        folder = self._folder(weights=False)
        family = folder.network.family
        shape, factor = self._latent_shape(folder), folder.pixels_per_latent
        num_train_timesteps, prediction_type = read_scheduler(
            folder.named, lambda: check_config(folder.scheduler())
        )
        files = {file for files in self._weights(folder).values() for file in files}
        return ModelInfo(
            family=family.name,
            latent_shape=shape,
            image_size=shape[1] * factor,
            num_train_timesteps=num_train_timesteps,
            prediction_type=prediction_type,
            weight_bytes=sum(file.stat().st_size for file in files) or None,
            prompts=family.prompts,
            latent_scale=self._latent_scale(folder),
        )

    def schedule(self) -> NoiseSchedule:
        """See `ModelRecipe`."""
        folder = self._folder(weights=False)
        config, name = folder.scheduler(), folder.classes["scheduler"]
        found = read_scheduler(folder.named, lambda: NoiseSchedule.from_config(config))
        # Keys that are not read may still be such that the pipeline cannot be made.
        load_part(folder.path, "scheduler", name, variant=None, dtype=None)
        return found

    def try_out(self) -> None:
        """Runs its parts on the meta device, without weights.

        Raises:
            ValueError: they do not fit together.
        """
        folder = self._folder(weights=False)
        family, network, shape = folder.network.family, folder.network, self._latent_shape(folder)
        configs = folder.parts().configs
        words = settings_digests(folder.path, [n for n in configs if n.startswith("tokenizer")])
        tried = json_digest(
            {
                "classes": folder.classes, "configs": configs, "shape": shape, "words": words,
                "loras": lora_fingerprint(loras_of(self.lora)),
                "file": folder.file and state_of(folder.file),
            }
        )  # fmt: skip
        if tried in _FITTING:
            return
        condition = network.blank_condition(folder.config(family.denoiser), 1, folder.num_tokens)
        meta = {name: value.to("meta") for name, value in condition.items()}
        named, own = folder.named, (family.denoiser, family.autoencoder)
        for name in sorted(self._weights(folder).keys() - own):
            with as_a_fault(named):
                encoder = folder.blank(name)
            tokenizer = name.replace("text_encoder", "tokenizer")
            # The descriptions of known models in this package have none.
            if tokenizer in folder.classes and (folder.path / tokenizer).is_dir():
                writes = load_part(
                    folder.path, tokenizer, folder.classes[tokenizer], variant=None, dtype=None
                )
                try_out_text_encoder(named, name, encoder, writes)
        try_out(
            named,
            lambda: (folder.blank(family.denoiser), folder.blank(family.autoencoder)),
            lambda denoiser, latents, steps: network.evaluate(denoiser, latents, steps, meta),
            shape,
            folder.pixels_per_latent,
            suspects=partial(_mistyped, folder),
        )
        if self.lora is not None or folder.file is not None:
            self._check_blank(folder, {name: folder.blank(name) for name in self._weights(folder)})
        _FITTING.add(tried)

    def call_cost(self, rows: int, execution: Execution) -> CallCost:
        """See `ModelRecipe`."""
        folder = self._folder(weights=False)
        family, named = folder.network.family, folder.named
        shape, config = self._latent_shape(folder), folder.config(family.denoiser)
        suspects = partial(_mistyped, folder)
        with as_a_fault(named, suspects):
            parts = {name: folder.blank(name) for name in self._weights(folder)}
        self._check_blank(folder, parts)
        denoiser, autoencoder = parts[family.denoiser], parts[family.autoencoder]
        execution.configure(denoiser)
        pixels: list[Tensor] = []
        with as_a_fault(named, suspects), torch.device("meta"):
            latents = torch.empty(rows, *shape, requires_grad=True)
            timesteps = torch.zeros(rows, dtype=torch.long)
            condition = folder.network.blank_condition(config, rows, folder.num_tokens)
            cost = call_cost(
                denoiser,
                lambda: folder.network.evaluate(denoiser, latents, timesteps, condition),
                attention=execution.attention,
                autocast=execution.autocast if self.dtype == "float32" else None,
            )
            one = torch.empty(1, *shape)
            cost = replace(
                cost,
                weight_bytes=sum(map(weight_bytes, parts.values())),
                decode_bytes=peak_bytes(
                    autoencoder, lambda: pixels.append(autoencoder.decode(one).sample)
                ),
            )
        side = shape[1] * folder.pixels_per_latent
        check_shape(named, "autoencoder's decoder", pixels[0], (1, 3, side, side))
        return cost if self.dtype == "float32" else cost.in_half_precision()

    def load(self, device: torch.device) -> LatentNetwork:
        """Loads every part, checks that no weight is missing, freezes; see `ModelRecipe`."""
        folder = self._folder(weights=True)
        family = folder.network.family
        dtype = getattr(torch, self.dtype)
        if folder.file is None:
            pipeline = self._from_folder(folder, dtype)
        else:
            blank = {name: folder.blank(name) for name in self._weights(folder)}
            self._check_blank(folder, blank)
            pipeline = load_single_file(
                part_class(f"diffusers.{folder.pipeline}"), folder.file, folder.path, folder.named,
                dtype=dtype, parts=blank, absent=family.ignored,
            )  # fmt: skip
        add_loras(pipeline, loras_of(self.lora))
        network = folder.network(
            pipeline, device, self.posterior, self._latent_scale(folder), self.image_size
        )
        if self.vae_slicing:
            network.codec.autoencoder.enable_slicing()
        if self.vae_tiling:
            network.codec.autoencoder.enable_tiling()
        return network

    def fingerprint(self) -> dict[str, str]:
        """See `ModelRecipe`."""
        folder = self._folder(weights=True)
        if folder.file is not None:
            return {
                "checkpoint": weights_sha256(folder.file), **lora_fingerprint(loras_of(self.lora))
            }  # fmt: skip
        found = {
            f"{name}/{file.name}": weights_sha256(file)
            for name, files in self._weights(folder).items()
            for file in files
        }
        return {**found, **lora_fingerprint(loras_of(self.lora))}

    def settings(self) -> dict[str, str]:
        """See `ModelRecipe`."""
        folder = self._folder(weights=True)
        if folder.unet is None:
            return settings_digests(folder.path, sorted(folder.classes))
        found = settings_digests(folder.path, sorted(folder.classes.keys() - {"unet"}))
        own = settings_digests(folder.unet, [""])
        return {**found, **{f"unet/{name}": digest for name, digest in own.items()}}

    def _from_folder(self, folder: PipelineFolder, dtype: torch.dtype) -> Any:
        """The pipeline of diffusers, on the CPU."""
        family = folder.network.family
        parts: dict[str, Any] = {
            name: load_part(
                folder.path, name, found, variant=self._variant(folder, name), dtype=dtype,
                place=folder.unet if name == "unet" else None,
            )
            for name, found in folder.classes.items()
        }  # fmt: skip
        absent = {name: None for name in (*family.optional, *family.ignored)}
        settings = {name: folder.index[name] for name in family.settings if name in folder.index}
        return part_class(f"diffusers.{folder.pipeline}")(**{**absent, **settings, **parts})

    def _check_blank(self, folder: PipelineFolder, parts: Mapping[str, Any]) -> None:
        """Checks a single file by parts on the meta device, and adds the LoRAs to them."""
        if folder.file is not None:
            check_names(folder.file, folder.named, parts)
        if self.lora is None:
            return
        family = folder.network.family
        absent = dict.fromkeys((*family.parts, *family.ignored))
        pipeline = part_class(f"diffusers.{folder.pipeline}")(**{**absent, **parts})
        add_loras(pipeline, loras_of(self.lora))
        for part in parts.values():
            part.to("meta").eval().requires_grad_(False)

    def _latent_shape(self, folder: PipelineFolder) -> tuple[int, int, int]:
        """(C, H, W) of a latent.

        Raises:
            ValueError: the parts do not fit together, or cannot draw images of this size.
        """
        return folder.network.checked_shape(folder.parts(), self.image_size)

    def _latent_scale(self, folder: PipelineFolder) -> float:
        """Read from the JSON, as diffusers fills in missing keys when it loads a part."""
        name = folder.network.family.autoencoder
        is_vq = folder.classes[name].endswith("VQModel")
        return latent_scale(folder.config(name), is_vq=is_vq, given=self.latent_scale)

    def _folder(self, *, weights: bool) -> PipelineFolder:
        if self.config is not None:
            return self._checked(self._of_a_file(self.config))
        path = fetched(self.path, revision=self.revision, variant=self.variant, weights=weights)
        folder = open_pipeline(f"model.path={self.path}", path)
        if self.unet is not None:
            folder = folder.with_unet(self.unet)
        is_here = path == Path(self.path).expanduser()
        self._checked(folder)
        for name, files in self._weights(folder).items():
            is_own = name == "unet" and folder.unet is not None
            if (weights or is_here or is_own) and not files:
                owner = folder.named.removeprefix("model.path=")
                raise no_weights(owner, folder.place(name), name, self.variant)
        return folder

    def _of_a_file(self, config: str) -> PipelineFolder:
        """The folder that describes a single file, see `invmm.models.single_file`.

        Raises:
            ValueError: one of the two is missing or of another kind, or an option has no meaning.
        """
        file, path = checkpoint_file(self.path, config), config_folder(config)
        for option in ("variant", "revision", "unet"):
            if (value := getattr(self, option)) is not None:
                raise Refusal(
                    f"model.{option}={value} has no meaning for a single file; give null",
                    f"model.{option}",
                )
        named = f"model.path={self.path} with model.config={config}"
        folder = open_pipeline(named, path)
        if folder.network.family.name not in FAMILIES:
            raise ValueError(
                f"{named} is a {folder.pipeline}, and single files are read of Stable Diffusion 1, "
                "2 and XL; convert it by from_single_file(...).save_pretrained(FOLDER)"
            )
        return replace(folder, file=file)

    def _checked(self, folder: PipelineFolder) -> PipelineFolder:
        """The folder, if its parts fit together and the LoRAs are files for its family.

        Raises:
            ValueError: naming the key.
        """
        self._latent_shape(folder)
        if self.lora is not None:
            if not folder.network.family.searched:
                raise Refusal(
                    f"model.lora={self.lora} has no meaning for a {folder.pipeline}, for which "
                    "diffusers loads none; give null",
                    "model.lora",
                )
            check_loras(loras_of(self.lora))
        return folder

    def _weights(self, folder: PipelineFolder) -> dict[str, list[Path]]:
        return {
            name: [folder.file]
            if folder.file is not None
            else weight_files(folder.place(name), found, self._variant(folder, name))
            for name, found in folder.classes.items()
            if name != "scheduler" and not name.startswith("tokenizer")
        }

    def _variant(self, folder: PipelineFolder, name: str) -> str | None:
        """Of a part's files; training writes those of `unet` without one, whatever the others."""
        place = folder.place(name)
        is_own = name == "unet" and folder.unet is not None
        has_files = not is_own or weight_files(place, folder.classes[name], self.variant)
        return self.variant if has_files else None


@dataclass(frozen=True, kw_only=True)
class PipelineFolder:
    """A pipeline on disk, its JSON files read.

    Attributes:
        path: of the folder.
        pipeline: its class name.
        network: the class that runs it.
        index: its model_index.json.
        classes: part -> "library.Class".
        named: the model in messages.
        unet: folder of the U-Net that takes the place of its own; None without.
        file: that holds the weights of all parts; None if they are in the folder.
    """

    path: Path
    pipeline: str
    network: type[LatentNetwork]
    index: Mapping[str, Any]
    classes: Mapping[str, str]
    named: str
    unet: Path | None = None
    file: Path | None = None

    def with_unet(self, path: str) -> PipelineFolder:
        """The same model with another U-Net.

        Raises:
            ValueError: it has none, or the folder does not hold one.
        """
        if self.network.family.denoiser != "unet":
            raise Refusal(
                f"model.unet={path} has no meaning for a {self.pipeline}, whose denoiser is a "
                f"{self.network.family.denoiser}; put it into a copy of the model's folder",
                "model.unet",
            )
        return replace(self, unet=_unet_folder(path), named=f"{self.named} with model.unet={path}")

    def place(self, part: str) -> Path:
        """The folder of a part."""
        return self.unet if part == "unet" and self.unet is not None else self.path / part

    def config(self, part: str) -> Mapping[str, Any]:
        """The config.json of a part."""
        return read_json(self.place(part) / "config.json")

    def parts(self) -> Parts:
        """The configs of all parts but the scheduler.

        Raises:
            ValueError: a config is missing, is not JSON, or names another class than the index.
        """
        names = [name for name in self.classes if name != "scheduler"]
        classes = {name: self.classes[name].rpartition(".")[2] for name in names}
        configs = {}
        for name in names:
            is_tokenizer = name.startswith("tokenizer")
            file = self.place(name) / f"{'tokenizer_' * is_tokenizer}config.json"
            if not is_tokenizer or file.is_file():
                configs[name] = read_json(file)
            elif file.parent.is_dir():
                configs[name] = {}
        for name, config in configs.items():
            if config.get("quantization_config"):
                raise ValueError(
                    f"the {name} of {self.named} has a quantization_config in its "
                    "config.json, and quantised weights are not read from folders; give the model "
                    "in float16 or float32"
                )
            own = config.get("_class_name", classes[name])
            if own != classes[name] and sorted(map(str, (own, classes[name]))) != _RENAMED:
                raise ValueError(
                    f"the {name} of {self.named} has _class_name={own} in its config.json, "
                    f"and model_index.json says {classes[name]}; save the model again"
                )
        return Parts(source=self.named, classes=classes, configs=configs)

    @property
    def pixels_per_latent(self) -> int:
        """Side of the square of pixels that one latent stands for."""
        parts = self.parts()
        return 2 ** (parts.length(self.network.family.autoencoder, "block_out_channels") - 1)

    @property
    def num_tokens(self) -> int:
        """Of a prompt, if it has a tokenizer here; else CLIP's."""
        path = self.path / "tokenizer" / "tokenizer_config.json"
        length = read_json(path).get("model_max_length") if path.is_file() else None
        return length if isinstance(length, int) else _CLIP_TOKENS

    def blank(self, part: str) -> Any:
        """A part on the meta device: its shapes without any weights."""
        found, config = part_class(self.classes[part]), dict(self.config(part))
        with torch.device("meta"):
            if self.classes[part].startswith("diffusers."):
                blank = found.from_config(config)
            else:
                blank = found(found.config_class.from_dict(config))
        return blank.eval().requires_grad_(False)

    def scheduler(self) -> Mapping[str, Any]:
        """The scheduler's config, see `scheduler_json`."""
        return scheduler_json(self.path / "scheduler", self.index)


def open_pipeline(named: str, folder: Path) -> PipelineFolder:
    """Reads the index of a pipeline.

    Args:
        named: the model in messages.
        folder: that holds it.

    Raises:
        ValueError: it is not a supported pipeline.
    """
    index = read_json(folder / "model_index.json")
    name = pipeline_name(named, index, PIPELINES)
    network = PIPELINES[name]
    classes = network.family.classes(named, index)
    return PipelineFolder(
        path=folder, pipeline=name, network=network, index=index, classes=classes, named=named
    )


def _unet_folder(path: str) -> Path:
    """The folder of a U-Net: as given, or the folder `unet` in it.

    Raises:
        ValueError: neither or both of them hold one.
    """
    folder = Path(path).expanduser()
    found = [one for one in (folder, folder / "unet") if (one / "config.json").is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        state = "holds a config.json and a folder unet with another"
    elif folder.is_dir():
        state = "holds neither a config.json nor a folder unet with one"
    else:
        state = "is a file" if folder.exists() else "does not exist"
    raise ValueError(
        f"model.unet={path} {state}; give the folder of a U-Net as save_pretrained writes it"
    )


def _mistyped(folder: PipelineFolder) -> list[str]:
    """Suspects if the denoiser or the autoencoder cannot be built, see `mistyped`."""
    family = folder.network.family
    return [
        line
        for name in (family.denoiser, family.autoencoder)
        for line in mistyped(name, part_class(folder.classes[name]), folder.config(name))
    ]
