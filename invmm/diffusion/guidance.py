"""Classifier-free guidance: pushes predictions away from those under the negative prompt.

Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022. Legend: guidance_scale -> w;
negative -> the condition of the empty (or negative) prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Condition = Mapping[str, Tensor]
"""Inputs that condition the denoiser by name (prompt_embeds, class_labels); one row per latent."""


def repeated(condition: Condition | None, count: int) -> Condition | None:
    """The condition as `count` rows, cycling through its rows; a single row is not copied."""
    if condition is None:
        return None
    return {
        name: value.expand(count, *value.shape[1:])
        if len(value) == 1
        else value[torch.arange(count, device=value.device) % len(value)]
        for name, value in condition.items()
    }


def is_guided(guidance_scale: float) -> bool:
    """Whether a scale takes a second evaluation per step; as in pipelines, not at 1 or below."""
    return guidance_scale > 1


def guided(
    predict: Callable[[Tensor, Tensor, Condition], Tensor],
    condition: Condition,
    negative: Condition,
    guidance_scales: Tensor,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The guided prediction as a function of latents and timesteps.

    Args:
        predict: the network, called once a step with 2 B rows.
        condition: B rows.
        negative: B rows of the same names and shapes.
        guidance_scales: (B,); a scale of 1 gives the prediction under `condition`.
    """
    both = {name: torch.cat([negative[name], value]) for name, value in condition.items()}
    scales = guidance_scales.reshape(-1, 1, 1, 1)

    def predict_guided(latents: Tensor, timesteps: Tensor) -> Tensor:
        outputs = predict(torch.cat([latents] * 2), torch.cat([timesteps] * 2), both)
        under_negative, under_condition = outputs.chunk(2)
        return under_negative + scales.to(outputs) * (under_condition - under_negative)

    return predict_guided
