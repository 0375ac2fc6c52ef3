"""Data sets of the Hugging Face hub, parquet files and image folders, by the library `datasets`.

Data sets are not trusted: parquet files are passed to the library one by one, so that a README
cannot point it elsewhere; images are decoded by `invmm.data.images`; and a row that holds a path or
URL instead of an image's bytes is refused.
"""

from __future__ import annotations

import glob
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, MinLen

from invmm.data.dataset import (
    ImageEntry,
    ImageError,
    LoadedImage,
    Split,
    check_selection,
    select,
)
from invmm.data.folder import ImageFolder, OpenFolder
from invmm.data.images import MIN_SIDE, Resize, load_image
from invmm.data.openmoji import cache_folder
from invmm.data.parquet_files import ParquetFiles, is_data
from invmm.data.problems import Problems
from invmm.data.values import Tally, caption_of, is_absent, label_of
from invmm.faults import Refusal
from invmm.files import json_digest, write_atomically


@dataclass(frozen=True, kw_only=True)
class HubImages:
    """Images of a data set on the hub, or of parquet files or an image folder on this machine.

    Attributes:
        path: a hub id such as uoft-cs/cifar10, a parquet file, a folder of them, or an image
            folder (see `ImageFolder`; then image, caption and label name columns of its metadata,
            null finds them, and split is ignored).
        name: the configuration, if the data set has several.
        revision: of a hub repository; refs/convert/parquet is the hub's copy as parquet files.
        split: as in the names of the files: train-00000-of-00001.parquet or train/0000.parquet.
        image: column of the images.
        caption: column of the prompts; null for none.
        label: column of the class numbers; null for none.
        id_column: column of unique ids; null numbers the rows: train-000000, train-000001, ...
        first: use only this many rows from the beginning.
        rows: use only the rows with these numbers, counted from 0.
        streaming: fetch only the rows of `first` or `rows`, not whole files.
        seen: whether the model was trained on the images: train, held_out or unknown.
        num_images: number of images, for dry runs on a machine without the data set.
        size: side of the loaded images; null takes the model's.
        resize: what happens to images that are not square: crop, squash or pad (on white).
        ids: measure only these.
        take: largest number of images to measure of each group: duplicated, single, held_out.

    Raises:
        ValueError: contradictory selections.
    """

    path: Annotated[str, MinLen(1)]
    name: str | None = None
    revision: str | None = None
    split: Annotated[str, MinLen(1)] = "train"
    image: Annotated[str, MinLen(1)] = "image"
    caption: str | None = None
    label: str | None = None
    id_column: str | None = None
    first: Annotated[int, Ge(1)] | None = None
    rows: Annotated[list[Annotated[int, Ge(0)]], MinLen(1)] | None = None
    streaming: bool = False
    seen: Split = "unknown"
    num_images: Annotated[int, Ge(1)] | None = None
    size: Annotated[int, Ge(MIN_SIDE)] | None = None
    resize: Resize = "crop"
    ids: list[str] | None = None
    take: dict[str, int] | None = None

    def __post_init__(self) -> None:
        check_selection(self.ids, self.take)
        if self.first is not None and self.rows is not None:
            raise Refusal(
                "dataset.first and dataset.rows exclude each other; give one of them",
                "dataset.first",
                "dataset.rows",
            )
        if self.rows is not None and len(set(self.rows)) < len(self.rows):
            ((row, _),) = Counter(self.rows).most_common(1)
            raise Refusal(f"dataset.rows names a row twice: {row}; name it once", "dataset.rows")
        if self.streaming and self.first is None and self.rows is None:
            raise Refusal(
                "dataset.streaming=true fetches single rows; give dataset.first or dataset.rows",
                "dataset.streaming",
                "dataset.first",
                "dataset.rows",
            )

    def open(self, size: int) -> OpenRows | OpenFolder:
        """Reads captions, labels and ids; no image is decoded.

        Raises:
            ValueError: the data set, the parquet files of the split or a column is missing.
        """
        root = Path(self.path).expanduser()
        if root.is_dir() and not any(map(is_data, root.rglob("*.parquet"))):
            return self._image_folder(size)
        files, remarks = ParquetFiles(
            path=self.path,
            name=self.name,
            revision=self.revision,
            split=self.split,
            streaming=self.streaming,
            num_images=len(self.ids or self.rows or ()) or self.first or self.num_images,
        ).find()
        if self.streaming:
            files, numbers = [self._streamed(files)], self._wanted(None)
            table = self._table(files)
        else:
            table = self._table(files)
            numbers = self._wanted(len(table))
            table = table.select(numbers)
        problems = Problems()
        entries = self._entries(table, numbers, problems)
        return OpenRows(
            entries=select(entries, ids=self.ids, take=self.take),
            problems=[*remarks, *problems.lines()],
            size=self.size or size,
            resize=self.resize,
            everything=entries,
            table=table.select_columns([self.image]),
            source=f"data set {self.path}",
        )

    def _image_folder(self, size: int) -> OpenFolder:
        opened = ImageFolder(
            path=self.path,
            image=self.image,
            caption=self.caption,
            label=self.label,
            size=self.size,
            resize=self.resize,
        ).open(size)
        numbers = self._wanted(len(opened.entries))
        entries = [opened.entries[number] for number in numbers]
        if self.seen != "unknown":
            entries = [e if e.copies is not None else replace(e, split=self.seen) for e in entries]
        return replace(
            opened, entries=select(entries, ids=self.ids, take=self.take), everything=entries
        )

    def _wanted(self, count: int | None) -> list[int]:
        """Numbers of the chosen rows, counted from 0.

        Args:
            count: rows of the data set; if None, `first` and `rows` are not checked against it.

        Raises:
            ValueError: more rows are chosen than there are.
        """
        chosen = range(self.first) if self.first is not None else self.rows
        if count is None:
            return list(chosen or ())
        if chosen is None:
            return list(range(count))
        if (last := max(chosen)) >= count:
            key = f"first={self.first}" if self.first is not None else f"rows up to {last}"
            raise ValueError(f"dataset.{key} asks for more than the {count} rows of {self.path}")
        return list(chosen)

    def _streamed(self, files: Sequence[str]) -> str:
        """Path of a parquet file in the cache that holds just the chosen rows."""
        wanted = self._wanted(None)
        key = {
            "files": [(file, _version(file)) for file in files],
            "columns": self._columns,
            "rows": wanted,
        }
        cache = cache_folder() / f"rows-{json_digest(key)}.parquet"
        if not cache.is_file():
            last, count, kept, chosen = max(wanted), 0, {}, set(wanted)
            with self._readable() as datasets:
                for row in self._load(datasets, files, streaming=True).take(last + 1):
                    if count in chosen:
                        kept[count] = row
                    count += 1
            content = io.BytesIO()
            rows = datasets.Dataset.from_list([kept[number] for number in self._wanted(count)])
            rows.cast_column(self.image, datasets.Image(decode=False)).to_parquet(content)
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, content.getvalue())
        return str(cache)

    def _table(self, files: Sequence[str]) -> Any:
        """A memory-mapped table of the columns that are needed."""
        import pyarrow.parquet

        try:
            present = pyarrow.parquet.read_schema(files[0]).names
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{files[0]} is no parquet file: {error}") from error
        for key in ("image", "caption", "label", "id_column"):
            column = getattr(self, key)
            if column is not None and column not in present:
                raise ValueError(
                    f"dataset.{key}={column} is no column of {self.path}; there are "
                    f"{', '.join(present)}"
                )
        with self._readable() as datasets:
            return self._load(datasets, files, streaming=False)

    def _load(self, datasets: Any, files: Sequence[str], *, streaming: bool) -> Any:
        table = datasets.load_dataset(
            "parquet",
            data_files={"train": [glob.escape(file) for file in files]},
            split="train",
            columns=self._columns,
            streaming=streaming,
        )
        return table.cast_column(self.image, datasets.Image(decode=False))

    @contextmanager
    def _readable(self) -> Iterator[Any]:
        """Yields the library `datasets`; any exception in the block becomes one line.

        Raises:
            ValueError: in place of the exception, or the library is not installed.
        """
        try:
            import datasets
        except ImportError:
            raise ValueError(
                f"dataset.path={self.path} needs the package datasets; install it by `pip install "
                "'invmm[data]'`"
            ) from None
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        try:
            yield datasets
        except Exception as error:  # whatever a foreign file makes it raise
            reason = " ".join(str(error.__cause__ or error).split())[:400]
            raise ValueError(f"dataset.path={self.path} cannot be read: {reason}") from error

    @property
    def _columns(self) -> list[str]:
        named = (self.image, self.caption, self.label, self.id_column)
        return list(dict.fromkeys(column for column in named if column))

    def _entries(self, table: Any, numbers: Sequence[int], problems: Problems) -> list[ImageEntry]:
        def column(name: str | None) -> Sequence[Any]:
            return table[name][:] if name else [None] * len(numbers)

        counted = [f"{self.split}-{number:06d}" for number in numbers]
        names = [str(value) for value in column(self.id_column)] if self.id_column else counted
        if self.id_column and any(map(is_absent, column(self.id_column))):
            raise ValueError(
                f"dataset.id_column={self.id_column} holds no id in some rows; use "
                "dataset.id_column=null"
            )
        if len(set(names)) < len(names):
            raise ValueError(
                f"dataset.id_column={self.id_column} holds an id twice; use dataset.id_column=null"
            )

        def read(name: str | None, option: str, reader: Callable[[Any], Any]) -> list[Any]:
            values, tally = [], Tally(option, name)
            for image_id, raw in zip(names, column(name), strict=True):
                try:
                    values.append(reader(raw))
                except ValueError as error:
                    values.append(None)
                    problems.add(repr(image_id), f": {error}", kind=option)
                tally.count(raw, values[-1])
            tally.check()
            return values

        captions = read(self.caption, "caption", caption_of)
        labels = read(self.label, "label", label_of)
        return [
            ImageEntry(
                image_id=image_id,
                path=f"{self.path}#{place}",
                caption=caption,
                label=label,
                split=self.seen,
                copies=0 if self.seen == "held_out" else None,
            )
            for place, (image_id, caption, label) in enumerate(
                zip(names, captions, labels, strict=True)
            )
        ]


@dataclass(frozen=True, kw_only=True)
class OpenRows:
    """See `ImageDataset`."""

    entries: Sequence[ImageEntry]
    problems: Sequence[str]
    size: int
    resize: Resize
    everything: Sequence[ImageEntry]
    table: Any
    source: str

    def load(self, entry: ImageEntry) -> LoadedImage:
        """See `ImageDataset`; a path or URL in a row is never opened."""
        image = self.table[int(entry.path.rpartition("#")[2])]
        (value,) = image.values()
        if not value or not value.get("bytes"):
            raise ImageError("the row does not hold an image's bytes; a path in it is not followed")
        return load_image(value["bytes"], size=self.size, resize=self.resize)

    def training_entries(self) -> list[ImageEntry]:
        """All rows that were not held out, with one copy each."""
        return [replace(e, copies=1) for e in self.everything if e.split != "held_out"]


def _version(file: str) -> list[int]:
    """Size and modification time of a local file; [] for a hub address, which names its commit."""
    return [] if "://" in file else [os.stat(file).st_size, os.stat(file).st_mtime_ns]
