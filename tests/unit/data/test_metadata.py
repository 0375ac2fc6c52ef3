"""What the files beside images say of them: every form, and what has no single meaning."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from invmm.data.folder import ImageFolder
from invmm.data.prompt import Prompt

NAN = float("nan")


@pytest.fixture
def folder(tmp_path):
    """(names) -> a folder of such images."""

    def painted(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), "red").save(tmp_path / name, "PNG")
        return tmp_path

    return painted


def write(path: Path, rows: list[dict]) -> None:
    """Metadata in the form that the name asks for, as pandas writes it."""
    frame = pd.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True)


def opened(path: Path, **options):
    return ImageFolder(path=str(path), **options).open(8)


def told(dataset) -> list[tuple]:
    return [(e.image_id, e.caption, e.label, e.copies) for e in dataset.entries]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_each_form_tells_captions_labels_and_copies(form, folder):
    """With missing numbers, so that pandas writes integers as 4.0."""
    root = folder("1.png", "2.png", "3.png")
    rows = [
        {"file_name": "1.png", "text": 'a, "b"\nc', "label": 1, "copies": 4},
        {"file_name": "2.png", "text": None, "label": None, "copies": 0},
        {"file_name": "3.png", "text": "é", "label": 0, "copies": None},
    ]
    write(root / f"metadata.{form}", rows)
    dataset = opened(root)
    assert told(dataset) == [
        ("1.png", 'a, "b"\nc', 1, 4),
        ("2.png", None, None, 0),
        ("3.png", "é", 0, None),
    ]
    assert list(dataset.problems) == []


@pytest.mark.parametrize(("value", "copies"), [
    (4, 4), (4.0, 4), ("4", 4), (" 4.0 ", 4), (0.0, 0), (None, None), (NAN, None), (4.5, "bad"),
    ("4.5", "bad"), (-1, "bad"), (-1.0, "bad"), (True, "bad"), (float("inf"), "bad"), ("x", "bad"),
    (10**400, "bad"), ([4], "bad"),
])  # fmt: skip
def test_numbers_as_people_write_them(value, copies, folder):
    root = folder("1.png")
    row = json.dumps({"file_name": "1.png", "copies": value, "label": value})
    (root / "metadata.jsonl").write_text(row)
    (entry,), problems = (dataset := opened(root)).entries, dataset.problems
    if copies == "bad":
        assert (entry.copies, entry.label, entry.split) == (None, None, "unknown")
        label, number = problems
        assert re.fullmatch(
            r"'1\.png': label .{1,80} is not the number of a class \(0, 1, \.\.\.\)", label
        )
        assert re.fullmatch(r"'1\.png': copies .{1,80} is not a number of copies", number)
    else:
        assert (entry.copies, entry.label, list(problems)) == (copies, copies, [])


def test_metadata_in_subfolders_names_the_images_beside_it(folder):
    root = folder("top.png", "train/1.png", "train/deep/2.png", "test/3.png")
    write(root / "metadata.csv", [
        {"file_name": "top.png", "text": "top"},
        {"file_name": "train/1.png", "text": "far"},
        {"file_name": "train/deep/2.png", "text": "two"},
    ])  # fmt: skip
    write(root / "train/metadata.jsonl", [{"file_name": "1.png", "prompt": "near"}])
    write(root / "test/metadata.parquet", [{"file_name": "./3.png", "caption": "three"}])
    dataset = opened(root)
    assert {e.image_id: e.caption for e in dataset.entries} == {
        "top.png": "top",
        "train/1.png": "near",
        "train/deep/2.png": "two",
        "test/3.png": "three",
    }
    assert list(dataset.problems) == [
        "'train/1.png' is listed in train/metadata.jsonl and metadata.csv; the nearer one is used"
    ]


def test_an_image_that_only_other_folders_metadata_leaves_out_is_named(folder):
    root = folder("a/1.png", "a/x/2.png", "b/3.png")
    write(root / "a/metadata.csv", [{"file_name": "1.png", "text": "one"}])
    assert list(opened(root).problems) == [
        "'a/x/2.png' is not listed in a/metadata.csv; likewise 1 more: 'b/3.png'"
    ]


@pytest.mark.parametrize(("columns", "options"), [
    ({"file_name": "1.png", "prompt": "yes"}, {}),
    ({"file_name": "1.png", "caption": "yes", "text": None}, {}),
    ({"file_name": "1.png", "caption": "yes", "text": "yes"}, {}),
    ({"image": "1.png", "text": "yes"}, {}),
    ({"image_file_name": "1.png", "text": "yes"}, {}),
    ({"file_name": "1.png", "mask_file_name": "m.png", "image": "hash", "text": "yes"}, {}),
    ({"photo": "1.png", "text": "yes"}, {"image": "photo"}),
    ({"photo_file_name": "1.png", "mask_file_name": "m.png", "text": "yes"}, {"image": "photo"}),
    ({"file_name": "1.png", "text": "no", "prompt": "yes"}, {"caption": "prompt"}),
    ({"file_name": "1.png", "alt": "yes", "label": 7, "kind": 3.0},
     {"caption": "alt", "label": "kind"}),
    ({" file_name": "1.png", "text ": "yes"}, {}),
])  # fmt: skip
def test_columns_are_found_or_named(columns, options, folder):
    root = folder("1.png")
    form = "csv" if " file_name" in columns else "parquet"
    write(root / f"metadata.{form}", [columns])
    dataset = opened(root, **options)
    label = 3 if "kind" in columns else None
    assert told(dataset) == [("1.png", "yes", label, None)]
    assert list(dataset.problems) == []


@pytest.mark.parametrize(("row", "options", "refusal"), [
    ({"file_name": "1.png", "text": "a", "prompt": "b"}, {},
     r"metadata\.csv, line 2 has text and prompt; give dataset\.caption=text or dataset\.caption="),
    ({"a_file_name": "1.png", "b_file_name": "1.png"}, {},
     r"metadata\.csv, line 2 has a_file_name and b_file_name; give dataset\.image=a_file_name or"),
    ({"name": "1.png", "text": "a"}, {},
     r"metadata\.csv names no image: every line has no file_name \(columns: \['name', 'text'\]\)"),
    ({"file_name": "1.png", "text": "a"}, {"image": "img"},
     r"metadata\.csv names no image: every line has no img .*dataset\.image=COLUMN"),
    ({"file_name": "1.png", "text": "a"}, {"caption": "alt"},
     r"dataset\.caption=alt is no column of its metadata; there are file_name, text; give one"),
    ({"file_name": "1.png", "text": "a"}, {"label": "cls"},
     r"dataset\.label=cls is no column of .* or dataset\.label=null"),
    ({"file_name": "1.png", "cls": "cat"}, {"label": "cls"},
     r"dataset\.label=cls is a column without numbers of classes: its first value is 'cat'"),
    ({"file_name": "1.png", "text": "a", "text ": "b"}, {}, r"its header has text twice"),
])  # fmt: skip
def test_what_has_no_single_meaning_is_refused(row, options, refusal, folder):
    root = folder("1.png")
    write(root / "metadata.csv", [row])
    with pytest.raises(ValueError, match=refusal) as caught:
        opened(root, **options)
    assert "\n" not in str(caught.value)


def test_a_named_column_without_any_metadata_is_refused(folder):
    with pytest.raises(ValueError, match=r"^dataset\.caption=text names .* has no metadata; use"):
        opened(folder("1.png"), caption="text")


def test_two_forms_in_one_folder_are_refused_by_name(folder):
    root = folder("sub/1.png")
    for form in ("csv", "jsonl"):
        write(root / f"sub/metadata.{form}", [{"file_name": "1.png"}])
    with pytest.raises(ValueError, match=r"has metadata\.csv and metadata\.jsonl .*\(sub\); keep"):
        opened(root)


@pytest.mark.parametrize(("content", "refusal"), [
    ("file_name,text\n1.png,caf\xe9\n".encode("latin-1"), r"cannot be read: it is not UTF-8"),
    ("file_name,text\n1.png,a\n".encode("utf-16"), r"cannot be read: it is not UTF-8"),
    (b'file_name,text\n1.png,"never closed\n2.png,b\n', r"cannot be read: unexpected end of data"),
    (b"file_name;text\n1.png;a\n", r"its columns are separated by ';'; save it with commas$"),
    (b"file_name\ttext\n1.png\ta\n", r"its columns are separated by '\\t'; save it with commas$"),
    (b'file_name,text\n1.png,"a"b\n', r"cannot be read: ',' expected after"),
    (b"file_name,text\n1.png," + b"x" * 200_000 + b"\n", r"cannot be read: field larger than"),
])  # fmt: skip
def test_a_csv_file_that_cannot_be_trusted_is_refused(content, refusal, folder):
    root = folder("1.png")
    (root / "metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"^metadata\.csv .*" + refusal):
        opened(root)


def test_cells_that_are_not_those_of_the_header_are_no_caption(folder):
    """A caption with a comma outside quotes would be cut silently."""
    root = folder("1.png", "2.png", "3.png")
    content = "\ufefffile_name,text\r\n1.png,a, b\r\n\r\n2.png,two\r\n3.png\r\n"
    (root / "metadata.csv").write_text(content, encoding="utf-8", newline="")
    dataset = opened(root)
    assert [entry.caption for entry in dataset.entries] == [None, "two", None]
    cells, unlisted = dataset.problems
    assert cells.startswith("metadata.csv, line 2 is not used: its number of cells is not the 2 of")
    assert cells.endswith("in quotes; likewise 1 more: metadata.csv, line 5")
    assert unlisted == "'1.png' is not listed in metadata.csv; likewise 1 more: '3.png'"


def test_cells_by_which_libraries_write_nothing_are_no_captions(folder):
    """`datasets` reads them so too; the picture would else be measured under the prompt "nan"."""
    cells = ["nan", "NaN", "null", "None", "<NA>", "none of them"]
    root = folder(*(f"{index}.png" for index in range(6)))
    rows = [f"{index}.png,{cell},{cell},{cell}" for index, cell in enumerate(cells[:5])]
    rows = ["file_name,text,label,copies", *rows, f"5.png,{cells[5]},1,2"]
    (root / "metadata.csv").write_text("\n".join(rows))
    dataset = opened(root)
    assert told(dataset) == [
        *((f"{index}.png", None, None, None) for index in range(5)),
        ("5.png", "none of them", 1, 2),
    ]
    assert list(dataset.problems) == []


def test_what_is_told_twice_is_not_read_as_one_of_both(folder):
    root = folder("1.png", "2.png")
    (root / "metadata.jsonl").write_text(
        '{"file_name": "1.png", "text": "a", "text": "b"}\n{"file_name": "2.png", "text": "c"}'
    )
    dataset = opened(root)
    assert [entry.caption for entry in dataset.entries] == [None, "c"]
    assert dataset.problems[0] == "metadata.jsonl, line 1 is not used: it has 'text' twice"
    (root / "metadata.jsonl").unlink()
    columns = [["1.png"], ["a"], ["b"]]
    table = pyarrow.Table.from_arrays(
        [pyarrow.array(column) for column in columns], names=["file_name", "text", "text"]
    )
    pyarrow.parquet.write_table(table, root / "metadata.parquet")
    with pytest.raises(ValueError, match=r"^metadata\.parquet cannot be read: .*has text twice"):
        opened(root)


def test_columns_that_are_not_read_are_named(folder):
    root = folder("1.png")
    row = {"file_name": "1.png", "Text": "a", "description": "b", "class": 1, "copies": 2}
    write(root / "metadata.jsonl", [row])
    (problem,) = opened(root).problems
    assert problem == (
        "columns of the metadata that are not read (3): 'Text', 'description', 'class'; "
        "dataset.caption and dataset.label name those of prompts and classes"
    )
    dataset = opened(root, caption="Text", label="class")
    assert told(dataset) == [("1.png", "a", 1, 2)]
    (problem,) = dataset.problems
    assert "(1): 'description'" in problem


def test_a_text_beside_an_image_that_is_not_utf8_is_no_caption(folder):
    """Its letters would be replaced, and the picture measured under another prompt."""
    root = folder("1.png", "2.png", "3.png", "4.png")
    (root / "1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (root / "2.txt").write_bytes("a dot".encode("utf-16"))
    (root / "3.txt").write_text("\ufeffcaf\xe9\n", encoding="utf-8")
    (root / "4.txt").touch()
    dataset = opened(root)
    assert [entry.caption for entry in dataset.entries] == [None, None, "caf\xe9", None]
    assert list(dataset.problems) == [
        "'1.txt' is not used as a caption: it is not UTF-8 text; likewise 1 more: '2.txt'",
        "'4.txt' is not used as a caption: the file is empty",
    ]


def test_a_parquet_file_that_is_none_or_claims_too_much_is_refused(folder, monkeypatch):
    root = folder("1.png")
    (root / "metadata.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ValueError, match=r"^metadata\.parquet cannot be read: "):
        opened(root)
    write(root / "metadata.parquet", [{"file_name": "1.png"}] * 3)
    monkeypatch.setattr("invmm.data.metadata.MAX_ROWS", 2)
    with pytest.raises(ValueError, match=r"cannot be read: it claims 3 rows, more than 2"):
        opened(root)


def test_images_within_a_parquet_file_of_metadata_are_not_loaded(folder):
    root = folder("1.png")
    table = pyarrow.table({"file_name": ["1.png"], "image": [{"bytes": b"x"}], "thumb": [b"x"]})
    pyarrow.parquet.write_table(table, root / "metadata.parquet")
    assert told(opened(root)) == [("1.png", None, None, None)]


def test_an_empty_file_is_named(folder):
    root = folder("1.png")
    (root / "metadata.csv").touch()
    assert list(opened(root).problems) == ["metadata.csv is not used: the file is empty"]
    (root / "metadata.csv").write_text("file_name,text\n")
    assert list(opened(root).problems) == ["'1.png' is not listed in metadata.csv"]


def test_captions_that_are_no_texts_are_named_and_counted(folder):
    root = folder("0.png", "1.png", "2.png", "3.png")
    texts = (0, 0.5, ["a"], NAN)
    rows = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(texts)]
    (root / "metadata.jsonl").write_text("\n".join(rows))
    dataset = opened(root)
    assert [entry.caption for entry in dataset.entries] == [None] * 4
    assert list(dataset.problems) == [
        "'0.png': caption 0 is not a text; likewise 2 more: '1.png', '2.png'"
    ]
    with pytest.raises(ValueError, match=r"^dataset\.caption=text is a column without captions: "):
        opened(root, caption="text")


def test_repeated_missing_and_outside_rows_are_one_line_each(folder):
    root = folder("1.png")
    names = ["1.png"] * 5 + [f"gone{i}.png" for i in range(9)] + ["../x.png", "/etc/passwd"]
    write(root / "metadata.csv", [{"file_name": name, "text": "a"} for name in names])
    dataset = opened(root)
    assert len(dataset.entries) == 12
    assert list(dataset.problems) == [
        "metadata.csv, line 3: '1.png' is listed twice; the first line is used; likewise 3 more: "
        "metadata.csv, line 4, metadata.csv, line 5, metadata.csv, line 6",
        "'../x.png': metadata.csv names a file outside the data folder",
        "'/etc/passwd': metadata.csv names it by an absolute path; give names relative to that "
        "file",
        "'gone0.png': listed in metadata.csv but missing; likewise 8 more: 'gone1.png', "
        "'gone2.png', 'gone3.png', ...",
    ]


def test_names_that_windows_wrote_and_detours_within_the_folder(folder):
    root = folder("images/1.png", "images/2.png", "meta/3.png")
    write(root / "metadata.csv", [{"file_name": "images\\1.png", "text": "one"}])
    write(root / "meta/metadata.csv", [
        {"file_name": "../images/2.png", "text": "two"}, {"file_name": "3.png", "text": "three"},
    ])  # fmt: skip
    dataset = opened(root)
    assert [entry.caption for entry in dataset.entries] == ["one", "two", "three"]
    assert list(dataset.problems) == []


NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize("on_disk", [NFC, NFD])
@pytest.mark.parametrize("listed", [NFC, NFD])
def test_composed_and_decomposed_names_are_one_image(on_disk, listed, folder):
    root = folder(f"{on_disk}/{on_disk}.png", f"{on_disk}/b.png", f"{on_disk}/.{on_disk}.png")
    names = [f"{listed}/{listed}.png", f"{listed}/.{listed}.png"]
    write(root / "metadata.jsonl", [{"file_name": name, "text": "coffee"} for name in names])
    (root / on_disk / "b.txt").write_text("beside")
    dataset = opened(root)
    assert [(e.image_id, e.caption, e.error) for e in dataset.entries] == [
        (f"{NFC}/.{NFC}.png", "coffee", None),
        (f"{NFC}/b.png", "beside", None),
        (f"{NFC}/{NFC}.png", "coffee", None),
    ]
    assert len({dataset.load(entry).sha256 for entry in dataset.entries}) == 1
    assert len(opened(root, ids=[f"{listed}/{listed}.png"]).entries) == 1
    with pytest.raises(ValueError, match="2 times"):
        ImageFolder(path=str(root), ids=[f"{form}/{form}.png" for form in (NFC, NFD)])


def test_a_text_beside_an_image_in_another_unicode_form(folder):
    root = folder(f"{NFD}.png")
    (root / f"{NFC}.txt").write_text("coffee")
    dataset = opened(root)
    assert (dataset.entries[0].caption, list(dataset.problems)) == ("coffee", [])


def test_two_files_of_one_name_are_refused(folder):
    root = folder(f"{NFD}.png", f"{NFC}.png")
    if len(os.listdir(root)) < 2:
        pytest.skip("this file system keeps one form only")
    with pytest.raises(ValueError, match=rf"holds '{NFC}\.png' twice, .*Unicode form"):
        opened(root)


def test_a_prompt_that_no_image_has_is_refused_at_once(folder):
    entries = opened(folder("1.png", "2.png")).entries
    for kind, cure in (("caption", "prompt=empty"), ("class_label", r"prompt\.label=NUMBER")):
        with pytest.raises(ValueError, match=rf"^prompt={kind} .* none of the 2 images .*{cure}"):
            Prompt(kind=kind).check(entries)
    for harmless in (Prompt(), Prompt(kind="empty"), Prompt(kind="class_label", label=3)):
        harmless.check(entries)
    Prompt(kind="caption").check([])
