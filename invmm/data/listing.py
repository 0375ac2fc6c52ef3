"""What a folder of images holds, and what its metadata.jsonl says that it holds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from invmm.data.dataset import ImageEntry, ImageError, Split
from invmm.data.images import read_bytes

EXTENSIONS = frozenset(
    f".{name}"
    for name in "png jpg jpeg webp bmp gif tif tiff jp2 avif ppm pgm ico tga".split()  # noqa: SIM905
)
"""Names of images; other files count only if the metadata lists them."""
METADATA = "metadata.jsonl"


@dataclass
class Listing:
    """Reads a folder and its metadata; no image is opened, and nothing outside the folder.

    Attributes:
        root: the folder, with its links resolved.
        problems: grows by one line for each thing that a person should know.
    """

    root: Path
    problems: list[str] = field(default_factory=list)

    def entries(self, *, recursive: bool) -> list[ImageEntry]:
        """All images that are there or listed, sorted by id."""
        metadata = self._metadata()
        found = {path.relative_to(self.root).as_posix() for path in self._walk(recursive)}
        if metadata:
            unlisted = sorted(found - set(metadata))
            self.problems += [f"{image_id!r} is not listed in {METADATA}" for image_id in unlisted]
        return [
            self._entry(image_id, metadata.get(image_id, {}))
            for image_id in sorted(found | set(metadata))
        ]

    def _entry(self, image_id: str, listed: Mapping[str, Any]) -> ImageEntry:
        path = self.root / image_id
        error = self._error(image_id)
        caption = listed.get("text") or listed.get("caption")
        if caption and not isinstance(caption, str):
            self.problems.append(f"{image_id!r}: caption {caption!r} is not a text")
            caption = None
        if not caption and error is None:
            caption = self._sidecar(path)
        split, copies = self._split(image_id, listed)
        return ImageEntry(
            image_id=image_id,
            path=str(path),
            caption=caption or None,
            label=self._label(image_id, listed),
            split=split,
            copies=copies,
            error=error,
        )

    def _error(self, image_id: str) -> str | None:
        """Why an image must not be opened."""
        name = PurePosixPath(image_id)
        if name.is_absolute() or ".." in name.parts:
            return f"{METADATA} names a file outside the data folder"
        path = self.root / image_id
        if not self._is_inside(path):
            return "the link leads out of the data folder"
        if not os.path.exists(path):
            if os.path.islink(path):
                return "the link leads nowhere"
            return f"listed in {METADATA} but missing"
        return None

    def _is_inside(self, path: Path) -> bool:
        try:
            return path.resolve().is_relative_to(self.root)
        except (OSError, RuntimeError, ValueError):  # such a path (a link to itself) is no file
            return True

    def _sidecar(self, path: Path) -> str | None:
        """The caption in a text file of the same name."""
        sidecar = path.with_suffix(".txt")
        if not (os.path.isfile(sidecar) and self._is_inside(sidecar)):
            return None
        try:
            return read_bytes(sidecar).decode("utf-8-sig", errors="replace").strip()
        except ImageError:
            return None

    def _label(self, image_id: str, listed: Mapping[str, Any]) -> int | None:
        label = listed.get("label")
        if label is None or (type(label) is int and label >= 0):
            return label
        self.problems.append(f"{image_id!r}: label {label!r} is not the number of a class")
        return None

    def _split(self, image_id: str, listed: Mapping[str, Any]) -> tuple[Split, int | None]:
        split, copies = listed.get("split", "unknown"), listed.get("copies")
        if split not in get_args(Split):
            known = ", ".join(get_args(Split))
            self.problems.append(f"{image_id!r}: split {split!r} is none of {known}")
            split = "unknown"
        if copies is None:
            return split, None
        if type(copies) is not int or copies < 0:
            self.problems.append(f"{image_id!r}: copies {copies!r} is not a number of copies")
            return split, None
        implied: Split = "train" if copies else "held_out"
        if split not in (implied, "unknown"):
            self.problems.append(
                f"{image_id!r}: split {split} contradicts copies {copies}; {implied} counts"
            )
        return implied, copies

    def _metadata(self) -> dict[str, Mapping[str, Any]]:
        path = self.root / METADATA
        if not os.path.lexists(path):
            return {}
        try:
            if not self._is_inside(path):
                raise ImageError("the link leads out of the data folder")
            lines = read_bytes(path).splitlines()
        except ImageError as error:
            self.problems.append(f"{METADATA} is not used: {error}")
            return {}
        listed: dict[str, Mapping[str, Any]] = {}
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{METADATA}, line {number}"
            try:
                row = json.loads(line)
                name = row["file_name"]
            except (ValueError, KeyError, TypeError, RecursionError):
                self.problems.append(f"{where} is not a JSON object with file_name")
                continue
            if not isinstance(name, str) or not name or "\0" in name:
                self.problems.append(f"{where}: file_name {name!r} is not a name")
                continue
            image_id = PurePosixPath(name).as_posix()
            if image_id in listed:
                self.problems.append(f"{where}: {image_id!r} stands twice; the first line counts")
            else:
                listed[image_id] = row
        return listed

    def _walk(self, recursive: bool) -> Iterator[Path]:
        """Paths that are named like images; linked folders are not entered, so loops end."""
        for folder, subfolders, names in os.walk(self.root, onerror=self._unreadable):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in names + subfolders:
                if _is_image_name(name) and not name.startswith("."):
                    yield Path(folder) / name
            if not recursive:
                return

    def _unreadable(self, error: OSError) -> None:
        self.problems.append(f"a folder cannot be read: {error}")


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS
