"""A folder of images, with captions where there are some."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from invmm.data.dataset import ImageEntry, ImageError, LoadedImage, check_selection, select
from invmm.data.images import MIN_SIDE, Resize, load_image, read_bytes
from invmm.data.manifest import TrainingManifest

EXTENSIONS = frozenset(
    f".{name}"
    for name in "png jpg jpeg webp bmp gif tif tiff jp2 avif ppm pgm ico tga".split()  # noqa: SIM905
)
METADATA = "metadata.jsonl"


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Every image below a folder.

    Captions come from `metadata.jsonl` (keys file_name and text or caption, optionally split and
    copies) or from a text file beside the image. A training manifest, as `invmm-train` writes it
    beside a model, tells split and copies by the content of the files.

    Attributes:
        path: of the folder.
        size: side of the loaded images; null takes the model's.
        resize: what happens to images that are not square: crop, squash or pad (on white).
        recursive: look into subfolders.
        training_manifest: a training_manifest.json.
        ids: measure only these.
        take: measure at most so many of each group: duplicated, single, held_out.

    Raises:
        ValueError: ids and take together.
    """

    path: str
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
            ValueError: no such folder, or no images in it.
        """
        root = Path(self.path).expanduser().resolve()
        if not root.is_dir():
            raise ValueError(f"dataset.path={self.path} is not a folder; give a folder of images")
        listing = _Listing(root)
        entries = listing.entries(recursive=self.recursive)
        if not entries:
            raise ValueError(
                f"dataset.path={self.path} holds no images ({' '.join(sorted(EXTENSIONS))}); give "
                "a folder of images"
            )
        if self.training_manifest is not None:
            manifest = TrainingManifest.read(Path(self.training_manifest))
            entries = [_with_copies(entry, manifest) for entry in entries]
        return OpenFolder(
            entries=select(entries, ids=self.ids, take=self.take),
            problems=listing.problems,
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
        """All usable images; one copy where nothing else is known, none of the held-out ones."""
        known = [
            replace(entry, copies=1) if entry.copies is None else entry
            for entry in self.everything
            if entry.error is None and entry.split != "held_out"
        ]
        return [entry for entry in known if entry.copies]


@dataclass
class _Listing:
    """What the folder holds and what its metadata says it holds."""

    root: Path
    problems: list[str] = field(default_factory=list)

    def entries(self, *, recursive: bool) -> list[ImageEntry]:
        metadata = self._metadata()
        found = {}
        for path in sorted(_walk(self.root, recursive=recursive)):
            image_id = path.relative_to(self.root).as_posix()
            listed = metadata.pop(image_id, None)
            if listed is None and (self.root / METADATA).exists():
                self.problems.append(f"{image_id} is not listed in {METADATA}")
            found[image_id] = self._entry(image_id, path, listed or {})
        for image_id, listed in metadata.items():
            found[image_id] = self._missing(image_id, listed)
        return [found[image_id] for image_id in sorted(found)]

    def _entry(self, image_id: str, path: Path, listed: Mapping[str, Any]) -> ImageEntry:
        caption = listed.get("text", listed.get("caption")) or _sidecar(path)
        error = None if _is_below(path, self.root) else "the link leads out of the data folder"
        return self._annotated(image_id, path, caption, listed, error)

    def _missing(self, image_id: str, listed: Mapping[str, Any]) -> ImageEntry:
        error = f"listed in {METADATA} but missing"
        path = self.root / image_id
        if Path(image_id).is_absolute() or ".." in Path(image_id).parts:
            error = f"{METADATA} names a file outside the data folder"
        elif path.exists():
            error = "not an image by its name" if path.is_file() else "not a regular file"
        caption = listed.get("text", listed.get("caption"))
        return self._annotated(image_id, path, caption, listed, error)

    def _annotated(
        self, image_id: str, path: Path, caption: Any, listed: Mapping[str, Any], error: str | None
    ) -> ImageEntry:
        split, copies = listed.get("split", "unknown"), listed.get("copies")
        if split not in ("train", "held_out", "unknown"):
            self.problems.append(f"{image_id}: split {split!r} is none of train, held_out, unknown")
            split = "unknown"
        if copies is not None and (not isinstance(copies, int) or copies < 0):
            self.problems.append(f"{image_id}: copies {copies!r} is not a number of copies")
            copies = None
        return ImageEntry(
            image_id=image_id,
            path=str(path),
            caption=str(caption) if caption else None,
            split=split if copies is None else "train" if copies else "held_out",
            copies=copies,
            error=error,
        )

    def _metadata(self) -> dict[str, Mapping[str, Any]]:
        path = self.root / METADATA
        if not path.is_file():
            return {}
        listed: dict[str, Mapping[str, Any]] = {}
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            where = f"{METADATA}, line {number}"
            try:
                row = json.loads(line)
                name = row["file_name"]
            except (ValueError, KeyError, TypeError):
                self.problems.append(f"{where} is not a JSON object with file_name")
                continue
            if not isinstance(name, str) or not name or "\0" in name:
                self.problems.append(f"{where}: file_name {name!r} is not a name")
            elif name in listed:
                self.problems.append(f"{where}: {name} stands twice; the first line counts")
            else:
                listed[name] = row
        return listed


def _walk(root: Path, *, recursive: bool) -> Iterator[Path]:
    """Image paths below a folder; linked folders are not entered, so loops end nowhere."""
    for folder, subfolders, names in os.walk(root, followlinks=False):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names + [name for name in subfolders if _is_image_name(name)]:
            if _is_image_name(name) and not name.startswith("."):
                yield Path(folder) / name
        if not recursive:
            return


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _is_below(path: Path, root: Path) -> bool:
    try:
        return path.resolve(strict=False).is_relative_to(root)
    except (OSError, RuntimeError):
        return False


def _sidecar(path: Path) -> str | None:
    """The caption in a text file of the same name."""
    sidecar = path.with_suffix(".txt")
    try:
        return read_bytes(sidecar).decode(errors="replace").strip() or None
    except ImageError:
        return None


def _with_copies(entry: ImageEntry, manifest: TrainingManifest) -> ImageEntry:
    """Split and copies by content: an image that the manifest does not know was held out."""
    if entry.error is not None:
        return entry
    try:
        sha256 = hashlib.sha256(read_bytes(Path(entry.path))).hexdigest()
    except ImageError:
        return entry
    copies = sum(known.copies for known in manifest.entries if known.sha256 == sha256)
    return replace(entry, copies=copies, split="train" if copies else "held_out")
