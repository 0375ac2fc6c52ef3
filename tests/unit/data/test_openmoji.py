"""Icons: rendering, the distinct subset, its cache, and the plan of copies."""

from __future__ import annotations

import hashlib
import json
import pickle
import unicodedata
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from invmm.data import openmoji
from invmm.data.dataset import DatasetRecipe, ImageError
from invmm.data.openmoji import OpenMoji, distinct_icons, greedily_distinct, named_icons, render


class Thumbnail:
    """A similarity that is cheap: 4x4 averages; counts how many images it saw."""

    seen = 0

    def load(self, device):
        return self

    def identity(self):
        return {"name": "thumbnail"}

    def embed(self, pixels):
        type(self).seen += len(pixels)
        small = torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1)
        return torch.nn.functional.normalize(small - small.mean(1, keepdim=True), dim=1)


@pytest.fixture
def icons(monkeypatch, tmp_path):
    """The first 150 icons, the cheap similarity and an empty cache."""
    first = named_icons()[:150]
    monkeypatch.setattr(openmoji, "named_icons", lambda: first)
    monkeypatch.setattr(openmoji, "SscdOnnx", Thumbnail)
    monkeypatch.setenv("INVMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Thumbnail, "seen", 0)
    return first


SMALL = {"num_train": 6, "num_held_out": 3, "copies": [4, 2], "distinct_threshold": 0.8}


def test_icons_are_single_code_points_with_a_name():
    found = named_icons()
    assert "1f600" in found
    assert not any("-" in image_id for image_id in found)
    assert found == sorted(set(found), key=lambda image_id: int(image_id, 16))
    assert len(found) > 1400


def test_icons_are_drawn_on_white_at_any_size():
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">'
        '<rect x="0" y="0" width="4" height="4" fill="#ff0000"/>'
        '<rect x="4" y="4" width="4" height="4" fill="#0000ff" fill-opacity="0.2"/></svg>'
    )
    for size in (8, 16):
        pixels, half = render(svg, size), size // 2
        assert pixels.shape == (3, size, size)
        assert (torch.tensor([1.0, -1, -1]) == pixels[:, :half, :half].flatten(1).T).all()
        assert (pixels[:, :half, half:] == 1).all()
        veil = pixels[:, half:, half:].flatten(1)
        assert torch.allclose(veil.T, torch.tensor([0.6, 0.6, 1.0]), atol=0.01)


def test_greedily_distinct_keeps_the_first_of_each_kind():
    angles = torch.deg2rad(torch.tensor([0.0, 50, 70, 130, 10, 200]))
    vectors = torch.stack([angles.cos(), angles.sin()], 1)
    assert greedily_distinct(vectors, 0.5) == [0, 2, 5]
    assert greedily_distinct(vectors, 0.99) == [0, 1, 2, 3, 4, 5]
    assert greedily_distinct(vectors, -1.0) == [0]


def test_kept_icons_are_distinct_by_sscd_and_dropped_ones_are_not(icons, monkeypatch):
    monkeypatch.undo()
    some = icons[60:120]
    kept = greedily_distinct(vectors := openmoji._embeddings(some, 16), 0.5)
    similarity = vectors @ vectors.T
    assert 5 < len(kept) < len(some) - 5
    for index in range(len(some)):
        closest = max((similarity[index, k].item() for k in kept if k < index), default=-1)
        assert (closest < 0.5) == (index in kept)


