"""Which images of a set are measured."""

from __future__ import annotations

import pytest

from invmm.data.dataset import ImageEntry, check_selection, select

COPIES = {"a": 0, "b": 1, "c": 8, "d": None, "e": 2, "f": 1, "g": 0}
ENTRIES = [
    ImageEntry(image_id=name, path=name, copies=copies, split="train" if copies else "unknown")
    for name, copies in COPIES.items()
]


def chosen(**options) -> str:
    return "".join(e.image_id for e in select(ENTRIES, **{"ids": None, "take": None, **options}))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "abcdefg"),
        ({"ids": ["f", "a"]}, "fa"),
        ({"take": {"duplicated": 1, "single": 9, "held_out": 1}}, "abcf"),
        ({"take": {"held_out": 2, "single": 0}}, "ag"),
    ],
)
def test_selection(options, expected):
    assert chosen(**options) == expected


def test_an_unknown_id_is_answered_with_the_nearest():
    entries = [ImageEntry(image_id=name, path=name) for name in ("cats/1.png", "dogs/1.png")]
    with pytest.raises(ValueError, match=r"ids names cat/1\.png, .*; did you mean cats/1\.png\?$"):
        select(entries, ids=["cat/1.png"], take=None)


def test_a_selection_of_nothing_is_refused():
    unknown = [ImageEntry(image_id="a", path="a")]
    with pytest.raises(ValueError, match=r"^dataset\.take={'single': 3} leaves no image"):
        select(unknown, ids=None, take={"single": 3})


@pytest.mark.parametrize(
    ("ids", "take", "message"),
    [
        (["a"], {"single": 1}, r"dataset\.ids and dataset\.take exclude each other"),
        ([], None, r"dataset\.ids=\[\] leaves no image"),
        (["a", "b", "a"], None, r"dataset\.ids names a 2 times"),
        (None, {"singles": 1}, r"'singles'; its keys are duplicated, single, held_out"),
        (None, {"single": -1}, r"dataset\.take\.single=-1 is negative"),
    ],
)
def test_contradictory_selections_are_refused(ids, take, message):
    with pytest.raises(ValueError, match=message):
        check_selection(ids, take)


def test_possible_selections_pass():
    for ids, take in ((None, None), (["a", "b"], None), (None, {"single": 0, "held_out": 2})):
        check_selection(ids, take)
