"""What metadata.csv, metadata.jsonl and metadata.parquet say of the images beside them.

The names and the key `file_name` are those of the image folders of the library `datasets`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from invmm.data.images import read_bytes
from invmm.data.problems import Problems, shortly
from invmm.data.values import is_absent

FORMS = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTIONS = ("text", "caption", "prompt")
"""Columns of captions where none is named."""
MAX_ROWS = 20_000_000
"""A parquet file of more rows is not read: a few of its bytes can stand for any number of rows."""


class Row(NamedTuple):
    """What is said of one image: (name relative to the file's folder, where it stands, values)."""

    name: str
    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns, as in `dataset.image` and so on; None finds them.

    Attributes:
        image: of the files' names; COLUMN stands for COLUMN_file_name too, as in `datasets`.
        caption: of the prompts.
        label: of the numbers of classes.
    """

    image: str | None = None
    caption: str | None = None
    label: str | None = None

    def name_in(self, values: Mapping[str, Any], where: str) -> Any:
        """The name of a row's image; None if it has none.

        Raises:
            ValueError: several columns may hold it.
        """
        if self.image not in (None, "image"):
            column = self.image if self.image in values else f"{self.image}_file_name"
            return values.get(column)
        if "file_name" in values:
            return values["file_name"]
        found = [key for key in values if key == "image" or key.endswith("_file_name")]
        if len(found) > 1:
            raise ValueError(_choose(where, found, "image"))
        return values[found[0]] if found else None

    def caption_in(self, values: Mapping[str, Any], where: str) -> Any:
        """The caption of a row as it stands there.

        Raises:
            ValueError: several columns hold different ones.
        """
        if self.caption is not None:
            return values.get(self.caption)
        found = {key: values.get(key) for key in CAPTIONS}
        found = {key: value for key, value in found.items() if value != "" and not is_absent(value)}
        first = next(iter(found.values()), None)
        if any(value != first or type(value) is not type(first) for value in found.values()):
            raise ValueError(_choose(where, list(found), "caption"))
        return first

    def label_in(self, values: Mapping[str, Any]) -> Any:
        """The label of a row as it stands there."""
        return values.get(self.label or "label")


def read_rows(path: Path, shown: str, columns: Columns, problems: Problems) -> list[Row]:
    """The rows of a metadata file; those that cannot be used become problems.

    Args:
        path: of the file.
        shown: its name in messages.
        columns: as the person named them.
        problems: to add to.

    Raises:
        ImageError: it is no regular file, or empty, or too large.
        ValueError: it cannot be read, names no image, or lacks a choice of columns.
    """
    content = read_bytes(path)
    try:
        parsed = list(_READERS[path.suffix](content))
    except Exception as error:  # whatever a foreign file makes a parser raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{shown} cannot be read: {reason}") from error
    key = columns.image or "file_name"
    lacks = f"is not a JSON object with {key}" if path.suffix == ".jsonl" else f"has no {key}"
    unit = "row" if path.suffix == ".parquet" else "line"
    rows = []
    for number, values in parsed:
        where = f"{shown}, {unit} {number}"
        if isinstance(values, str):
            problems.add(where, f" {values}", kind=f"{shown} {values}")
            continue
        name = columns.name_in(values, where)
        if is_absent(name):
            problems.add(where, f" {lacks}", kind=f"{shown} {lacks}")
        elif not isinstance(name, str) or not name or "\0" in name:
            problems.add(where, f": {key} {shortly(name)} is not a name", kind=f"{shown} name")
        else:
            rows.append(Row(name, where, values))
    if parsed and not rows:
        keys = dict.fromkeys(
            k for _, values in parsed if not isinstance(values, str) for k in values
        )
        has = f" (columns: {shortly(list(keys))})" if keys else ""
        raise ValueError(
            f"{shown} names no image: every {unit} {lacks}{has}; give each one a file_name, or "
            "name the column of the files by dataset.image=COLUMN"
        )
    return rows


def _read_jsonl(content: bytes) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) else {}


def _read_csv(content: bytes) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason}); save it as UTF-8") from error
    # Strict, since a quote that is left open would swallow the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = [name.strip() for name in next(reader, [])]
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise ValueError(f"its header has {twice[0]} twice; name each column once")
    for cells in reader:
        if len(cells) == len(header):
            yield reader.line_num, {k: cell or None for k, cell in zip(header, cells, strict=True)}
        elif cells:
            yield (
                reader.line_num,
                f"is not used: its cells are not the {len(header)} of the header; a caption with a "
                "comma or a line break needs quotes",
            )


def _read_parquet(content: bytes) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow.parquet
    from pyarrow import types

    with pyarrow.parquet.ParquetFile(io.BytesIO(content)) as file:
        if file.metadata.num_rows > MAX_ROWS:
            raise ValueError(f"it claims {file.metadata.num_rows} rows, more than {MAX_ROWS}")
        no_text = (types.is_binary, types.is_large_binary, types.is_struct)  # whole images
        plain = [f.name for f in file.schema_arrow if not any(test(f.type) for test in no_text)]
        rows = (row for b in file.iter_batches(columns=plain) for row in b.to_pylist())
        yield from enumerate(rows)


_READERS: dict[str, Callable[[bytes], Iterator[tuple[int, Mapping[str, Any] | str]]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _choose(where: str, found: list[str], option: str) -> str:
    cures = " or ".join(f"dataset.{option}={column}" for column in found)
    return f"{where} has {' and '.join(found)}; give {cures}"
