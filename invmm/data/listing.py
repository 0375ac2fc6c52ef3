"""Lists the images of a folder with the captions, labels and copies in its metadata and texts."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, get_args

from invmm.data.dataset import ImageEntry, ImageError, Split, canonical
from invmm.data.images import read_bytes
from invmm.data.metadata import Columns, Row, read_rows
from invmm.data.problems import Problems, names, short_repr
from invmm.data.values import Tally, caption_of, copies_of, is_absent, label_of
from invmm.data.walk import Walk


class _Listed(NamedTuple):
    """The metadata row that is used for an image, and the name of its file in messages."""

    row: Row
    source: str


@dataclass
class Listing:
    """Reads a folder and its metadata; opens no image, and nothing outside the folder.

    Attributes:
        root: the folder, with its links resolved.
        columns: of the metadata.
        problems: remarks for the user.
    """

    root: Path
    columns: Columns = field(default_factory=Columns)
    problems: Problems = field(default_factory=Problems)

    def __post_init__(self) -> None:
        self._walk = Walk(self.root, self.problems)
        self._captions = Tally("caption", self.columns.caption)
        self._labels = Tally("label", self.columns.label)

    def entries(self, *, recursive: bool) -> list[ImageEntry]:
        """All images that exist or are listed in metadata, sorted by id.

        Raises:
            ValueError: names or metadata are ambiguous, or a column that the user named is missing.
        """
        self._walk.look(recursive=recursive)
        listed, sources = self._listed()
        ids = sorted(self._walk.images.keys() | listed.keys())
        if sources:
            for image_id in ids:
                if image_id not in listed:
                    source = _nearest(image_id, sources)
                    where = f"listed in {source}" if source else "listed in any metadata file"
                    self.problems.add(repr(image_id), f" is not {where}", kind="unlisted")
        entries = [self._entry(image_id, listed.get(image_id)) for image_id in ids]
        for tally in (self._captions, self._labels):
            tally.check()
        self._walk.report(set(listed))
        return entries

    def _entry(self, image_id: str, listed: _Listed | None) -> ImageEntry:
        path = self._path(image_id)
        error = self._error(image_id, path, listed)
        if error is not None:
            self.problems.add(repr(image_id), f": {error}")
        values = listed.row.values if listed else {}
        raw = self.columns.caption_in(values, listed.row.where) if listed else None
        caption = self._value(image_id, caption_of, raw, "caption")
        self._captions.count(raw, caption)
        if caption is None and error is None:
            caption = self._sidecar(path)
        raw = self.columns.label_in(values)
        label = self._value(image_id, label_of, raw, "label")
        self._labels.count(raw, label)
        split, copies = self._split(image_id, values)
        return ImageEntry(
            image_id=image_id,
            path=str(path),
            caption=caption or None,
            label=label,
            split=split,
            copies=copies,
            error=error,
        )

    def _value(self, image_id: str, read: Any, raw: Any, kind: str) -> Any:
        try:
            return read(raw)
        except ValueError as error:
            self.problems.add(repr(image_id), f": {error}", kind=kind)
            return None

    def _path(self, image_id: str) -> Path:
        """The path of an image, whose name on disk may be in NFC or NFD."""
        if (path := self._walk.images.get(image_id)) is not None:
            return path
        forms = (image_id, unicodedata.normalize("NFD", image_id))
        existing = (self.root / form for form in forms if os.path.lexists(self.root / form))
        return next(existing, self.root / image_id)

    def _error(self, image_id: str, path: Path, listed: _Listed | None) -> str | None:
        """Why an image cannot be used; None if it can."""
        if listed and posixpath.isabs(image_id):
            return f"{listed.source} names it by an absolute path; give names relative to that file"
        if listed and ".." in image_id.split("/"):
            return f"{listed.source} names a file outside the data folder"
        if not self._walk.is_inside(path):
            return "the link leads out of the data folder"
        if not os.path.exists(path):
            if listed is None or os.path.islink(path):
                return "the link leads nowhere"
            return f"listed in {listed.source} but missing"
        return None

    def _sidecar(self, path: Path) -> str | None:
        """The caption in a text file of the same name."""
        name = path.with_suffix(".txt").name
        for form in dict.fromkeys((name, canonical(name), unicodedata.normalize("NFD", name))):
            sidecar = path.with_name(form)
            if os.path.isfile(sidecar) and self._walk.is_inside(sidecar):
                try:
                    return read_bytes(sidecar).decode("utf-8-sig").strip()
                except (ImageError, UnicodeDecodeError) as error:
                    reason = error if isinstance(error, ImageError) else "it is not UTF-8 text"
                    self.problems.add(repr(form), f" is not used as a caption: {reason}")
                    return None
        return None

    def _split(self, image_id: str, values: Any) -> tuple[Split, int | None]:
        split = values.get("split")
        if is_absent(split):
            split = "unknown"
        if split not in get_args(Split):
            known, subject = ", ".join(get_args(Split)), repr(image_id)
            self.problems.add(
                subject, f": split {short_repr(split)} is none of {known}", kind="split"
            )
            split = "unknown"
        copies = self._value(image_id, copies_of, values.get("copies"), "copies")
        if copies is None:
            return split, None
        implied: Split = "train" if copies else "held_out"
        if split not in (implied, "unknown"):
            rest = f": split {split} contradicts copies {copies}; {implied} is used"
            self.problems.add(repr(image_id), rest, kind="contradiction")
        return implied, copies

    def _listed(self) -> tuple[dict[str, _Listed], dict[str, str]]:
        """Id -> its row in the nearest metadata file; folder -> its metadata file, for messages.

        Raises:
            ValueError: a file cannot be read, or no file has a column that the user named.
        """
        listed: dict[str, _Listed] = {}
        sources: dict[str, str] = {}
        columns: dict[str, None] = {}
        for path in sorted(self._walk.metadata, key=lambda path: -len(path.parts)):
            folder = path.parent.relative_to(self.root).as_posix()
            source = _shown(path.relative_to(self.root).as_posix())
            try:
                if not self._walk.is_inside(path):
                    raise ImageError("the link leads out of the data folder")
                rows = read_rows(path, source, self.columns, self.problems)
            except ImageError as error:
                self.problems.add(source, f" is not used: {error}")
                continue
            sources[canonical(folder)] = source
            for row in rows:
                columns.update(dict.fromkeys(row.values))
                self._add(self._id(folder, row.name), _Listed(row, source), listed)
        self._check_columns(columns)
        if unread := [column for column in columns if not self.columns.reads(column)]:
            self.problems.add(
                f"columns of the metadata that are not read {names(unread)}; dataset.caption and "
                "dataset.label name those of prompts and classes",
                "",
            )
        return listed, sources

    def _add(self, image_id: str, new: _Listed, listed: dict[str, _Listed]) -> None:
        """Adds a row unless its image has one; files are read from the deepest folder upwards."""
        old = listed.setdefault(image_id, new)
        if old is new:
            return
        if old.source == new.source:
            rest = f": {image_id!r} is listed twice; the first line is used"
            self.problems.add(new.row.where, rest, kind=f"twice in {new.source}")
        else:
            rest = f" is listed in {old.source} and {new.source}; the nearer one is used"
            self.problems.add(repr(image_id), rest)

    def _id(self, folder: str, name: str) -> str:
        """The id of a listed image; a name that leaves the data folder is returned unchanged."""
        written = posixpath.join(folder, name) if folder != "." else name
        image_id = canonical(posixpath.normpath(written))
        if posixpath.isabs(image_id) or image_id.split("/")[0] == "..":
            return name
        if "\\" in image_id and image_id not in self._walk.images:  # as Windows writes names
            with_slashes = image_id.replace("\\", "/")
            return with_slashes if with_slashes in self._walk.images else image_id
        return image_id

    def _check_columns(self, columns: Iterable[str]) -> None:
        present = list(columns)
        for option in ("caption", "label"):
            column = getattr(self.columns, option)
            if column is not None and column not in present:
                if not present:
                    raise ValueError(
                        f"dataset.{option}={column} names a column, but the folder has no "
                        f"metadata; use dataset.{option}=null"
                    )
                raise ValueError(
                    f"dataset.{option}={column} is no column of its metadata; there are "
                    f"{', '.join(present)}; give one of them, or dataset.{option}=null"
                )


def _nearest(image_id: str, sources: dict[str, str]) -> str | None:
    """The metadata file in the folder of an image, or in the nearest folder above that has one."""
    above = [parent.as_posix() for parent in PurePosixPath(image_id).parents]
    return next((sources[folder] for folder in above if folder in sources), None)


def _shown(name: str) -> str:
    """A name for messages, quoted if it holds line breaks or control characters."""
    return name if name.isprintable() else repr(name)
