"""Particles that climb towards an image: one repeat of multilevel splitting.

Legend: Draws.noise -> e; step -> h; level -> the intermediate thresholds of Au & Beck 2001;
goal -> beta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from invmm.diffusion.sampling import Sampler
from invmm.engine.requests import draw_seeds

START = -2.0
"""A level below every cosine similarity."""
SMALLEST_STEP = 1e-3
"""Below, a move no longer leaves its place within any budget of ours (ours)."""


@dataclass(frozen=True, eq=False)
class Draws:
    """All the randomness that samples are made of, on the CPU so that every device sees the same.

    Attributes:
        noise: (B, C, H, W) single precision, in units of the prior's standard deviation.
        seeds: (B,) integer, for the noise that a stochastic sampler draws itself; deterministic
            ones ignore them.
    """

    noise: Tensor
    seeds: Tensor

    @classmethod
    def from_prior(
        cls, count: int, shape: Sequence[int], sampler: Sampler, rng: torch.Generator
    ) -> Draws:
        """`count` independent draws of latents of a shape (C, H, W), as a user would draw them."""
        noise = torch.randn((count, *shape), generator=rng)
        return cls(noise, torch.tensor(draw_seeds(count, sampler, rng) or (0,) * count))

    @classmethod
    def joined(cls, parts: Sequence[Draws]) -> Draws:
        """One after the other."""
        return cls(
            torch.cat([part.noise for part in parts]), torch.cat([part.seeds for part in parts])
        )

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, rows: slice | Tensor) -> Draws:
        return Draws(self.noise[rows], self.seeds[rows])

    def split(self, size: int) -> list[Draws]:
        """Parts of `size` rows, in order."""
        return [*map(Draws, self.noise.split(size), self.seeds.split(size))]

    def moved_towards(self, fresh: Draws, step: float) -> Draws:
        """Preconditioned Crank-Nicolson: e' = sqrt(1 - h^2) e + h n, invariant under N(0, I).

        A seed has no neighbours, so it is proposed anew: an independent draw leaves its uniform
        distribution invariant too, and the pair is a valid move for stochastic samplers. The
        more of a sample its seed decides, the rarer such moves are accepted.
        """
        return Draws(math.sqrt(1 - step**2) * self.noise + step * fresh.noise, fresh.seeds)

    def replaced_where(self, mask: Tensor, other: Draws) -> Draws:
        """The rows of `other` where the mask (B,) is true."""
        rows = mask.reshape(-1, 1, 1, 1)
        return Draws(
            torch.where(rows, other.noise, self.noise), torch.where(mask, other.seeds, self.seeds)
        )


def next_level(similarities: Tensor, *, current: float, goal: float, num_kept: int) -> float:
    """The highest similarity of those particles that fail; who lives on lies strictly above it.

    Counted so, the product of factors is an unbiased estimate (Brehier et al. 2016), which it
    is not if the lowest survivor sets the threshold.

    Similarities may be tied: if the best are, the threshold is the next lower similarity, so that
    some live on. If all are, it stays, and moves alone can tell the particles apart;
    `Population.raise_level` says how such rounds are counted.

    Args:
        similarities: (N,) all above the current threshold.
        current: threshold that the particles live above.
        goal: the threshold of a replica.
        num_kept: particles that live on unless there are ties, in [1, N).

    Returns:
        The goal if it is not above that similarity: then replicas are counted, not climbed to.
    """
    ordered = similarities.sort().values
    failed = ordered[len(ordered) - num_kept - 1]
    if bool(failed >= goal):
        return goal
    lower = ordered[ordered < ordered[-1]]
    if len(lower) == 0:
        return current
    return min(failed.item(), lower[-1].item())


class Population:
    """Particles, the level that they live above, and what it took to get there.

    It begins with free samples, of which only those that pass the first level become particles.

    Args:
        pick: rows (B,) of the free samples -> their draws.
        similarities: of the free samples to the image.
        goal: the threshold of a replica.
        num_particles: N, from the first level on.
        num_kept: particles that survive a level, unless similarities are tied.
        step: h of the first move.
        target_acceptance: share of accepted moves that h is adapted to.

    Attributes:
        levels: threshold of each round; it stays where all particles are tied, and the last is
            the goal once it has been reached.
        passed: how many passed each higher threshold, and out of how many.
        acceptances: share of the moves accepted in each round, but for the last.
    """

    def __init__(
        self,
        pick: Callable[[Tensor], Draws],
        similarities: Tensor,
        *,
        goal: float,
        num_particles: int,
        num_kept: int,
        step: float,
        target_acceptance: float,
    ) -> None:
        self._pick, self.similarities = pick, similarities
        self.goal, self.num_particles, self.num_kept = goal, num_particles, num_kept
        self.step, self.target_acceptance = step, target_acceptance
        self.levels: list[float] = []
        self.passed: list[tuple[int, int]] = []
        self.acceptances: list[float] = []
        self._accepted: list[float] = []
        self._tied = 0

    @property
    def reached(self) -> bool:
        """Whether the particles that remain are replicas."""
        return bool(self.levels) and self.levels[-1] == self.goal

    @property
    def stalled(self) -> bool:
        """Whether h is at its smallest: even the shortest moves fall below the level."""
        return self.step <= SMALLEST_STEP

    def raise_level(self) -> None:
        """Sets the next threshold and counts who passes it.

        A round in which all are tied leaves the threshold, and nobody of it passes the next one:
        it adds its particles to those out of which the next threshold is passed. Without that, p
        would be that of the luckiest round (ours). Particles of which none has moved are those of
        the round before, and are not counted again.
        """
        current = self.levels[-1] if self.levels else START
        level = next_level(
            self.similarities, current=current, goal=self.goal, num_kept=self.num_kept
        )
        self.levels.append(level)
        if level > current:
            passed = self._pass(self.similarities)
            self.passed.append((int(passed.sum()), self._tied + len(passed)))
            self._tied = 0
        elif not self.acceptances or self.acceptances[-1] > 0:
            self._tied += len(self.similarities)

    def resample(self, rng: torch.Generator) -> None:
        """N copies of those who passed the level.

        Every survivor is copied equally often, up to one, chosen at random: as unbiased as
        drawing with replacement, with less variance.
        """
        survivors = self._pass(self.similarities).nonzero()[:, 0]
        order = torch.randperm(len(survivors), generator=rng)
        copied = survivors[order[torch.arange(self.num_particles) % len(survivors)]]
        self.draws, self.similarities = self._pick(copied), self.similarities[copied]
        self._pick = lambda rows: self.draws[rows]
        self._accepted = []

    def propose(self, sampler: Sampler, rng: torch.Generator) -> Draws:
        """A move of every particle, not yet made."""
        fresh = Draws.from_prior(len(self.draws), self.draws.noise.shape[1:], sampler, rng)
        return self.draws.moved_towards(fresh, self.step)

    def decide(self, proposals: Draws, similarities: Tensor) -> None:
        """Accepts the moves that stay above the level, and adapts h (Andrieu & Thoms 2008).

        Args:
            proposals: of `propose`.
            similarities: (N,) of their samples to the image.
        """
        stays = self._pass(similarities)
        self.draws = self.draws.replaced_where(stays, proposals)
        self.similarities = torch.where(stays, similarities, self.similarities)
        accepted = stays.double().mean().item()
        self._accepted.append(accepted)
        step = self.step * math.exp(accepted - self.target_acceptance)
        self.step = min(1.0, max(SMALLEST_STEP, step))

    def settle(self) -> None:
        """After the last move at a level."""
        self.acceptances.append(sum(self._accepted) / len(self._accepted))

    def _pass(self, similarities: Tensor) -> Tensor:
        """Who lies above the last level, or at least at it if it is the goal."""
        level = self.levels[-1]
        return similarities >= level if self.reached else similarities > level
