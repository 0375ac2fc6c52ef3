"""Makes a folder of CIFAR-10 whose metadata.jsonl plants some images and holds others out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from invmm.data.duplication import planted, shuffled
from invmm.data.hub import HubImages, OpenRows

COPIES = (100, 64, 32, 16, 8, 4, 2)
EACH = 10
HELD_OUT = 1000
SEED = 0


def main() -> None:
    """Writes the images, then the list that vouches for them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/cifar10_planted"))
    parser.add_argument("--source", default="uoft-cs/cifar10", help="hub id, or a parquet file")
    options = parser.parse_args()
    opened = HubImages(path=options.source, image="img", label="label").open(32)
    if not isinstance(opened, OpenRows):
        parser.error(
            f"--source={options.source} is a folder of images; give a hub id or a parquet file"
        )
    entries = {entry.image_id: entry for entry in opened.entries}
    order = shuffled(list(entries), SEED)
    train, held_out = order[:-HELD_OUT], order[-HELD_OUT:]
    plan = {**planted(train, COPIES * EACH), **dict.fromkeys(held_out, 0)}
    options.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for place, (image_id, copies) in enumerate(plan.items()):
        # Names sort in the order of the plan, so that dataset.take takes some of each number.
        name = f"{place:05d}_{image_id}.png"
        row = opened.table[int(entries[image_id].path.rpartition("#")[2])]
        (options.folder / name).write_bytes(row["img"]["bytes"])
        lines.append({"file_name": name, "label": entries[image_id].label, "copies": copies})
    metadata = options.folder / "metadata.jsonl"
    metadata.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"written: {metadata}, {len(lines)} images, {sum(plan.values())} with copies")


if __name__ == "__main__":
    main()
