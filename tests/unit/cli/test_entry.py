"""How every command ends."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
import tiny

from invmm.cli.entry import run_command

TALKATIVE = """
import sys
from invmm.cli.entry import run_command

def action():
    for line in range(20_000):
        print(f"line {line}", flush=line % 2 == 0)
    print("still at work", file=sys.stderr)
    return 3

sys.exit(run_command("invmm", action))
"""


def raising(error: BaseException):
    def action() -> int:
        raise error

    return action


@pytest.mark.parametrize(("error", "code", "line"), [
    (ValueError("seed=x is wrong"), 2, "invmm: seed=x is wrong\n"),
    (OSError(28, "No space left"), 2, "invmm: [Errno 28] No space left\n"),
    (KeyboardInterrupt(), 130, ""),
])  # fmt: skip
def test_what_goes_wrong_has_a_code_and_a_line(error, code, line, capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://nowhere.to_be_found")
    assert run_command("invmm", raising(error)) == code
    assert capsys.readouterr() == ("", line)
    assert os.environ["MPLBACKEND"] == "Agg"


def test_faults_of_the_program_and_usage_errors_pass(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    with pytest.raises(ZeroDivisionError):
        run_command("invmm", raising(ZeroDivisionError()))
    with pytest.raises(SystemExit) as end:
        run_command("invmm", raising(SystemExit(2)))
    assert end.value.code == 2


def test_a_reader_that_leaves_neither_ends_nor_changes_a_command():
    process = subprocess.Popen(
        [sys.executable, "-c", TALKATIVE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.stderr.read() == "still at work\n"
    assert process.wait(timeout=30) == 3


def test_streams_that_are_closed_from_the_start(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert run_command("invmm", lambda: print("nobody hears it") or 0) == 0


@pytest.mark.parametrize("arguments", [["--bogus"], ["run", "--num-samples", "0"]])
def test_usage_errors_are_faults(arguments, tmp_path):
    result = tiny.invmm([sys.executable, "-m", "invmm.cli.verify", *arguments], cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
