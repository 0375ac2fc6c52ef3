"""The interface of data sets: entries that are cheap to list, and images that may fail to load."""

from __future__ import annotations

import difflib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from invmm.faults import Refusal

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "held_out", "unknown"]
Group = Literal["duplicated", "single", "held_out"]


class ImageError(ValueError):
    """One image cannot be used; the message is one line. It never ends a run."""


@dataclass(frozen=True, kw_only=True)
class ImageEntry:
    """One image of a data set; nothing is decoded yet.

    Attributes:
        image_id: stable and unique, such as the relative POSIX path in NFC or an icon's code point.
        path: of the file, or a description of the source.
        caption: its prompt; None if it has none.
        label: its class number; None if it has none.
        split: whether the model was trained on it.
        copies: how many times it is in the training set; 0 if held out, None if unknown.
        error: why it cannot be used, if that is known without opening it.
    """

    image_id: str
    path: str
    caption: str | None = None
    label: int | None = None
    split: Split = "unknown"
    copies: int | None = None
    error: str | None = None

    @property
    def group(self) -> Group | None:
        """The group by number of copies; None if that is unknown."""
        if self.copies is None:
            return "held_out" if self.split == "held_out" else None
        return "duplicated" if self.copies > 1 else "single" if self.copies == 1 else "held_out"


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """A decoded image.

    Attributes:
        pixels: (3, H, W) float32 in [-1, 1].
        sha256: of the source's bytes.
    """

    pixels: Tensor
    sha256: str


class ImageDataset(Protocol):
    """An opened data set.

    Attributes:
        entries: the images to measure, in a stable order.
        problems: remarks for the user.
        size: side of the loaded images in pixels.
        source: where the images come from, and their licence if it asks for credit.
    """

    entries: Sequence[ImageEntry]
    problems: Sequence[str]
    size: int
    source: str

    def load(self, entry: ImageEntry) -> LoadedImage:
        """Decodes one image; raises ImageError if it cannot be used."""
        ...

    def training_entries(self) -> Sequence[ImageEntry]:
        """All images with at least one copy, measured or not."""
        ...


@runtime_checkable
class DatasetRecipe(Protocol):
    """How to get a data set."""

    def open(self, size: int) -> ImageDataset:
        """Lists the images; they will be loaded at size x size pixels.

        Raises:
            ValueError: the data set as a whole cannot be used.
        """
        ...


def canonical(name: str) -> str:
    """A name in Unicode's composed form (NFC); macOS writes file names decomposed (NFD)."""
    return unicodedata.normalize("NFC", name)


def select(
    entries: Sequence[ImageEntry],
    *,
    ids: Sequence[str] | None,
    take: Mapping[str, int] | None,
) -> list[ImageEntry]:
    """The entries to measure.

    Args:
        entries: all of them.
        ids: only these, in this order.
        take: group -> how many images at most, the first ones; other groups are left out.

    Raises:
        ValueError: an id is not in the data set, or no image is left to measure.
    """
    if ids is not None:
        by_id = {entry.image_id: entry for entry in entries}
        named = [image_id if image_id in by_id else canonical(image_id) for image_id in ids]
        for image_id in named:
            if image_id not in by_id:
                near = difflib.get_close_matches(image_id, by_id, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise Refusal(
                    f"dataset.ids names {image_id}, which is not in the set{hint}", "dataset.ids"
                )
        return [by_id[image_id] for image_id in named]
    if take is None:
        return list(entries)
    left = dict(take)
    chosen = []
    for entry in entries:
        if entry.group and left.get(entry.group, 0) > 0:
            left[entry.group] -= 1
            chosen.append(entry)
    if not chosen:
        raise ValueError(
            f"dataset.take={dict(take)} leaves no image: it needs images whose numbers of copies "
            "are known; use dataset.take=null to measure all"
        )
    return chosen


def check_selection(ids: Sequence[str] | None, take: Mapping[str, int] | None) -> None:
    """Refuses empty and contradictory selections.

    Raises:
        ValueError: naming the key.
    """
    if ids is not None and take is not None:
        raise Refusal(
            "dataset.ids and dataset.take exclude each other; give one of them",
            "dataset.ids",
            "dataset.take",
        )
    if ids is not None and not ids:
        raise Refusal(
            "dataset.ids=[] leaves no image; use dataset.ids=null to measure all", "dataset.ids"
        )
    for image_id, count in Counter(map(canonical, ids or ())).items():
        if count > 1:
            raise ValueError(f"dataset.ids names {image_id} {count} times; name it once")
    groups = ("duplicated", "single", "held_out")
    for group, count in (take or {}).items():
        if group not in groups:
            raise Refusal(
                f"dataset.take names {group!r}; its keys are {', '.join(groups)}", "dataset.take"
            )
        if count < 0:
            raise Refusal(
                f"dataset.take.{group}={count} is negative; use 0 or more", "dataset.take"
            )
