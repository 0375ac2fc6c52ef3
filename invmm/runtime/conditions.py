"""What the images of a run are drawn under: given, or searched."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from invmm.data.dataset import ImageEntry
from invmm.data.prompt import Prompt
from invmm.diffusion.guidance import Condition, repeated
from invmm.engine.searched_prompt import PromptTokens
from invmm.models.execution import LoadedNetwork, SearchableNetwork


class Conditions:
    """The prompt of a run, as its network understands it.

    Args:
        network: the model.
        prompt: of the run.

    Attributes:
        negative: one row that guidance pushes away from, for all images.

    Raises:
        ValueError: the model does not understand the prompt.
    """

    @torch.no_grad()
    def __init__(self, network: LoadedNetwork, prompt: Prompt) -> None:
        self.network, self.prompt = network, prompt
        self.negative = network.negative(prompt.negative)
        self._searched = None
        if prompt.search:
            self._searched = self._text_network.searched_prompt(prompt.search)

    @property
    def _text_network(self) -> SearchableNetwork:
        if not isinstance(self.network, SearchableNetwork):
            raise ValueError("prompt=learned: the model reads no text to search; use prompt=none")
        return self.network

    @torch.no_grad()
    def of(self, entry: ImageEntry) -> Condition | None:
        """What an image asks for; None where that is searched."""
        return None if self._searched else self.network.condition(self.prompt.of(entry))

    @torch.no_grad()
    def tokens(self, entry: ImageEntry) -> PromptTokens | None:
        """What the prompt is searched out of; encoders that are not searched read the caption."""
        tokens = self._searched
        if tokens is None or not tokens.reads_caption:
            return tokens
        fixed = self.network.condition(self.prompt.of(entry))
        assert fixed is not None
        return replace(tokens, fixed=fixed)

    @torch.no_grad()
    def found(self, entry: ImageEntry, embeddings: Tensor) -> Condition:
        """A searched prompt from its record: (L, d) or (n, L, d) embeddings, n rows of condition.

        Raises:
            ValueError: they do not suit the text encoders that were searched.
        """
        tokens = self.tokens(entry)
        if tokens is None:
            raise ValueError("it has a prompt_embedding, and the prompt of the run is not searched")
        rows = embeddings[None] if embeddings.ndim == 2 else embeddings
        widths = [table.shape[1] for table in tokens.tables.values()]
        length = next(iter(tokens.ids.values())).shape[1]
        if rows.shape[1:] != (length, sum(widths)):
            raise ValueError(
                f"its prompt_embedding has the shape {tuple(embeddings.shape)}, prompts of this "
                f"model have {(length, sum(widths))}"
            )
        parts = rows.to(self.network.device).split(widths, 2)
        ids, fixed = repeated(tokens.ids, len(rows)), repeated(tokens.fixed, len(rows))
        assert ids is not None
        assert fixed is not None
        by_encoder = dict(zip(tokens.tables, parts, strict=True))
        return self._text_network.encode_prompt(by_encoder, ids, fixed)
