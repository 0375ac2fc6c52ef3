"""The one table of exit codes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from invmm.exits import HELP, Exit, worst

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("codes", "expected"), [
    ([], 0), ([0, 0], 0), ([0, 4], 4), ([4, 1, 0], 1), ([1, 3, 4], 3), ([3, 2, 1], 2),
    ([2, 130], 130), ([143, 2, 3], 143), ([130, 143], 143), ([137, 2], 137),
])  # fmt: skip
def test_the_most_urgent_code_is_the_sweep_s(codes, expected):
    assert worst(codes) == expected
    assert worst(reversed(codes)) == expected


def test_help_and_documentation_list_every_code():
    table = (ROOT / "docs" / "commands.md").read_text().split("## Exit codes")[1]
    documented = [int(code) for row in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE)
                  for code in row.split(",")]  # fmt: skip
    assert documented == [code.value for code in Exit] == [0, 1, 2, 3, 4, 130, 143]
    assert [int(code) for code in re.findall(r"\b\d+\b", HELP)] == documented
