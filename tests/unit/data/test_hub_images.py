"""Parquet files, image folders and the hub: what is read, and what must not be opened."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from invmm.data.dataset import ImageError
from invmm.data.folder import ImageFolder
from invmm.data.hub import HubImages
from invmm.data.parquet_files import NotReachedError

pytest.importorskip("datasets")

COLOURS = ("red", "blue", "green", "white", "black")


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("INVMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "arrow"))


@pytest.fixture
def parquet(encoded):
    """(path, colours or whole image values, further columns) -> writes a parquet file."""

    def write(path: Path, images, **columns) -> Path:
        values = [
            {"bytes": encoded(Image.new("RGB", (8, 8), image)), "path": f"{image}.png"}
            if isinstance(image, str)
            else image
            for image in images
        ]
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.table({"image": pyarrow.array(values, kind), **columns})
        pyarrow.parquet.write_table(table, path)
        return path

    return write


def colour(dataset, entry) -> tuple[float, ...]:
    return tuple(dataset.load(entry).pixels[:, 0, 0].tolist())


RED, BLUE = (1.0, -1.0, -1.0), (-1.0, -1.0, 1.0)


def test_rows_have_ids_captions_labels_and_pixels(parquet, tmp_path, encoded):
    path = parquet(
        tmp_path / "odd [name]*/train.parquet", COLOURS[:2],
        text=["a cat", None], label=[3, None], other=[1, 2],
    )  # fmt: skip
    recipe = HubImages(path=str(path), caption="text", label="label", seen="train")
    dataset = pickle.loads(pickle.dumps(recipe.open(4)))
    assert [(e.image_id, e.caption, e.label, e.split) for e in dataset.entries] == [
        ("train-000000", "a cat", 3, "train"),
        ("train-000001", None, None, "train"),
    ]
    assert [colour(dataset, entry) for entry in dataset.entries] == [RED, BLUE]
    loaded = dataset.load(dataset.entries[0])
    assert loaded.pixels.shape == (3, 4, 4)
    alone = tmp_path / "alone" / "red.png"
    alone.parent.mkdir()
    alone.write_bytes(encoded(Image.new("RGB", (8, 8), "red")))
    same = ImageFolder(path=str(alone.parent)).open(4)
    assert loaded.sha256 == same.load(same.entries[0]).sha256
    assert [entry.copies for entry in dataset.training_entries()] == [1, 1]
    assert dataset.source == f"data set {path}"


def test_one_bad_row_is_one_bad_image(parquet, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    rows = [
        "red",
        {"bytes": b"not an image", "path": None},
        {"bytes": None, "path": str(secret)},
        {"bytes": b"", "path": "https://example.org/x.png"},
        None,
        "blue",
    ]
    dataset = HubImages(path=str(parquet(tmp_path / "set" / "train.parquet", rows))).open(8)
    outcomes = []
    for entry in dataset.entries:
        try:
            outcomes.append(colour(dataset, entry))
        except ImageError as error:
            outcomes.append(str(error))
    refused = "the row does not hold an image's bytes; a path in it is not followed"
    assert outcomes == [RED, "not an image in a known format", refused, refused, refused, BLUE]


def test_a_column_of_paths_is_not_followed(tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    pyarrow.parquet.write_table(pyarrow.table({"image": [str(secret)]}), tmp_path / "train.parquet")
    dataset = HubImages(path=str(tmp_path / "train.parquet")).open(8)
    with pytest.raises(ImageError, match="is not followed"):
        dataset.load(dataset.entries[0])


def test_a_column_of_plain_bytes(tmp_path, encoded):
    images = [encoded(Image.new("RGB", (8, 8), "blue"))]
    pyarrow.parquet.write_table(pyarrow.table({"image": images}), tmp_path / "train.parquet")
    dataset = HubImages(path=str(tmp_path)).open(8)
    assert colour(dataset, dataset.entries[0]) == BLUE


def test_files_of_a_split_are_read_in_order(parquet, tmp_path):
    parquet(tmp_path / "data/train-00001-of-00002.parquet", ["blue"])
    parquet(tmp_path / "data/train-00000-of-00002.parquet", ["red"])
    parquet(tmp_path / "data/trainer-00000-of-00001.parquet", ["white"])
    parquet(tmp_path / "data/test-00000-of-00001.parquet", ["green"])
    dataset = HubImages(path=str(tmp_path)).open(8)
    assert [colour(dataset, entry) for entry in dataset.entries] == [RED, BLUE]
    test = HubImages(path=str(tmp_path), split="test", seen="held_out").open(8)
    assert [(e.image_id, e.group) for e in test.entries] == [("test-000000", "held_out")]
    assert test.training_entries() == []


def test_the_layout_of_the_hubs_own_parquet_copies(parquet, tmp_path):
    parquet(tmp_path / "plain/train/0000.parquet", ["red"])
    parquet(tmp_path / "plain/test/0000.parquet", ["green"])
    assert len(HubImages(path=str(tmp_path)).open(8).entries) == 1
    parquet(tmp_path / "noisy/train/0000.parquet", ["blue"])
    with pytest.raises(ValueError, match=r"several configurations; .*one of noisy, plain"):
        HubImages(path=str(tmp_path)).open(8)
    dataset = HubImages(path=str(tmp_path), name="noisy").open(8)
    assert colour(dataset, dataset.entries[0]) == BLUE


@pytest.mark.parametrize("streaming", [False, True])
def test_chosen_rows_keep_their_numbers(streaming, parquet, tmp_path):
    path = str(parquet(tmp_path / "train.parquet", COLOURS, text=list(COLOURS)))
    dataset = HubImages(path=path, caption="text", rows=[4, 1], streaming=streaming).open(8)
    assert [(e.image_id, e.caption) for e in dataset.entries] == [
        ("train-000004", "black"), ("train-000001", "blue"),
    ]  # fmt: skip
    assert colour(dataset, dataset.entries[1]) == BLUE
    first = HubImages(path=path, first=2, streaming=streaming, ids=["train-000001"]).open(8)
    assert [colour(first, entry) for entry in first.entries] == [BLUE]
    for wanted in ({"first": 6}, {"rows": [5]}):
        with pytest.raises(ValueError, match="asks for more than the 5 rows"):
            HubImages(path=path, streaming=streaming, **wanted).open(8)


def test_streamed_rows_are_kept_until_the_files_change(parquet, tmp_path, monkeypatch):
    path = parquet(tmp_path / "train.parquet", COLOURS)
    recipe, load = HubImages(path=str(path), first=2, streaming=True), HubImages._load
    recipe.open(8)
    (kept,) = (tmp_path / "cache").glob("rows-*.parquet")
    assert len(pyarrow.parquet.read_table(kept)) == 2
    streams = []

    def watched(self, datasets, files, *, streaming):
        streams.append(streaming)
        return load(self, datasets, files, streaming=streaming)

    monkeypatch.setattr(HubImages, "_load", watched)
    dataset = recipe.open(8)
    assert [colour(dataset, entry) for entry in dataset.entries] == [RED, BLUE]
    assert streams == [False]
    parquet(path, ["blue", "red", "white"])
    dataset = recipe.open(8)
    assert [colour(dataset, entry) for entry in dataset.entries] == [BLUE, RED]
    assert streams == [False, True, False]


def test_ids_from_a_column(parquet, tmp_path):
    path = parquet(tmp_path / "train.parquet", COLOURS[:2], key=["x", "y"], twice=[7, 7])
    recipe = HubImages(path=str(path), id_column="key")
    assert [entry.image_id for entry in recipe.open(8).entries] == ["x", "y"]
    with pytest.raises(ValueError, match=r"dataset\.id_column=twice holds an id twice"):
        HubImages(path=str(path), id_column="twice").open(8)


def test_an_image_folder_is_read_as_one(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "extra.png")
    (tmp_path / "broken.png").write_bytes(b"junk")
    lines = [{"file_name": name, "text": name} for name in ("a.png", "broken.png", "gone.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dataset = HubImages(path=str(tmp_path), seen="train").open(8)
    assert [(e.image_id, e.caption, e.split, e.error) for e in dataset.entries] == [
        ("a.png", "a.png", "train", None),
        ("broken.png", "broken.png", "train", None),
        ("extra.png", None, "train", None),
        ("gone.png", "gone.png", "train", "listed in metadata.jsonl but missing"),
    ]
    assert list(dataset.problems) == [
        "'extra.png' is not listed in metadata.jsonl",
        "'gone.png': listed in metadata.jsonl but missing",
    ]
    assert len(HubImages(path=str(tmp_path), first=2).open(8).entries) == 2


def test_a_readme_cannot_point_elsewhere(parquet, tmp_path):
    parquet(tmp_path / "outside/train.parquet", ["blue"])
    parquet(tmp_path / "set/train.parquet", ["red"])
    header = "configs:\n- config_name: default\n  data_files: ../outside/train.parquet"
    (tmp_path / "set/README.md").write_text(f"---\n{header}\n---\n")
    dataset = HubImages(path=str(tmp_path / "set")).open(8)
    assert [colour(dataset, entry) for entry in dataset.entries] == [RED]


def test_links_out_of_the_folder_are_left_out(parquet, tmp_path):
    parquet(tmp_path / "outside.parquet", ["blue"])
    parquet(tmp_path / "set/train-0.parquet", ["red"])
    (tmp_path / "set/train-1.parquet").symlink_to(tmp_path / "outside.parquet")
    dataset = HubImages(path=str(tmp_path / "set")).open(8)
    assert [colour(dataset, entry) for entry in dataset.entries] == [RED]
    assert list(dataset.problems) == ["1 parquet files are links that lead out of the data folder"]


@pytest.mark.parametrize(("options", "expected"), [
    ({"image": "picture"}, r"dataset\.image=picture is no column of .*; there are image, text"),
    ({"caption": "prompt"}, r"dataset\.caption=prompt is no column of "),
    ({"split": "test"}, r"no parquet files of dataset\.split=test .*refs/convert/parquet"),
    ({"image": "text"}, "is not followed"),
])  # fmt: skip
def test_what_is_not_there_is_named(options, expected, parquet, tmp_path):
    parquet(tmp_path / "train-0.parquet", ["red"], text=["a"])
    with pytest.raises(ValueError, match=expected):
        (dataset := HubImages(path=str(tmp_path), **options).open(8)).load(dataset.entries[0])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_that_is_no_parquet(streaming, tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"(is no parquet file|cannot be read): "):
        HubImages(path=str(tmp_path), first=1, streaming=streaming).open(8)


@pytest.mark.parametrize(("options", "expected"), [
    ({"first": 1, "rows": [0]}, "exclude each other"),
    ({"rows": [1, 1]}, "names a row twice"),
    ({"streaming": True}, r"give dataset\.first or dataset\.rows"),
])  # fmt: skip
def test_contradictions_are_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        HubImages(path="x", **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_that_cannot_be_reached(streaming, monkeypatch, tmp_path):
    def fail(*args, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    recipe = HubImages(path="some/set", first=9, num_images=50, streaming=streaming)
    with pytest.raises(NotReachedError, match=r"dataset\.path=some/set .*no connection") as caught:
        recipe.open(8)
    assert caught.value.num_images == 9
    with pytest.raises(NotReachedError, match="no hub id") as caught:
        HubImages(path="./nowhere").open(8)
    assert caught.value.num_images is None


def test_only_the_parquet_files_of_the_split_are_fetched(parquet, monkeypatch, tmp_path):
    parquet(tmp_path / "snapshot/blobs/1", ["red"])
    files = tmp_path / "snapshot/plain_text"
    files.mkdir()
    (files / "train-00000-of-00001.parquet").symlink_to("../blobs/1")
    asked = []

    def fetch(name, **options):
        asked.append((name, options))
        return str(tmp_path / "snapshot")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    dataset = HubImages(path="uoft-cs/cifar10", revision="abc").open(8)
    assert [colour(dataset, entry) for entry in dataset.entries] == [RED]
    ((name, options),) = asked
    assert (name, options["repo_type"], options["revision"]) == (
        "uoft-cs/cifar10", "dataset", "abc",
    )  # fmt: skip
    offered = ["README.md", "plain_text/train-0.parquet", "plain_text/test-0.parquet", "train.py"]
    chosen = huggingface_hub.utils.filter_repo_objects(
        offered, allow_patterns=options["allow_patterns"]
    )
    assert list(chosen) == ["plain_text/train-0.parquet"]


def test_without_the_library_its_name_is_given(parquet, tmp_path, monkeypatch):
    path = parquet(tmp_path / "train.parquet", ["red"])
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets; .*'invmm\[data\]'"):
        HubImages(path=str(path)).open(8)


def test_numbers_and_captions_as_pandas_writes_them(parquet, tmp_path):
    nan = float("nan")
    path = str(parquet(
        tmp_path / "train.parquet", COLOURS, text=["a", None, "", "b", "c"],
        label=[1.0, nan, 2.5, -1.0, 4.0], list=[["x"]] * 5, number=[1, 2, 3, 4, 5],
    ))  # fmt: skip
    dataset = HubImages(path=path, caption="text", label="label").open(8)
    assert [(entry.caption, entry.label) for entry in dataset.entries] == [
        ("a", 1), (None, None), (None, None), ("b", None), ("c", 4),
    ]  # fmt: skip
    assert list(dataset.problems) == [
        "'train-000002': label 2.5 is not the number of a class (0, 1, ...); likewise 1 more: "
        "'train-000003'"
    ]
    for column, value in (("list", r"\['x'\]"), ("number", "1")):
        with pytest.raises(
            ValueError, match=rf"^dataset\.caption={column} is .* value is {value};"
        ):
            HubImages(path=path, caption=column).open(8)
    with pytest.raises(ValueError, match=r"^dataset\.label=text is a column without numbers"):
        HubImages(path=path, label="text").open(8)


def test_ids_that_are_not_there_are_refused(parquet, tmp_path):
    path = parquet(tmp_path / "train.parquet", COLOURS[:2], key=["x", None])
    with pytest.raises(ValueError, match=r"dataset\.id_column=key holds no id in some rows"):
        HubImages(path=str(path), id_column="key").open(8)


def test_columns_of_an_image_folder_are_those_of_its_metadata(tmp_path):
    """A metadata.parquet describes the images beside it and is no data set of its own."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    row = {"file_name": ["a.png"], "alt": ["a cat"], "text": ["no"], "kind": [3.0]}
    pyarrow.parquet.write_table(pyarrow.table(row), tmp_path / "metadata.parquet")
    dataset = HubImages(path=str(tmp_path), caption="alt", label="kind").open(8)
    assert [(e.image_id, e.caption, e.label) for e in dataset.entries] == [("a.png", "a cat", 3)]
    with pytest.raises(ValueError, match=r"^dataset\.caption=prompt is no column of its metadata"):
        HubImages(path=str(tmp_path), caption="prompt").open(8)


def test_metadata_beside_parquet_files_is_no_data(parquet, tmp_path):
    parquet(tmp_path / "train/0.parquet", ["red"])
    pyarrow.parquet.write_table(
        pyarrow.table({"file_name": ["a"]}), tmp_path / "train/metadata.parquet"
    )
    dataset = HubImages(path=str(tmp_path)).open(8)
    assert [colour(dataset, entry) for entry in dataset.entries] == [RED]
