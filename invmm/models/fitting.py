"""Checks that the parts of a pipeline fit together, and finds the shape of its latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from invmm.faults import Refusal
from invmm.models.components import Parts

_MORE_INPUTS = {
    1: "a depth map", 3: "a small image", 4: "an image", 5: "a mask and an image (inpainting)",
}  # fmt: skip
"""Number of extra input channels -> what U-Nets that edit or enlarge pictures read from them."""


def square_side(parts: Parts, denoiser: str, given: int | None, pixels_per_latent: int) -> int:
    """Side of the latents (of the pixels without an autoencoder) that a denoiser is to draw.

    Args:
        parts: of the pipeline.
        denoiser: its name.
        given: `model.image_size`, in pixels; None takes the denoiser's sample_size.
        pixels_per_latent: of the autoencoder; 1 without one.

    Raises:
        ValueError: the size is unknown or not square, or the denoiser cannot draw it.
    """
    if given is None:
        side = parts.value(denoiser, "sample_size")
        if isinstance(side, (list, tuple)) and len(side) == 2 and side[0] == side[1]:
            side = side[0]
        if type(side) is not int or side < 1:
            cure = (
                "give model.image_size=... in pixels" if parts.source
                else f"call pipeline.{denoiser}.register_to_config(sample_size=...)"
            )  # fmt: skip
            parts.refuse(denoiser, "sample_size", f"images must be square; {cure}")
    else:
        side, rest = divmod(given, pixels_per_latent)
        if rest or not side:
            raise Refusal(
                f"model.image_size={given} is no multiple of the {pixels_per_latent} pixels that "
                f"a latent stands for; use {max(side, 1) * pixels_per_latent}",
                "model.image_size",
            )
    _check_side(parts, denoiser, side, pixels_per_latent)
    return side


def check_channels(parts: Parts, denoiser: str, autoencoder: str) -> int:
    """The number of channels of a latent, the same for denoiser and autoencoder.

    Raises:
        ValueError: their configs name different numbers.
    """
    channels = parts.integer(denoiser, "in_channels")
    key = "latent_channels"
    if parts.is_a(autoencoder, "VQModel") and parts.value(autoencoder, "vq_embed_dim") is not None:
        key = "vq_embed_dim"
    if channels != (latent_channels := parts.integer(autoencoder, key)):
        more = _MORE_INPUTS.get(channels - latent_channels)
        parts.refuse(
            denoiser, "in_channels",
            f"it reads {more} beside the noisy latents; give a model that needs none" if more
            else f"the {autoencoder} has {key}={latent_channels}; give the autoencoder that the "
            "model was trained with",
        )  # fmt: skip
    outputs = parts.value(denoiser, "out_channels")
    learned = (2 * channels,) if parts.is_a(denoiser, "DiTTransformer2DModel") else ()
    as_inputs = (None,) if "Transformer" in parts.classes[denoiser] else ()
    if outputs not in (channels, *learned, *as_inputs):
        parts.refuse(
            denoiser, "out_channels", f"its pipeline needs {channels}, as many as in_channels; "
            "give a model without a learned variance",
        )  # fmt: skip
    return channels


def check_autoencoder(parts: Parts, name: str, *, shift: bool, statistics: bool) -> None:
    """Refuses an autoencoder whose latents have no usable scale.

    Args:
        parts: of the pipeline.
        name: of the autoencoder.
        shift: whether the pipeline reads `shift_factor`.
        statistics: whether it reads `latents_mean` and `latents_std`.

    Raises:
        ValueError: naming the key.
    """
    parts.check_expected(name)
    parts.length(name, "block_out_channels")
    if parts.is_a(name, "AutoencoderKL") and parts.number(name, "scaling_factor") <= 0:
        parts.refuse(name, "scaling_factor", "it must be above 0; give that of its training")
    if shift:
        parts.number(name, "shift_factor")
    values = {key: parts.value(name, key) for key in ("latents_mean", "latents_std")}
    if not statistics or None in values.values():
        return
    count = parts.integer(name, "latent_channels")
    for key, numbers in values.items():
        if not _are_numbers(numbers, count) or (key == "latents_std" and min(numbers) <= 0):
            parts.refuse(
                name,
                key,
                f"{count} finite numbers are needed, above 0 for "
                "latents_std; give those of its training",
            )


def check_text_width(parts: Parts, denoiser: str, encoders: Sequence[str]) -> None:
    """Refuses a U-Net whose cross_attention_dim is not the width of its text encoders' embeddings.

    Raises:
        ValueError: naming the key.
    """
    width = sum(parts.integer(encoder, "hidden_size") for encoder in encoders)
    read = parts.value(denoiser, "cross_attention_dim")
    widths = read if isinstance(read, (list, tuple)) else [read]
    if not widths or any(one != width for one in widths):
        parts.refuse(
            denoiser, "cross_attention_dim",
            f"its text encoders return {width}; give the text encoders of its training",
        )  # fmt: skip


def check_tokenizers(parts: Parts) -> None:
    """Refuses tokenizers whose prompts may be longer than their CLIP text encoder can read.

    Raises:
        ValueError: naming the key.
    """
    for name in parts.configs:
        encoder = name.replace("tokenizer", "text_encoder")
        if encoder == name or not parts.is_a(encoder, "CLIPTextModel"):
            continue
        longest = parts.integer(encoder, "max_position_embeddings")
        length = parts.value(name, "model_max_length")  # without one, a prompt has no end
        if type(length) is not int or not 1 <= length <= longest:
            parts.refuse(
                name, "model_max_length",
                f"the {encoder} reads {longest} tokens; set it to {longest} in "
                "tokenizer_config.json",
            )  # fmt: skip


def _check_side(parts: Parts, denoiser: str, side: int, pixels_per_latent: int) -> None:
    """Refuses sizes that the denoiser's architecture cannot draw."""
    unit = 1
    if parts.is_a(denoiser, "UNet2DModel"):
        unit = 2 ** (parts.length(denoiser, "block_out_channels") - 1)
        reason = f"its U-Net halves them {unit.bit_length() - 1} times"
    elif "Transformer" in parts.classes[denoiser]:
        unit = parts.integer(denoiser, "patch_size")
        reason = f"its transformer has patches of {unit}x{unit}"
    if side % unit:
        pixels = unit * pixels_per_latent
        raise ValueError(
            f"the {denoiser} of {parts.named} cannot draw {side}x{side} latents, {reason}; use "
            f"model.image_size={max(pixels, side * pixels_per_latent // pixels * pixels)}"
        )
    largest = parts.value(denoiser, "pos_embed_max_size")
    if isinstance(largest, int) and side // unit > largest:
        pixels = largest * unit * pixels_per_latent
        parts.refuse(
            denoiser, "pos_embed_max_size",
            f"it has no positions for {side // unit}x{side // unit} patches; use model.image_size="
            f"{pixels} or less",
        )  # fmt: skip


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) == count
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )
