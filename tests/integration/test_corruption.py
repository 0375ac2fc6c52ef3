"""Random damage to the files of a run or of a model, then the same command.

No traceback, nothing hangs, and a run ends with the records that it had, or is refused in one line.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pipelines
import pytest
import tiny

from invmm.cli import measure

SECONDS = 120
"""After which a command hangs."""
PROBABILITY = (
    "measurement=probability", "measurement.bank_size=24", "measurement.block_size=8",
    "measurement.own_bank_size=8", "measurement.min_count=2", "measurement.num_particles=4",
    "measurement.moves=1", "measurement.max_samples=64", "measurement.repeats=1",
)  # fmt: skip
KINDS = {"inversion": (), "probability": PROBABILITY}


def truncated(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size or 1)])


def flipped(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    for _ in range(rng.randint(1, 3)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def deleted(path: Path, rng: random.Random) -> None:
    path.unlink()


def swapped(path: Path, rng: random.Random) -> None:
    """With a file of the same name elsewhere, if there is one, otherwise with any."""
    root = next(parent for parent in path.parents if (parent / ".root").exists())
    others = [other for other in files_of(root) if other != path]
    other = rng.choice([o for o in others if o.suffix == path.suffix] or others)
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def forbidden(path: Path, rng: random.Random) -> None:
    path.chmod(0)


def piped(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def swollen(path: Path, rng: random.Random) -> None:
    """To a terabyte that takes no room."""
    os.truncate(path, 2**40)


def scrambled(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.choice([0, 1, 8, 100, 5000])))


ODD = (
    None, True, False, "", "x", "x" * 5000, -1, 0, 1, 0.5, 1e30, 2**70, float("nan"), [], {},
    [None], [1, 2, 3, 4], {"a": 1},
)  # fmt: skip


def altered(path: Path, rng: random.Random) -> None:
    """Another value somewhere in a JSON file, if it is one still."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return
    nodes = [content]
    for node in nodes:
        inner = node.values() if isinstance(node, dict) else node[:8]
        nodes += [value for value in inner if isinstance(value, (dict, list)) and value]
    node = rng.choice(nodes)
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    node[key] = rng.choice(ODD)
    path.write_text(json.dumps(content))


DAMAGES = (
    truncated, flipped, deleted, swapped, forbidden, piped, endless, swollen, scrambled, altered,
    altered,
)  # fmt: skip


def files_of(root: Path) -> list[Path]:
    """All that can be damaged, or damaged again."""
    found = [path for path in root.rglob("*") if path.is_file() and path.name != ".root"]
    return sorted(path for path in found if path.stat().st_size < 2**30)


def damage(root: Path, rng: random.Random) -> str:
    """Damages one file below a folder; what was done to which."""
    (root / ".root").touch()
    files = files_of(root)
    kind = rng.choice(DAMAGES)
    path = rng.choice([f for f in files if f.suffix == ".json"] if kind is altered else files)
    kind(path, rng)
    (root / ".root").unlink()
    return f"{path.relative_to(root)} {kind.__name__}"


def ended(arguments: list[str], capsys) -> tuple[int, list[str]]:
    """Exit code and error lines of a command, run in this process."""

    def hangs(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        code = measure.COMMAND.run(arguments[3:])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    errors = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in errors)
    return code, [line for line in errors if line.startswith("invmm: ")]


@pytest.fixture(scope="module", params=KINDS)
def whole(request, model, tmp_path_factory):
    """A run of two images that ended well, and the command that made it."""
    place = tmp_path_factory.mktemp("whole")
    images = tiny.save_images(place / "images", 2)
    command = tiny.command(model, images, place / "run", *KINDS[request.param])
    result = tiny.invmm(command)
    assert result.returncode == 0, result.stderr
    return place / "run", command, tiny.records(place / "run")


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, 110))]
)
def test_a_damaged_run_heals_or_is_refused(seed, whole, tmp_path, capsys):
    run, command, expected = whole
    rng = random.Random(seed)
    kept = shutil.copytree(run, tmp_path / "kept")
    done = []
    try:
        done += [damage(run, rng) for _ in range(rng.choice([1, 1, 3]))]
        code, errors = ended(command, capsys)
        assert (code, len(errors)) in ((0, 0), (2, 1)), (done, code, errors)
        if code == 0:
            assert tiny.records(run) == expected, done
    finally:
        shutil.rmtree(run)
        kept.rename(run)


@pytest.fixture(scope="module", params=["pixel", "latent"])
def damaged_model(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    if request.param == "pixel":
        tiny.save_model(place / "model")
    else:
        pipelines.seeded(pipelines.stable_diffusion).save_pretrained(place / "model")
    prompt = "none" if request.param == "pixel" else "empty"
    return place / "model", tiny.save_images(place / "images", 1), f"prompt={prompt}"


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, 110))]
)
def test_a_damaged_model_is_measured_or_refused(seed, damaged_model, tmp_path, capsys):
    model, images, prompt = damaged_model
    rng = random.Random(seed)
    kept = shutil.copytree(model, tmp_path / "kept")
    done = []
    try:
        done += [damage(model, rng) for _ in range(rng.choice([1, 1, 3]))]
        command = tiny.command(model, images, tmp_path / "run", "inversion.num_steps=5", prompt)
        planned, planned_errors = ended([*command, "dry_run=true"], capsys)
        assert (planned, len(planned_errors)) in ((0, 0), (2, 1)), (done, planned_errors)
        code, errors = ended(command, capsys)
        assert (code, len(errors)) in ((0, 0), (2, 1), (3, 0)), (done, code, errors)
        assert planned == 0 or code == 2, done
    finally:
        shutil.rmtree(model)
        kept.rename(model)
