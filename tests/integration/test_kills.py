"""SIGKILL at any moment of any command: the same command ends with the same bits.

Each command runs in a process of its own, forked off a server that has imported everything, so that
kills fall into its work and not into its imports.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from invmm.results.seal import contents

TRAINING = (
    "model=unet_tiny", "model.image_size=8", "model.block_out_channels=[8,16]",
    "model.attention_levels=[1]", "training.num_steps=60", "training.batch_size=4",
    "training.export_steps=[20,40]", "training.checkpoint_every=10", "trainer=cpu",
    "trainer.threads_per_device=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def forked():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["diffusers", "invmm.training.train", "invmm.runtime.measure", "invmm.cli.verify"]
    )
    return context


def _work(module: str, arguments: list[str], output: Path) -> None:
    """Runs a command in the child."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = [module, *arguments]
    command: Any = importlib.import_module(f"invmm.cli.{module}")
    (command.COMMAND.main if hasattr(command, "COMMAND") else command.main)()


class Case:
    """A command that begins in a folder, and what it leaves there."""

    def __init__(self, module: str, begin: Callable[[Path], list[str]], left: Callable) -> None:
        self.module, self.begin, self.left = module, begin, left


def start(forked, case: Case, folder: Path, arguments: list[str]):
    output = folder.with_suffix(".txt")
    child = forked.Process(target=_work, args=(case.module, arguments, output))
    child.start()
    return child, output


def finish(forked, case: Case, folder: Path, arguments: list[str], allowed=(0,)) -> float:
    """Seconds that the command took to its end."""
    started = time.monotonic()
    child, output = start(forked, case, folder, arguments)
    child.join(timeout=120)
    assert child.exitcode in allowed, output.read_text()[-2000:]
    return time.monotonic() - started


def sealed(folder: Path) -> tuple[Any, dict[str, str]]:
    """Records with their arrays, and the digests of all that the root hash covers."""
    return tiny.records(folder), contents(folder)


def exported(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.glob("step_*/**/*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def cases(model, images, finished) -> dict[str, Case]:
    run_dir, _ = finished

    def measuring(*overrides: str) -> Callable[[Path], list[str]]:
        def begin(folder: Path) -> list[str]:
            return tiny.command(model, images, folder, "engine.slots=2", *overrides)[3:]

        return begin

    def training(folder: Path) -> list[str]:
        return ["dataset=folder", f"dataset.path={images}", f"run_dir={folder}", *TRAINING]

    def copied(*options: str) -> Callable[[Path], list[str]]:
        def begin(folder: Path) -> list[str]:
            if not folder.exists():
                shutil.copytree(run_dir, folder)
            return [str(folder), *options]

        return begin

    def tables(folder: Path) -> tuple[Any, bytes, bytes]:
        return sealed(folder), *((folder / f"scores.{x}").read_bytes() for x in ("csv", "parquet"))

    options = ("--model", str(model), "--min-threshold", "0.05", "--min-samples", "3")
    return {
        "inversion": Case("measure", measuring(), sealed),
        "trajectory": Case("measure", measuring(*tiny.TRAJECTORY), sealed),
        "bank and splitting": Case("measure", measuring(*tiny.PROBABILITY), sealed),
        "training": Case("train", training, exported),
        "collect": Case("collect", copied(), tables),
        "verify": Case("verify", copied(*options), tables),
    }


KILLS = [
    ("training", 2), ("collect", 2),
    *(
        pytest.param(name, 17, marks=pytest.mark.slow)
        for name in (
            "inversion", "trajectory", "bank and splitting", "training", "collect", "verify"
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kills"), KILLS)
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bits(
    name, kills, cases, forked, tmp_path
):
    case, rng, killed, number = cases[name], random.Random(kills), 0, 0
    arguments = case.begin(tmp_path / "whole")
    seconds = finish(forked, case, tmp_path / "whole", arguments, allowed=(0, 4))
    expected = case.left(tmp_path / "whole")
    while killed < kills:
        number += 1
        folder = tmp_path / f"killed-{number}"
        arguments = case.begin(folder)
        for _ in range(3):
            child, output = start(forked, case, folder, arguments)
            child.join(timeout=rng.uniform(0, seconds))
            killed += child.exitcode is None
            child.kill()
            child.join()
            assert not output.exists() or "Traceback" not in output.read_text()
        finish(forked, case, folder, arguments, allowed=(0, 4))
        assert case.left(folder) == expected
