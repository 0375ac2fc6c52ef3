"""Reads metadata.csv, metadata.jsonl and metadata.parquet, which describe the images beside them.

The names of the files and of the column `file_name` are those of image folders in the library
`datasets`.
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
from invmm.data.problems import Problems, short_repr
from invmm.data.values import is_absent

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTIONS = ("text", "caption", "prompt")
"""Columns that may hold captions if the user names none."""
_NONE = ("", "nan", "null", "none", "<na>")
"""Cells of a csv file, in lower case, that libraries write for an absent value."""
MAX_ROWS = 20_000_000
"""A parquet file of more rows is refused: a few bytes can encode any number of equal rows."""


class Row(NamedTuple):
    """The metadata of one image.

    Attributes:
        name: of the image, relative to the folder of the metadata file.
        where: the file and the line or row, for messages.
        values: column -> value.
    """

    name: str
    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns, from the keys dataset.image, dataset.caption and dataset.label.

    Attributes:
        image: column of the file names; COLUMN may also be called COLUMN_file_name, as in
            `datasets`. None takes file_name, or else the only column that may hold names.
        caption: column of the prompts; None takes the `CAPTIONS` column that exists.
        label: column of the class numbers; None takes label.
    """

    image: str | None = None
    caption: str | None = None
    label: str | None = None

    def reads(self, column: str) -> bool:
        """Whether a column is read at all, though perhaps not in every row."""
        known = {"file_name", "image", "label", "copies", "split", *CAPTIONS}
        named = {self.image, self.caption, self.label}
        return column in known | named or column.endswith("_file_name")  # of another picture

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
        candidates = [key for key in values if key == "image" or key.endswith("_file_name")]
        if len(candidates) > 1:
            raise ValueError(_ambiguous(where, candidates, "image"))
        return values[candidates[0]] if candidates else None

    def caption_in(self, values: Mapping[str, Any], where: str) -> Any:
        """The caption of a row as the file holds it.

        Raises:
            ValueError: several columns hold different ones.
        """
        if self.caption is not None:
            return values.get(self.caption)
        cells = {key: values.get(key) for key in CAPTIONS}
        texts = {key: value for key, value in cells.items() if value != "" and not is_absent(value)}
        first = next(iter(texts.values()), None)
        if any(value != first or type(value) is not type(first) for value in texts.values()):
            raise ValueError(_ambiguous(where, list(texts), "caption"))
        return first

    def label_in(self, values: Mapping[str, Any]) -> Any:
        """The label of a row as the file holds it."""
        return values.get(self.label or "label")


def read_rows(path: Path, shown: str, columns: Columns, problems: Problems) -> list[Row]:
    """The usable rows of a metadata file; each other row adds a problem.

    Args:
        path: of the file.
        shown: its name in messages.
        columns: as the user named them.
        problems: gets a remark for each row that cannot be used.

    Raises:
        ImageError: it is no regular file, or empty, or too large.
        ValueError: it cannot be read, names no image, or several columns could be the same one.
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
            problems.add(where, f": {key} {short_repr(name)} is not a name", kind=f"{shown} name")
        else:
            rows.append(Row(name, where, values))
    if parsed and not rows:
        keys = dict.fromkeys(
            k for _, values in parsed if not isinstance(values, str) for k in values
        )
        has = f" (columns: {short_repr(list(keys))})" if keys else ""
        raise ValueError(
            f"{shown} names no image: every {unit} {lacks}{has}; give each one a file_name, or "
            "name the column of the files by dataset.image=COLUMN"
        )
    return rows


def _read_jsonl(content: bytes) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=_with_each_key_once)
            except _KeyTwice as error:
                yield number, f"is not used: it has {short_repr(str(error))} twice"
                continue
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) else {}


class _KeyTwice(Exception):
    """A JSON object has a key twice, of which parsers take either value."""


def _with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _KeyTwice(next(key for key in keys if keys.count(key) > 1))
    return row


def _read_csv(content: bytes) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason}); save it as UTF-8") from error
    # Strict, since a quote that is left open would swallow the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = [name.strip() for name in next(reader, [])]
    if len(header) == 1 and (mark := next((m for m in (";", "\t") if m in header[0]), None)):
        raise ValueError(f"its columns are separated by {mark!r}; save it with commas")
    _check_header([name for name in header if name])
    for cells in reader:
        if len(cells) == len(header):
            values = (None if cell.strip().lower() in _NONE else cell for cell in cells)
            yield reader.line_num, dict(zip(header, values, strict=True))
        elif cells:
            yield (
                reader.line_num,
                f"is not used: its number of cells is not the {len(header)} of the header; put a "
                "caption with a comma or a line break in quotes",
            )


def _read_parquet(content: bytes) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow.parquet
    from pyarrow import types

    with pyarrow.parquet.ParquetFile(io.BytesIO(content)) as file:
        if file.metadata.num_rows > MAX_ROWS:
            raise ValueError(f"it claims {file.metadata.num_rows} rows, more than {MAX_ROWS}")
        _check_header(file.schema_arrow.names)
        not_text = (types.is_binary, types.is_large_binary, types.is_struct)  # whole images
        plain = [f.name for f in file.schema_arrow if not any(test(f.type) for test in not_text)]
        rows = (row for b in file.iter_batches(columns=plain) for row in b.to_pylist())
        yield from enumerate(rows)


_READERS: dict[str, Callable[[bytes], Iterator[tuple[int, Mapping[str, Any] | str]]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _check_header(columns: list[str]) -> None:
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise ValueError(f"its header has {twice[0]} twice; name each column once")


def _ambiguous(where: str, columns: list[str], option: str) -> str:
    cures = " or ".join(f"dataset.{option}={column}" for column in columns)
    return f"{where} has {' and '.join(columns)}; give {cures}"
