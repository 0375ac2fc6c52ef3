"""The noise distribution that an inversion moves, and how far it has moved.

Legend: mean -> mu; log_variance -> log sigma^2; kl -> KL(q || N(0, I)), the measure itself.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, I)), averaged over latent dimensions (paper).

    Args:
        mean: (B, C, H, W), in units of the prior's standard deviation.
        log_variance: (B, C, H, W).

    Returns:
        (B,) nats per latent dimension; zero only at N(0, I).
    """
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).flatten(1).mean(1)


class GaussianNoise:
    """q = N(mean, diag(exp(log_variance))), with both parameters as leaves of the graph.

    Args:
        mean: (1, C, H, W).
        log_variance: (1, C, H, W).
    """

    def __init__(self, mean: Tensor, log_variance: Tensor) -> None:
        self.mean = mean.detach().clone().requires_grad_()
        self.log_variance = log_variance.detach().clone().requires_grad_()

    @classmethod
    def prior(cls, latents: Tensor) -> GaussianNoise:
        """N(0, I) in the shape of the latents (1, C, H, W), in fp32."""
        zeros = torch.zeros_like(latents, dtype=torch.float32)
        return cls(zeros, zeros)

    def parameters(self) -> list[Tensor]:
        """What the optimiser moves."""
        return [self.mean, self.log_variance]

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """(count, C, H, W) noises through which gradients reach the parameters.

        The generator lives on the CPU, so every device sees the same noises.
        """
        standard = torch.randn((count, *self.mean.shape[1:]), generator=rng).to(self.mean)
        return self.mean + (0.5 * self.log_variance).exp() * standard

    def kl(self) -> Tensor:
        """Scalar, nats per latent dimension."""
        return kl_to_standard_normal(self.mean, self.log_variance)[0]

    def tensors(self) -> dict[str, Tensor]:
        """Detached copies of the parameters, (C, H, W) each."""
        return {
            "mean": self.mean.detach()[0].cpu().clone(),
            "log_variance": self.log_variance.detach()[0].cpu().clone(),
        }
