"""What a network call will need, known before any weight is loaded."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, kw_only=True)
class CallCost:
    """Of one call with gradients.

    Attributes:
        activation_bytes: most that the forward pass and its backward pass hold, beside the weights.
        flop: floating-point operations of the forward pass; a backward pass to the latents alone
            takes about as many again.
        weight_bytes: of the network and all parts that are loaded with it.
        decode_bytes: most that turning one latent into an image holds; 0 without an autoencoder.
    """

    activation_bytes: int
    flop: int
    weight_bytes: int = 0
    decode_bytes: int = 0

    def in_half_precision(self) -> CallCost:
        """The same with two bytes a number instead of four."""
        return CallCost(
            activation_bytes=self.activation_bytes // 2,
            flop=self.flop,
            weight_bytes=self.weight_bytes // 2,
            decode_bytes=self.decode_bytes // 2,
        )


def call_cost(
    network: nn.Module,
    call: Callable[[], Tensor],
    *,
    attention: str | None = None,
    autocast: str | None = None,
) -> CallCost:
    """Counts a call; works on the meta device, where nothing is allocated or computed.

    Args:
        network: its weights are not among the activations.
        call: runs the forward pass with gradients.
        attention: the kernel, see `Execution`; any but "math" keeps no matrix of weights.
        autocast: the precision of matrix products, see `Execution`; None leaves them alone.
    """
    casts = _autocast(getattr(torch, autocast) if autocast else None)
    with _fused_attention(attention), casts, _Peak(network) as held:
        with FlopCounterMode(display=False) as counter:
            output = call()
        if output.is_meta:
            torch.autograd.backward(output, torch.empty_like(output))
    return CallCost(
        activation_bytes=held.most,
        flop=counter.get_total_flops(),
        weight_bytes=weight_bytes(network),
    )


def weight_bytes(network: nn.Module) -> int:
    """Size of all parameters and buffers; those that are shared count once."""
    values = {value.untyped_storage()._cdata: value for value in network.state_dict().values()}
    return sum(value.untyped_storage().nbytes() for value in values.values())


def peak_bytes(network: nn.Module, call: Callable[[], object]) -> int:
    """Most that a call without gradients holds at a time, beside the weights.

    Args:
        network: what is called.
        call: runs it.
    """
    with torch.no_grad(), _fused_attention(None), _Peak(network) as held:
        call()
    return held.most


@contextmanager
def _fused_attention(attention: str | None) -> Iterator[None]:
    """Has attention on the meta device counted as GPUs compute it: the meta device has no kernels.

    Without it the matrix of all pairs of tokens would be held, most of the memory at 64x64.
    """
    plain = functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not query.is_meta:
            return plain(query, key, value, *args, **kwargs)
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, None, True)[0]

    if attention != "math":
        functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


@contextmanager
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Casts what PyTorch's autocast casts on a GPU, on the meta device, which has no autocast.

    Weights are cast at each use and the copies live until the backward pass; normalisations stay in
    float32. So a call holds about 0.8 of what it holds in float32, not half of it.

    Args:
        dtype: of matrix products and convolutions; None casts nothing.
    """
    products = ("linear", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention")
    dtypes = {
        **dict.fromkeys(products if dtype else (), dtype),
        **dict.fromkeys(("group_norm", "layer_norm", "softmax") if dtype else (), torch.float32),
    }
    plain = {name: getattr(functional, name) for name in dtypes}

    def casting(name: str) -> Callable[..., Any]:
        def cast(value: Any) -> Any:
            is_number = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtypes[name]) if is_number else value

        def function(*args: Any, **kwargs: Any) -> Any:
            return plain[name](*map(cast, args), **{key: cast(own) for key, own in kwargs.items()})

        return function

    try:
        for name in dtypes:
            setattr(functional, name, casting(name))
        yield
    finally:
        for name, function in plain.items():
            setattr(functional, name, function)


class _Peak(TorchDispatchMode):
    """Follows the memory of what is computed; `most` bytes were alive at once.

    Args:
        network: its weights are not counted.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        weights = (value.untyped_storage()._cdata for value in network.state_dict().values())
        self.alive = dict.fromkeys(weights, 0)
        self.total = self.most = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                self.total += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.most = max(self.most, self.total)
        return outputs

    def _freed(self, storage: int) -> None:
        self.total -= self.alive.pop(storage)
