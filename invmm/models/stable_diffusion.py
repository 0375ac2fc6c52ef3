"""Stable Diffusion 1, 2 and XL: a U-Net on KL latents that CLIP embeddings of a prompt steer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

from invmm.diffusion.guidance import Condition
from invmm.models.codec import Conventions
from invmm.models.components import DEFAULTS, Parts
from invmm.models.fitting import check_text_width
from invmm.models.latent import TextLatentNetwork
from invmm.models.parts import RECTIFIED_FLOWS, SCHEDULERS, Family
from invmm.models.prompt_search import clip_output, with_columns

_SIZE_IS_MEANT, _SET_SIZE = Version("0.9.0.dev0"), 64
_TOKENIZERS = ("transformers.CLIPTokenizer", "transformers.CLIPTokenizerFast")


class StableDiffusion(TextLatentNetwork):
    """Stable Diffusion 1.x and 2.x, predicting noise or velocity."""

    family = Family(
        name="stable_diffusion",
        pipelines=("StableDiffusionPipeline",),
        denoiser="unet",
        autoencoder="vae",
        prompts=("caption", "empty", "learned"),
        searched=("text_encoder",),
        parts={
            "vae": ("diffusers.AutoencoderKL",),
            "text_encoder": ("transformers.CLIPTextModel",),
            "tokenizer": _TOKENIZERS,
            "unet": ("diffusers.UNet2DConditionModel",),
            "scheduler": SCHEDULERS,
        },
        ignored=("safety_checker", "feature_extractor", "image_encoder"),
        settings=("requires_safety_checker",),
    )

    @classmethod
    def checked_shape(cls, parts: Parts, image_size: int | None) -> tuple[int, int, int]:
        """See `LatentNetwork`: of old folders, the size that their pipeline sets in memory."""
        return super().checked_shape(_with_set_size(parts), image_size)

    @staticmethod
    def check_condition(parts: Parts) -> None:
        """See `LatentNetwork`: the U-Net reads the prompt's embeddings and nothing else."""
        why = (
            "its pipeline gives it the prompt's embeddings only; give a model that needs no others"
        )
        parts.check("unet", "addition_embed_type", None, why)
        check_text_width(parts, "unet", ["text_encoder"])

    def condition(self, prompt: str | int | None) -> Condition:
        """The prompt's embeddings, as the pipeline makes them."""
        return _embeds(self.pipeline.encode_prompt(_text(prompt), self.device, 1, False)[0])

    def negative(self, prompt: str) -> Condition:
        """The negative prompt's embeddings; usually of the empty one."""
        return self.condition(prompt)

    def encode_prompt(self, embeddings: Condition, ids: Condition, fixed: Condition) -> Condition:
        """See `TextNetwork`: the last hidden states."""
        (encoder,) = embeddings
        output = clip_output(self.pipeline.text_encoder, ids[encoder], embeddings[encoder])
        return {"prompt_embeds": output.last_hidden_state}

    @staticmethod
    def evaluate(denoiser: Any, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """See `LatentNetwork`."""
        return denoiser(latents, timesteps, condition["prompt_embeds"]).sample

    @staticmethod
    def blank_condition(config: Mapping[str, Any], rows: int, tokens: int) -> Condition:
        """See `LatentNetwork`."""
        return {"prompt_embeds": torch.zeros(rows, tokens, _text_width(config))}


class StableDiffusionXL(TextLatentNetwork):
    """Stable Diffusion XL: two text encoders, a pooled embedding and the size of the image."""

    conventions = Conventions(statistics=True, upcast=True)
    family = Family(
        name="sdxl",
        pipelines=("StableDiffusionXLPipeline",),
        denoiser="unet",
        autoencoder="vae",
        prompts=("caption", "empty", "learned"),
        searched=("text_encoder", "text_encoder_2"),
        parts={
            "vae": ("diffusers.AutoencoderKL",),
            "text_encoder": ("transformers.CLIPTextModel",),
            "text_encoder_2": ("transformers.CLIPTextModelWithProjection",),
            "tokenizer": _TOKENIZERS,
            "tokenizer_2": _TOKENIZERS,
            "unet": ("diffusers.UNet2DConditionModel",),
            "scheduler": SCHEDULERS,
        },
        ignored=("feature_extractor", "image_encoder"),
        settings=("force_zeros_for_empty_prompt", "add_watermarker"),
    )

    @staticmethod
    def check_condition(parts: Parts) -> None:
        """See `LatentNetwork`: the added embedding holds the pooled prompt and six sizes."""
        key = "projection_class_embeddings_input_dim"
        why = "a U-Net of SDXL reads the pooled prompt and the sizes of the image (text_time)"
        if parts.value("unet", "addition_embed_type") != "text_time":
            parts.refuse("unet", "addition_embed_type", f"{why}; give the U-Net of an SDXL model")
        sizes = 6 * parts.integer("unet", "addition_time_embed_dim")
        expected = sizes + parts.integer("text_encoder_2", "projection_dim")
        if parts.integer("unet", key) != expected:
            parts.refuse(
                "unet", key, f"the pooled prompt and six sizes take {expected}; a refiner reads "
                "an aesthetic score instead: give the base model",
            )  # fmt: skip
        check_text_width(parts, "unet", ["text_encoder", "text_encoder_2"])
        own, other = "tokenizer_2", "tokenizer"
        lengths = [
            parts.value(one, "model_max_length") for one in (own, other) if one in parts.configs
        ]
        if len(lengths) == 2 and lengths[0] != lengths[1]:
            parts.refuse(
                own, "model_max_length", f"the embeddings of both lie side by side; give the "
                f"{other} the same (tokenizer_config.json)",
            )  # fmt: skip

    def condition(self, prompt: str | int | None) -> Condition:
        """Embeddings of both encoders, the pooled one of the second, and the image's size."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            _text(prompt), device=self.device, do_classifier_free_guidance=False
        )
        return self._with_size(embeds, pooled)

    def negative(self, prompt: str) -> Condition:
        """Zeros instead of the empty prompt where the pipeline was made for them."""
        condition = self.condition(prompt)
        if prompt == "" and self.pipeline.config.force_zeros_for_empty_prompt:
            sizes = condition["time_ids"]
            return {**{k: torch.zeros_like(v) for k, v in condition.items()}, "time_ids": sizes}
        return condition

    def encode_prompt(self, embeddings: Condition, ids: Condition, fixed: Condition) -> Condition:
        """See `TextNetwork`: the penultimate hidden states of both encoders side by side."""
        found = dict(fixed)
        for name, own in embeddings.items():
            output = clip_output(getattr(self.pipeline, name), ids[name], own)
            is_second = name == "text_encoder_2"
            start = self.pipeline.text_encoder.config.hidden_size if is_second else 0
            states = output.hidden_states[-2]
            found["prompt_embeds"] = with_columns(found["prompt_embeds"], states, start)
            if is_second:
                found["pooled_embeds"] = output.text_embeds
        return found

    def _with_size(self, embeds: Tensor, pooled: Tensor) -> Condition:
        size = self.image_size
        sizes = torch.tensor([[size, size, 0, 0, size, size]], device=self.device)
        return {
            "prompt_embeds": embeds.detach(),
            "pooled_embeds": pooled.detach(),
            "time_ids": sizes.to(embeds.dtype),
        }

    @staticmethod
    def evaluate(denoiser: Any, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """See `LatentNetwork`."""
        added = {"text_embeds": condition["pooled_embeds"], "time_ids": condition["time_ids"]}
        return denoiser(
            latents, timesteps, condition["prompt_embeds"], added_cond_kwargs=added
        ).sample

    @staticmethod
    def blank_condition(config: Mapping[str, Any], rows: int, tokens: int) -> Condition:
        """See `LatentNetwork`."""
        sizes = 6 * config["addition_time_embed_dim"]
        pooled = config["projection_class_embeddings_input_dim"] - sizes
        return {
            "prompt_embeds": torch.zeros(rows, tokens, _text_width(config)),
            "pooled_embeds": torch.zeros(rows, pooled),
            "time_ids": torch.zeros(rows, 6),
        }


class StableDiffusion3(TextLatentNetwork):
    """Stable Diffusion 3 and 3.5: a transformer trained on rectified flow, with or without T5."""

    posterior = "sample"
    conventions = Conventions(shift=True)
    family = Family(
        name="sd3",
        pipelines=("StableDiffusion3Pipeline",),
        denoiser="transformer",
        autoencoder="vae",
        prompts=("caption", "empty", "learned"),
        searched=("text_encoder",),
        parts={
            "transformer": ("diffusers.SD3Transformer2DModel",),
            "vae": ("diffusers.AutoencoderKL",),
            "text_encoder": ("transformers.CLIPTextModelWithProjection",),
            "text_encoder_2": ("transformers.CLIPTextModelWithProjection",),
            "text_encoder_3": ("transformers.T5EncoderModel",),
            "tokenizer": _TOKENIZERS,
            "tokenizer_2": _TOKENIZERS,
            "tokenizer_3": ("transformers.T5TokenizerFast", "transformers.T5Tokenizer"),
            "scheduler": RECTIFIED_FLOWS,
        },
        optional=("text_encoder_3", "tokenizer_3"),
        ignored=("feature_extractor", "image_encoder"),
    )

    @staticmethod
    def check_condition(parts: Parts) -> None:
        """See `LatentNetwork`: both CLIPs side by side, padded to the width of T5."""
        both = ("text_encoder", "text_encoder_2")
        pooled = sum(parts.integer(name, "projection_dim") for name in both)
        if parts.integer("transformer", "pooled_projection_dim") != pooled:
            parts.refuse(
                "transformer", "pooled_projection_dim",
                f"its text encoders return {pooled}; give the text encoders of its training",
            )  # fmt: skip
        width = parts.integer("transformer", "joint_attention_dim")
        needed = sum(parts.integer(name, "hidden_size") for name in both)
        t5 = parts.integer("text_encoder_3", "d_model") if "text_encoder_3" in parts.configs else 0
        if width < needed or t5 not in (0, width):
            parts.refuse(
                "transformer", "joint_attention_dim",
                f"its text encoders return {t5 or needed}; give the text encoders of its training",
            )  # fmt: skip

    def condition(self, prompt: str | int | None) -> Condition:
        """Embeddings of all encoders in a row, and the pooled ones of both CLIPs."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            _text(prompt), None, None, device=self.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds.detach(), "pooled_embeds": pooled.detach()}

    def negative(self, prompt: str) -> Condition:
        """The negative prompt's embeddings; usually of the empty one."""
        return self.condition(prompt)

    def encode_prompt(self, embeddings: Condition, ids: Condition, fixed: Condition) -> Condition:
        """See `TextNetwork`: the penultimate hidden states, as the pipeline takes them.

        The release of the paper takes the last ones of CLIP-L.
        """
        found, first = dict(fixed), self.pipeline.text_encoder.config
        for name, own in embeddings.items():
            output = clip_output(getattr(self.pipeline, name), ids[name], own)
            is_second = name == "text_encoder_2"
            for part, values, start in (
                ("prompt_embeds", output.hidden_states[-2], first.hidden_size),
                ("pooled_embeds", output.text_embeds, first.projection_dim),
            ):
                found[part] = with_columns(found[part], values, start if is_second else 0)
        return found

    @staticmethod
    def evaluate(denoiser: Any, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """See `LatentNetwork`."""
        return denoiser(
            hidden_states=latents,
            timestep=timesteps,
            encoder_hidden_states=condition["prompt_embeds"],
            pooled_projections=condition["pooled_embeds"],
        ).sample

    @staticmethod
    def blank_condition(config: Mapping[str, Any], rows: int, tokens: int) -> Condition:
        """See `LatentNetwork`; T5 adds 256 tokens to CLIP's."""
        return {
            "prompt_embeds": torch.zeros(rows, tokens + 256, config["joint_attention_dim"]),
            "pooled_embeds": torch.zeros(rows, config["pooled_projection_dim"]),
        }


def _with_set_size(parts: Parts) -> Parts:
    """With 64 for a sample_size below it of U-Nets saved before 0.9.0, as diffusers corrects it.

    Raises:
        ValueError: the version is none, on which the pipeline itself fails.
    """
    config, size = parts.configs["unet"], parts.value("unet", "sample_size")
    if parts.source is None or "_diffusers_version" not in config:
        return parts  # in memory the pipeline has done so
    try:
        version = Version(Version(config["_diffusers_version"]).base_version)
    except (InvalidVersion, TypeError):
        parts.refuse("unet", "_diffusers_version", "it is no version, such as 0.9.0; remove it")
    if version >= _SIZE_IS_MEANT or not isinstance(size, int) or size >= _SET_SIZE:
        return parts
    return replace(parts, configs={**parts.configs, "unet": {**config, "sample_size": _SET_SIZE}})


def _text_width(config: Mapping[str, Any]) -> int:
    """Width of the embeddings that a U-Net reads; its config may list it for each block."""
    width = config.get(
        "cross_attention_dim", DEFAULTS["UNet2DConditionModel"]["cross_attention_dim"]
    )
    return width if isinstance(width, int) else width[0]


def _embeds(prompt_embeds: Tensor) -> Condition:
    return {"prompt_embeds": prompt_embeds.detach()}


def _text(prompt: str | int | None) -> str:
    if not isinstance(prompt, str):
        raise ValueError(f"the prompt {prompt!r} is no text; use prompt=caption or prompt=empty")
    return prompt
