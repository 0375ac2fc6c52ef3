"""Packing the requests of many images into network calls of a constant number of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from invmm.diffusion.guidance import Condition, is_guided
from invmm.engine.requests import Denoise, Embed, EncodePrompt, Minimise, Sample


def in_calls(
    function: Callable[..., Tensor], columns: Sequence[Sequence[Tensor]], rows: int
) -> list[Tensor]:
    """Applies a row-wise function to many requests in calls of exactly `rows` rows.

    Args:
        function: takes the tensors of one request, any number of rows, and returns as many.
        columns: the tensors of each request; row counts may differ between requests.
        rows: rows of every call; the last is padded by repeating its first row.

    Returns:
        One tensor per request, with its own rows.
    """
    calls, sizes = _packed(columns, rows)
    outputs = torch.cat([function(*call) for call in calls])
    return list(outputs.split(sizes)[: len(columns)])


def conditions_in_calls(
    function: Callable[..., Condition], columns: Sequence[Sequence[Tensor]], rows: int
) -> list[Condition]:
    """As `in_calls`, for a function that returns a condition."""
    calls, sizes = _packed(columns, rows)
    outputs = [function(*call) for call in calls]
    split = {name: torch.cat([out[name] for out in outputs]).split(sizes) for name in outputs[0]}
    return [{name: own[i] for name, own in split.items()} for i in range(len(columns))]


def _packed(
    columns: Sequence[Sequence[Tensor]], rows: int
) -> tuple[Iterator[tuple[Tensor, ...]], list[int]]:
    """The tensors of each call, and the row counts that all rows split into.

    The counts are those of the requests in order, then that of the padding.
    """
    sizes = [len(request[0]) for request in columns]
    inputs = [torch.cat(tensors) for tensors in zip(*columns, strict=True)]
    if padding := -sum(sizes) % rows:
        inputs = [
            torch.cat([tensor, tensor[:1].detach().expand(padding, *tensor.shape[1:])])
            for tensor in inputs
        ]
    # Kernels are chosen by memory format, which cat takes from its inputs: one format for all.
    inputs = [tensor.contiguous() for tensor in inputs]
    return zip(*(tensor.split(rows) for tensor in inputs), strict=True), [*sizes, padding]


def condition_values(request: Denoise | Sample) -> list[Tensor]:
    """The tensors of a request's condition, in the order of their names."""
    return list((request.condition or {}).values())


def by_names(names: Sequence[str], values: Sequence[Tensor]) -> Condition | None:
    """The inverse of `condition_values`; None without names."""
    return dict(zip(names, values, strict=True)) or None


def rows_like(kind: type) -> type:
    """The type of request whose configured rows per call hold for this type too."""
    return Denoise if kind in (EncodePrompt, Minimise) else kind


def num_rows(request: Any) -> int:
    """Rows of a request's tensors."""
    if isinstance(request, EncodePrompt):
        return len(next(iter(request.embeddings.values())))
    return len(request.noise if isinstance(request, Sample) else request.latents)


def needs_grad(request: Denoise | Sample | EncodePrompt) -> bool:
    """Whether the answer keeps its graph: an input requires grad."""
    if isinstance(request, EncodePrompt):
        return any(value.requires_grad for value in request.embeddings.values())
    main = request.noise if isinstance(request, Sample) else request.latents
    return main.requires_grad or any(value.requires_grad for value in condition_values(request))


def signature(request: Any) -> tuple[Any, ...]:
    """A key of a request; requests with equal keys can share a network call."""
    if isinstance(request, Embed):
        return (Embed, request.latents.shape[1:])
    if isinstance(request, EncodePrompt):
        tokens = request.tokens
        inputs = [_shapes(values) for values in (request.embeddings, tokens.ids, tokens.fixed)]
        return (EncodePrompt, *inputs, needs_grad(request))
    main = request.noise if isinstance(request, Sample) else request.latents
    condition = _shapes(request.condition or {})
    drawn_by = None
    if isinstance(request, Sample):
        drawn_by = (request.sampler, is_guided(request.guidance_scale))
    return (type(request), drawn_by, main.shape[1:], main.dtype, condition, needs_grad(request))


def _shapes(condition: Condition) -> tuple[Any, ...]:
    return tuple((name, value.shape[1:], value.dtype) for name, value in condition.items())
