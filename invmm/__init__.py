"""invmm: which training images has a diffusion model memorized, how strongly, and why.

The rooms read in the order of the data flow: images are loaded (`data`), encoded by the model
(`models`), inverted (`inversion`) on the engine (`engine`, `diffusion`), compared (`replication`),
stored (`results`) and looked at (`analysis`). `runtime` is Lightning, `cli` is Hydra.

From Python: `invmm.measure(pipeline, images)`.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports torch and diffusers only for those who measure."""
    if name == "measure":
        from invmm.cli.api import measure

        return measure
    raise AttributeError(f"module 'invmm' has no attribute {name!r}")
