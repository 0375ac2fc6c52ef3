"""Pixel-space models, with or without classes: a U-Net whose latents are the pixels themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from invmm.diffusion.schedule import NoiseSchedule, read_scheduler, schedule_of
from invmm.diffusion.scheduler_config import TRAINED_KEYS, check_config
from invmm.engine.requests import Condition
from invmm.faults import Refusal
from invmm.models.adapter import ModelInfo
from invmm.models.codec import clamped
from invmm.models.components import EXPECTED, Parts
from invmm.models.cost import CallCost, call_cost
from invmm.models.execution import Execution
from invmm.models.fitting import square_side
from invmm.models.json_files import settings_digests
from invmm.models.labels import class_label
from invmm.models.loading import (
    PIPELINES,
    ModelFolder,
    check_components,
    load_unet,
    open_folder,
)
from invmm.models.parts import index_of
from invmm.models.trial import as_a_fault, mistyped, try_out
from invmm.models.weights import weights_sha256

_LUMINANCE = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class PixelUNet:
    """A diffusers DDPM or DDIM pipeline, or a bare UNet2DModel.

    Attributes:
        path: a local folder or a hub id.
        noise_schedule: diffusers scheduler keys; needed for a bare U-Net, overrides a pipeline's.
        variant: of the weight files, for example fp16.
        revision: of a hub repository.
        dtype: of the weights; losses and the noise distribution stay in float32.
        image_size: side of its images in pixels; null takes the network's sample_size.

    Raises:
        ValueError: an unknown key of the noise schedule.
    """

    path: str
    noise_schedule: dict[str, Any] | None = None
    variant: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    image_size: Annotated[int, Ge(8)] | None = None

    def __post_init__(self) -> None:
        if unknown := sorted({*(self.noise_schedule or ())} - {*TRAINED_KEYS}):
            raise Refusal(
                f"model.noise_schedule has no key {', '.join(unknown)}; its keys are "
                f"{', '.join(TRAINED_KEYS)}",
                "model.noise_schedule",
            )

    def describe(self) -> ModelInfo:
        """Reads JSON only; see `ModelRecipe`."""
        folder = self._folder(weights=False)
        latent_shape = self._latent_shape(folder)
        num_train_timesteps, prediction_type = read_scheduler(
            self._source, lambda: check_config(self._trained(folder))
        )
        on_disk = folder.path == Path(self.path).expanduser()
        weights = folder.weights(self.variant) if on_disk else []
        return ModelInfo(
            family="pixel",
            latent_shape=latent_shape,
            image_size=latent_shape[1],
            num_train_timesteps=num_train_timesteps,
            prediction_type=prediction_type,
            weight_bytes=sum(file.stat().st_size for file in weights) or None,
            prompts=("class_label",) if folder.unet_config.get("num_class_embeds") else ("none",),
        )

    def schedule(self) -> NoiseSchedule:
        """See `ModelRecipe`."""
        trained = self._trained(self._folder(weights=False))
        return read_scheduler(self._source, lambda: NoiseSchedule.from_config(trained))

    def try_out(self) -> None:
        """Runs the network on the meta device, without weights.

        Raises:
            ValueError: its config describes no network that works.
        """
        folder = self._folder(weights=False)
        try_out_pixels(f"model.path={self.path}", folder.unet_config, self._latent_shape(folder))

    def call_cost(self, rows: int, execution: Execution) -> CallCost:
        """See `ModelRecipe`."""
        from diffusers import UNet2DModel

        folder, named = self._folder(weights=False), f"model.path={self.path}"
        config, shape = folder.unet_config, self._latent_shape(folder)
        suspects = partial(mistyped, "unet", UNet2DModel, config)
        with as_a_fault(named, suspects), torch.device("meta"):
            unet: Any = UNet2DModel.from_config(dict(config))
        unet.requires_grad_(False)
        execution.configure(unet)
        with as_a_fault(named, suspects), torch.device("meta"):
            latents = torch.empty(rows, *shape, requires_grad=True)
            timesteps = torch.zeros(rows, dtype=torch.long)
            labels = timesteps if config.get("num_class_embeds") else None
            cost = call_cost(
                unet,
                lambda: unet(latents, timesteps, labels).sample,
                attention=execution.attention,
                autocast=execution.autocast if self.dtype == "float32" else None,
            )
        return cost if self.dtype == "float32" else cost.in_half_precision()

    def load(self, device: torch.device) -> PixelNetwork:
        """Loads, freezes and moves the network; see `ModelRecipe`."""
        folder = self._folder(weights=True)
        self._latent_shape(folder)
        unet = load_unet(folder, variant=self.variant, dtype=getattr(torch, self.dtype))
        return PixelNetwork(unet, self.schedule(), device, self.image_size)

    def fingerprint(self) -> dict[str, str]:
        """See `ModelRecipe`."""
        folder = self._folder(weights=True)
        return {
            file.relative_to(folder.path).as_posix(): weights_sha256(file)
            for file in folder.weights(self.variant)
        }

    def settings(self) -> dict[str, str]:
        """See `ModelRecipe`."""
        folder = self._folder(weights=True)
        return settings_digests(folder.path, [folder.unet, *(["scheduler"] if folder.unet else [])])

    def _folder(self, *, weights: bool) -> ModelFolder:
        return open_folder(self.path, revision=self.revision, variant=self.variant, weights=weights)

    def _latent_shape(self, folder: ModelFolder) -> tuple[int, int, int]:
        parts = Parts(
            source=f"model.path={self.path}",
            classes={"unet": "UNet2DModel"},
            configs={"unet": folder.unet_config},
        )
        return _latent_shape(parts, self.image_size)

    def _trained(self, folder: ModelFolder) -> Mapping[str, Any]:
        """The keys of the trained noise schedule."""
        trained = self.noise_schedule or folder.scheduler_config
        if trained is None:
            raise ValueError(
                f"model.path={self.path} is a bare network without a noise schedule; give "
                "'model.noise_schedule={num_train_timesteps: 1000, beta_schedule: linear, "
                "beta_start: 1e-4, beta_end: 0.02, prediction_type: epsilon}' as it was trained"
            )
        return trained

    @property
    def _source(self) -> str:
        return "model.noise_schedule" if self.noise_schedule else f"model.path={self.path}"


class PixelNetwork:
    """A frozen U-Net behind the engine's `Network` Protocol.

    Args:
        unet: a UNet2DModel with 1 or 3 channels.
        schedule: what it was trained with.
        device: where it runs.
        image_size: side of its images; None takes the network's sample_size.
    """

    def __init__(
        self,
        unet: Any,
        schedule: NoiseSchedule,
        device: torch.device,
        image_size: int | None = None,
    ) -> None:
        config = {"unet": dict(unet.config)}
        parts = Parts(source=None, classes={"unet": "UNet2DModel"}, configs=config)
        self.latent_shape = _latent_shape(parts, image_size)
        self.schedule = schedule
        self.device = device
        self.denoiser = unet.to(device).eval().requires_grad_(False)

    @classmethod
    def from_pipeline(cls, pipeline: Any) -> PixelNetwork:
        """Wraps a DDPMPipeline or DDIMPipeline object; its U-Net is frozen in place.

        Raises:
            ValueError: another pipeline, whose latents may not be pixels, or other parts.
        """
        if (name := type(pipeline).__name__) not in PIPELINES:
            raise ValueError(f"a {name} is not supported; give a {' or '.join(PIPELINES)}")
        check_components("the pipeline in memory", index_of(pipeline))
        schedule = schedule_of(pipeline)
        return cls(pipeline.unet, schedule, pipeline.unet.device)

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition | None) -> Tensor:
        """See `Network`; a learned variance is left out."""
        labels = condition["class_labels"] if condition else None
        output = self.denoiser(latents.to(self.denoiser.dtype), timesteps, labels).sample
        return output[:, : self.latent_shape[0]].to(latents.dtype)

    def condition(self, prompt: str | int | None) -> Condition | None:
        """See `LoadedNetwork`: a class label if the network was trained with them."""
        count = self.denoiser.config.num_class_embeds
        if not count:
            if prompt is not None:
                raise ValueError("an unconditional pixel model takes no prompt; use prompt=none")
            return None
        return {"class_labels": class_label(prompt, count).to(self.device)}

    def negative(self, prompt: str) -> Condition | None:
        """See `LoadedNetwork`: there is no unconditional class."""
        return None

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels are latents; a greyscale model sees the luminance."""
        if self.latent_shape[0] == 3:
            return pixels
        weights = pixels.new_tensor(_LUMINANCE).view(1, 3, 1, 1)
        return (pixels * weights).sum(1, keepdim=True)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Network`."""
        return clamped(latents).expand(-1, 3, -1, -1)


def try_out_pixels(named: str, config: Mapping[str, Any], shape: tuple[int, int, int]) -> None:
    """Runs a U-Net of this config on the meta device; see `try_out`.

    Raises:
        ValueError: the config describes no U-Net that works.
    """
    from diffusers import UNet2DModel

    def build() -> tuple[Any, None]:
        unet: Any = UNet2DModel.from_config(dict(config))
        return unet.eval(), None

    def denoise(unet: Any, latents: Tensor, timesteps: Tensor) -> Tensor:
        labels = timesteps if config.get("num_class_embeds") else None
        return unet(latents, timesteps, labels).sample

    try_out(named, build, denoise, shape, suspects=partial(mistyped, "unet", UNet2DModel, config))


def _latent_shape(parts: Parts, image_size: int | None) -> tuple[int, int, int]:
    """(C, H, W) of the pixels that a U-Net draws.

    Raises:
        ValueError: its inputs are not just pixels, timesteps and class labels.
    """
    for key in ("time_embedding_type", "class_embed_type"):
        only, _ = EXPECTED["UNet2DModel"][key]
        why = "supported are positional timesteps and plain class labels (num_class_embeds)"
        parts.check("unet", key, only, why)
    if parts.value("unet", "num_class_embeds") is not None:
        parts.integer("unet", "num_class_embeds")
    channels, outputs = (parts.value("unet", key) for key in ("in_channels", "out_channels"))
    if channels not in (1, 3) or outputs not in (channels, 2 * channels):
        raise ValueError(
            f"the unet of {parts.named} maps {channels} to {outputs} channels; a pixel model has 1 "
            "or 3 (a latent model needs its autoencoder: give the folder of the whole pipeline)"
        )
    side = square_side(parts, "unet", image_size, 1)
    return channels, side, side
