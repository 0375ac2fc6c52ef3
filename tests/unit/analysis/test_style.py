"""Figures need no backend, and leave a notebook its own."""

from __future__ import annotations

import subprocess
import sys

DRAW = """
import os, sys
from pathlib import Path
from invmm.analysis.style import save_figure, style, subplots

with style():
    figure, axis = subplots(figsize=(2, 2))
    axis.plot([0, 1])
    save_figure(figure, Path("figure.png"))
import matplotlib
print("matplotlib.pyplot" in sys.modules, os.environ["MPLBACKEND"], matplotlib.get_backend())
"""


def drawn(tmp_path, backend: str, before: str = "") -> str:
    environment = {"PATH": "", "MPLBACKEND": backend, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", before + DRAW]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    return result.stdout


def test_a_backend_that_is_not_installed_does_not_matter(tmp_path):
    missing = "module://matplotlib_inlined.backend_inline"
    assert drawn(tmp_path, missing).startswith(f"False {missing} ")


def test_a_backend_that_is_stays(tmp_path):
    """Whether matplotlib came first or the figure."""
    (tmp_path / "mine.py").write_text("from matplotlib.backends.backend_svg import *\n")
    before = "import sys; sys.path.insert(0, '.')\n"
    backend = "module://mine"
    assert drawn(tmp_path, backend, before) == f"False {backend} {backend}\n"
    chosen = before + "import matplotlib; matplotlib.use('pdf')\n"
    assert drawn(tmp_path, backend, chosen).split()[-1].lower() == "pdf"
