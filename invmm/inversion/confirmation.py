"""What fresh samples say of a noise distribution that has been found and is frozen (ours).

None of them had a part in choosing it, so that their rate has an exact interval, and the lower end
of the rate a certificate.
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
"""In which a distribution is diagonal: as published, or an orthonormal frequency basis."""
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, eq=False)
class Confirmation:
    """A count of replicas among fresh samples, and what follows from it.

    Attributes:
        check: the samples, and how many of them replicate.
        kl_nats: of the distribution, summed over latent dimensions.
        confidence: of the interval and of the certificate.
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
        """What the lower end certifies for free samples, in nats; -inf without a replica."""
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
        noise: frozen: nothing may choose it by what these samples show.
        target: the image, with the condition to draw under.
        setting: sampler and criterion.
        rng: a source that had no part in the search, or a later part of the same one.
        num_samples: how many.
        guidance_scale: at which the distribution replicates.
        basis: in which it is diagonal.
        confidence: for one of several looks, that of all of them with the rest divided by their
            number (Bonferroni).
    """
    draws = in_pixels(noise.draw(num_samples, rng).detach(), basis)
    seeds = draw_seeds(num_samples, setting.sampler, rng)
    rows = target.rows(num_samples)
    check = await compare(draws, rows, seeds, target, setting, guidance_scale=guidance_scale)
    return Confirmation(
        check=check,
        kl_nats=exact_kl(noise) * noise.mean.numel(),
        confidence=confidence,
    )


def in_pixels(noise: Tensor, basis: Basis) -> Tensor:
    """(B, C, H, W) draws in a basis -> as the sampler takes them."""
    return from_frequencies(noise) if basis == "dct" else noise


def exact_kl(noise: GaussianNoise) -> float:
    """The KL in double precision, nats per latent dimension."""
    mean, log_variance = (value.detach().cpu().double() for value in noise.parameters())
    return kl_to_standard_normal(mean, log_variance).item()
