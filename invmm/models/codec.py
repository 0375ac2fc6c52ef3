"""Between pixels and the latents of an autoencoder, as its pipeline converts them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from invmm.faults import Refusal

Posterior = Literal["mode", "sample"]

DIFFUSERS_SCALE = 0.18215
"""Stable Diffusion's, which diffusers gives every autoencoder whose config names no scale."""


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """Which keys of an autoencoder's config the pipelines of a family read.

    Attributes:
        shift: `shift_factor`, subtracted before latents are scaled.
        statistics: `latents_mean` and `latents_std`, if both are there.
        upcast: `force_upcast`: encode in float32, and decode in it where the weights are float16.
    """

    shift: bool = False
    statistics: bool = False
    upcast: bool = False


class Codec:
    """A frozen autoencoder with the scale and shift of its latents.

    VQ autoencoders give the latents before quantisation and quantise when they decode; KL ones give
    the mode of the posterior, or a sample of it that the image alone decides.

    Args:
        autoencoder: diffusers' VQModel or AutoencoderKL.
        posterior: which latents of a KL autoencoder stand for an image (paper: the mode, for
            Stable Diffusion 3 a sample).
        scale: of the latents of a VQ autoencoder; see `latent_scale`.
        conventions: which keys of its config its pipeline reads.
    """

    def __init__(
        self,
        autoencoder: Any,
        posterior: Posterior = "mode",
        scale: float | None = None,
        conventions: Conventions = Conventions(),
    ) -> None:
        self.autoencoder = autoencoder
        self.posterior: Posterior = posterior
        config = autoencoder.config
        self.scale: float | Tensor = latent_scale(
            config, is_vq=hasattr(autoencoder, "quantize"), given=scale
        )
        self.shift: float | Tensor = 0.0
        if conventions.shift:
            self.shift = config.get("shift_factor") or 0.0
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if conventions.statistics and mean is not None and deviation is not None:
            self.shift = torch.tensor(mean).reshape(1, -1, 1, 1)
            self.scale = self.scale / torch.tensor(deviation).reshape(1, -1, 1, 1)
        self._upcasts = conventions.upcast and bool(config.get("force_upcast"))
        self.factor = pixels_per_latent(config)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) in the denoiser's units, float32."""
        with self._precision(upcast=self._upcasts):
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
        scale, shift = self._affine(latents)
        return (latents.float() - shift) * scale

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) clamped to [-1, 1], float32; NaN where not finite."""
        scale, shift = self._affine(latents)
        is_half = self.autoencoder.dtype == torch.float16  # diffusers keeps bfloat16 here
        with self._precision(upcast=self._upcasts and is_half):
            unscaled = (latents / scale + shift).to(self.autoencoder.dtype)
            return clamped(self.autoencoder.decode(unscaled).sample.float())

    def _affine(self, latents: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """Scale and shift, on the device of the latents."""
        scale, shift = (
            value.to(latents.device) if isinstance(value, Tensor) else value
            for value in (self.scale, self.shift)
        )
        return scale, shift

    @contextmanager
    def _precision(self, *, upcast: bool) -> Iterator[None]:
        """Within it the autoencoder runs in float32 if `upcast`; then its own dtype is restored."""
        own = self.autoencoder.dtype
        if not upcast or own == torch.float32:
            yield
            return
        self.autoencoder.to(torch.float32)
        try:
            yield
        finally:
            self.autoencoder.to(own)


def clamped(pixels: Tensor) -> Tensor:
    """Pixels clamped to [-1, 1], non-finite ones as NaN; clamp alone turns infinity into 1."""
    return pixels.clamp(-1, 1).masked_fill(~pixels.isfinite(), float("nan"))


def latent_scale(config: Mapping[str, Any], *, is_vq: bool, given: float | None = None) -> float:
    """Factor from an autoencoder's latents to those that the denoiser was trained on.

    The config of a KL autoencoder holds it. A VQ autoencoder whose config has no scaling_factor has
    unscaled latents, as in the released latent diffusion, although diffusers fills in 0.18215. When
    diffusers saves such a model, it writes the value that it filled in; whether the denoiser was
    trained with it, only the user can know then.

    Args:
        config: its config.json, or the config in memory, where diffusers lists under
            `_use_default_values` the keys that it filled in.
        is_vq: whether it is a VQ autoencoder.
        given: `model.latent_scale`, for a config that leaves the scale open; None if not given.

    Raises:
        ValueError: the config leaves the scale open and `given` is None; the two contradict each
            other; or one of them is not a positive number.
    """
    value = config.get("scaling_factor", DIFFUSERS_SCALE)
    if not _is_scale(value):
        raise ValueError(
            f"the autoencoder has scaling_factor={value!r} in its config; a positive number is "
            "needed, the one that the denoiser was trained with"
        )
    if given is not None and not _is_scale(given):
        raise Refusal(
            f"model.latent_scale={given!r} cannot be a scale; use a positive number",
            "model.latent_scale",
        )
    if is_vq and value == DIFFUSERS_SCALE:
        filled_in = config.get("_use_default_values")
        is_named = "scaling_factor" in config and not (
            isinstance(filled_in, list) and "scaling_factor" in filled_in
        )
        if is_named and given is None:
            raise Refusal(
                f"model.latent_scale=null leaves the scale open: scaling_factor={value} in the "
                "config of a VQ autoencoder is also what diffusers writes when it saves one "
                "without a scale; use model.latent_scale=1.0 for unscaled latents (CompVis' "
                f"models), or model.latent_scale={value} if the U-Net was trained on scaled ones",
                "model.latent_scale",
            )
        return given or 1.0
    if given not in (None, value):
        raise Refusal(
            f"model.latent_scale={given} contradicts scaling_factor={value} in the autoencoder's "
            "config; use model.latent_scale=null",
            "model.latent_scale",
        )
    return value


def _is_scale(value: Any) -> bool:
    """Whether it is a number by which float32 latents can be multiplied and divided."""
    float32 = torch.finfo(torch.float32)
    return type(value) in (int, float) and float32.tiny <= value <= float32.max


def pixels_per_latent(config: Any) -> int:
    """Side of the square of pixels that one latent stands for, from an autoencoder's config."""
    return 2 ** (len(config["block_out_channels"]) - 1)