def test_the_list_is_computed_once(icons, tmp_path):
    kept = distinct_icons(16, 0.8)
    assert Thumbnail.seen == 150
    assert 10 < len(kept) < 150
    assert set(kept) <= set(icons)
    assert distinct_icons(16, 0.8) == kept
    assert Thumbnail.seen == 150
    assert len(distinct_icons(16, 0.9)) > len(kept)
    assert distinct_icons(24, 0.8)
    assert Thumbnail.seen == 450
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-30],
        lambda content: b"[]",
        lambda content: b"\xff",
        lambda content: json.dumps({**json.loads(content), "icons": ["1f600"]}).encode(),
        lambda content: b'{"icons": null, "sha256": ""}',
    ],
    ids=["empty", "cut", "list", "binary", "shortened", "null"],
)
def test_a_damaged_cache_is_computed_again(damage, icons, tmp_path):
    kept = distinct_icons(16, 0.8)
    (cache,) = (tmp_path / "cache").iterdir()
    whole = cache.read_bytes()
    cache.write_bytes(damage(whole))
    assert distinct_icons(16, 0.8) == kept
    assert Thumbnail.seen == 300
    assert cache.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_time_only(icons, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert distinct_icons(16, 0.8) == distinct_icons(16, 0.8)
    assert Thumbnail.seen == 300


def test_the_plan_of_copies(icons):
    dataset = OpenMoji(**SMALL).open(16)
    assert Counter(entry.copies for entry in dataset.entries) == {4: 1, 2: 1, 1: 4, 0: 3}
    assert {(entry.split, entry.copies == 0) for entry in dataset.entries} == {
        ("train", False),
        ("held_out", True),
    }
    assert len({entry.image_id for entry in dataset.entries}) == 9
    assert dataset.training_entries() == [entry for entry in dataset.entries if entry.copies]
    assert "CC BY-SA 4.0" in dataset.source


def test_the_seed_alone_chooses_the_icons(icons):
    one, same, other = (OpenMoji(**SMALL, seed=seed).open(16).entries for seed in (1, 1, 2))
    assert list(one) == list(same)
    assert {entry.image_id for entry in one} != {entry.image_id for entry in other}


def test_more_held_out_icons_change_no_training_icon(icons):
    few = OpenMoji(**SMALL).open(16).training_entries()
    more = OpenMoji(**{**SMALL, "num_held_out": 9}).open(16).training_entries()
    assert few == more


def test_an_entry_and_its_pixels(icons):
    dataset = pickle.loads(pickle.dumps(OpenMoji(**SMALL).open(16)))
    entry = next(entry for entry in dataset.entries if entry.copies == 4)
    code = int(entry.image_id, 16)
    assert entry.path == f"openmoji:{code:04X}"
    assert entry.caption == unicodedata.name(chr(code)).lower()
    loaded = dataset.load(entry)
    assert loaded.pixels.shape == (3, 16, 16)
    svg = openmoji._svg_folder() / f"{code:04X}.svg"
    assert loaded.sha256 == hashlib.sha256(svg.read_bytes()).hexdigest()
    assert torch.equal(loaded.pixels, render(svg.read_text(), 16))


def test_an_icon_that_is_gone_is_an_image_error(icons, monkeypatch, tmp_path):
    dataset = OpenMoji(**SMALL).open(16)
    monkeypatch.setattr(openmoji, "_svg_folder", lambda: tmp_path)
    with pytest.raises(ImageError, match="the icon cannot be read"):
        dataset.load(dataset.entries[0])


def test_take_and_ids_leave_the_training_set_alone(icons):
    whole = OpenMoji(**SMALL).open(16)
    taken = OpenMoji(**SMALL, take={"duplicated": 1, "held_out": 2}).open(16)
    assert Counter(entry.copies for entry in taken.entries) == {4: 1, 0: 2}
    named = OpenMoji(**SMALL, ids=[whole.entries[7].image_id]).open(16)
    assert list(named.entries) == [whole.entries[7]]
    assert taken.training_entries() == named.training_entries() == whole.training_entries()


def test_the_plan_may_come_from_a_file(icons, tmp_path):
    kept = distinct_icons(16, 0.8)
    plan = tmp_path / "plan.csv"
    plan.write_text(f"image_id,copies\n{kept[3]},5\n{kept[1]},0\n")
    dataset = OpenMoji(**{**SMALL, "copies_file": str(plan)}).open(16)
    assert [(entry.image_id, entry.copies) for entry in dataset.entries] == [
        (kept[3], 5),
        (kept[1], 0),
    ]
    plan.write_text("image_id,copies\nnot-an-icon,5\n")
    with pytest.raises(ValueError, match="names not-an-icon, which is not among the distinct"):
        OpenMoji(**{**SMALL, "copies_file": str(plan)}).open(16)


def test_more_icons_than_there_are(icons):
    recipe = OpenMoji(**{**SMALL, "num_held_out": 500})
    with pytest.raises(ValueError, match=r"num_train=6 and dataset\.num_held_out=500 ask for more"):
        recipe.open(16)


def test_more_copies_than_icons_are_refused_at_once():
    with pytest.raises(ValueError, match=r"copies=\[2, 2\] has 2 numbers for dataset\.num_train=1"):
        OpenMoji(num_train=1, copies=[2, 2])


def test_the_preset_holds_the_defaults():
    preset = yaml.safe_load(Path("conf/dataset/openmoji.yaml").read_text())
    assert preset.pop("_target_") == f"{OpenMoji.__module__}.{OpenMoji.__qualname__}"
    assert preset == {field.name: getattr(OpenMoji(), field.name) for field in fields(OpenMoji)}
    assert isinstance(OpenMoji(), DatasetRecipe)
