"""Values that Hydra cannot read are answered with the argument that it can."""

from __future__ import annotations

import shlex

import pytest

from invmm.config.compose import compose_job, jobs


def read(text: str, *, multirun: bool = False) -> tuple[list[list[str]], list[str], list[str]]:
    faults: list[str] = []
    left_out: list[str] = []
    return jobs([text], multirun=multirun, faults=faults, left_out=left_out), faults, left_out


@pytest.mark.parametrize("value", [
    "unicode_path/画像", "scans (2024)", "scan (1)", "a=b", "~/images", "a'b", 'a"b', 'a"b\\',
    "50% & more!", "low, ugly!", "[画像", "#1", "`x`", "new\nline é",
])  # fmt: skip
def test_the_cure_is_what_a_shell_and_hydra_read_as_the_value(value):
    found, (fault,), left_out = read(f"dataset.path={value}")
    told, _, cure = fault.partition(" cannot be read: ")
    if value.startswith("["):  # a list with a fault in it, or a name: nobody knows
        assert cure == "check its brackets, and put each text within them in quotes"
        assert (found, left_out) == ([[]], ["dataset.path"])
        return
    assert told == f"'dataset.path={value}'"
    (argument,) = shlex.split(cure.removeprefix("give "))
    assert read(argument) == ([[argument]], [], [])
    assert found == [[argument]]  # so that nothing is missing beside it
    assert left_out == []
    config = compose_job("measure", ["model.path=m", "dataset=folder", argument], [])
    assert config["dataset"]["path"] == value


@pytest.mark.parametrize(("text", "multirun", "cure", "expected"), [
    ("dataset.path=a/画,b/写", True, 'dataset.path="a/画","b/写"',
     [['dataset.path="a/画"'], ['dataset.path="b/写"']]),
    ("dataset.path=画, b", True, 'dataset.path="画",b',
     [['dataset.path="画"'], ["dataset.path=b"]]),
    ("dataset.ids=[画.png,b.png]", False, 'dataset.ids=["画.png",b.png]',
     [['dataset.ids=["画.png",b.png]']]),
    ('dataset.ids=[画.png,"b,c.png"]', True, 'dataset.ids=["画.png","b,c.png"]',
     [['dataset.ids=["画.png","b,c.png"]']]),
    ("+prompt.text=画", False, '+prompt.text="画"', [['+prompt.text="画"']]),
])  # fmt: skip
def test_lists_are_quoted_one_by_one(text, multirun, cure, expected):
    found, faults, _ = read(text, multirun=multirun)
    assert faults == [f"'{text}' cannot be read: give {shlex.quote(cure)}"]
    assert found == expected


@pytest.mark.parametrize(("text", "reason"), [
    ("b", "give KEY=VALUE"), ("", "give KEY=VALUE"),
    ("画=1", "'画' is no key; keys are letters, digits, _ and ."),
    ("dataset.ids=[1", "check its brackets, and put each text within them in quotes"),
    ("dataset.take={single:画}", "check its brackets, and put each text within them in quotes"),
])  # fmt: skip
def test_what_quotes_do_not_cure(text, reason):
    found, faults, left_out = read(text)
    assert faults == [f"'{text}' cannot be read: {reason}"]
    assert found == [[]]
    assert left_out == [text.partition("=")[0]]


@pytest.mark.parametrize(("text", "hint"), [
    ("seed=0,1", ""), ("sampler=ddim,euler", ""), ("seed=range(0,3)", ""),
    ("dataset.path=Photos, 2024", ", or give one value in quotes: 'dataset.path=\"Photos, 2024\"'"),
])  # fmt: skip
def test_a_comma_may_belong_to_one_value(text, hint):
    _, faults, _ = read(text)
    cure = f"{text} names several values; add --multirun to run one job each{hint}"
    assert faults == [cure]


@pytest.mark.parametrize("text", ["seed=range(0,0)", "sampler=glob(zz*)", "model.path=glob(x*)"])
def test_a_sweep_without_a_job_is_a_fault(text):
    _, faults, _ = read(text, multirun=True)
    assert faults == [f"{text} names no value, so there is no job to run; name one or more"]


def test_options_may_be_quoted():
    faults: list[str] = []
    config = compose_job("measure", ["model.path=m", 'sampler="euler"'], faults)
    assert faults == []
    assert config["sampler"]["scheduler"] == "euler"
