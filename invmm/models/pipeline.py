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
from invmm.files import json_digest
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
        path: a local folder or a hub id.
        variant: of the weight files, for example fp16.
        revision: of a hub repository.
        dtype: of the weights; losses and the noise distribution stay in float32.
        lora: a safetensors file with LoRA weights for the denoiser and text encoders, or a folder
            that peft wrote; or a list of them and of {path: FILE, weight: 0.7}.
        posterior: which latents stand for an image; null takes the family's (paper: the mode,
            for Stable Diffusion 3 a sample).
        latent_scale: factor of the latents of a VQ autoencoder whose config leaves it open; 1 for
            latents as they are encoded (paper).
        image_size: side of the images in pixels; null takes the denoiser's sample_size.
        vae_slicing: decode image after image, for less memory.
        vae_tiling: decode tile after tile, for large images.
    """

    path: str
    variant: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    lora: LoraSetting = None
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
            f"model.path={self.path}", lambda: check_config(folder.scheduler())
        )
        files = [file for files in self._weights(folder).values() for file in files]
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
        folder, source = self._folder(weights=False), f"model.path={self.path}"
        config, name = folder.scheduler(), folder.classes["scheduler"]
        found = read_scheduler(source, lambda: NoiseSchedule.from_config(config))
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
        configs = folder.parts(self.path).configs
        words = settings_digests(folder.path, [n for n in configs if n.startswith("tokenizer")])
        tried = json_digest(
            {
                "classes": folder.classes, "configs": configs, "shape": shape, "words": words,
                "loras": lora_fingerprint(loras_of(self.lora)),
            }
        )  # fmt: skip
        if tried in _FITTING:
            return
        condition = network.blank_condition(folder.config(family.denoiser), 1, folder.num_tokens)
        meta = {name: value.to("meta") for name, value in condition.items()}
        named, own = f"model.path={self.path}", (family.denoiser, family.autoencoder)
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
        if self.lora is not None:
            self._add_blank_loras(folder, {one: folder.blank(one) for one in self._weights(folder)})
        _FITTING.add(tried)

    def call_cost(self, rows: int, execution: Execution) -> CallCost:
        """See `ModelRecipe`."""
        folder, named = self._folder(weights=False), f"model.path={self.path}"
        family = folder.network.family
        shape, config = self._latent_shape(folder), folder.config(family.denoiser)
        suspects = partial(_mistyped, folder)
        with as_a_fault(named, suspects):
            parts = {name: folder.blank(name) for name in self._weights(folder)}
        if self.lora is not None:
            self._add_blank_loras(folder, parts)
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
        parts: dict[str, Any] = {
            name: load_part(folder.path, name, found, variant=self.variant, dtype=dtype)
            for name, found in folder.classes.items()
        }
        absent = {name: None for name in (*family.optional, *family.ignored)}
        settings = {name: folder.index[name] for name in family.settings if name in folder.index}
        pipeline = part_class(f"diffusers.{folder.pipeline}")(**{**absent, **settings, **parts})
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
        files = [file for files in self._weights(folder).values() for file in files]
        found = {file.relative_to(folder.path).as_posix(): weights_sha256(file) for file in files}
        return {**found, **lora_fingerprint(loras_of(self.lora))}

    def settings(self) -> dict[str, str]:
        """See `ModelRecipe`."""
        folder = self._folder(weights=True)
        return settings_digests(folder.path, sorted(folder.classes))

    def _add_blank_loras(self, folder: PipelineFolder, parts: Mapping[str, Any]) -> None:
        """Adds the LoRAs to parts on the meta device, which checks their names and shapes."""
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
        return folder.network.checked_shape(folder.parts(self.path), self.image_size)

    def _latent_scale(self, folder: PipelineFolder) -> float:
        """Read from the JSON, as diffusers fills in missing keys when it loads a part."""
        name = folder.network.family.autoencoder
        is_vq = folder.classes[name].endswith("VQModel")
        return latent_scale(folder.config(name), is_vq=is_vq, given=self.latent_scale)

    def _folder(self, *, weights: bool) -> PipelineFolder:
        folder = open_pipeline(
            self.path, revision=self.revision, variant=self.variant, weights=weights
        )
        is_here = folder.path == Path(self.path).expanduser()
        self._latent_shape(folder)
        if self.lora is not None:
            if not folder.network.family.searched:
                raise ValueError(
                    f"model.lora={self.lora} has no meaning for a {folder.pipeline}, for which "
                    "diffusers loads none; give null"
                )
            check_loras(loras_of(self.lora))
        if weights or is_here:
            for name, files in self._weights(folder).items():
                if not files:
                    raise no_weights(self.path, folder.path / name, name, self.variant)
        return folder

    def _weights(self, folder: PipelineFolder) -> dict[str, list[Path]]:
        return {
            name: weight_files(folder.path / name, found, self.variant)
            for name, found in folder.classes.items()
            if name != "scheduler" and not name.startswith("tokenizer")
        }


@dataclass(frozen=True, kw_only=True)
class PipelineFolder:
    """A pipeline on disk, its JSON files read.

    Attributes:
        path: of the folder.
        pipeline: its class name.
        network: the class that runs it.
        index: its model_index.json.
        classes: part -> "library.Class".
    """

    path: Path
    pipeline: str
    network: type[LatentNetwork]
    index: Mapping[str, Any]
    classes: Mapping[str, str]

    def config(self, part: str) -> Mapping[str, Any]:
        """The config.json of a part."""
        return read_json(self.path / part / "config.json")

    def parts(self, path: str) -> Parts:
        """The configs of all parts but the scheduler.

        Args:
            path: as the user gave it.

        Raises:
            ValueError: a config is missing, is not JSON, or names another class than the index.
        """
        names = [name for name in self.classes if name != "scheduler"]
        classes = {name: self.classes[name].rpartition(".")[2] for name in names}
        configs = {}
        for name in names:
            is_tokenizer = name.startswith("tokenizer")
            file = self.path / name / f"{'tokenizer_' * is_tokenizer}config.json"
            if not is_tokenizer or file.is_file():
                configs[name] = read_json(file)
            elif file.parent.is_dir():
                configs[name] = {}
        for name, config in configs.items():
            if config.get("quantization_config"):
                raise ValueError(
                    f"the {name} of model.path={path} has a quantization_config in its "
                    "config.json, and quantised weights are not read from folders; give the model "
                    "in float16 or float32"
                )
            own = config.get("_class_name", classes[name])
            if own != classes[name] and sorted(map(str, (own, classes[name]))) != _RENAMED:
                raise ValueError(
                    f"the {name} of model.path={path} has _class_name={own} in its config.json, "
                    f"and model_index.json says {classes[name]}; save the model again"
                )
        return Parts(source=f"model.path={path}", classes=classes, configs=configs)

    @property
    def pixels_per_latent(self) -> int:
        """Side of the square of pixels that one latent stands for."""
        parts = self.parts(str(self.path))
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


def open_pipeline(
    path: str, *, revision: str | None, variant: str | None, weights: bool
) -> PipelineFolder:
    """Finds the folder, fetching a hub id if need be, and reads its index.

    Raises:
        ValueError: neither a folder nor a hub id, or not a supported pipeline.
    """
    folder = fetched(path, revision=revision, variant=variant, weights=weights)
    index = read_json(folder / "model_index.json")
    name = pipeline_name(f"model.path={path}", index, PIPELINES)
    network = PIPELINES[name]
    classes = network.family.classes(f"model.path={path}", index)
    return PipelineFolder(path=folder, pipeline=name, network=network, index=index, classes=classes)


def _mistyped(folder: PipelineFolder) -> list[str]:
    """Suspects if the denoiser or the autoencoder cannot be built, see `mistyped`."""
    family = folder.network.family
    return [
        line
        for name in (family.denoiser, family.autoencoder)
        for line in mistyped(name, part_class(folder.classes[name]), folder.config(name))
    ]
