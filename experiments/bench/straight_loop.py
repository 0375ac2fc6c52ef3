"""The algorithm without the engine: one image after the other, every check in full.

What a careful script would do, with frozen weights, which the published code does not freeze.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from invmm.diffusion.sampling import draw
from invmm.engine.protocols import Network, Setting, Similarity, Target
from invmm.inversion.controllers import Losses
from invmm.inversion.inversion import Inversion
from invmm.inversion.noise import GaussianNoise
from invmm.inversion.objectives import DenoisingObjective


def invert_one_by_one(
    targets: Sequence[Target],
    inversion: Inversion,
    network: Network,
    similarity: Similarity,
    setting: Setting,
) -> list[list[float]]:
    """The losses of every image; draws the same random numbers as the engine does."""
    curves = []
    for index, target in enumerate(targets):
        rng = torch.Generator().manual_seed(index)
        curves.append(_invert(target, inversion, network, similarity, setting, rng))
    return curves


def _invert(
    target: Target,
    inversion: Inversion,
    network: Network,
    similarity: Similarity,
    setting: Setting,
    rng: torch.Generator,
) -> list[float]:
    objective, schedule = inversion.objective, setting.schedule
    assert isinstance(objective, DenoisingObjective)
    assert objective.timesteps == "importance"
    noise = GaussianNoise.prior(target.latents)
    optimizer = torch.optim.Adam(noise.parameters(), lr=inversion.learning_rate, fused=True)
    weight = inversion.kl_weight.init()
    losses: list[float] = []
    totals: list[float] = []
    for step in range(inversion.num_steps + 1):
        check_due = step % inversion.check_every == 0 and (step > 0 or inversion.check_prior)
        if step > 0:
            drawn = schedule.draw_levels(objective.batch_size, rng, by_weight=True)
            timesteps = schedule.timesteps[drawn].to(network.device)
            noisy = schedule.add_noise(
                target.latents, noise.draw(objective.batch_size, rng), timesteps
            )
            output = network.predict(noisy, timesteps, None)
            clean = schedule.clean_latents(output, noisy, timesteps)
            errors = (clean - target.latents).square().flatten(1).mean(1)
            loss = (schedule.importance_weights[drawn].to(errors.device) * errors).mean()
            total = loss + weight.value * noise.kl()
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            totals.append(total.item())
            seen = Losses(reconstruction=losses, total=totals) if check_due else None
            weight = inversion.kl_weight.update(weight, seen)
        if check_due:
            with torch.no_grad():
                latents = draw(
                    lambda latents, timesteps: network.predict(latents, timesteps, None),
                    noise.draw(setting.criterion.num_samples, rng),
                    sampler=setting.sampler,
                    schedule=schedule,
                )
                vectors = similarity.embed(network.decode(latents))
                if (vectors @ target.embedding).min() >= setting.criterion.threshold:
                    break
    return losses
