"""Lists from files: what they hold counts, not how they are named."""

from __future__ import annotations

import json
import pickle

import cloudpickle
import pytest

from invmm.cli.job import HydraJob
from invmm.config import lists
from invmm.config.compose import compose_job, jobs
from invmm.config.runs import run_digest

GIVEN = ("model.path=m", "dataset=cifar10")


def composed(*overrides: str) -> tuple[dict, list[str]]:
    faults: list[str] = []
    jobs([], multirun=False, faults=[])  # as a command begins
    return compose_job("measure", [*GIVEN, *overrides], faults), faults


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "content", "ids"), [
    ("a.txt", "b.png\n\na c.png\r\n#d.png", ["b.png", "a c.png", "#d.png"]),
    ("with space.txt", "\ufeff[1].png\n", ["[1].png"]),
    ("a.json", '["b.png",\n "2"]', ["b.png", "2"]),
    ("any", '["b.png"]', ["b.png"]),
])  # fmt: skip
def test_ids_one_a_line_or_as_json(name, content, ids, here):
    (here / name).write_text(content, encoding="utf-8", newline="")
    config, faults = composed(f"dataset.ids=@{name}")
    assert (config["dataset"]["ids"], faults) == (ids, [])


def test_a_name_that_hydra_needs_in_quotes(here):
    (here / "画像 (1).txt").write_text("b.png")
    assert composed("dataset.ids='@画像 (1).txt'")[0]["dataset"]["ids"] == ["b.png"]


def test_twenty_five_thousand_rows(here):
    rows = list(range(0, 50_000, 2))
    (here / "rows.txt").write_text("\n".join(map(str, rows)))
    (here / "rows.json").write_text(json.dumps(rows))
    configs = [composed(f"dataset.rows=@rows.{form}")[0] for form in ("txt", "json")]
    assert all(config["dataset"]["rows"] == rows for config in configs)
    assert lists.shortened(configs[0])["dataset"]["rows"] == "25,000 from 0 to 49998"


def test_the_content_is_the_identity_not_the_name(here):
    for name, content in (("a.txt", "x.png\ny.png"), ("b.json", '["x.png", "y.png"]')):
        (here / name).write_text(content)
    options = ("dataset.ids=@a.txt", "dataset.ids=@b.json", "dataset.ids=[x.png,y.png]")
    assert len({run_digest("measure", composed(option)[0]) for option in options}) == 1
    before = run_digest("measure", composed("dataset.ids=@a.txt")[0])
    (here / "a.txt").write_text("x.png")
    assert run_digest("measure", composed("dataset.ids=@a.txt")[0]) != before


@pytest.mark.parametrize(("option", "content", "fault"), [
    ("ids=@list.txt", None, "the file is missing; give a text file with one id a line"),
    ("ids=@.", None, "cannot be used: not a regular file"),
    ("ids=@", None, "cannot be used: not a regular file"),
    ("ids=@list.txt", b"", "cannot be used: the file is empty"),
    ("ids=@list.txt", b"\n \n", "is an empty list; give at least one id"),
    ("ids=@list.json", b"[]", "is an empty list; give at least one id"),
    ("ids=@list.json", b'{"a": 1}', "is not a JSON list; give one, or a .txt file with one id a"),
    ("ids=@list.json", b'["a.png", 7]', "entry 2, 7, is no id"),
    ("ids=@list.txt", "é".encode("latin-1"), "is not UTF-8 text; save the list as UTF-8"),
    ("rows=@list.txt", b"1\n2x\n", "entry 2, '2x', is no row number"),
    ("rows=@list.txt", b"1.0\n", "entry 1, '1.0', is no row number"),
    ("rows=@list.json", b"[1, true]", "entry 2, True, is no row number"),
    ("rows=@list.txt", b"[" * 100_000, "is no row number"),
])  # fmt: skip
def test_what_is_no_list_is_one_line_at_the_check(option, content, fault, here):
    if content is not None:
        (here / option.partition("@")[2]).write_bytes(content)
    config, faults = composed(f"dataset.{option}")
    assert config["dataset"][option.partition("=")[0]] is None
    (line,) = faults
    assert line.startswith(f"dataset.{option}")
    assert fault in line
    assert "\n" not in line


def test_a_job_takes_its_lists_along(here):
    """A cluster may begin it hours later, where the file has changed."""
    (here / "a.txt").write_text("x.png")
    submitted = composed("dataset.ids=@a.txt")[0]
    sent = cloudpickle.dumps(HydraJob(print))
    (here / "a.txt").write_text("other.png")
    lists.contents().clear()
    job = pickle.loads(sent)
    assert compose_job("measure", [*GIVEN, "dataset.ids=@a.txt"], []) == submitted
    assert job.launched_by
