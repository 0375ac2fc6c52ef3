"""A small text-to-image model to train: Stable Diffusion's parts, its autoencoder the identity.

The autoencoder is there because the pipeline wants one, not to compress: icons of 16 pixels are
diffused as they are, and what is exported is a `StableDiffusionPipeline` like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, MinLen
from torch import Tensor, nn

from invmm.faults import Refusal
from invmm.training.architectures import check_network, check_noise
from invmm.training.tokenizer import word_tokenizer


@dataclass(frozen=True, kw_only=True)
class TextUNet:
    """A `UNet2DConditionModel` steered by a CLIP text encoder, both trained from scratch.

    Attributes:
        image_size: side of the images, and of the latents.
        block_out_channels: width of each resolution level.
        layers_per_block: residual blocks per level.
        attention_levels: levels (0 = finest) with self- and cross-attention; the block between
            down and up always has both.
        norm_num_groups: of the group normalisation; divides every width.
        num_attention_heads: per attention layer of the U-Net.
        text_hidden_size: width of the text encoder and of its embeddings.
        text_num_layers: of the text encoder.
        text_num_heads: per attention layer of the text encoder.
        caption_dropout: probability that a training image is shown with the empty caption, which
            guidance needs (Ho and Salimans 2022, "Classifier-Free Diffusion Guidance").
        caption_templates: captions of the copies of an image in the training set, in turn; {} is
            its own. One: all copies share a caption; several: copies have differing ones.
        prediction_type: what the network learns to predict.
        num_train_timesteps: T.
        beta_schedule: of the noise.
        beta_start: first beta.
        beta_end: last beta.

    Raises:
        ValueError: widths, groups, heads and levels that do not fit, or a template without {}.
    """

    image_size: Annotated[int, Ge(8)] = 16
    block_out_channels: list[int]
    layers_per_block: Annotated[int, Ge(1)] = 1
    attention_levels: list[int]
    norm_num_groups: Annotated[int, Ge(1)] = 8
    num_attention_heads: Annotated[int, Ge(1)] = 8
    text_hidden_size: Annotated[int, Ge(1)] = 64
    text_num_layers: Annotated[int, Ge(1)] = 2
    text_num_heads: Annotated[int, Ge(1)] = 4
    caption_dropout: Annotated[float, Ge(0), Le(1)] = 0.1
    caption_templates: Annotated[list[str], MinLen(1)] = field(default_factory=lambda: ["{}"])
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
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
            heads=("num_attention_heads", self.num_attention_heads),
        )
        check_noise(self.beta_start, self.beta_end)
        # The pipeline draws images whose sides are multiples of 8 only.
        if self.image_size % 8:
            raise Refusal(
                f"model.image_size={self.image_size} is no size of a StableDiffusionPipeline; use "
                "a multiple of 8",
                "model.image_size",
            )
        for template in self.caption_templates:
            if "{}" not in template:
                raise Refusal(
                    f"model.caption_templates holds {template!r}, which says nothing of the image; "
                    "put {} where its caption goes",
                    "model.caption_templates",
                )
        if self.text_hidden_size % self.text_num_heads:
            raise Refusal(
                f"model.text_num_heads={self.text_num_heads} does not divide "
                f"model.text_hidden_size={self.text_hidden_size}; use a divisor",
                "model.text_num_heads",
                "model.text_hidden_size",
            )

    def check_captions(self, captions: Sequence[str | None]) -> None:
        """See `TrainableModel`; each image needs one."""
        if missing := sum(caption is None for caption in captions):
            raise ValueError(
                f"{missing} of the training images have no caption, from which a text-to-image "
                "model learns; give each one in the data set, or train model=unet_tiny"
            )

    def start(self, captions: Sequence[str | None]) -> TextTrainee:
        """See `TrainableModel`.

        Raises:
            ValueError: training images without a caption.
        """
        self.check_captions(captions)
        tokenizer = word_tokenizer(
            template.replace("{}", caption)
            for caption in captions
            if caption is not None
            for template in self.caption_templates
        )
        return TextTrainee(
            unet=self._unet(),
            text_encoder=self._text_encoder(tokenizer),
            tokenizer=tokenizer,
            vae=identity_autoencoder(self.image_size),
            scheduler=self._scheduler(),
            caption_dropout=self.caption_dropout,
            caption_templates=self.caption_templates,
        )

    def _unet(self) -> Any:
        from diffusers import UNet2DConditionModel

        attends = [level in self.attention_levels for level in range(len(self.block_out_channels))]
        down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends]
        up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)]
        return UNet2DConditionModel(
            sample_size=self.image_size,
            in_channels=3,
            out_channels=3,
            block_out_channels=tuple(self.block_out_channels),
            layers_per_block=self.layers_per_block,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            norm_num_groups=self.norm_num_groups,
            cross_attention_dim=self.text_hidden_size,
            # In this class the name means the number of heads, whatever it says.
            attention_head_dim=self.num_attention_heads,
        )

    def _text_encoder(self, tokenizer: Any) -> Any:
        from transformers import CLIPTextConfig, CLIPTextModel

        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.text_hidden_size,
            intermediate_size=4 * self.text_hidden_size,  # as in CLIP
            projection_dim=self.text_hidden_size,
            num_hidden_layers=self.text_num_layers,
            num_attention_heads=self.text_num_heads,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return CLIPTextModel(config)

    def _scheduler(self) -> Any:
        from diffusers import DDPMScheduler

        return DDPMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_schedule=self.beta_schedule,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            prediction_type=self.prediction_type,
            clip_sample=False,
            steps_offset=1,  # StableDiffusionPipeline overwrites any other
        )


class TextTrainee(nn.Module):
    """The parts of a `StableDiffusionPipeline` in training; see `Trainee`.

    Args:
        unet: predicts from noisy latents, timesteps and prompt embeddings.
        text_encoder: token ids -> prompt embeddings.
        tokenizer: captions -> token ids.
        vae: between pixels and latents; frozen here.
        scheduler: of the forward process.
        caption_dropout: see `TextUNet`.
        caption_templates: see `TextUNet`.
    """

    def __init__(
        self,
        *,
        unet: Any,
        text_encoder: Any,
        tokenizer: Any,
        vae: Any,
        scheduler: Any,
        caption_dropout: float,
        caption_templates: Sequence[str] = ("{}",),
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.tokenizer = unet, text_encoder, tokenizer
        self.vae = vae.requires_grad_(False)
        self.scheduler, self.caption_dropout = scheduler, caption_dropout
        self.caption_templates = tuple(caption_templates)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """See `Trainee`: (B, 3, H, W) in [-1, 1] -> latents of the same shape."""
        return self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor

    def prompt_embeds(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, tokens, text_hidden_size), as the pipeline encodes them."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, return_tensors="pt"
        )
        return self.text_encoder(tokens.input_ids.to(self.text_encoder.device))[0]

    def forward(self, noisy: Tensor, timesteps: Tensor, captions: Sequence[str]) -> Tensor:
        """See `Trainee`."""
        return self.unet(noisy, timesteps, self.prompt_embeds(captions)).sample

    def pipeline(self) -> Any:
        """See `Trainee`."""
        from diffusers import StableDiffusionPipeline

        # Declared as if they had to be there.
        absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            requires_safety_checker=False,
            **absent,
        )


def identity_autoencoder(size: int, *, pixel_scale: float = 1e-3) -> Any:
    """An `AutoencoderKL` of one level that changes nothing: latents are the pixels.

    Group normalisation divides by the standard deviation of what it sees. Here that is a pair of
    constants +-1 beside which the pixels, written small and with both signs, count for nothing.
    The activation drops out by silu(z) - silu(-z) = z.

    Args:
        size: side of the images.
        pixel_scale: what pixels of +-1 are beside the constants (ours); the error of the round
            trip is a few times its square.

    Returns:
        The autoencoder in float32; the posterior's deviation is 3e-7, the least there is.
    """
    from diffusers import AutoencoderKL

    channels = 8  # each of three colours with both signs, and both constants
    autoencoder: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(channels,),
        latent_channels=3,
        norm_num_groups=1,
        sample_size=size,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    signs = torch.cat([torch.eye(3), -torch.eye(3), torch.zeros(2, 3)])  # (8, 3)
    constants = torch.tensor([0.0] * (channels - 2) + [1.0, -1.0])
    deviation = (constants.square().mean() + autoencoder.encoder.conv_norm_out.eps).sqrt()
    with torch.no_grad():
        for name, parameter in autoencoder.named_parameters():
            # Residual blocks without weights in their second convolution pass on their input.
            if ".conv2." in name:
                parameter.zero_()
        for half in (autoencoder.encoder, autoencoder.decoder):
            _pointwise(half.conv_in, signs * pixel_scale, constants)
            outputs = torch.zeros(half.conv_out.out_channels, channels)
            outputs[:3] = signs.T * deviation / pixel_scale
            _pointwise(half.conv_out, outputs, torch.zeros(half.conv_out.out_channels))
        autoencoder.encoder.conv_out.bias[3:] = -30  # log variance, where diffusers clamps it
    return autoencoder


def _pointwise(convolution: nn.Conv2d, weights: Tensor, bias: Tensor) -> None:
    """Sets a convolution to a matrix on the channels of each pixel."""
    convolution.weight.zero_()
    convolution.weight[:, :, 1, 1] = weights
    assert convolution.bias is not None
    convolution.bias.copy_(bias)
