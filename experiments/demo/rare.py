"""Prints the planted icons that too few free samples replicate for a count, as a list of ids."""

from __future__ import annotations

from pathlib import Path

from invmm.analysis.study import read_run

ENOUGH = 10

if __name__ == "__main__":
    counted = read_run(Path("results/demo/counted"))
    rare = counted[(counted.copies > 1) & (counted["count"].fillna(0) < ENOUGH)]
    print(f"[{','.join(rare.image_id)}]")
