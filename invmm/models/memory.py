"""How much memory gradients will need, known before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def activation_bytes(network: nn.Module, call: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass.

    Works on the meta device, where nothing is allocated or computed.

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

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
