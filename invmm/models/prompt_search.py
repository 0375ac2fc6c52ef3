"""Relaxed tokens in place of a text: what CLIP makes of embeddings that no token has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from invmm.diffusion.guidance import Condition
from invmm.engine.searched_prompt import PromptSearch, PromptTokens
from invmm.models.parts import Family


def prompt_tokens(
    pipeline: Any, family: Family, search: PromptSearch, fixed: Condition
) -> PromptTokens:
    """What a prompt of this pipeline is made of.

    Args:
        pipeline: of a family with text encoders.
        family: names those that are searched unless told otherwise.
        search: how it is searched.
        fixed: one row of the condition of the empty prompt.

    Raises:
        ValueError: encoders that there are not or that cannot share a prompt, or too many tokens.
    """
    encoders = _encoders(family, search.encoders)
    tokenizers = {
        name: getattr(pipeline, name.replace("text_encoder", "tokenizer")) for name in encoders
    }
    (tokenizer, *others) = tokenizers.values()
    if any(other.get_vocab() != tokenizer.get_vocab() for other in others):
        raise ValueError(
            f"prompt.search.encoders={list(encoders)} have different vocabularies; search one of "
            "them"
        )
    places = tokenizer.model_max_length - 2
    num_free = places if search.num_tokens is None else search.num_tokens
    if num_free > places:
        raise ValueError(
            f"prompt.search.num_tokens={num_free} exceeds the {places} free places of the "
            f"tokenizer; use at most {places}"
        )
    device = fixed["prompt_embeds"].device
    tables = {name: getattr(pipeline, name).get_input_embeddings().weight for name in encoders}
    return PromptTokens(
        search=search,
        num_free=num_free,
        # A table may have more rows than there are tokens.
        tables={name: table[: len(tokenizer)] for name, table in tables.items()},
        ids={name: _ids(own, num_free).to(device) for name, own in tokenizers.items()},
        fixed=fixed,
        reads_caption=set(encoders) != set(_present(pipeline, family)),
        decode=tokenizer.decode,
    )


def clip_output(encoder: Any, ids: Tensor, embeddings: Tensor) -> Any:
    """What a CLIP text encoder returns, with all hidden states.

    CLIP takes no embeddings, so they are put in behind its table.

    Args:
        encoder: the text model.
        ids: (B, L) tokens, of which only the place of the end token matters.
        embeddings: (B, L, d).
    """
    own = embeddings.to(encoder.dtype)
    hook = encoder.get_input_embeddings().register_forward_hook(lambda *_: own)
    try:
        return encoder(ids, output_hidden_states=True)
    finally:
        hook.remove()


def with_columns(values: Tensor, own: Tensor, start: int) -> Tensor:
    """Values with other columns from `start` on.

    Args:
        values: (B, D), or (B, L', D) of which the first L places are replaced.
        own: (B, d), or (B, L, d).
        start: the first of d columns.
    """
    replaced = values.clone()
    places = replaced if own.ndim == 2 else replaced[:, : own.shape[1]]
    places[..., start : start + own.shape[-1]] = own
    return replaced


def _encoders(family: Family, names: Sequence[str] | None) -> Sequence[str]:
    known = [
        name
        for name, classes in family.parts.items()
        if classes[0].startswith("transformers.CLIPText")
    ]
    for name in names or ():
        if name not in known:
            raise ValueError(
                f"prompt.search.encoders={list(names or ())}: {name} is no CLIP text encoder of a "
                f"{family.name} model; there are {', '.join(known)}"
            )
    return tuple(dict.fromkeys(names or family.searched))


def _present(pipeline: Any, family: Family) -> list[str]:
    return [name for name in family.parts if "text_encoder" in name and getattr(pipeline, name)]


def _ids(tokenizer: Any, num_free: int) -> Tensor:
    """(1, L) tokens; in the free places one that is surely not the end."""
    padding = tokenizer.model_max_length - 2 - num_free
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return torch.tensor([[begin] * (1 + num_free) + [end] + [pad] * padding])
