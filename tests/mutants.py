"""Which mutants of the package the tests kill (`make mutants`).

A mutant has one operator, comparison, number, branch or decorator changed by Cosmic Ray. Each is
made in a copy of the working tree and meets the quick tests of its room, then, if it lives, those
of the rooms that build on it.
"""

from __future__ import annotations

import argparse
import ast
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from cosmic_ray.commands.init import _all_work_items as all_work_items
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_item import MutationSpec, TestOutcome

ROOT = Path(__file__).parents[1]
ROOMS = ("inversion", "probability", "diffusion", "engine", "models", "analysis")
BEYOND = {
    "inversion": "tests/contract/test_engine.py tests/contract/test_searched_prompts.py "
    "tests/integration/test_replay_runs.py",
    "probability": "tests/integration/test_probability.py",
    "diffusion": "tests/contract",
    "engine": "tests/unit/inversion tests/unit/probability tests/contract",
    "models": "tests/contract",
    "analysis": "tests/unit/test_studies.py",
}
"""Room -> the tests of the rooms that use it."""
SETTINGS = "tests/unit/config/test_settings_page.py tests/unit/config/test_defaults.py"
"""The tests of every room's settings."""
EQUIVALENT = (
    "ReplaceComparisonOperator_Is_Eq", "ReplaceComparisonOperator_IsNot_NotEq",
    "ReplaceComparisonOperator_Eq_Is", "ReplaceComparisonOperator_NotEq_IsNot",
)  # fmt: skip
"""Change nothing for None, and for most short values."""
FLAGS = ("frozen", "kw_only", "eq", "strict")
"""Arguments of dataclasses and `zip` that only guard against mistakes in the code itself."""


def main() -> int:
    """Prints a line for each mutant, the share killed in each room, and what survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of mutants")
    parser.add_argument("--count", type=int, default=60, help="how many of them")
    given = parser.parse_args()
    chosen = choose(given.seed, given.count)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with (
        tempfile.TemporaryDirectory() as place,
        multiprocessing.get_context("spawn").Pool(2, enter_copy, (place,)) as pool,
    ):
        limits = dict(pool.imap_unordered(time_limit, ROOMS))
        if faulty := [room for room in ROOMS if limits[room] is None]:
            print(f"the tests of {', '.join(faulty)} fail without a mutant; run `make test`")
            return 2
        work = [(spec, limits[room_of(spec)]) for spec in chosen]
        ended = []
        for spec, is_killed, diff in pool.imap_unordered(tried, work):
            ended.append((spec, is_killed, diff))
            verdict = "killed" if is_killed else "SURVIVED"
            print(f"{len(ended):4} of {len(chosen)} {verdict:8} {named(spec)}", flush=True)
    killed = Counter(room_of(spec) for spec, is_killed, _ in ended if is_killed)
    of = Counter(room_of(spec) for spec in chosen)
    for _, is_killed, diff in sorted(ended, key=lambda found: named(found[0])):
        if not is_killed:
            print(f"\n{diff}")
    print(*(f"{room:12} {killed[room]} of {of[room]} killed" for room in ROOMS), sep="\n")
    print(f"{'all':12} {killed.total()} of {of.total()} killed (seed {given.seed})")
    return 0


def choose(seed: int, count: int) -> list[MutationSpec]:
    """Mutants at places drawn at random, one a place."""
    places: dict[tuple, list[MutationSpec]] = {}
    for room in ROOMS:
        for path in sorted((ROOT / "invmm" / room).rglob("*.py")):
            hints, flags = type_hints(path), guards(path)
            for item in all_work_items([path.relative_to(ROOT)], {}):
                (spec,) = item.mutations
                family = spec.operator_name.removeprefix("core/").split("_")[0]
                is_hint = "BitOr" in spec.operator_name and spec.start_pos[0] in hints
                is_idle = is_hint or spec.start_pos in flags
                if not is_idle and not spec.operator_name.endswith(EQUIVALENT):
                    place = (spec.module_path, spec.start_pos, spec.end_pos, family)
                    places.setdefault(place, []).append(spec)
    rng = random.Random(seed)
    return [rng.choice(places[place]) for place in rng.sample(sorted(places), count)]


def type_hints(path: Path) -> set[int]:
    """The lines of a file that hold type hints."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    hints = [getattr(node, name, None) for node in nodes for name in ("annotation", "returns")]
    return {
        line for hint in hints if hint for line in range(hint.lineno, (hint.end_lineno or 0) + 1)
    }


def guards(path: Path) -> set[tuple[int, int]]:
    """Where in a file the values of `FLAGS` stand, as line and column."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    values = [n.value for n in nodes if isinstance(n, ast.keyword) and n.arg in FLAGS]
    return {(value.lineno, value.col_offset) for value in values}


def room_of(spec: MutationSpec) -> str:
    """The folder of the package that a mutant is in."""
    return spec.module_path.parts[1]


def named(spec: MutationSpec) -> str:
    """Where a mutant is, and what it changes."""
    return f"{spec.module_path}:{spec.start_pos[0]} {spec.operator_name.removeprefix('core/')}"


def enter_copy(place: str) -> None:
    """Puts this process into a copy of the working tree, from which its tests import."""
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT
    )
    copy = Path(place) / str(os.getpid())
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)


def tests(paths: str) -> str:
    """The command that runs quick tests until one fails."""
    return f"{sys.executable} -m pytest -q -x -p no:cacheprovider -m 'not slow and not gpu' {paths}"


def own_tests(room: str, module: str = "") -> str:
    """The command for those of a room, those named after the module first."""
    named_after = sorted(Path("tests/unit", room).glob(f"test_{module}.py"))
    return tests(" ".join(map(str, [*named_after, f"tests/unit/{room}"])))


def time_limit(room: str) -> tuple[str, float | None]:
    """A room, and the seconds after which a mutant in it is taken to hang; None if tests fail."""
    started = time.monotonic()
    for command in (own_tests(room), tests(f"{BEYOND[room]} {SETTINGS}")):
        if subprocess.run(command, shell=True, capture_output=True, check=False).returncode:
            return room, None
    return room, 60 + 3 * (time.monotonic() - started)


def tried(work: tuple[MutationSpec, float]) -> tuple[MutationSpec, bool, str]:
    """A mutant, whether the tests kill it, and its change."""
    spec, limit = work
    room = room_of(spec)
    for command in (own_tests(room, spec.module_path.stem), tests(f"{BEYOND[room]} {SETTINGS}")):
        found = mutate_and_test([spec], command, limit)
        if found.test_outcome is not TestOutcome.SURVIVED:
            break
    return spec, found.test_outcome is not TestOutcome.SURVIVED, found.diff or ""


if __name__ == "__main__":
    sys.exit(main())
