"""A prompt that is searched together with the noise: how, and out of which tokens."""

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
        temperature: of the relaxed tokens; the lower, the nearer to single tokens (paper: 2).
        num_tokens: free places; what follows the end is padding, as the tokenizer pads. null takes
            all places between begin and end (paper: 75 of CLIP's 77).
        encoders: text encoders that read the searched prompt; the others read the image's caption.
            null takes text_encoder (paper), for Stable Diffusion XL text_encoder_2 too (ours).
        check_prompts: "shared" draws one prompt for all samples of a check (release, Stable
            Diffusion 1 and 2), "each" one for each of them (release, Stable Diffusion 3).
    """

    temperature: Annotated[float, Gt(0)] = 2.0
    num_tokens: Annotated[int, Ge(1)] | None = None
    encoders: Annotated[Sequence[str], MinLen(1)] | None = None
    check_prompts: Literal["shared", "each"] = "shared"


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptTokens:
    """What a searched prompt is made of: begin, free places, end, padding.

    Attributes:
        search: how it is searched.
        num_free: places 1 to num_free are free.
        tables: encoder -> (V, d) embeddings of its tokens; all encoders have one vocabulary.
        ids: encoder -> (1, L) tokens; the begin token stands in the free places.
        fixed: one row of the condition, what the encoders that are not searched make of the
            caption still in it.
        reads_caption: whether there are such encoders.
        decode: the text of token ids.
    """

    search: PromptSearch
    num_free: int
    tables: Condition
    ids: Condition
    fixed: Condition
    reads_caption: bool
    decode: Callable[[list[int]], str]
