"""The duplication plan."""

from __future__ import annotations

from collections import Counter

import pytest

from invmm.data.duplication import planted, read_plan, shuffled


def test_the_first_images_are_planted():
    assert planted(["a", "b", "c", "d"], [8, 2]) == {"a": 8, "b": 2, "c": 1, "d": 1}
    assert list(planted(["z", "a"], [3])) == ["z", "a"]


def test_the_shuffle_is_a_permutation_that_depends_on_the_seed_alone():
    ids = [str(number) for number in range(50)]
    assert shuffled(ids, 7) == shuffled(ids, 7)
    assert shuffled(ids, 7) != shuffled(ids, 8)
    assert Counter(shuffled(ids, 7)) == Counter(ids)
    firsts = Counter(shuffled(ids[:4], seed)[0] for seed in range(400))
    assert min(firsts.values()) > 60


def test_a_plan_is_read_in_the_order_of_its_lines(tmp_path):
    (tmp_path / "plan.csv").write_text('image_id,copies\nb, 8\n"a,1.png",0\n')
    plan = read_plan(tmp_path / "plan.csv")
    assert list(plan.items()) == [("b", 8), ("a,1.png", 0)]


def test_a_plan_from_a_spreadsheet(tmp_path):
    (tmp_path / "plan.csv").write_bytes(b"\xef\xbb\xbfcopies,image_id\r\n3,a\r\n")
    assert read_plan(tmp_path / "plan.csv") == {"a": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the columns must be image_id and copies"),
        (b"image,copies\na,1\n", "the columns must be image_id and copies"),
        (b"image_id,copies,copies\na,1,2\n", "the columns must be image_id and copies"),
        (b"image_id,copies\n", "names no image"),
        (b"image_id,copies\na,1\nb\n", "line 3: not an image_id and a number of copies"),
        (b"image_id,copies\na,1,9\n", "line 2: not an image_id and a number of copies"),
        (b"image_id,copies\na,-1\n", "line 2: not an image_id and a number of copies"),
        (b"image_id,copies\na,1.5\n", "line 2: not an image_id and a number of copies"),
        (b"image_id,copies\na,1\na,2\n", "line 3: image_id 'a' is empty or stands twice"),
        (b"image_id,copies\n,2\n", "line 2: image_id '' is empty or stands twice"),
        (b"image_id,copies\n\xff,2\n", "cannot be read"),
        (b"image_id,copies\n" + b"a" * 200_000 + b",2\n", "cannot be read"),
    ],
)
def test_a_faulty_plan_is_refused_by_its_line(content, message, tmp_path):
    path = tmp_path / "plan.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)


def test_a_missing_plan_is_a_users_error(tmp_path):
    with pytest.raises(ValueError, match=r"none\.csv cannot be read"):
        read_plan(tmp_path / "none.csv")
