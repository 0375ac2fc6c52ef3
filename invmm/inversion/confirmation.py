"""Confirms a noise distribution, frozen after its search, by fresh samples (ours).

The samples had no part in choosing the distribution. So their replication rate has an exact
interval, and its one-sided lower end gives a certificate (see `invmm.probability.certificate`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from invmm.engine.check import Check, compare
from invmm.engine.protocols import Setting, Target
from invmm.engine.requests import draw_seeds
from invmm.inversion.frequency import from_frequencies
from invmm.inversion.noise import GaussianNoise, kl_to_standard_normal
from invmm.probability.certificate import clopper_pearson, log_p_certified, lower_rate

Basis = Literal["pixel", "dct"]
"""Coordinates in which a distribution is diagonal: the entries of the latents ("pixel", as
published), or their orthonormal frequencies ("dct")."""
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, eq=False)
class Confirmation:
    """A count of replicas among fresh samples, with its interval and certificate.

    Attributes:
        check: the samples, and how many of them replicate.
        kl_nats: KL of the distribution from the prior, summed over latent dimensions.
        confidence: of the interval and of the certificate, in (0, 1).
    """

    check: Check
    kl_nats: float
    confidence: float = CONFIDENCE

    @property
    def count(self) -> int:
        """Samples that replicate."""
        return self.check.replicas

    @property
    def num_samples(self) -> int:
        """Samples drawn."""
        return len(self.check.similarities)

    @property
    def rate(self) -> float:
        """Share of the samples that replicate."""
        return self.check.rate

    @property
    def interval(self) -> tuple[float, float]:
        """Exact two-sided interval of the rate."""
        return clopper_pearson(self.count, self.num_samples, self.confidence)

    @property
    def lower_rate(self) -> float:
        """Exact one-sided lower end of the rate."""
        return lower_rate(self.count, self.num_samples, self.confidence)

    @property
    def log_p_certified(self) -> float:
        """Certified lower bound of log p under the prior, in nats; -inf without a replica."""
        return log_p_certified(self.kl_nats, self.lower_rate)

    def columns(self) -> dict[str, float | int | None]:
        """Columns of the score table."""
        low, high = self.interval
        certified = self.log_p_certified
        return {
            "confirm_passed": self.count,
            "confirm_drawn": self.num_samples,
            "confirm_confidence": self.confidence,
            "rate_low": low,
            "rate_high": high,
            "log_p_certified": certified if math.isfinite(certified) else None,
        }


async def confirm(
    noise: GaussianNoise,
    target: Target,
    setting: Setting,
    rng: torch.Generator,
    *,
    num_samples: int,
    guidance_scale: float,
    basis: Basis = "pixel",
    confidence: float = CONFIDENCE,
) -> Confirmation:
    """Draws fresh samples, all of them at one guidance scale, and counts the replicas.

    Args:
        noise: the distribution, which must have been chosen without these samples.
        target: the image, with the condition of the samples.
        setting: sampler and criterion.
        rng: a generator that the search did not use, or the search's own after its last draw.
        num_samples: how many to draw.
        guidance_scale: at which the distribution replicates.
        basis: coordinates of the distribution.
        confidence: of the interval and of the certificate. For one of k looks that are confident
            together at c, give 1 - (1 - c) / k (Bonferroni).
    """
    draws = from_basis(noise.draw(num_samples, rng).detach(), basis)
    seeds = draw_seeds(num_samples, setting.sampler, rng)
    rows = target.rows(num_samples)
    check = await compare(draws, rows, seeds, target, setting, guidance_scale=guidance_scale)
    return Confirmation(
        check=check,
        kl_nats=exact_kl(noise) * noise.mean.numel(),
        confidence=confidence,
    )


def from_basis(noise: Tensor, basis: Basis) -> Tensor:
    """(B, C, H, W) coordinates of draws in a basis -> the noise that the sampler starts from."""
    return from_frequencies(noise) if basis == "dct" else noise


def exact_kl(noise: GaussianNoise) -> float:
    """The KL in double precision, nats per latent dimension."""
    mean, log_variance = (value.detach().cpu().double() for value in noise.parameters())
    return kl_to_standard_normal(mean, log_variance).item()
