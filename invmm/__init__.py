"""invmm: which training images has a diffusion model memorized, how strongly, and why.

The rooms read in the order of the data flow: images are loaded (`data`), encoded by the model
(`models`), inverted (`inversion`) on the engine (`engine`, `diffusion`), compared (`replication`),
stored (`results`) and looked at (`analysis`). `runtime` is Lightning, `cli` is Hydra.
"""

__version__ = "0.1.0"
