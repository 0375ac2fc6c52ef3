"""A prompt that is searched together with the noise: the settings, and the tokens to search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, MinLen

from invmm.diffusion.guidance import Condition


@dataclass(frozen=True, kw_only=True)
class PromptSearch:
    """How a prompt is searched.

    Attributes:
        temperature: of the Gumbel-softmax; the lower, the nearer draws are to single tokens
            (paper: 2).
        num_tokens: number of tokens that are searched; the end token and the tokenizer's padding
            follow them. null takes all places between begin and end (paper: 75 of CLIP's 77).
        encoders: text encoders that read the searched prompt; the others read the image's caption.
            null takes text_encoder (paper), for Stable Diffusion XL text_encoder_2 too (ours).
        check_prompts: "shared" draws one prompt for all samples of a check (release, Stable
            Diffusion 1 and 2), "each" draws one prompt per sample (release, Stable Diffusion 3).
    """

    temperature: Annotated[float, Gt(0)] = 2.0
    num_tokens: Annotated[int, Ge(1)] | None = None
    encoders: Annotated[Sequence[str], MinLen(1)] | None = None
    check_prompts: Literal["shared", "each"] = "shared"


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptTokens:
    """The tokens of a searched prompt: begin, free places, end, padding.

    Attributes:
        search: how it is searched.
        num_free: places 1 to num_free are free: their tokens are searched.
        tables: encoder -> (V, d) token embeddings; all encoders share one vocabulary.
        ids: encoder -> (1, L) token ids, with the begin token in the free places.
        fixed: one row of the condition of a given text; a searched encoder's output replaces its
            part of it, so the other encoders keep reading that text.
        reads_caption: whether some encoder is not searched and so reads the image's caption.
        decode: token ids -> their text.
    """

    search: PromptSearch
    num_free: int
    tables: Condition
    ids: Condition
    fixed: Condition
    reads_caption: bool
    decode: Callable[[list[int]], str]
