"""Sorts the files of a folder into images, metadata and kinds of files that are not read."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from invmm.data.dataset import canonical
from invmm.data.images import HEIF_EXTENSIONS, extensions, has_signature
from invmm.data.metadata import METADATA_FILES
from invmm.data.problems import Problems, names

_DATA = frozenset(
    f".{name}"
    for name in "txt caption csv tsv json jsonl ndjson parquet arrow feather xls xlsx yaml yml xml".split()  # noqa: SIM905, E501
)
"""Endings of files that may hold captions or metadata."""
_OTHER_IMAGES = (".svg", ".jxl", ".heics", ".heifs", ".avif", ".dng", ".cr2", ".nef", ".exr")
"""Endings of image formats that Pillow has no reader for."""
_KINDS = {
    "data": (
        "files that look like captions or metadata and are not read {}; captions are read from "
        f"{', '.join(METADATA_FILES)}, and from NAME.txt beside the image NAME"
    ),
    "heif": "HEIF images that are not read {}; pip install 'invmm[heif]'",
    "image": "images in formats that are not read {}; convert them, to PNG for example",
    "hidden": "hidden files and folders that are not read {}; rename them to have them read",
    "linked": (
        "linked folders that lead out of the data folder and are not entered {}; copy their "
        "images, or give them as a dataset.path of their own"
    ),
    "looped": "linked folders that lead elsewhere in the data folder and are read there {}",
    "run": "folders of runs, whose pictures are none of the images {}",
    "other": "other files that are not read {}",
}
"""Kind of files that are not read -> the line that names them."""


def is_run_folder(path: Path) -> bool:
    """Whether invmm wrote this folder: a run may lie among its images, and goes on there."""
    return (path / "config.json").is_file() and (
        (path / "run.lock").exists() or (path / "records").is_dir()
    )


@dataclass
class Walk:
    """Lists a folder; no image is decoded, and nothing outside the folder is opened.

    Attributes:
        root: the folder, with its links resolved.
        problems: gets the remarks.
        images: id -> path of each file with the ending or the signature of an image.
        metadata: paths of the metadata files.
        skipped: kind -> relative names of what is not read.
    """

    root: Path
    problems: Problems
    images: dict[str, Path] = field(default_factory=dict)
    metadata: list[Path] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in _KINDS})

    def look(self, *, recursive: bool) -> None:
        """Fills the attributes; linked folders are not entered, so loops of links do no harm.

        Raises:
            ValueError: two names differ in their Unicode form only, or a folder has two metadata
                files.
        """
        for folder, subfolders, files in os.walk(self.root, onerror=self._unreadable):
            subfolders.sort()
            self._sort(Path(folder), sorted(files), subfolders)
            subfolders[:] = [
                name
                for name in subfolders
                if not (name.startswith(".") or is_run_folder(Path(folder, name)))
            ]
            if not recursive:
                return

    def is_inside(self, path: Path) -> bool:
        """Whether a path stays in the folder when its links are followed."""
        try:
            return path.resolve().is_relative_to(self.root)
        except (
            OSError,
            RuntimeError,
            ValueError,
        ):  # a link to itself, for example: not a file anyway
            return True

    def report(self, used: set[str]) -> None:
        """Adds a remark for each kind of files that are not read.

        Args:
            used: ids that metadata lists, whose files count as images whatever they are called.
        """
        for kind, skipped in self.skipped.items():
            if unread := [name for name in skipped if canonical(name) not in used]:
                self.problems.add(_KINDS[kind].format(names(unread)), "")

    def _sort(self, folder: Path, files: list[str], subfolders: list[str]) -> None:
        forms = [name for name in files if name in METADATA_FILES]
        if len(forms) > 1:
            where = folder.relative_to(self.root).as_posix()
            raise ValueError(
                f"dataset.path={self.root} has {' and '.join(forms)} in the same folder ({where}); "
                "keep one of them"
            )
        self.metadata += [folder / name for name in forms]
        images = []
        for name in files + subfolders:
            path = folder / name
            kind = self._kind(path, is_folder=name in subfolders)
            if kind == "read":
                images.append(name)
                self._add(path)
            elif kind is not None:
                self.skipped[kind].append(path.relative_to(self.root).as_posix())
        stems = {canonical(os.path.splitext(name)[0]) for name in images}
        beside = {
            (folder / name).relative_to(self.root).as_posix()
            for name in files
            if name.endswith(".txt") and canonical(name[:-4]) in stems
        }
        self.skipped["data"] = [name for name in self.skipped["data"] if name not in beside]

    def _kind(self, path: Path, *, is_folder: bool) -> str | None:
        """What to do with a file or folder.

        Returns:
            "read" for an image, a key of `skipped` for what is not read, None for a metadata file
            or a folder that is entered.
        """
        name, ending = path.name, os.path.splitext(path.name)[1].lower()
        if name.startswith("."):
            return "hidden"
        if ending in extensions():
            return "read"
        if is_folder:
            if not path.is_symlink():
                return "run" if is_run_folder(path) else None
            return "looped" if self.is_inside(path) else "linked"
        if name in METADATA_FILES:
            return None
        if not ending:
            return "read" if self.is_inside(path) and has_signature(path) else "other"
        if ending in _DATA:
            return "data"
        if ending in HEIF_EXTENSIONS:
            return "heif"
        return "image" if ending in (*Image.registered_extensions(), *_OTHER_IMAGES) else "other"

    def _add(self, path: Path) -> None:
        image_id = canonical(path.relative_to(self.root).as_posix())
        if image_id in self.images:
            raise ValueError(
                f"dataset.path={self.root} holds {image_id!r} twice, under names that differ in "
                "their Unicode form only; rename or remove one of them"
            )
        self.images[image_id] = path

    def _unreadable(self, error: OSError) -> None:
        self.problems.add(f"a folder cannot be read: {error}", "")
