"""The decisions of the five released scripts (Maryeon/InvMM, 20 March 2025), written once more.

A straight loop over one image, from the published table alone and nothing of the package: no YAML,
no schedule, no sampler of ours. It consumes the same random numbers in the same order as ours, so
that both can be compared step by step: levels, noises, prompts; at a check noises, prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Script:
    """One of the five, in the symbols of the paper.

    Attributes:
        tracked: what `progress` is judged by, P or P + lambda R.
        betas: first and last, and whether their roots are linear; None for a rectified flow.
        prompt: None, or how many soft prompts serve the N noises of a check: "one" or "each".
        size: side of the images that SSCD sees.
    """

    B: int
    C: int
    delta: float
    tracked: str
    sampling_steps: int
    betas: tuple[float, float, bool] | None
    size: int
    scales: tuple[float, ...] = (1.0,)
    prompt: str | None = None
    lr: float = 0.1
    total: int = 2000
    ksi: float = 1e-3
    window: int = 100
    N: int = 8
    beta: float = 0.5
    temperature: float = 2.0
    shift: float = 3.0


_SD: dict[str, Any] = {
    "B": 16, "C": 50, "delta": 1e-3, "tracked": "total", "sampling_steps": 50,
    "betas": (0.00085, 0.012, True), "size": 320,
    "scales": (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0), "prompt": "one",
}  # fmt: skip
SCRIPTS = {
    "ddpm": Script(
        B=32, C=50, delta=1e-4, tracked="reconstruction", sampling_steps=200,
        betas=(1e-4, 0.02, False), size=32,
    ),
    "ldm": Script(
        B=16, C=10, delta=5e-4, tracked="total", sampling_steps=50,
        betas=(0.0015, 0.0195, True), size=256,
    ),
    "sd1": Script(**_SD),
    "sd2": Script(**_SD),
    "sd3": Script(**{
        **_SD, "betas": None, "scales": (1.0, 2.0, 3.0, 4.0, 5.0), "prompt": "each",
    }),
}  # fmt: skip


@dataclass
class Run:
    """What a script went through.

    Attributes:
        P: at each step, like R and the lambda that the step used.
        margins: of each check but the first, how far the progress was from deciding otherwise.
        checks: of each check, the similarities (scales, N).
        score: R at the first success; None without one.
    """

    P: list[float] = field(default_factory=list)
    R: list[float] = field(default_factory=list)
    lam: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    checks: list[Tensor] = field(default_factory=list)
    score: float | None = None
    mu: Tensor | None = None

    def halvings(self, script: Script) -> list[bool]:
        """Of each check but the first, what a script would decide on these losses."""
        losses, ends = self.tracked(script.tracked), range(script.C, len(self.P) + 1, script.C)
        means = [sum(own) / len(own) for end in ends if (own := losses[:end][-script.window :])]
        return [a - b < script.ksi for a, b in pairwise(means)]

    def tracked(self, which: str) -> list[float]:
        """P, or P + lambda R, of every step."""
        if which == "reconstruction":
            return self.P
        return [p + lam * r for p, r, lam in zip(self.P, self.R, self.lam, strict=True)]


def levels_of(script: Script) -> tuple[Tensor, Tensor, Tensor]:
    """Signal, noise scale and what the network is told, at each of the 1,000 noise levels."""
    if script.betas is None:
        sigma = shifted(torch.arange(1, 1001) / 1000, script.shift)
        return 1 - sigma, sigma, 1000 * sigma
    first, last, of_roots = script.betas
    if of_roots:
        betas = torch.linspace(first**0.5, last**0.5, 1000) ** 2
    else:
        betas = torch.linspace(first, last, 1000)
    alphas = torch.cumprod(1 - betas, 0)
    return alphas.sqrt(), (1 - alphas).sqrt(), torch.arange(1000)


def shifted(sigma: Tensor, shift: float) -> Tensor:
    return shift * sigma / (1 + (shift - 1) * sigma)


def sample(script: Script, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """From noise to clean latents: DDIM without noise, or Euler on the rectified flow."""
    signal, scale, _ = levels_of(script)
    if script.betas is None:
        # From the largest to the smallest training sigma, shifted once more, and then to 0.
        least = shifted(torch.tensor(1 / 1000), script.shift).item()
        grid = shifted(torch.linspace(1, least, script.sampling_steps), script.shift)
        for here, after in zip(grid, [*grid[1:], torch.tensor(0.0)], strict=True):
            x = x + (after - here) * predict(x, (1000 * here).expand(len(x)))
        return x
    stride = 1000 // script.sampling_steps
    for at in range(999, -1, -stride):  # 999, 994, ..., 4 for 200 steps
        noise = predict(x, torch.full((len(x),), at))
        clean = (x - scale[at] * noise) / signal[at]
        if at < stride:
            return clean
        x = signal[at - stride] * clean + scale[at - stride] * noise
    raise AssertionError


def run(script: Script, network: Any, target: Any, similarity: Any, rng: torch.Generator) -> Run:
    """The script on one image: its target's latents, embedding, negative and tokens."""
    signal, scale, told = levels_of(script)
    x0, seen = target.latents, Run()
    mu = torch.zeros_like(x0, requires_grad=True)
    logvar = torch.zeros_like(x0, requires_grad=True)
    moved = [mu, logvar]
    if script.prompt:
        (table,), (ids,) = target.tokens.tables.values(), target.tokens.ids.values()
        logits = torch.zeros(75, len(table), requires_grad=True)
        moved.append(logits)

    def noises(count: int) -> Tensor:
        return mu + torch.exp(logvar / 2) * torch.randn(count, *x0.shape[1:], generator=rng)

    def prompts(count: int) -> dict[str, Tensor] | None:
        if script.prompt is None:
            return None
        seeds = torch.randint(2**62, (count,), generator=rng).tolist()
        uniform = [
            torch.empty_like(logits).exponential_(generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        soft = ((logits - torch.stack(uniform).log()) / script.temperature).softmax(-1) @ table
        ends = table[ids].expand(count, -1, -1)
        tokens = torch.cat([ends[:, :1], soft, ends[:, 76:]], 1)
        rows = {name: value.expand(count, -1) for name, value in target.tokens.fixed.items()}
        return network.encode_prompt({"encoder": tokens}, {"encoder": ids.expand(count, -1)}, rows)

    adam = torch.optim.Adam(moved, lr=script.lr)
    lam, previous = 1.0, math.inf
    for step in range(1, script.total + 1):
        level = torch.randint(1000, (script.B,), generator=rng)
        s, n = (values[level].view(-1, 1, 1, 1) for values in (signal, scale))
        noisy = s * x0 + n * noises(script.B)
        output = network.predict(noisy, told[level], prompts(script.B))
        flow = script.betas is None
        clean = noisy - n * output if flow else (noisy - n * output) / s
        p = ((clean - x0) ** 2).mean()
        r = 0.5 * (mu**2 + logvar.exp() - logvar - 1).mean()
        adam.zero_grad()
        (p + lam * r).backward()
        adam.step()
        seen.P.append(p.item())
        seen.R.append(r.item())
        seen.lam.append(lam)
        if step % script.C:
            lam += script.delta
            continue
        recent = seen.tracked(script.tracked)[-script.window :]
        now = sum(recent) / len(recent)
        if step > script.C:
            seen.margins.append(abs(previous - now - script.ksi))
        lam = lam / 2 if previous - now < script.ksi else lam + script.delta
        previous = now
        with torch.no_grad():
            found = check(script, network, target, similarity, noises, prompts)
        seen.checks.append(found)
        if (found.min(1).values >= script.beta).any():
            seen.score = 0.5 * (mu**2 + logvar.exp() - logvar - 1).mean().item()
            break
    seen.mu = mu.detach()
    return seen


def check(script, network, target, similarity, noises, prompts) -> Tensor:
    """Similarities (scales, N) of N samples at every scale, all of them drawn."""
    x = noises(script.N)
    condition = prompts(script.N if script.prompt == "each" else 1)
    rows = condition and {name: v.expand(script.N, -1) for name, v in condition.items()}
    blank = rows and {name: v.expand(script.N, -1) for name, v in target.negative.items()}

    def guided(guidance: float):
        def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
            with_prompt = network.predict(latents, timesteps, rows)
            if guidance == 1:
                return with_prompt
            without = network.predict(latents, timesteps, blank)
            return without + guidance * (with_prompt - without)

        return predict

    drawn = [sample(script, guided(guidance), x).clamp(-1, 1) for guidance in script.scales]
    return torch.stack([similarity.embed(pixels) @ target.embedding for pixels in drawn])
