"""Runs a model's parts on the meta device, to refuse parts that do not fit before weights load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from operator import or_
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError
from torch import Tensor

_MOST_TOKENS = 256
"""More are given to no text encoder here."""


@contextmanager
def as_a_fault(named: str, suspects: Callable[[], list[str]] = list) -> Iterator[None]:
    """Turns any exception that a foreign config makes the libraries raise into one line.

    Args:
        named: the model, for messages.
        suspects: returns what in its configs may be the cause.

    Raises:
        ValueError: in place of any other exception.
    """
    try:
        yield
    except Exception as error:
        reason = "; ".join(suspects()[:3]) or " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"the parts of {named} do not work together as their configs describe them "
            f"({reason[:300]}); save the model again, or correct its config.json"
        ) from error


def mistyped(part: str, part_class: type, config: Mapping[str, Any]) -> list[str]:
    """Values of a config that are not of the types by which its class names them, a line each.

    Not a fault by itself: classes take more than their annotations say.
    """
    try:
        hints = get_type_hints(part_class.__init__)
    except (NameError, TypeError):
        return []
    lines = []
    for key in config.keys() & hints.keys():
        try:
            TypeAdapter(_loosened(hints[key])).validate_python(config[key])
        except PydanticSchemaGenerationError:
            continue
        except ValidationError:
            lines.append(f"{key}={config[key]!r:.60} of the {part} is no {_named(hints[key])}")
    return sorted(lines)


def _loosened(hint: Any) -> Any:
    """A tuple of one may have any length: so diffusers writes lists."""
    origin, own = get_origin(hint), tuple(_loosened(argument) for argument in get_args(hint))
    if origin is tuple and len(own) == 1:
        return tuple[own[0], ...]
    return reduce(or_, own) if origin in (Union, UnionType) else hint


def _named(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def try_out_text_encoder(named: str, part: str, encoder: Any, tokenizer: Any) -> None:
    """Reads a prompt on the meta device, as long as prompts can be.

    Args:
        named: the model, for messages.
        part: name of the encoder, for messages.
        encoder: on the meta device.
        tokenizer: that feeds it.

    Raises:
        ValueError: the encoder cannot read what the tokenizer writes.
    """
    with as_a_fault(f"{named}, its {part} first,"):
        length = min(tokenizer.model_max_length, _MOST_TOKENS)
        ids = tokenizer(
            "a", padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        words = encoder.get_input_embeddings().num_embeddings
        largest = max(tokenizer.get_vocab().values())
    if largest >= words:
        raise ValueError(
            f"the tokenizer of the {part} of {named} has words up to {largest}, and the {part} "
            f"{words} words; give the tokenizer that it was trained with"
        )
    with as_a_fault(f"{named}, its {part} first,"), torch.no_grad():
        encoder(ids.to("meta"), output_hidden_states=True)


def try_out(
    named: str,
    build: Callable[[], tuple[Any, Any]],
    denoise: Callable[[Any, Tensor, Tensor], Tensor],
    shape: tuple[int, int, int],
    pixels_per_latent: int = 1,
    suspects: Callable[[], list[str]] = list,
) -> None:
    """Denoises, encodes and decodes one row on the meta device; only shapes are computed.

    Args:
        named: the model, for messages.
        build: returns the denoiser and the autoencoder (None without one); called on that device.
        denoise: (denoiser, latents, timesteps) -> its raw output.
        shape: (C, H, W) of a latent.
        pixels_per_latent: side of the square of pixels that one latent stands for.
        suspects: see `as_a_fault`.

    Raises:
        ValueError: the parts cannot be built or called, or an output has an unexpected shape.
    """
    channels, height, width = shape
    picture = (1, 3, height * pixels_per_latent, width * pixels_per_latent)
    outputs: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    with as_a_fault(named, suspects), torch.no_grad(), torch.device("meta"):
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
