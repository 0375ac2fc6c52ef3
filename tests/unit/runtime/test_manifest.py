"""A manifest says what a run was made of, and refuses to go on with other inputs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import written

from invmm.replication.correlation import PixelCorrelation
from invmm.replication.replication import Replication
from invmm.results.ownership import OwnedRunFolder
from invmm.runtime.manifest import Inputs, write_manifest

INPUTS = Inputs(
    model={"unet/weights.safetensors": "aa"},
    model_settings={"unet/config.json": "cc"},
    similarity={"name": "sscd", "size": 128},
    second_opinion={"name": "pixel_correlation", "size": "as is"},
    dataset="d1",
)


@pytest.fixture
def folder(tmp_path):
    with OwnedRunFolder(tmp_path / "run", config=written.CONFIG, digest="d") as folder:
        yield folder


def write(folder, inputs=INPUTS, problems=()):
    write_manifest(folder, inputs, config=written.CONFIG, seed=3, problems=list(problems))


def test_it_says_what_was_run_on_what(folder):
    write(folder, problems=["b.png is listed but missing"])
    manifest = json.loads((folder.path / "manifest.json").read_text())
    assert manifest["config"] == written.CONFIG
    assert manifest["config_digest"] == "d"
    assert manifest["seed"] == 3
    assert manifest["inputs"]["model"] == {"unet/weights.safetensors": "aa"}
    assert manifest["dataset_problems"] == ["b.png is listed but missing"]
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0] or (
        manifest["versions"]["torch"] == torch.__version__
    )
    assert manifest["hardware"]["threads"] == torch.get_num_threads()
    assert set(manifest) >= {"started", "git"}


def test_the_same_inputs_go_on_and_keep_the_first_manifest(folder):
    write(folder)
    before = (folder.path / "manifest.json").read_bytes()
    write(folder)
    assert (folder.path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"unet/weights.safetensors": "bb"}},
         r"model\.unet/weights\.safetensors was aa and is bb"),
        ({"model_settings": {"unet/config.json": "dd"}},
         r"model_settings\.unet/config\.json was cc and is dd"),
        ({"similarity": {"name": "sscd", "size": 64}}, r"similarity\.size was 128 and is 64"),
        ({"second_opinion": None}, "second_opinion was .* and is None"),
        ({"dataset": "d2"}, "dataset was d1 and is d2"),
    ],
)  # fmt: skip
def test_other_inputs_are_refused_by_name(folder, change, said):
    write(folder)
    with pytest.raises(ValueError, match=said):
        write(folder, replace(INPUTS, **change))


def test_a_manifest_from_before_the_settings_were_hashed_goes_on(folder):
    write(folder)
    path = folder.path / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["inputs"]["model_settings"]
    path.write_text(json.dumps(manifest))
    write(folder, replace(INPUTS, model_settings={"unet/config.json": "dd"}))
    with pytest.raises(ValueError, match="dataset was d1"):
        write(folder, replace(INPUTS, dataset="d2"))


@pytest.mark.parametrize("content", ["[]", "{", "[" * 10**5])
def test_a_damaged_manifest_is_said(folder, content):
    (folder.path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        write(folder)


@pytest.mark.parametrize(
    "change",
    [{"inputs": None}, {"inputs": [1]}, {"seed": 4}, {"seed": None}, {"config_digest": "x"}],
)
def test_an_altered_manifest_is_said(folder, change):
    write(folder)
    path = folder.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        write(folder)


def test_a_manifest_that_was_taken_away_from_records_is_said(folder):
    place = folder.record_folder("a")
    place.mkdir(parents=True)
    (place / "record.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest.json is missing, so that nothing says"):
        write(folder)


def test_inputs_are_read_from_the_recipes():
    class Model:
        def fingerprint(self):
            return {"weights": "aa"}

        def settings(self):
            return {"unet/config.json": "bb"}

    class Dataset:
        entries = (written.entry("a"),)

    similarity = PixelCorrelation(size=8)
    alone = Inputs.of(Model(), Replication(similarity=similarity), Dataset())
    assert alone.second_opinion is None
    assert (alone.model, alone.model_settings) == (
        {"weights": "aa"}, {"unet/config.json": "bb"},
    )  # fmt: skip
    assert alone.similarity == {"name": "pixel_correlation", "size": 8}
    both = Replication(similarity=similarity, second_opinion=PixelCorrelation())
    assert Inputs.of(Model(), both, Dataset()).second_opinion == PixelCorrelation().identity()
    Dataset.entries = (written.entry("a", copies=2),)
    assert Inputs.of(Model(), both, Dataset()).dataset != alone.dataset
