"""Tiny pipelines as one file with the names of Stable Diffusion's first release.

The inverse of what diffusers does when it reads such a file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn",
}  # fmt: skip


def checkpoint(pipeline: Any) -> dict[str, Tensor]:
    """All weights of a pipeline, and buffers that such files hold beside them."""
    unet = {f"model.diffusion_model.{key}": value for key, value in unet_weights(pipeline.unet)}
    vae = {f"first_stage_model.{key}": value for key, value in vae_weights(pipeline.vae)}
    weights = {**unet, **vae, "betas": torch.rand(1000), "model_ema.decay": torch.tensor(0.9999)}
    if hasattr(pipeline, "text_encoder_2"):
        prefix, second = "conditioner.embedders.0.transformer.text_model.", pipeline.text_encoder_2
        weights |= open_clip_weights(second, "conditioner.embedders.1.model.")
    elif pipeline.scheduler.config.prediction_type == "v_prediction":  # Stable Diffusion 2
        prefix = None
        weights |= open_clip_weights(pipeline.text_encoder, "cond_stage_model.model.")
        last = "cond_stage_model.model.transformer.resblocks.23.ln_1.bias"
        weights |= {last: torch.rand(16), "cond_stage_model.model.text_projection": torch.eye(16)}
    else:
        prefix = "cond_stage_model.transformer.text_model."
    if prefix:
        state = pipeline.text_encoder.state_dict()
        weights |= {prefix + key.removeprefix("text_model."): state[key] for key in state}
        weights[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    return {key: value.detach().clone().contiguous() for key, value in weights.items()}


def save_single_file(pipeline: Any, file: Path, config: Path) -> None:
    """Writes the file, and the folder that describes it, without any weights."""
    save_file(checkpoint(pipeline), file, metadata={"format": "pt"})
    pipeline.save_pretrained(config)
    for weights in config.glob("*/*.safetensors"):
        weights.unlink()


def unet_weights(unet: Any):
    per_block = unet.config.layers_per_block + 1

    def renamed(key: str) -> str:
        for own, other in OUTSIDE.items():
            if key.startswith(f"{own}."):
                return other + key.removeprefix(own)
        side, block, kind, layer, rest = re.fullmatch(
            r"(down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)", key
        ).groups()  # type: ignore[union-attr]
        place = "1" if kind == "attentions" else "0"
        if kind == "resnets":
            first, _, last = rest.partition(".")
            rest = f"{RESNET[first]}.{last}"
        if side == "mid_block":
            return f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}.{rest}"
        start = int(block) * per_block
        if kind == "downsamplers":
            return f"input_blocks.{start + per_block}.0.{rest.replace('conv', 'op')}"
        if kind == "upsamplers":
            has_attention = f"up_blocks.{block}.attentions.0.norm.weight" in unet.state_dict()
            return f"output_blocks.{start + per_block - 1}.{2 if has_attention else 1}.{rest}"
        if side == "down_blocks":
            return f"input_blocks.{start + int(layer) + 1}.{place}.{rest}"
        return f"output_blocks.{start + int(layer)}.{place}.{rest}"

    return [(renamed(key), value) for key, value in unet.state_dict().items()]


def vae_weights(vae: Any):
    last = len(vae.config.block_out_channels) - 1
    for key, value in vae.state_dict().items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        if up := re.search(r"up_blocks\.(\d+)\.", name):
            name = name.replace(up[0], f"up.{last - int(up[1])}.").replace("resnets.", "block.")
            name = name.replace("upsamplers.0.", "upsample.")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if "mid_block.attentions.0." in name:
            name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
            for own, other in ATTENTION.items():
                name = name.replace(f".{own}.", f".{other}.")
            value = value[:, :, None, None] if value.ndim == 2 else value
        yield name, value


def open_clip_weights(encoder: Any, prefix: str) -> dict[str, Tensor]:
    state = {key.removeprefix("text_model."): v for key, v in encoder.state_dict().items()}
    weights = {prefix + "logit_scale": torch.tensor(4.6)}
    if (projection := state.pop("text_projection.weight", None)) is not None:
        weights[prefix + "text_projection"] = projection.T
    for key, value in state.items():
        name = key
        for own, other in OPEN_CLIP.items():
            name = name.replace(own, other)
        if ".q_proj." in name:
            both = [value, *(state[key.replace("q_proj", one)] for one in ("k_proj", "v_proj"))]
            name, value = name.replace("q_proj.", "in_proj_"), torch.cat(both)
        if ".k_proj." not in name and ".v_proj." not in name:
            weights[prefix + name] = value
    return weights
