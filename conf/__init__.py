"""Hydra configs; installed as the package invmm.conf."""
