"""The training manifest: which images a model was trained on, and how many copies of each."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from invmm.data.dataset import ImageEntry, Split
from invmm.files import write_atomically

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ManifestEntry:
    """One image: its id, the SHA-256 of its source, its split, copies and caption."""

    image_id: str
    sha256: str
    split: Split
    copies: int
    caption: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingManifest:
    """The training set of a model.

    Attributes:
        entries: every image that was trained on.
        source: where the images come from, and their licence.
    """

    entries: tuple[ManifestEntry, ...]
    source: str

    def write(self, path: Path) -> None:
        """Writes JSON, whole or not at all."""
        content = {"schema_version": SCHEMA_VERSION, "digest": self.digest, **asdict(self)}
        write_atomically(path, json.dumps(content, indent=1).encode())

    @classmethod
    def read(cls, path: Path) -> TrainingManifest:
        """Reads what `write` wrote.

        Raises:
            ValueError: not such a file, or it was altered.
        """
        try:
            content = json.loads(path.read_bytes())
            if content["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"its schema_version is {content['schema_version']}")
            entries = tuple(ManifestEntry(**entry) for entry in content["entries"])
            manifest, digest = cls(entries=entries, source=content["source"]), content["digest"]
        except KeyError as error:
            raise ValueError(f"{path} is not a training manifest: it has no {error}") from error
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not a training manifest: {error}") from error
        if manifest.digest != digest:
            raise ValueError(f"{path} was altered: its digest does not match its entries")
        return manifest

    def copies_by_sha256(self) -> Counter[str]:
        """SHA-256 -> copies of that content in the training set, summed over ids."""
        copies: Counter[str] = Counter()
        for entry in self.entries:
            copies[entry.sha256] += entry.copies
        return copies

    @property
    def digest(self) -> str:
        """SHA-256 of the list, whatever its order."""
        lines = sorted(f"{e.image_id}\t{e.sha256}\t{e.split}\t{e.copies}" for e in self.entries)
        return hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()


def list_digest(entries: Iterable[ImageEntry]) -> str:
    """SHA-256 of ids, splits, copies, captions and labels: cheap, since no image is read."""
    lines = sorted(f"{(e.image_id, e.split, e.copies, e.caption, e.label)}" for e in entries)
    return hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()
