"""What all models on the latents of an autoencoder share, and the unconditional and class ones.

A family is a subclass with its `family` table and `evaluate`; one with a condition says what a
blank one looks like and how a prompt or label becomes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from invmm.diffusion.guidance import Condition
from invmm.diffusion.schedule import schedule_of
from invmm.engine.searched_prompt import PromptSearch, PromptTokens
from invmm.models.codec import Codec, Conventions, Posterior
from invmm.models.components import Parts
from invmm.models.fitting import (
    check_autoencoder,
    check_channels,
    check_tokenizers,
    square_side,
)
from invmm.models.labels import class_label
from invmm.models.parts import AUTOENCODERS, SCHEDULERS, Family
from invmm.models.prompt_search import prompt_tokens


class LatentNetwork:
    """A frozen pipeline behind the engine's `Network` Protocol.

    Args:
        pipeline: the diffusers pipeline; its parts are frozen in place.
        device: where it runs.
        posterior: see `Codec`; None takes the family's.
        latent_scale: see `invmm.models.codec.latent_scale`.
        image_size: side of its images in pixels; None takes the denoiser's sample_size.

    Raises:
        ValueError: its parts do not fit together, or need inputs that the family does not provide.

    Attributes:
        family: which pipelines, of which parts.
        denoiser: the U-Net or transformer.
        image_size: side of the images that it draws.
    """

    family: ClassVar[Family]
    posterior: ClassVar[Posterior] = "mode"
    conventions: ClassVar[Conventions] = Conventions()

    def __init__(
        self,
        pipeline: Any,
        device: torch.device,
        posterior: Posterior | None = None,
        latent_scale: float | None = None,
        image_size: int | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.latent_shape = self.checked_shape(self.parts_of(pipeline), image_size)
        for name in self.family.parts:
            part = getattr(pipeline, name)
            if isinstance(part, torch.nn.Module):
                part.to(device).eval().requires_grad_(False)
        self.device = device
        self.denoiser: Any = getattr(pipeline, self.family.denoiser)
        autoencoder = getattr(pipeline, self.family.autoencoder)
        self.codec = Codec(autoencoder, posterior or self.posterior, latent_scale, self.conventions)
        self.schedule = schedule_of(pipeline)
        self.image_size = self.latent_shape[1] * self.codec.factor

    @classmethod
    def parts_of(cls, pipeline: Any) -> Parts:
        """The configs of a pipeline object's parts, without the scheduler."""
        known = {name: own for name, own in cls.family.parts.items() if name != "scheduler"}
        return Parts.in_memory(pipeline, known, cls.family.optional)

    @classmethod
    def checked_shape(cls, parts: Parts, image_size: int | None) -> tuple[int, int, int]:
        """Checks that parts fit together, and returns the shape (C, H, W) of a latent.

        Args:
            parts: of a pipeline on disk or in memory.
            image_size: side of its images in pixels; None takes the denoiser's sample_size.

        Raises:
            ValueError: naming the part, the key, the value and the cure.
        """
        denoiser, autoencoder = cls.family.denoiser, cls.family.autoencoder
        check_autoencoder(
            parts, autoencoder, shift=cls.conventions.shift, statistics=cls.conventions.statistics
        )
        parts.check_expected(denoiser)
        channels = check_channels(parts, denoiser, autoencoder)
        factor = 2 ** (parts.length(autoencoder, "block_out_channels") - 1)
        side = square_side(parts, denoiser, image_size, factor)
        check_tokenizers(parts)
        cls.check_condition(parts)
        return channels, side, side

    @staticmethod
    def check_condition(parts: Parts) -> None:
        """Refuses parts that do not agree on the condition; does nothing for models without one.

        Raises:
            ValueError: naming the part, the key, the value and the cure.
        """

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition | None) -> Tensor:
        """See `Network`; a learned variance is left out."""
        dtype = self.denoiser.dtype
        cast = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in (condition or {}).items()
        }
        output = self.evaluate(self.denoiser, latents.to(dtype), timesteps, cast)
        return output[:, : self.latent_shape[0]].to(latents.dtype)

    def encode(self, pixels: Tensor) -> Tensor:
        """See `Network`."""
        return self.codec.encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Network`."""
        return self.codec.decode(latents)

    def condition(self, prompt: str | int | None) -> Condition | None:
        """One row that says what to draw; an unconditional model has none."""
        if prompt is not None:
            raise ValueError(f"a {self.family.name} model takes no prompt; use prompt=none")
        return None

    def negative(self, prompt: str) -> Condition | None:
        """One row that guidance pushes away from; None without guidance."""
        return None

    @staticmethod
    def evaluate(denoiser: Any, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The denoiser's raw output."""
        raise NotImplementedError

    @staticmethod
    def blank_condition(config: Mapping[str, Any], rows: int, tokens: int) -> Condition:
        """Zeros in the shape of a condition; {} without one.

        Args:
            config: of the denoiser.
            rows: of the condition.
            tokens: of a prompt, if there is one.
        """
        return {}


class TextLatentNetwork(LatentNetwork):
    """A family with text encoders, the prompt of which can be searched."""

    def searched_prompt(self, search: PromptSearch) -> PromptTokens:
        """See `SearchableNetwork`."""
        fixed = self.condition("")
        assert fixed is not None
        return prompt_tokens(self.pipeline, self.family, search, fixed)

    def encode_prompt(self, embeddings: Condition, ids: Condition, fixed: Condition) -> Condition:
        """See `TextNetwork`."""
        raise NotImplementedError


class LatentDiffusion(LatentNetwork):
    """Unconditional latent diffusion, on a VQ or a KL autoencoder."""

    family = Family(
        name="ldm",
        pipelines=("LDMPipeline",),
        denoiser="unet",
        autoencoder="vqvae",
        parts={
            "vqvae": AUTOENCODERS,
            "unet": ("diffusers.UNet2DModel",),
            "scheduler": SCHEDULERS,
        },
    )

    @staticmethod
    def evaluate(denoiser: Any, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """See `LatentNetwork`."""
        return denoiser(latents, timesteps).sample


class Dit(LatentNetwork):
    """Class-conditional diffusion transformers on a KL autoencoder."""

    family = Family(
        name="dit",
        pipelines=("DiTPipeline",),
        denoiser="transformer",
        autoencoder="vae",
        prompts=("class_label",),
        parts={
            "transformer": ("diffusers.DiTTransformer2DModel", "diffusers.Transformer2DModel"),
            "vae": ("diffusers.AutoencoderKL",),
            "scheduler": SCHEDULERS,
        },
        settings=("id2label",),
    )

    @staticmethod
    def check_condition(parts: Parts) -> None:
        """See `LatentNetwork`: the number of classes must be an integer."""
        parts.integer("transformer", "num_embeds_ada_norm")

    def condition(self, prompt: str | int | None) -> Condition:
        """One row of class labels.

        Raises:
            ValueError: no label of this model.
        """
        count = self.denoiser.config.num_embeds_ada_norm
        return {"class_labels": class_label(prompt, count).to(self.device)}

    def negative(self, prompt: str) -> Condition:
        """The class that stands for no class."""
        count = self.denoiser.config.num_embeds_ada_norm
        return {"class_labels": torch.tensor([count], device=self.device)}

    @staticmethod
    def evaluate(denoiser: Any, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """See `LatentNetwork`."""
        return denoiser(latents, timestep=timesteps, **condition).sample

    @staticmethod
    def blank_condition(config: Mapping[str, Any], rows: int, tokens: int) -> Condition:
        """See `LatentNetwork`."""
        return {"class_labels": torch.zeros(rows, dtype=torch.long)}
