"""Classifier-free guidance: away from what the model draws without the prompt.

Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022. Legend: guidance_scale -> w;
negative -> the empty (or negative) prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Condition = Mapping[str, Tensor]
"""What the denoiser is conditioned on, one row per latent row (prompt_embeds, class_labels...)."""


def repeated(condition: Condition | None, count: int) -> Condition | None:
    """A condition as `count` rows: one row without copying it, several ones by turns."""
    if condition is None:
        return None
    return {
        name: value.expand(count, *value.shape[1:])
        if len(value) == 1
        else value[torch.arange(count, device=value.device) % len(value)]
        for name, value in condition.items()
    }


def is_guided(guidance_scale: float) -> bool:
    """Whether a scale needs a second evaluation; at 1 and below, pipelines leave guidance out."""
    return guidance_scale > 1


def guided(
    predict: Callable[[Tensor, Tensor, Condition], Tensor],
    condition: Condition,
    negative: Condition,
    guidance_scales: Tensor,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The guided prediction as a function of latents and timesteps.

    Args:
        predict: the network, evaluated once a step on twice the rows.
        condition: B rows.
        negative: B rows of the same names and shapes.
        guidance_scales: (B,), above 1 where it matters.
    """
    both = {name: torch.cat([negative[name], value]) for name, value in condition.items()}
    scales = guidance_scales.reshape(-1, 1, 1, 1)

    def predict_guided(latents: Tensor, timesteps: Tensor) -> Tensor:
        outputs = predict(torch.cat([latents] * 2), torch.cat([timesteps] * 2), both)
        without, with_condition = outputs.chunk(2)
        return without + scales.to(outputs) * (with_condition - without)

    return predict_guided
