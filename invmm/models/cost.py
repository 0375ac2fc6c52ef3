"""What a network call will need, known before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, kw_only=True)
class CallCost:
    """Of one call with gradients.

    Attributes:
        activation_bytes: kept by the forward pass for its backward pass.
        flop: floating-point operations of the forward pass; a backward pass to the latents alone
            takes about as many again.
    """

    activation_bytes: int
    flop: int


def call_cost(network: nn.Module, call: Callable[[], Tensor]) -> CallCost:
    """Counts a call; works on the meta device, where nothing is allocated or computed.

    Args:
        network: its weights are not counted.
        call: runs the forward pass with gradients.
    """
    weights = {value.untyped_storage()._cdata for value in network.state_dict().values()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        call()
    return CallCost(
        activation_bytes=sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
        flop=counter.get_total_flops(),
    )
