"""Networks that `invmm-train` can train from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from annotated_types import Ge, Gt, Le, Lt


@runtime_checkable
class TrainableModel(Protocol):
    """A recipe for an untrained model."""

    image_size: int

    def build(self) -> tuple[Any, Any]:
        """A network with random weights and its diffusers training scheduler."""
        ...


@dataclass(frozen=True, kw_only=True)
class UNet:
    """An unconditional `UNet2DModel` with a DDPM schedule.

    Attributes:
        image_size: side of the images.
        block_out_channels: width of each resolution level.
        layers_per_block: residual blocks per level.
        attention_levels: levels (0 = finest) with self-attention.
        norm_num_groups: of the group normalisation; divides every width.
        attention_head_dim: channels per attention head.
        dropout: in residual blocks.
        prediction_type: what the network learns to predict.
        num_train_timesteps: T.
        beta_schedule: of the noise.
        beta_start: first beta.
        beta_end: last beta.

    Raises:
        ValueError: widths, groups and levels that do not fit.
    """

    image_size: Annotated[int, Ge(8)] = 16
    block_out_channels: list[int]
    layers_per_block: Annotated[int, Ge(1)] = 1
    attention_levels: list[int]
    norm_num_groups: Annotated[int, Ge(1)] = 8
    attention_head_dim: Annotated[int, Ge(1)] = 8
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    num_train_timesteps: Annotated[int, Ge(2)] = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: Annotated[float, Gt(0), Le(1)] = 1e-4
    beta_end: Annotated[float, Gt(0), Le(1)] = 0.02

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        if not levels or min(self.block_out_channels) < 1:
            raise ValueError(
                f"model.block_out_channels={self.block_out_channels} is no network; give the width "
                "of each level, such as [32, 64, 64]"
            )
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            raise ValueError(
                f"model.norm_num_groups={self.norm_num_groups} does not divide every one of "
                f"model.block_out_channels={self.block_out_channels}; use a common divisor"
            )
        if any(not 0 <= level < levels for level in self.attention_levels):
            raise ValueError(
                f"model.attention_levels={self.attention_levels} names a level that is not there; "
                f"use 0 to {levels - 1}"
            )
        # The block between down and up attends at the last width.
        attending = [self.block_out_channels[level] for level in (*self.attention_levels, -1)]
        if any(width % self.attention_head_dim for width in attending):
            raise ValueError(
                f"model.attention_head_dim={self.attention_head_dim} does not divide the widths "
                f"with attention, {sorted(set(attending))}; use a common divisor"
            )
        if self.beta_start > self.beta_end:
            raise ValueError(
                f"model.beta_start={self.beta_start} exceeds model.beta_end={self.beta_end}; the "
                "noise must grow"
            )
        if self.image_size % 2 ** (levels - 1):
            raise ValueError(
                f"model.image_size={self.image_size} cannot be halved {levels - 1} times; use a "
                f"multiple of {2 ** (levels - 1)} or fewer model.block_out_channels"
            )

    def build(self) -> tuple[Any, Any]:
        """See `TrainableModel`; the caller seeds the weights."""
        from diffusers import DDPMScheduler, UNet2DModel

        attends = [level in self.attention_levels for level in range(len(self.block_out_channels))]
        unet = UNet2DModel(
            sample_size=self.image_size,
            block_out_channels=tuple(self.block_out_channels),
            layers_per_block=self.layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            norm_num_groups=self.norm_num_groups,
            attention_head_dim=self.attention_head_dim,
            dropout=self.dropout,
        )
        scheduler = DDPMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_schedule=self.beta_schedule,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            prediction_type=self.prediction_type,
            clip_sample=False,
        )
        return unet, scheduler
