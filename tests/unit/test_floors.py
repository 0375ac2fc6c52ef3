"""Imports go down the floors only, and each framework stays on its own."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import invmm

PACKAGE = Path(invmm.__file__).parent
FLOORS = (
    {"diffusion"},
    {"engine"},
    {"results"},
    {"inversion", "probability", "baselines"},
    {"models", "data", "replication"},
    {"analysis"},
    {"runtime", "training", "verification"},
    {"config"},
    {"cli"},
)
"""Lowest first."""
HOMES = {
    "hydra": {"cli", "config"},
    "omegaconf": {"cli", "config"},
    "pytorch_lightning": {"runtime", "training"},
    "lightning": {"runtime", "training"},
}
TORCHLESS = {"results"}
"""Rooms that read what a run left, on machines without torch too."""
"""Framework -> the only rooms that may import it."""


def modules() -> dict[str, str]:
    """Module name -> source, of the whole package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path.read_text()
    return found


def imports(source: str) -> Iterator[str]:
    """Every module or name that a source imports, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floors"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "invmm" and len(parts) > 1 else None


def floor(module: str) -> int:
    """Of a module, by its room; -1 for what stands in the package itself, but for its door."""
    if module == "invmm":
        return len(FLOORS)
    name = room(module)
    found = [level for level, rooms in enumerate(FLOORS) if name in rooms]
    return found[0] if found else -1


def breaches(sources: dict[str, str]) -> list[str]:
    """Imports that climb, and frameworks away from home."""
    found = []
    for module, source in sources.items():
        for imported in imports(source):
            if imported.startswith("invmm.") and floor(imported) > floor(module):
                found.append(f"{module} climbs to {imported}")
            homes = HOMES.get(imported.split(".")[0])
            if homes and room(module) not in homes:
                found.append(f"{module} imports {imported}, which belongs to {sorted(homes)}")
            if room(module) in TORCHLESS and "torch" in imported.split("."):
                found.append(f"{module} imports {imported}, and is to do without torch")
    return found


def order(sources: dict[str, str]) -> list[str]:
    """Modules after all that they import; CycleError if there is a circle."""
    graph = {}
    for module, source in sources.items():
        names = set(imports(source))
        prefixes = {name.rpartition(".")[0] for name in names} | names
        graph[module] = (prefixes & sources.keys()) - {module, "invmm"}
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_every_room_has_a_floor():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= set().union(*FLOORS)
    assert len(rooms) >= 10


def test_no_import_climbs_and_frameworks_stay_at_home():
    assert breaches(modules()) == []


def test_there_is_no_circle():
    sources = modules()
    ordered = order(sources)
    assert ordered.index("invmm.diffusion.schedule") < ordered.index("invmm.config.runs")
    assert len(ordered) == len(sources)


@pytest.mark.parametrize(("module", "source"), [
    ("invmm.diffusion.sampling", "from invmm.engine.engine import Engine"),
    ("invmm.engine.engine", "def f():\n    import invmm.runtime.measure"),
    ("invmm.results.records", "from invmm import cli"),
    ("invmm.results.records", "from invmm.inversion import saved"),
    ("invmm.results.records", "def f():\n    from safetensors.torch import load"),
    ("invmm.runtime.measure", "import hydra"),
    ("invmm.runtime.measure", "from omegaconf import OmegaConf"),
    ("invmm.models.pixel", "if True:\n    from pytorch_lightning import Trainer"),
])  # fmt: skip
def test_a_breach_is_seen_wherever_it_stands(module, source):
    assert len(breaches({module: source})) == 1


def test_a_circle_is_seen():
    sources = {
        "invmm.data.a": "from invmm.data.b import thing",
        "invmm.data.b": "def f():\n    from invmm.data import a",
    }
    with pytest.raises(graphlib.CycleError):
        order(sources)


def test_reading_a_run_loads_no_torch():
    names = sorted(name for name in modules() if room(name) in TORCHLESS)
    script = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
