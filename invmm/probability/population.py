"""The particles of one repeat of multilevel splitting, which climb towards an image.

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
"""Smallest h of a move; shorter moves would lead nowhere within our budgets (ours)."""


@dataclass(frozen=True, eq=False)
class Draws:
    """The random numbers that determine samples, on the CPU so that all devices see the same.

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
        """`count` independent draws for latents of a shape (C, H, W), as a user would draw them."""
        noise = torch.randn((count, *shape), generator=rng)
        return cls(noise, torch.tensor(draw_seeds(count, sampler, rng) or (0,) * count))

    @classmethod
    def joined(cls, parts: Sequence[Draws]) -> Draws:
        """The draws of all parts, in order."""
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

        A seed has no neighbours, so the seed of `fresh` is proposed: an independent draw leaves its
        uniform distribution invariant too, and the pair is a valid move for stochastic samplers.
        The more of a sample its seed decides, the more rarely such moves are accepted.
        """
        return Draws(math.sqrt(1 - step**2) * self.noise + step * fresh.noise, fresh.seeds)

    def replaced_where(self, mask: Tensor, other: Draws) -> Draws:
        """The rows of `other` where the mask (B,) is true."""
        rows = mask.reshape(-1, 1, 1, 1)
        return Draws(
            torch.where(rows, other.noise, self.noise), torch.where(mask, other.seeds, self.seeds)
        )


def next_level(similarities: Tensor, *, current: float, goal: float, num_kept: int) -> float:
    """The threshold of the next level: the highest similarity among the particles that fail.

    Survivors lie strictly above it. With this threshold the product of factors is an unbiased
    estimate (Brehier et al. 2016); with that of the lowest survivor it is not.

    If the highest similarities are tied, the threshold is the next lower one, so that some
    particles survive. If all are tied, it stays at `current`, and only moves can separate the
    particles; `Population.raise_level` says how such rounds are counted.

    Args:
        similarities: (N,) all above the current threshold.
        current: threshold of the current level.
        goal: the threshold of a replica.
        num_kept: particles that survive unless there are ties, in [1, N).

    Returns:
        The threshold, but at most the goal, at which replicas are counted.
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
    """The particles of one repeat, and the levels that they have passed.

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
        levels: threshold of each round; equal to the one before if all particles were tied, and
            the goal in the round that reaches it.
        passed: for each threshold above the one before, the number of particles that passed it
            and of those that might have.
        acceptances: share of accepted moves of each round; the last round makes none.
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
        """Whether the level is the threshold of a replica."""
        return bool(self.levels) and self.levels[-1] == self.goal

    @property
    def stalled(self) -> bool:
        """Whether h is at its smallest, since even the shortest moves fall below the level."""
        return self.step <= SMALLEST_STEP

    def raise_level(self) -> None:
        """Sets the next threshold and counts the particles that pass it.

        In a round in which all particles are tied, the threshold stays, and its particles count as
        failures at the next threshold. Otherwise p would be that of the luckiest round (ours). If
        no particle has moved since the round before, they are not counted again.
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
        """Replaces the particles by N copies of those that passed the level.

        The numbers of copies differ by at most one, and chance decides which survivors get one
        more: as unbiased as drawing with replacement, with less variance.
        """
        survivors = self._pass(self.similarities).nonzero()[:, 0]
        order = torch.randperm(len(survivors), generator=rng)
        copied = survivors[order[torch.arange(self.num_particles) % len(survivors)]]
        self.draws, self.similarities = self._pick(copied), self.similarities[copied]
        self._pick = lambda rows: self.draws[rows]
        self._accepted = []

    def propose(self, sampler: Sampler, rng: torch.Generator) -> Draws:
        """Proposes a move of every particle."""
        fresh = Draws.from_prior(len(self.draws), self.draws.noise.shape[1:], sampler, rng)
        return self.draws.moved_towards(fresh, self.step)

    def decide(self, proposals: Draws, similarities: Tensor) -> None:
        """Accepts the moves that stay above the level, and adapts h (Andrieu & Thoms 2008).

        Args:
            proposals: from `propose`.
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
        """Ends the moves of a round: records the share that was accepted."""
        self.acceptances.append(sum(self._accepted) / len(self._accepted))

    def _pass(self, similarities: Tensor) -> Tensor:
        """(B,) bool: which similarities lie above the level (or at it, if it is the goal)."""
        level = self.levels[-1]
        return similarities >= level if self.reached else similarities > level
