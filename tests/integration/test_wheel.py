"""A plain `pip install .`, used from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[2]
SOURCES = ("invmm", "conf", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        path = ROOT / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, source / name)
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(target), str(source)], check=True)
    (built,) = target.glob("invmm-*.whl")
    return built


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory):
    """Console scripts of an environment with the wheel, and the dependencies of this one."""
    root = tmp_path_factory.mktemp("venv")
    venv.create(root, with_pip=False)
    installed = next(root.glob("lib/python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "--python", str(root), "install", "-q", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    # Behind the wheel in the search path, so that the checkout's editable install does not win.
    (installed / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return root / "bin"


def run(script: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {"PYTHONPATH": "", "PATH": os.environ["PATH"]}
    return tiny.invmm([str(script), *arguments], cwd=cwd, env=clean)


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_every_config(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("invmm/**/*.py")}
    configs = {
        f"invmm/conf/{path.relative_to(ROOT / 'conf').as_posix()}"
        for path in ROOT.glob("conf/**/*.yaml")
    }
    assert len(configs) > 30
    assert modules | configs | {"invmm/conf/__init__.py", "invmm/py.typed"} <= held
    assert not [name for name in held if name.startswith(("conf/", "tests/"))]


@pytest.mark.slow
def test_the_installed_commands_work_in_an_empty_folder(scripts, model, images, tmp_path):
    where = run(scripts / "python", "-c", "import invmm; print(invmm.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(scripts.parent)), where.stderr
    for command in ("invmm", "invmm-train", "invmm-threshold", "invmm-collect"):
        result = run(scripts / command, "--help", cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
    inputs = [f"model.path={model}", "dataset=folder", f"dataset.path={images}"]
    dry = run(scripts / "invmm", *inputs, "dry_run=true", cwd=tmp_path)
    assert (dry.returncode, dry.stderr) == (0, "")
    assert "images: 8 of 8x8 pixels" in dry.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_installed_run_equals_one_from_the_checkout(scripts, finished, model, images, tmp_path):
    run_dir, _ = finished
    _, _, _, *overrides = tiny.command(model, images, tmp_path / "run")
    result = run(scripts / "invmm", *overrides, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert tiny.records(tmp_path / "run") == tiny.records(run_dir)
