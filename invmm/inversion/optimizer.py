"""Adam that can use one step size for all coordinates of a tensor, unlike torch's (ours)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Adam:
    """Adam (Kingma & Ba 2015), its second moment optionally shared by a whole tensor.

    Args:
        parameters: leaves of the graph.
        moved: mask, 1 where parameters may move and 0 elsewhere; broadcasts to each of them.
        betas: decay of the first and second moment.
        step_size: "shared" or "coordinate"; see `Trajectory`.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        moved: Tensor,
        betas: Sequence[float],
        step_size: str,
    ) -> None:
        self.parameters, self.moved, self.betas = parameters, moved, betas
        self.is_shared = step_size == "shared"
        self.first = [torch.zeros_like(parameter) for parameter in parameters]
        self.second = [torch.zeros_like(parameter) for parameter in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Moves the parameters by one step and clears their gradients."""
        self.steps += 1
        first_beta, second_beta = self.betas
        states = zip(self.parameters, self.first, self.second, strict=True)
        for parameter, first, second in states:
            assert parameter.grad is not None
            gradient = parameter.grad * self.moved
            square = gradient.square()
            if self.is_shared:
                # The mean counts masked coordinates too, so a narrower band takes longer steps.
                square = square.mean().expand_as(square)
            first.lerp_(gradient, 1 - first_beta)
            second.lerp_(square, 1 - second_beta)
            scale = (second / (1 - second_beta**self.steps)).sqrt()
            tiny = torch.finfo(scale.dtype).tiny  # a gradient of 0 moves nothing
            parameter -= learning_rate * first / (1 - first_beta**self.steps) / (scale + tiny)
            parameter.grad = None
