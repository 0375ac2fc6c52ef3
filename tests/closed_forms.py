"""Events under N(0, I) whose probability is known, as worlds that splitting climbs in.

The network returns its noise unchanged, and the similarity of a sample to the image is a known
function of its height, so that "replicates" means a height of at least `edge`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import ncx2, norm
from torch import Tensor
from worlds import PixelWorld, linear_schedule, make_setting, make_target

from invmm.engine.engine import Engine
from invmm.engine.outcomes import Outcome
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job
from invmm.probability.bank import SharedBank
from invmm.probability.splitting import Splitting

Height = Callable[[Tensor], Tensor]
"""Noise (B, D) -> heights (B,)."""


class NoiseNetwork(PixelWorld):
    """Predicts as clean latents what it is given: in one DDIM step, the sample is the noise."""

    def __init__(self, shape: tuple[int, int, int] = (1, 4, 4)) -> None:
        super().__init__(linear_schedule("sample"), shape)

    def predict(self, latents: Tensor, timesteps: Tensor, condition: object) -> Tensor:
        self.calls.append(len(latents))
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class Dial:
    """Embeds an image as a hand that turns from 180 to 0 degrees while its height rises."""

    def __init__(self, height: Height) -> None:
        self.height = height

    def embed(self, pixels: Tensor) -> Tensor:
        angle = math.pi * torch.sigmoid(-self.height(pixels.flatten(1)))
        return torch.stack([angle.cos(), angle.sin()], 1)


def at_height(height: float) -> float:
    """The similarity to the target of an image of that height."""
    return math.cos(math.pi / (1 + math.exp(height)))


def measured(
    height: Height,
    edge: float,
    *seeds: int,
    shape: tuple[int, int, int] = (1, 4, 4),
    sampler: dict[str, object] | None = None,
    slots: int = 1,
    shared: bool = False,
    rows: int = 256,
    **changes,
) -> list[Outcome]:
    """One outcome a seed, through the engine, from a bank of the image's own or a shared one."""
    network = NoiseNetwork(shape)
    options = {"num_inference_steps": 1, **(sampler or {})}
    setting = make_setting(network, threshold=at_height(edge), **options)
    target = replace(make_target(network), embedding=torch.tensor([1.0, 0.0]))
    splitting = Splitting(**changes)

    async def from_shared_bank(seed: int, rng: torch.Generator) -> Outcome:
        bank = splitting.bank(1000 * seed, shape, setting.sampler)
        shared = SharedBank(await bank.drawn(target, setting), splitting)
        return await shared(target, setting, rng)

    def job(seed: int) -> Job:
        rng = torch.Generator().manual_seed(seed)
        if shared:
            return Job(str(seed), lambda: from_shared_bank(seed, rng))
        return Job(str(seed), lambda: splitting(target, setting, rng))

    settings = EngineSettings(slots=slots, rows_sample=rows, rows_embed=rows)
    found = {job.key: outcome for job, outcome in Engine(network, Dial(height), settings).run(
        map(job, seeds)
    )}  # fmt: skip
    assert all(outcome.error is None for outcome in found.values())
    return [found[str(seed)] for seed in seeds]


def covers(outcome: Outcome, log_p: float) -> bool:
    """Whether the interval holds log p; of a censored image, whether its bound does."""
    low = outcome.columns["log_p_low"]
    return (low is None or low <= log_p) and log_p <= outcome.columns["log_p_high"]


# Heights ------------------------------------------------------------------------------------


def along_diagonal(noise: Tensor) -> Tensor:
    """N(0, 1) under the prior."""
    return noise.sum(1) / math.sqrt(noise.shape[1])


def either_way(noise: Tensor) -> Tensor:
    return along_diagonal(noise).abs()


def near_the_corner(noise: Tensor) -> Tensor:
    """Minus the distance to (0.7, ..., 0.7)."""
    return -(noise - 0.7).norm(dim=1)


# Worlds -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """An event of known probability.

    Attributes:
        height: of a sample.
        edge: that replicas lie at or above.
        log_p: of the event, in nats.
        shape: (C, H, W) of the noise.
    """

    height: Height
    edge: float
    log_p: float
    shape: tuple[int, int, int] = (1, 4, 4)

    def measured(self, seeds: Iterable[int], **options) -> list[Outcome]:
        """As `measured`, several seeds at a time."""
        options = {"shape": self.shape, "slots": 8, "rows": 1024, **options}
        return measured(self.height, self.edge, *seeds, **options)


def half_space(p: float, shape: tuple[int, int, int] = (1, 4, 4)) -> World:
    return World(along_diagonal, norm.isf(p), math.log(p), shape)


def ball(p: float) -> World:
    """Around (0.7, ..., 0.7): all 16 coordinates matter."""
    return World(near_the_corner, -math.sqrt(ncx2.ppf(p, 16, 16 * 0.49)), math.log(p))


def two_modes(p: float) -> World:
    """Two half-spaces, opposite to each other."""
    return World(either_way, norm.isf(p / 2), math.log(p))


def quantised(p: float) -> World:
    """A half-space whose height rises in steps of one standard deviation."""
    edge = norm.isf(p)
    return World(lambda noise: (along_diagonal(noise) - edge).floor(), -0.5, math.log(p))


def rugged(p: float) -> World:
    """A half-space behind ripples, which moves climb and fall by half a standard deviation.

    p is the mean of P[x >= edge - sin(10 y) / 2] over y ~ N(0, 1), here over a grid of y.
    """
    nodes = norm.ppf((np.arange(20000) + 0.5) / 20000)

    def probability(edge: float) -> float:
        return float(norm.sf(edge - np.sin(10 * nodes) / 2).mean())

    def height(noise: Tensor) -> Tensor:
        across = (noise[:, 0::2] - noise[:, 1::2]).sum(1) / math.sqrt(noise.shape[1])
        return along_diagonal(noise) + (10 * across).sin() / 2

    edge = brentq(lambda edge: math.log(probability(edge) / p), 0, 10)
    return World(height, float(edge), math.log(p))


def plateau(p: float) -> World:
    """A half-space, flat where 98 % of the prior lie, and rising from there."""
    flat = norm.isf(0.02)
    return World(lambda noise: along_diagonal(noise).clamp(min=flat), norm.isf(p), math.log(p))


def yes_or_no(p: float) -> World:
    """No level leads to the event: a sample is a replica, or as far from it as all others."""
    edge = norm.isf(p)
    return World(lambda noise: (along_diagonal(noise) >= edge).float(), 0.5, math.log(p))
