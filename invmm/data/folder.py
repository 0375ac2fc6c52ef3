"""A folder of images, with captions if it has some."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, MinLen

from invmm.data.dataset import ImageEntry, ImageError, LoadedImage, check_selection, select
from invmm.data.images import MIN_SIDE, Resize, formats, load_image, read_bytes
from invmm.data.listing import Listing
from invmm.data.manifest import TrainingManifest
from invmm.data.metadata import Columns


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Every image below a folder.

    Captions come from `metadata.csv`, `metadata.jsonl` or `metadata.parquet`, in the folder or in
    subfolders (file_name and text, caption or prompt, optionally label, split and copies), or from
    a text file beside the image. A training manifest, as `invmm-train` writes it beside a model,
    gives split and copies of each image by the content of its file.

    Attributes:
        path: of the folder.
        image: column of the file names in the metadata; null takes file_name, or else image.
        caption: column of the prompts; null takes text, caption or prompt, whichever exists.
        label: column of the class numbers; null takes label, if it exists.
        size: side of the loaded images; null takes the model's.
        resize: what happens to images that are not square: crop, squash or pad (on white).
        recursive: read subfolders too.
        training_manifest: a training_manifest.json.
        ids: measure only these.
        take: largest number of images to measure of each group: duplicated, single, held_out.

    Raises:
        ValueError: ids and take together.
    """

    path: Annotated[str, MinLen(1)]
    image: Annotated[str, MinLen(1)] | None = None
    caption: Annotated[str, MinLen(1)] | None = None
    label: Annotated[str, MinLen(1)] | None = None
    size: Annotated[int, Ge(MIN_SIDE)] | None = None
    resize: Resize = "crop"
    recursive: bool = True
    training_manifest: str | None = None
    ids: list[str] | None = None
    take: dict[str, int] | None = None

    def __post_init__(self) -> None:
        check_selection(self.ids, self.take)

    def open(self, size: int) -> OpenFolder:
        """Lists the folder.

        Raises:
            ValueError: no such folder, no images in it, or ambiguous names or metadata.
        """
        root = os.path.expanduser(self.path)
        if not os.path.isdir(root):  # unlike Path.is_dir, False for a name that is too long
            raise ValueError(f"dataset.path={self.path} is not a folder; give a folder of images")
        columns = Columns(image=self.image, caption=self.caption, label=self.label)
        listing = Listing(Path(root).resolve(), columns)
        entries = listing.entries(recursive=self.recursive)
        problems = listing.problems.lines()
        if not entries:
            remarks = "".join(f"; {problem}" for problem in problems)
            raise ValueError(
                f"dataset.path={self.path} holds no images that can be read "
                f"({', '.join(formats())}); give a folder of images{remarks}"
            )
        if self.training_manifest is not None:
            copies = TrainingManifest.read(Path(self.training_manifest)).copies_by_sha256()
            entries = [_with_copies(entry, copies) for entry in entries]
        return OpenFolder(
            entries=select(entries, ids=self.ids, take=self.take),
            problems=problems,
            size=self.size or size,
            resize=self.resize,
            everything=entries,
        )


@dataclass(frozen=True, kw_only=True)
class OpenFolder:
    """See `ImageDataset`."""

    entries: Sequence[ImageEntry]
    problems: Sequence[str]
    size: int
    resize: Resize
    everything: Sequence[ImageEntry]
    source: str = "image folder"

    def load(self, entry: ImageEntry) -> LoadedImage:
        """See `ImageDataset`."""
        if entry.error is not None:
            raise ImageError(entry.error)
        return load_image(read_bytes(Path(entry.path)), size=self.size, resize=self.resize)

    def training_entries(self) -> list[ImageEntry]:
        """All usable images that were not held out, with one copy if the number is unknown."""
        known = [
            replace(entry, copies=1) if entry.copies is None else entry
            for entry in self.everything
            if entry.error is None and entry.split != "held_out"
        ]
        return [entry for entry in known if entry.copies]


def _with_copies(entry: ImageEntry, copies_by_sha256: Mapping[str, int]) -> ImageEntry:
    """The entry with split and copies by its content; if the manifest lacks it, it was held out."""
    if entry.error is not None:
        return entry
    try:
        sha256 = hashlib.sha256(read_bytes(Path(entry.path))).hexdigest()
    except ImageError:
        return entry
    copies = copies_by_sha256.get(sha256, 0)
    return replace(entry, copies=copies, split="train" if copies else "held_out")
