"""Tiny pipelines of every family, with random weights and the real architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from worlds import LINEAR

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tokenizer() -> Any:
    """CLIP's, spelling words letter by letter."""
    from transformers import CLIPTokenizer

    tokens = ["<|startoftext|>", "<|endoftext|>", "<unk>"]
    tokens += [letter + end for letter in LETTERS for end in ("", "</w>")]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[],
        unk_token="<unk>", model_max_length=77,
    )  # fmt: skip


def text_encoder(*, projected: bool, width: int = 16) -> Any:
    """CLIP's, two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=60, hidden_size=width, intermediate_size=32, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=77,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def autoencoder(channels: int = 4, **options: Any) -> Any:
    """Two levels: one latent for 2x2 pixels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=channels, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.7, **options,
    )  # fmt: skip


def vq_autoencoder(**scale: float) -> Any:
    """With a codebook of 32."""
    from diffusers import VQModel

    return VQModel(
        block_out_channels=(8, 8), latent_channels=3, vq_embed_dim=3, num_vq_embeddings=32,
        norm_num_groups=4, sample_size=16, **scale,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def ddim(prediction_type: str = "epsilon", **betas: Any) -> Any:
    """Built as `Sampler` builds it."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        **(betas or LINEAR), prediction_type=prediction_type, clip_sample=False,
        set_alpha_to_one=True, timestep_spacing="trailing",
    )  # fmt: skip


def ldm(first_stage: Any) -> Any:
    from diffusers import LDMPipeline, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, in_channels=first_stage.config.latent_channels,
        out_channels=first_stage.config.latent_channels, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return LDMPipeline(vqvae=first_stage, unet=unet, scheduler=ddim())


def dit() -> Any:
    from diffusers import DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    return DiTPipeline(transformer=transformer, vae=autoencoder(), scheduler=ddim())


def text_unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**{
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1,
        "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), **options,
    })  # fmt: skip


def stable_diffusion(prediction_type: str = "epsilon", *, size: int = 8, **betas: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=text_encoder(projected=False), tokenizer=tokenizer(),
        unet=text_unet(sample_size=size),
        scheduler=ddim(prediction_type, **{**SD_BETAS, **betas}),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(size: int = 8, second_width: int = 16) -> Any:
    from diffusers import StableDiffusionXLPipeline

    unet = text_unet(
        sample_size=size, cross_attention_dim=16 + second_width, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + second_width,
        use_linear_projection=True,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=text_encoder(projected=False),
        text_encoder_2=text_encoder(projected=True, width=second_width),
        tokenizer=tokenizer(), tokenizer_2=tokenizer(), unet=unet, scheduler=ddim(**SD_BETAS),
        add_watermarker=False,
    )  # fmt: skip


def t5() -> dict[str, Any]:
    """T5's encoder and tokenizer, spelling words letter by letter."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    config = T5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return {
        "text_encoder_3": T5EncoderModel(config),
        "tokenizer_3": T5TokenizerFast(
            vocab=[*special, *((letter, -3.0) for letter in "\u2581" + LETTERS)], extra_ids=0
        ),
    }


def sd3(*, with_t5: bool, size: int = 8) -> Any:
    """T5 may be left out."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(
        sample_size=size, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
        caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=8,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=text_encoder(projected=True), tokenizer=tokenizer(),
        text_encoder_2=text_encoder(projected=True), tokenizer_2=tokenizer(),
        **(t5() if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}),
    )  # fmt: skip


def seeded(make: Callable[[], Any]) -> Any:
    """The pipeline, its weights drawn from seed 0, silent."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_lora(pipeline: Any, path: Path) -> None:
    """Writes random LoRA weights of rank 2 for the attention of the denoiser."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    kind = "unet" if hasattr(pipeline, "unet") else "transformer"
    denoiser = getattr(pipeline, kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        denoiser.add_adapter(config)
    weights = get_peft_model_state_dict(denoiser)
    denoiser.delete_adapters("default")
    save_file({f"{kind}.{key}": value.contiguous() for key, value in weights.items()}, path)


MAKERS: dict[str, Callable[[], Any]] = {
    "ldm vq": lambda: ldm(vq_autoencoder(scaling_factor=0.7)),
    "ldm kl": lambda: ldm(autoencoder()),
    "dit": dit,
    "sd1 epsilon": stable_diffusion,
    "sd1 24 pixels": lambda: stable_diffusion(size=12),
    "sd2 v": lambda: stable_diffusion("v_prediction"),
    "sd2 zero-snr": lambda: stable_diffusion("v_prediction", rescale_betas_zero_snr=True),
    "sdxl": sdxl,
    "sdxl 24 pixels": lambda: sdxl(size=12),
    "sd3": lambda: sd3(with_t5=False),
    "sd3 t5 24 pixels": lambda: sd3(with_t5=True, size=12),
}
