"""A CLIP tokenizer whose vocabulary is the words of some captions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

_START, _END, _UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<unk>"
_END_OF_WORD = "</w>"


def word_tokenizer(captions: Iterable[str]) -> Any:
    """A CLIP tokenizer to which each word of the captions is one token.

    A word is what CLIP takes for one: a run of letters, a digit, or a run of other signs. Unknown
    words are spelled by the pieces of known ones, a sign that stands in none is `<unk>`.

    Args:
        captions: at least one; case does not matter.

    Returns:
        A `transformers.CLIPTokenizer` whose length is that of the longest caption with its start
        and end.
    """
    from transformers import CLIPTokenizer

    special = [_START, _END, _UNKNOWN]
    split = _splitter(CLIPTokenizer(vocab=_numbered(special), merges=[], unk_token=_UNKNOWN))
    by_caption = [split(caption) for caption in captions]
    words = sorted({word for found in by_caption for word in found})
    spelled = [[*word[:-1], word[-1] + _END_OF_WORD] for word in words]
    merges: Any = merges_of(spelled)  # declared as texts, taken as pairs
    letters = sorted({piece for pieces in spelled for piece in pieces})
    tokens = dict.fromkeys([*special, *letters, *("".join(pair) for pair in merges)])
    return CLIPTokenizer(
        vocab=_numbered(tokens),
        merges=merges,
        unk_token=_UNKNOWN,
        model_max_length=2 + max(map(len, by_caption), default=0),
    )


def merges_of(words: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """Merges after which byte-pair encoding leaves one token of each word.

    What the merges so far leave of a word is folded from the left. New merges rank below all older
    ones, so they change nothing about the words before: those still have an older merge at each
    step.

    Args:
        words: each as its pieces, the last one marked as the end of a word.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        first, *rest = _encoded(word, ranks)
        for piece in rest:
            ranks[first, piece] = len(ranks)
            first += piece
    return list(ranks)


def _encoded(word: Sequence[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: the merge of the lowest rank first, wherever it applies."""
    pieces = list(word)
    while known := [pair for pair in pairwise(pieces) if pair in ranks]:
        best = min(known, key=ranks.__getitem__)
        merged: list[str] = []
        for piece in pieces:
            # A piece that has just been merged is longer than the first of the pair.
            if merged and (merged[-1], piece) == best:
                merged[-1] += piece
            else:
                merged.append(piece)
        pieces = merged
    return pieces


def _splitter(tokenizer: Any) -> Callable[[str], list[str]]:
    """Text -> words in the letters of CLIP's byte-level vocabulary."""
    backend = tokenizer.backend_tokenizer

    def split(text: str) -> list[str]:
        normalized = backend.normalizer.normalize_str(text)
        return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)]

    return split


def _numbered(tokens: Iterable[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}
