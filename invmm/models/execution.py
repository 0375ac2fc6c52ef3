"""How the denoiser is computed: precision, kernels, memory. What is computed stays the same.

The options change results within rounding, so they belong to a run's identity. Defaults: none of
them on; docs/scale.md says what each gains on a CPU, by `make bench`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
from annotated_types import Gt
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from invmm.diffusion.guidance import Condition
from invmm.engine.protocols import Network, TextNetwork
from invmm.engine.searched_prompt import PromptSearch, PromptTokens

_ATTENTION = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@runtime_checkable
class LoadedNetwork(Network, Protocol):
    """A network as adapters make it: its denoiser can be got at, and it understands prompts.

    Attributes:
        denoiser: the module that `predict` evaluates.
    """

    denoiser: nn.Module

    def condition(self, prompt: str | int | None) -> Condition | None:
        """One row that says what to draw: a text, a class label, or None.

        Raises:
            ValueError: the model does not understand it.
        """
        ...

    def negative(self, prompt: str) -> Condition | None:
        """One row that guidance pushes away from; None if the model has no guidance."""
        ...


@runtime_checkable
class SearchableNetwork(LoadedNetwork, TextNetwork, Protocol):
    """A network with text encoders, the prompt of which can be searched."""

    def searched_prompt(self, search: PromptSearch) -> PromptTokens:
        """What a searched prompt is made of, other encoders reading the empty prompt.

        Raises:
            ValueError: the model has no text encoder, or the search does not suit those it has.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the denoiser is computed.

    Attributes:
        autocast: run it in half precision; losses, the noise distribution and its KL, the
            optimiser and the sampler stay in float32.
        gradient_scale: with float16, gradients inside the network are this much greater, so that
            small ones do not vanish; they come out unscaled.
        compile: torch.compile; the constant row counts need one graph a kind of call.
        channels_last: memory format of the convolutions, often faster in half precision on GPUs.
        attention: force one kernel of scaled dot-product attention; null lets torch choose.
        gradient_checkpointing: compute activations anew in the backward pass: a fraction of the
            memory for a third more arithmetic.
    """

    autocast: Literal["bfloat16", "float16"] | None = None
    gradient_scale: Annotated[float, Gt(0)] = 1024.0
    compile: bool = False
    channels_last: bool = False
    attention: Literal["math", "efficient", "flash", "cudnn"] | None = None
    gradient_checkpointing: bool = False

    def prepare(self, network: LoadedNetwork) -> LoadedNetwork:
        """The network, computed this way; a `SearchableNetwork` if it is one.

        Raises:
            ValueError: the denoiser cannot do it.
        """
        self.configure(network.denoiser)
        if self.compile:
            network.denoiser.compile(dynamic=False)
        if isinstance(network, SearchableNetwork):
            return _ExecutedTextNetwork(network, self)
        return _ExecutedNetwork(network, self)

    def configure(self, denoiser: Any) -> None:
        """Sets what is a property of the module itself, on the meta device too."""
        if self.channels_last:
            denoiser.to(memory_format=torch.channels_last)
        if self.gradient_checkpointing:
            try:
                denoiser.enable_gradient_checkpointing()
            except (AttributeError, ValueError) as error:
                raise ValueError(
                    f"execution.gradient_checkpointing=true is not possible: "
                    f"{type(denoiser).__name__} does not support it"
                ) from error


class _ExecutedNetwork:
    """A network whose denoiser runs under an `Execution`."""

    def __init__(self, network: LoadedNetwork, execution: Execution) -> None:
        self._network = network
        self.denoiser = network.denoiser
        self.condition = network.condition
        self.negative = network.negative
        self._execution = execution
        self._dtype = getattr(torch, execution.autocast) if execution.autocast else None
        self._scale = execution.gradient_scale if execution.autocast == "float16" else None
        self.latent_shape = network.latent_shape
        self.schedule = network.schedule
        self.device = network.device
        self.encode = network.encode
        self.decode = network.decode

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition | None) -> Tensor:
        """See `Network`."""
        if self._scale:
            latents = _ScaleGradient.apply(latents, 1 / self._scale)
            condition = condition and {
                name: _ScaleGradient.apply(value, 1 / self._scale) if value.is_floating_point()
                else value
                for name, value in condition.items()
            }  # fmt: skip
        with ExitStack() as contexts:
            if self._dtype is not None:
                contexts.enter_context(torch.autocast(self.device.type, self._dtype))
            if self._execution.attention is not None:
                contexts.enter_context(sdpa_kernel(_ATTENTION[self._execution.attention]))
            output = self._network.predict(latents, timesteps, condition)
        output = output.float()
        return _ScaleGradient.apply(output, self._scale) if self._scale else output


class _ExecutedTextNetwork(_ExecutedNetwork):
    """Prompts are always encoded in the precision of the weights."""

    def __init__(self, network: SearchableNetwork, execution: Execution) -> None:
        super().__init__(network, execution)
        self.searched_prompt = network.searched_prompt
        self.encode_prompt = network.encode_prompt


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None
