"""The requests that a measurement may await.

A measurement is a coroutine. It never touches the network: it awaits one of the five requests
below, the engine answers it together with the requests of other images, and the measurement
goes on with its own rows of the answer.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from invmm.diffusion.guidance import Condition
from invmm.diffusion.sampling import Sampler
from invmm.diffusion.schedule import Prediction
from invmm.engine.searched_prompt import PromptTokens

T = TypeVar("T")


class Request(Generic[T]):
    """A question to the engine; awaiting it gives the answer."""

    def __await__(self) -> Generator[Request[T], T, T]:
        return (yield self)


@dataclass(frozen=True, eq=False)
class Denoise(Request[Prediction]):
    """One evaluation of the network per row.

    The answer keeps the graph if and only if an input requires grad.

    Attributes:
        latents: (B, C, H, W) noisy latents.
        timesteps: (B,) integer training timesteps.
        condition: rows that belong to the latents, or None for an unconditional model.
    """

    latents: Tensor
    timesteps: Tensor
    condition: Condition | None = None


@dataclass(frozen=True, eq=False)
class Sample(Request[Tensor]):
    """Runs the whole sampler from given noise; the answer is (B, C, H, W) clean latents.

    The answer keeps the graph if and only if the noise or the condition requires grad.

    Attributes:
        noise: (B, C, H, W) in units of the prior's standard deviation.
        sampler: scheduler and steps.
        condition: rows that belong to the noise, or None.
        seeds: one seed per row, for samplers that draw noise of their own; see `draw_seeds`.
        guidance_scale: above 1, predictions are pushed away from those under `negative`.
        negative: B rows of condition; needed for guidance only.
    """

    noise: Tensor
    sampler: Sampler
    condition: Condition | None = None
    seeds: tuple[int, ...] | None = None
    guidance_scale: float = 1.0
    negative: Condition | None = None


@dataclass(frozen=True, eq=False)
class EncodePrompt(Request[Condition]):
    """Runs the text encoders on token embeddings; the answer is B rows of condition.

    The answer keeps the graph if and only if the embeddings require grad. It costs no evaluation
    of the network.

    Attributes:
        embeddings: encoder -> (B, L, d).
        tokens: of the searched prompt.
    """

    embeddings: Condition
    tokens: PromptTokens


@dataclass(frozen=True, eq=False)
class Embedding:
    """Decoded samples and their embeddings by the similarity network.

    Attributes:
        pixels: (B, 3, H, W) in [-1, 1] (clamped).
        vectors: (B, D) unit-norm.
    """

    pixels: Tensor
    vectors: Tensor


@dataclass(frozen=True, eq=False)
class Embed(Request[Embedding]):
    """Decodes latents to pixels and embeds them with the similarity network; no gradients.

    Attributes:
        latents: (B, C, H, W) clean latents.
    """

    latents: Tensor


@dataclass(frozen=True, eq=False)
class Minimise(Request[None]):
    """Backpropagates a scalar loss into the leaves that the measurement owns.

    The engine does not check that the loss is finite, since that would make the host wait for the
    device at every step; the measurement checks when it reads its losses.
    """

    loss: Tensor


def draw_seeds(count: int, sampler: Sampler, rng: torch.Generator) -> tuple[int, ...] | None:
    """Seeds for the noise that a stochastic sampler draws itself; None for a deterministic one."""
    if not sampler.is_stochastic:
        return None
    return tuple(torch.randint(2**62, (count,), generator=rng, device=rng.device).tolist())
