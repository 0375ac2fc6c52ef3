"""Between pixels and the latents of an autoencoder, as its pipeline converts them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Posterior = Literal["mode", "sample"]


class Codec:
    """A frozen autoencoder with the scale and shift of its latents.

    VQ autoencoders give the latents before quantisation and quantise when they decode; KL ones give
    the mode of the posterior, or a sample of it that the image alone decides.

    Args:
        autoencoder: diffusers' VQModel or AutoencoderKL.
        posterior: which latents of a KL autoencoder stand for an image (paper: the mode, for
            Stable Diffusion 3 a sample).
    """

    def __init__(self, autoencoder: Any, posterior: Posterior = "mode") -> None:
        self.autoencoder = autoencoder
        self.posterior: Posterior = posterior
        config = autoencoder.config
        self.scale = config.get("scaling_factor") or 1.0
        self.shift = config.get("shift_factor") or 0.0
        self.factor = pixels_per_latent(config)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) in the denoiser's units, float32."""
        encoded = self.autoencoder.encode(pixels.to(self.autoencoder.dtype))
        if hasattr(encoded, "latents"):
            latents = encoded.latents
        elif self.posterior == "mode":
            latents = encoded.latent_dist.mode()
        else:
            generators = [torch.Generator().manual_seed(0) for _ in pixels]
            means = encoded.latent_dist.mean
            noise = torch.stack([torch.randn(means.shape[1:], generator=g) for g in generators])
            latents = means + encoded.latent_dist.std * noise.to(means)
        return (latents.float() - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) clamped to [-1, 1], float32."""
        unscaled = (latents / self.scale + self.shift).to(self.autoencoder.dtype)
        return self.autoencoder.decode(unscaled).sample.float().clamp(-1, 1)


def pixels_per_latent(config: Any) -> int:
    """Side of the square of pixels that one latent stands for, from an autoencoder's config."""
    return 2 ** (len(config["block_out_channels"]) - 1)
