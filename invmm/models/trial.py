"""Runs a model's parts on the meta device, to refuse parts that do not fit before weights load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def as_a_fault(named: str) -> Iterator[None]:
    """Turns any exception that a foreign config makes the libraries raise into one line.

    Args:
        named: the model, for messages.

    Raises:
        ValueError: in place of any other exception.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"the parts of {named} do not work together as their configs describe them ({reason}); "
            "save the model again, or correct its config.json"
        ) from error


def try_out(
    named: str,
    build: Callable[[], tuple[Any, Any]],
    denoise: Callable[[Any, Tensor, Tensor], Tensor],
    shape: tuple[int, int, int],
    pixels_per_latent: int = 1,
) -> None:
    """Denoises, encodes and decodes one row on the meta device; only shapes are computed.

    Args:
        named: the model, for messages.
        build: returns the denoiser and the autoencoder (None without one); called on that device.
        denoise: (denoiser, latents, timesteps) -> its raw output.
        shape: (C, H, W) of a latent.
        pixels_per_latent: side of the square of pixels that one latent stands for.

    Raises:
        ValueError: the parts cannot be built or called, or an output has an unexpected shape.
    """
    channels, height, width = shape
    picture = (1, 3, height * pixels_per_latent, width * pixels_per_latent)
    outputs: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    with as_a_fault(named), torch.no_grad(), torch.device("meta"):
        denoiser, autoencoder = build()
        latents, timesteps = torch.empty(1, *shape), torch.zeros(1, dtype=torch.long)
        outputs["denoiser"] = denoise(denoiser, latents, timesteps)[:, :channels], (1, *shape)
        if autoencoder is not None:
            encoded = autoencoder.encode(torch.empty(picture))
            found = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
            outputs["autoencoder's encoder"] = found, (1, *shape)
            outputs["autoencoder's decoder"] = autoencoder.decode(latents).sample, picture
    for part, (output, wanted) in outputs.items():
        check_shape(named, part, output, wanted)


def check_shape(named: str, part: str, output: Tensor, wanted: tuple[int, ...]) -> None:
    """Refuses a part whose output the next one cannot take.

    Args:
        named: the model, for messages.
        part: that returned the output.
        output: for one row.
        wanted: the shape that the next part needs.

    Raises:
        ValueError: the shapes differ.
    """
    if tuple(output.shape) != wanted:
        raise ValueError(
            f"the {part} of {named} returns {tuple(output.shape[1:])} where {wanted[1:]} is "
            "needed; give parts that were trained together"
        )
