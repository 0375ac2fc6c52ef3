"""The prompt of an inversion: as given, or searched together with the noise.

A searched prompt is a distribution over the vocabulary for each free place. A relaxed draw from it
is a mixture of token embeddings, which takes the place of one token's embedding. The complexity of
the prompt is not part of the score (paper).

Legend: logits -> unnormalised log-probabilities; temperature -> tau of the Gumbel-softmax (Jang et
al. 2017, "Categorical Reparameterization with Gumbel-Softmax").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from invmm.diffusion.guidance import Condition, repeated
from invmm.engine.protocols import Target
from invmm.engine.requests import EncodePrompt
from invmm.engine.searched_prompt import PromptTokens


class FixedPrompt:
    """The condition that an image comes with.

    Args:
        condition: one row, or None for an unconditional model.
    """

    def __init__(self, condition: Condition | None = None) -> None:
        self.condition = condition

    def parameters(self) -> list[Tensor]:
        """Nothing to move."""
        return []

    async def rows(self, count: int, rng: torch.Generator) -> Condition | None:
        """The condition as `count` rows."""
        return repeated(self.condition, count)

    async def check_rows(self, count: int, rng: torch.Generator) -> Condition | None:
        """As `rows`."""
        return repeated(self.condition, count)

    def conditioned(self, target: Target) -> Target:
        """The target, which has this condition already."""
        return target

    def tensors(self) -> dict[str, Tensor]:
        """Nothing to save."""
        return {}

    def columns(self) -> dict[str, str]:
        """Nothing to save."""
        return {}


class SoftPrompt:
    """A distribution over tokens for each free place; its logits are a leaf of the graph.

    Args:
        tokens: of the searched prompt.

    Attributes:
        logits: (num_free, V).
    """

    def __init__(self, tokens: PromptTokens) -> None:
        self.tokens = tokens
        table = next(iter(tokens.tables.values()))
        shape = (tokens.num_free, len(table))
        self.logits = torch.zeros(shape, device=table.device, requires_grad=True)
        self._checked: tuple[Tensor, Tensor, Condition] | None = None

    def parameters(self) -> list[Tensor]:
        """What the optimiser moves."""
        return [self.logits]

    async def rows(self, count: int, rng: torch.Generator) -> Condition:
        """`count` rows of condition, each of its own draw; gradients reach the logits."""
        return await EncodePrompt(self.draw(count, rng), self.tokens)

    async def check_rows(self, count: int, rng: torch.Generator) -> Condition | None:
        """`count` rows of condition for a replication check, without gradients; remembers them."""
        with torch.no_grad():
            embeddings = self.draw(1 if self._is_shared else count, rng)
        condition = await EncodePrompt(embeddings, self.tokens)
        likeliest, drawn = self.logits.detach().argmax(1), torch.cat([*embeddings.values()], 2)
        self._checked = likeliest, drawn, condition
        return repeated(condition, count)

    def conditioned(self, target: Target) -> Target:
        """The target under the prompts of the last check, which samples cycle through."""
        return replace(target, condition=self._checked[2]) if self._checked else target

    def draw(self, count: int, rng: torch.Generator) -> Condition:
        """Draws relaxed prompts: encoder -> (count, L, d) embeddings.

        `rng` gives a seed per draw, from which its Gumbel noise is drawn on the device.
        """
        seeds = torch.randint(2**62, (count,), generator=rng).tolist()
        tables, temperature = self.tokens.tables, self.tokens.search.temperature
        mixtures = RelaxedTokens.apply(self.logits, seeds, temperature, *tables.values())
        after = 1 + self.tokens.num_free
        prompts = {}
        for (name, table), mixture in zip(tables.items(), mixtures, strict=True):
            given = table[self.tokens.ids[name]].to(mixture).expand(count, -1, -1)
            prompts[name] = torch.cat([given[:, :1], mixture, given[:, after:]], 1)
        return prompts

    def tensors(self) -> dict[str, Tensor]:
        """Of the last check: the likeliest tokens (num_free,), and the embeddings that were drawn.

        The embeddings are (L, d), or (num_samples, L, d) with one prompt per sample; those of
        several encoders are concatenated along d. They are saved because a prompt that is decoded
        and tokenized again need not be the same.
        """
        if self._checked is None:
            return {}
        ids, embeddings = (value.cpu() for value in self._checked[:2])
        drawn = embeddings[0] if self._is_shared else embeddings
        return {"prompt_ids": ids, "prompt_embedding": drawn}

    def columns(self) -> Mapping[str, str]:
        """The likeliest tokens of the last check as text."""
        if self._checked is None:
            return {}
        return {"prompt": self.tokens.decode(self._checked[0].tolist())}

    @property
    def _is_shared(self) -> bool:
        return self.tokens.search.check_prompts == "shared"


class RelaxedTokens(torch.autograd.Function):
    """Embeddings of Gumbel-softmax draws, one at a time, computed again in the backward pass.

    All at once, the token weights of a batch over CLIP's vocabulary would take a gigabyte.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, seeds: Sequence[int], temperature: float, *tables: Tensor
    ) -> tuple[Tensor, ...]:
        """(n, V) logits, B seeds and a table (V, d) per encoder -> (B, n, d) per encoder."""
        # Not by `save_for_backward`, which refuses logits that have moved since: another image of
        # the same call may run its backward later, which gives these logits a gradient of zeros.
        ctx.logits, ctx.seeds, ctx.temperature, ctx.tables = logits, seeds, temperature, tables
        weights = (relaxed_tokens(logits, seed, temperature) for seed in seeds)
        drawn = [[draw @ table.to(draw) for table in tables] for draw in weights]
        return tuple(torch.stack(mixtures) for mixtures in zip(*drawn, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient through the softmax, summed over the draws."""
        total = torch.zeros_like(ctx.logits)
        for draw, seed in enumerate(ctx.seeds):
            weights = relaxed_tokens(ctx.logits, seed, ctx.temperature)
            slopes = torch.zeros_like(weights)
            for gradient, table in zip(gradients, ctx.tables, strict=True):
                slopes += gradient[draw] @ table.to(weights).T
            slopes -= (weights * slopes).sum(1, keepdim=True)
            total += slopes.mul_(weights)
        return total / ctx.temperature, None, None, *(None for _ in ctx.tables)


def relaxed_tokens(logits: Tensor, seed: int, temperature: float) -> Tensor:
    """One Gumbel-softmax draw of each row: (n, V) logits -> (n, V) weights that sum to 1."""
    generator = torch.Generator(logits.device).manual_seed(seed)
    gumbel = torch.empty_like(logits).exponential_(generator=generator).log_().neg_()
    return gumbel.add_(logits).div_(temperature).softmax(1)


def prompt_of(target: Target) -> FixedPrompt | SoftPrompt:
    """The prompt of an image: searched if the target has tokens, else given."""
    return FixedPrompt(target.condition) if target.tokens is None else SoftPrompt(target.tokens)
