"""The prompt or class label under which a conditional model is measured on an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from invmm.data.dataset import ImageEntry, ImageError
from invmm.engine.searched_prompt import PromptSearch
from invmm.faults import Refusal

Kind = Literal["none", "empty", "caption", "learned", "class_label"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The condition of an image.

    Attributes:
        kind: none for an unconditional model; for a text model empty, caption (the image's own) or
            learned (together with the noise); class_label for a class-conditional model.
        label: class label of all images; null takes each image's own.
        negative: the negative prompt of guidance; empty as in diffusers' pipelines.
        search: how a learned prompt is searched.

    Raises:
        ValueError: an option that the kind does not have, or one that it needs is missing.
    """

    kind: Kind = "none"
    label: Annotated[int, Ge(0)] | None = None
    negative: str = ""
    search: PromptSearch | None = None

    def __post_init__(self) -> None:
        if self.label is not None and self.kind != "class_label":
            raise Refusal(
                f"prompt.label={self.label} has no meaning for prompt={self.kind}; use "
                "prompt=class_label",
                "prompt.label",
            )
        if self.search is not None and self.kind != "learned":
            raise Refusal(
                f"prompt.search has no meaning for prompt={self.kind}; use prompt=learned",
                "prompt.search",
            )
        if self.search is None and self.kind == "learned":
            raise Refusal(
                "prompt.search=null leaves prompt=learned nothing to do; leave it out",
                "prompt.search",
            )
        if self.negative and self.kind not in ("empty", "caption", "learned"):
            raise Refusal(
                f"prompt.negative has no meaning for prompt={self.kind}; use prompt=caption",
                "prompt.negative",
            )

    @property
    def is_shared(self) -> bool:
        """Whether all images have the same condition."""
        return self.kind in ("none", "empty") or self.label is not None

    def check(self, entries: Sequence[ImageEntry]) -> None:
        """Refuses a data set in which no image has the caption or label that the kind needs.

        Raises:
            ValueError: naming the key, the value and the cures.
        """
        usable = [entry for entry in entries if entry.error is None]
        if not usable or self.is_shared or self.kind not in ("caption", "class_label"):
            return
        needs = "caption" if self.kind == "caption" else "label"
        if all(getattr(entry, needs) is None for entry in usable):
            cure = "prompt=empty" if needs == "caption" else "prompt.label=NUMBER for all of them"
            raise ValueError(
                f"prompt={self.kind} needs a {needs}, and none of the {len(usable)} images has "
                f"one; put them into metadata.csv or metadata.jsonl (in Python: prompts=), name a "
                f"column by dataset.{needs}=COLUMN, or use {cure}"
            )

    def of(self, entry: ImageEntry) -> str | int | None:
        """The text or label of an image; None for an unconditional model.

        For a learned prompt it is the caption, which encoders that are not searched read.

        Raises:
            ImageError: it needs a caption or label and has none.
        """
        if self.kind == "none":
            return None
        if self.kind == "empty":
            return ""
        if self.kind in ("caption", "learned"):
            if entry.caption is None:
                raise ImageError(
                    "it has no caption; put one into the metadata or a .txt file beside it (in "
                    "Python: prompts=), or use prompt=empty"
                )
            return entry.caption
        label = entry.label if self.label is None else self.label
        if label is None:
            raise ImageError(
                "it has no class label; put label into the metadata (in Python: prompts=), or give "
                "prompt.label"
            )
        return label
