"""Small worlds with known answers, shared by the tests.

`IdealNetwork` is the exact denoiser of Gaussian data; `MicroNetwork` is a random U-Net-like net
whose answers have no closed form; `Direction` is a similarity network that is just a projection.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from invmm.diffusion.sampling import Sampler
from invmm.diffusion.schedule import NoiseSchedule
from invmm.engine.criterion import ReplicationCriterion
from invmm.engine.protocols import Setting, Target

LINEAR = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}


def linear_schedule(prediction_type: str = "epsilon") -> NoiseSchedule:
    """The schedule of the DDPM paper."""
    return NoiseSchedule.from_config({**LINEAR, "prediction_type": prediction_type})


def ddim(predict, noise: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Ten steps of DDIM written out."""
    alphas, latents = schedule.alphas_cumprod, noise
    for at in range(999, 0, -100):
        eps = predict(latents, torch.full((len(latents),), at))
        clean = (latents - (1 - alphas[at]).sqrt() * eps) / alphas[at].sqrt()
        after = alphas[at - 100] if at >= 100 else torch.tensor(1.0)
        latents = after.sqrt() * clean + (1 - after).sqrt() * eps
    return latents


class PixelWorld:
    """The parts of a Network that pixel-space models share."""

    def __init__(self, schedule: NoiseSchedule, shape: tuple[int, int, int] = (3, 4, 4)) -> None:
        self.latent_shape = shape
        self.schedule = schedule
        self.device = torch.device("cpu")
        self.calls: list[int] = []

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)


class IdealNetwork(PixelWorld):
    """The optimal denoiser of data ~ N(mean, std^2) in every pixel."""

    def __init__(
        self, prediction_type: str = "epsilon", *, mean: float = 0.2, std: float = 0.3
    ) -> None:
        super().__init__(linear_schedule(prediction_type))
        self.mean, self.std = mean, std

    def clean_latents(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        alpha = self.schedule.alphas_cumprod[timesteps.long()].reshape(-1, 1, 1, 1)
        gain = alpha.sqrt() * self.std**2 / (alpha * self.std**2 + 1 - alpha)
        return self.mean + gain * (noisy - alpha.sqrt() * self.mean)

    def predict(self, latents: Tensor, timesteps: Tensor, condition: object) -> Tensor:
        self.calls.append(len(latents))
        alpha = self.schedule.alphas_cumprod[timesteps.long()].reshape(-1, 1, 1, 1)
        clean = self.clean_latents(latents, timesteps)
        noise = (latents - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        match self.schedule.prediction_type:
            case "epsilon":
                return noise
            case "v_prediction":
                return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
            case _:
                return clean


class MicroNetwork(PixelWorld):
    """A small convolutional epsilon-predictor with random weights, frozen."""

    def __init__(self, seed: int = 0, shape: tuple[int, int, int] = (3, 8, 8)) -> None:
        super().__init__(linear_schedule(), shape)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(shape[0] + 1, 16, 3, padding=1),
                nn.GroupNorm(4, 16),
                nn.SiLU(),
                nn.Conv2d(16, shape[0], 3, padding=1),
            )
        self.body.requires_grad_(False)

    def predict(self, latents: Tensor, timesteps: Tensor, condition: object) -> Tensor:
        self.calls.append(len(latents))
        time = (timesteps.float() / 1000).reshape(-1, 1, 1, 1).expand(-1, 1, *latents.shape[2:])
        return self.body(torch.cat([latents, time], 1))


class ConditionalNetwork(MicroNetwork):
    """A `MicroNetwork` whose output is shifted by its condition, so that guidance matters."""

    def predict(self, latents: Tensor, timesteps: Tensor, condition: object) -> Tensor:
        assert isinstance(condition, dict)
        assert len(condition["embeds"]) == len(latents)
        return super().predict(latents, timesteps, None) + condition["embeds"][:, :, None, None]


class Direction:
    """Cosine similarity of flattened pixels."""

    def embed(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(pixels.flatten(1), dim=1)


def make_target(network: PixelWorld, seed: int = 0) -> Target:
    """A random image in the range of pixels."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = network.latent_shape
    # In the memory format of decoded images, which must not reach the kernels.
    pixels = (torch.rand((height, width, channels), generator=generator) * 2 - 1).permute(2, 0, 1)
    return Target(
        image_id=f"image-{seed}",
        pixels=pixels,
        latents=network.encode(pixels[None]),
        embedding=Direction().embed(pixels[None])[0],
    )


def make_conditional_target(network: PixelWorld, seed: int = 0) -> Target:
    """A random image with a random prompt and an empty negative one."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, network.latent_shape[0], generator=generator)
    target = make_target(network, seed)
    return replace(target, condition={"embeds": embeds}, negative={"embeds": 0 * embeds})


def make_setting(
    network: PixelWorld,
    *,
    threshold: float = 0.5,
    num_samples: int = 4,
    early_exit: bool = True,
    num_confirm: int = 0,
    **sampler: object,
) -> Setting:
    """DDIM in 10 steps unless told otherwise."""
    options = {"scheduler": "ddim", "num_inference_steps": 10, **sampler}
    return Setting(
        schedule=network.schedule,
        sampler=Sampler(**options),  # pyright: ignore[reportArgumentType]
        criterion=ReplicationCriterion(
            threshold=threshold,
            num_samples=num_samples,
            early_exit=early_exit,
            num_confirm=num_confirm,
        ),
    )
