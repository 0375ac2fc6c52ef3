"""The interfaces that the engine needs: a network, a similarity network and a measurement."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from invmm.diffusion.guidance import Condition, repeated
from invmm.diffusion.sampling import Sampler
from invmm.diffusion.schedule import NoiseSchedule
from invmm.engine.criterion import Passing, ReplicationCriterion
from invmm.engine.finiteness import Stage, check_finite
from invmm.engine.outcomes import CostRange, Outcome
from invmm.engine.searched_prompt import PromptTokens
from invmm.faults import Refusal


@runtime_checkable
class Network(Protocol):
    """A frozen diffusion model of any family.

    Attributes:
        latent_shape: (C, H, W) of one latent.
        schedule: the noise schedule and prediction type that it was trained with.
        device: where latents live.
    """

    latent_shape: tuple[int, int, int]
    schedule: NoiseSchedule
    device: torch.device

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition | None) -> Tensor:
        """The raw output of the denoiser, (B, C, H, W); rows are independent."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [-1, 1] -> (B, C, H, W) latents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) latents -> (B, 3, H, W) pixels, clamped to [-1, 1].

        Pixels that are not finite before the clamp must be returned as NaN.
        """
        ...


@runtime_checkable
class TextNetwork(Network, Protocol):
    """A network whose prompt can be searched."""

    def encode_prompt(self, embeddings: Condition, ids: Condition, fixed: Condition) -> Condition:
        """Runs the text encoders on token embeddings; returns B independent rows of condition.

        Args:
            embeddings: encoder -> (B, L, d), without position embeddings.
            ids: encoder -> (B, L) token ids, which show where the prompt ends.
            fixed: B rows of condition, in which the outputs of these encoders replace their part.
        """
        ...


@runtime_checkable
class Similarity(Protocol):
    """A network whose unit-norm embeddings are close when two images are copies."""

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [-1, 1] -> (B, D) unit-norm embeddings; rows independent."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """One image under measurement.

    Attributes:
        image_id: stable id.
        pixels: (3, H, W) in [-1, 1].
        latents: (1, C, H, W).
        embedding: (D,) unit-norm.
        condition: one row, or several that samples cycle through; None for an unconditional model.
        negative: one row of the condition that guidance pushes away from; None without guidance.
        tokens: of a searched prompt, in place of a condition; None if the prompt is given.
    """

    image_id: str
    pixels: Tensor
    latents: Tensor
    embedding: Tensor
    condition: Condition | None = None
    negative: Condition | None = None
    tokens: PromptTokens | None = None

    def check_finite(self) -> None:
        """Refuses a target whose conditions, latents or embedding are not finite.

        Raises:
            NonFiniteError: naming the stage and the cure.
        """
        fixed = self.tokens.fixed if self.tokens else None
        check_finite([
            (Stage.PROMPT, self.condition), (Stage.PROMPT, self.negative), (Stage.PROMPT, fixed),
            (Stage.ENCODER, self.latents), (Stage.TARGET, self.embedding),
        ])  # fmt: skip

    def rows(self, count: int) -> Condition | None:
        """The condition as `count` rows; see `repeated`."""
        return repeated(self.condition, count)

    def negative_rows(self, count: int) -> Condition | None:
        """The negative condition as `count` rows."""
        return repeated(self.negative, count)


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """What all images of a run share: how samples are drawn and judged."""

    schedule: NoiseSchedule
    sampler: Sampler
    criterion: ReplicationCriterion


class Fingerprinted(Protocol):
    """A model whose files can be told from others."""

    def fingerprint(self) -> dict[str, str]:
        """Name -> SHA-256 of every weight file."""
        ...

    def settings(self) -> dict[str, str]:
        """Name -> SHA-256 of all else that decides what the model computes."""
        ...


@dataclass(frozen=True, kw_only=True)
class Use:
    """What a measurement is to be used with, told before weights are loaded.

    Attributes:
        model: under measurement.
        schedule: gives the model's noise schedule; building it takes a second.
        sampler: how the model draws.
        criterion: what counts as a replica.
        searches_prompt: whether the prompt is searched too, see `prompt=learned`.
        repeats: measurements of each image.
        is_plan: whether nothing will be run, so that no weight file need be read.
    """

    model: Fingerprinted
    schedule: Callable[[], NoiseSchedule]
    sampler: Sampler
    criterion: ReplicationCriterion
    searches_prompt: bool = False
    repeats: int = 1
    is_plan: bool = False


@runtime_checkable
class Measurement(Protocol):
    """An algorithm that measures one image, as a coroutine that awaits the engine's requests."""

    def check(self, use: Use) -> None:
        """Refuses what it cannot be used with.

        Raises:
            ValueError: naming the key, the value and the cure.
        """
        ...

    def __call__(
        self, target: Target, setting: Setting, rng: torch.Generator
    ) -> Coroutine[Any, Any, Outcome]:
        """Measures one image. All randomness comes from `rng`."""
        ...

    def cost(self, sampler: Sampler, criterion: ReplicationCriterion) -> CostRange:
        """Network evaluations of an image that uses up its whole budget."""
        ...


@runtime_checkable
class Searching(Measurement, Protocol):
    """A measurement that searches for a noise distribution and saves it, to be verified."""

    def passing(self, criterion: ReplicationCriterion, num_scales: int, steps: int) -> Passing:
        """The test that an image had to pass to be REPLICATED.

        Args:
            criterion: of the run.
            num_scales: guidance scales that each check tries.
            steps: optimiser steps after which the search ended.
        """
        ...


def refuse_searched_prompt(measurement: Measurement, use: Use) -> None:
    """For measurements that take the prompt as it is given.

    Raises:
        ValueError: the prompt is to be searched.
    """
    if use.searches_prompt:
        raise Refusal(
            f"prompt=learned cannot be searched by a {type(measurement).__name__}; use "
            "measurement=inversion with inversion=paper_sd, or prompt=caption",
            "prompt",
        )
