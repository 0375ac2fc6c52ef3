"""The model that a folder or hub id holds, whatever its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt

from invmm.diffusion.schedule import NoiseSchedule
from invmm.faults import Refusal
from invmm.identity import added
from invmm.models.adapter import ModelInfo, ModelRecipe
from invmm.models.codec import Posterior
from invmm.models.cost import CallCost
from invmm.models.execution import Execution, LoadedNetwork
from invmm.models.json_files import read_json
from invmm.models.loading import BARE, fetched
from invmm.models.loading import PIPELINES as PIXEL_PIPELINES
from invmm.models.lora import LoraSetting, loras_of
from invmm.models.parts import pipeline_name
from invmm.models.pipeline import PIPELINES as LATENT_PIPELINES
from invmm.models.pipeline import LatentPipeline
from invmm.models.pixel import PixelUNet
from invmm.models.single_file import config_folder


@dataclass(frozen=True, kw_only=True)
class AutoModel:
    """Reads model_index.json and picks the adapter.

    Attributes:
        path: a local folder, a hub id, or a safetensors file.
        config: of such a file, see `LatentPipeline`.
        variant: of the weight files, for example fp16.
        revision: of a hub repository.
        dtype: of the weights; losses and the noise distribution stay in float32.
        lora: LoRA weights, for models with a text encoder; see `LatentPipeline`.
        unet: see `LatentPipeline`.
        noise_schedule: diffusers scheduler keys, for pixel models; a bare network needs them.
        posterior: see `LatentPipeline`.
        latent_scale: see `LatentPipeline`.
        image_size: see `LatentPipeline` and `PixelUNet`.
        vae_slicing: see `LatentPipeline`.
        vae_tiling: see `LatentPipeline`.
    """

    path: str
    config: str | None = added(None)
    variant: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    lora: LoraSetting = None
    unet: str | None = added(None)
    noise_schedule: dict[str, Any] | None = None
    posterior: Posterior | None = None
    latent_scale: Annotated[float, Gt(0)] | None = None
    image_size: Annotated[int, Ge(8)] | None = None
    vae_slicing: bool = False
    vae_tiling: bool = False

    def __post_init__(self) -> None:
        loras_of(self.lora)

    def recipe(self) -> ModelRecipe:
        """The adapter's own recipe.

        Raises:
            ValueError: nothing there, a model of no supported family, or an option that its
                family does not have.
        """
        common: dict[str, Any] = {
            "path": self.path,
            "variant": self.variant,
            "revision": self.revision,
            "dtype": self.dtype,
        }
        if self.config is not None:
            folder = config_folder(self.config)
        else:
            folder = fetched(self.path, revision=self.revision, variant=self.variant, weights=False)
        if not (folder / "model_index.json").is_file():
            name = None  # a bare network, or what `PixelUNet` will refuse with the reason
        else:
            index = read_json(folder / "model_index.json")
            known = (*PIXEL_PIPELINES, *LATENT_PIPELINES)
            name = pipeline_name(f"model.path={self.path}", index, known, BARE)
        if name in LATENT_PIPELINES:
            self._refuse("noise_schedule", name)
            return LatentPipeline(
                **common,
                config=self.config,
                lora=self.lora,
                unet=self.unet,
                posterior=self.posterior,
                latent_scale=self.latent_scale,
                image_size=self.image_size,
                vae_slicing=self.vae_slicing,
                vae_tiling=self.vae_tiling,
            )
        for option in (
            "config",
            "lora",
            "unet",
            "posterior",
            "latent_scale",
            "vae_slicing",
            "vae_tiling",
        ):
            self._refuse(option, name or "UNet2DModel")
        return PixelUNet(**common, noise_schedule=self.noise_schedule, image_size=self.image_size)

    def describe(self) -> ModelInfo:
        """See `ModelRecipe`."""
        return self.recipe().describe()

    def try_out(self) -> None:
        """See `LatentPipeline` and `PixelUNet`."""
        recipe = self.recipe()
        assert isinstance(recipe, (LatentPipeline, PixelUNet))
        recipe.try_out()

    def schedule(self) -> NoiseSchedule:
        """See `ModelRecipe`."""
        return self.recipe().schedule()

    def call_cost(self, rows: int, execution: Execution) -> CallCost:
        """See `ModelRecipe`."""
        return self.recipe().call_cost(rows, execution)

    def load(self, device: torch.device) -> LoadedNetwork:
        """See `ModelRecipe`."""
        return self.recipe().load(device)

    def fingerprint(self) -> dict[str, str]:
        """See `ModelRecipe`."""
        return self.recipe().fingerprint()

    def settings(self) -> dict[str, str]:
        """See `ModelRecipe`."""
        return self.recipe().settings()

    def _refuse(self, option: str, name: str) -> None:
        value = getattr(self, option)
        if value:
            raise Refusal(
                f"model.{option}={value} has no meaning for a {name}; leave it at its default",
                f"model.{option}",
            )
