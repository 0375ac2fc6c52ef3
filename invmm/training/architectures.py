"""Networks that `invmm-train` can train from scratch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from invmm.faults import Refusal


@runtime_checkable
class TrainableModel(Protocol):
    """A recipe for an untrained model.

    Attributes:
        image_size: side of the images that it is trained on.
    """

    image_size: int

    def check_captions(self, captions: Sequence[str | None]) -> None:
        """Whether the model can learn from images with these captions, None where one has none.

        Raises:
            ValueError: it cannot.
        """
        ...

    def start(self, captions: Sequence[str | None]) -> Trainee:
        """A model with random weights, ready to be trained; the caller seeds them.

        Args:
            captions: of all training images, None where one has none, and further ones whose words
                prompts may use. A model without prompts takes no notice of them.

        Raises:
            ValueError: the model cannot be trained on these images.
        """
        ...


class Trainee(Protocol):
    """A network in training with what its pipeline needs besides; an `nn.Module`.

    Attributes:
        scheduler: the diffusers scheduler of the forward process.
        caption_dropout: probability that an image is shown with the empty caption.
        caption_templates: of the copies of an image, in turn; {} is its caption.
    """

    scheduler: Any
    caption_dropout: float
    caption_templates: Sequence[str]

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 3, H, W) in the units that are diffused; no gradients."""
        ...

    def __call__(self, noisy: Tensor, timesteps: Tensor, captions: Sequence[str]) -> Tensor:
        """Noisy (B, 3, H, W), (B,) and B captions -> the prediction, (B, 3, H, W)."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """See `nn.Module`; those that require gradients are trained."""
        ...

    def pipeline(self) -> Any:
        """The diffusers pipeline around these weights, to be saved."""
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
        check_network(
            image_size=self.image_size,
            block_out_channels=self.block_out_channels,
            attention_levels=self.attention_levels,
            norm_num_groups=self.norm_num_groups,
            heads=("attention_head_dim", self.attention_head_dim),
        )
        check_noise(self.beta_start, self.beta_end)

    def check_captions(self, captions: Sequence[str | None]) -> None:
        """See `TrainableModel`; it takes no notice of them."""

    def start(self, captions: Sequence[str | None]) -> PixelTrainee:
        """See `TrainableModel`."""
        return PixelTrainee(*self.build())

    def build(self) -> tuple[Any, Any]:
        """The network with random weights and its training scheduler; the caller seeds them."""
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


class PixelTrainee(nn.Module):
    """An unconditional network on pixels in training; see `Trainee`.

    Args:
        unet: network with a `.sample` output.
        scheduler: of the forward process.
    """

    caption_dropout = 0.0
    caption_templates = ("{}",)

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.unet, self.scheduler = unet, scheduler

    def encode(self, pixels: Tensor) -> Tensor:
        """See `Trainee`: the pixels themselves."""
        return pixels

    def forward(self, noisy: Tensor, timesteps: Tensor, captions: Sequence[str]) -> Tensor:
        """See `Trainee`; captions mean nothing to it."""
        return self.unet(noisy, timesteps).sample

    def pipeline(self) -> Any:
        """See `Trainee`."""
        from diffusers import DDPMPipeline

        return DDPMPipeline(self.unet, self.scheduler)


def check_network(
    *,
    image_size: int,
    block_out_channels: Sequence[int],
    attention_levels: Sequence[int],
    norm_num_groups: int,
    heads: tuple[str, int],
) -> None:
    """Refuses U-Nets that cannot be built.

    Args:
        image_size: side of what goes in.
        block_out_channels: width of each level.
        attention_levels: levels with attention.
        norm_num_groups: divides every width.
        heads: name and value of what divides the widths with attention.

    Raises:
        ValueError: naming the key.
    """
    levels = len(block_out_channels)
    if not levels or min(block_out_channels) < 1:
        raise Refusal(
            f"model.block_out_channels={block_out_channels} is no network; give the width of each "
            "level, such as [32, 64, 64]",
            "model.block_out_channels",
        )
    if any(width % norm_num_groups for width in block_out_channels):
        raise Refusal(
            f"model.norm_num_groups={norm_num_groups} does not divide every one of "
            f"model.block_out_channels={block_out_channels}; use a common divisor",
            "model.norm_num_groups",
            "model.block_out_channels",
        )
    if any(not 0 <= level < levels for level in attention_levels):
        raise Refusal(
            f"model.attention_levels={attention_levels} names a level that is not there; use 0 to "
            f"{levels - 1}",
            "model.attention_levels",
            "model.block_out_channels",
        )
    # The block between down and up attends at the last width.
    attending = [block_out_channels[level] for level in (*attention_levels, -1)]
    name, number = heads
    if any(width % number for width in attending):
        raise Refusal(
            f"model.{name}={number} does not divide the widths with attention, "
            f"{sorted(set(attending))}; use a common divisor",
            f"model.{name}",
            "model.block_out_channels",
            "model.attention_levels",
        )
    if image_size % 2 ** (levels - 1):
        raise Refusal(
            f"model.image_size={image_size} cannot be halved {levels - 1} times; use a multiple "
            f"of {2 ** (levels - 1)} or fewer model.block_out_channels",
            "model.image_size",
            "model.block_out_channels",
        )


def check_noise(beta_start: float, beta_end: float) -> None:
    """Refuses a noise that shrinks.

    Raises:
        ValueError: naming the keys.
    """
    if beta_start > beta_end:
        raise Refusal(
            f"model.beta_start={beta_start} exceeds model.beta_end={beta_end}; the noise must grow",
            "model.beta_start",
            "model.beta_end",
        )
