"""The parquet files of a data set: on this machine, or fetched from the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from invmm.data.metadata import METADATA_FILES

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class NotReachedError(ValueError):
    """A data set is not on this machine and could not be fetched.

    Args:
        reason: with key, value and cure.
        num_images: how many images it would give; None if unknown.
    """

    def __init__(self, reason: str, num_images: int | None) -> None:
        super().__init__(reason)
        self.num_images = num_images


@dataclass(frozen=True, kw_only=True)
class ParquetFiles:
    """Which parquet files hold the images of a split; `HubImages` explains the keys.

    Attributes:
        path: a hub id, a parquet file or a folder of them.
        name: of the configuration, where there are several.
        revision: of a hub repository.
        split: of the data set.
        streaming: names the addresses on the hub instead of fetching whole files.
        num_images: how many images are measured, for `NotReachedError`.
    """

    path: str
    name: str | None
    revision: str | None
    split: str
    streaming: bool
    num_images: int | None

    def find(self) -> tuple[list[str], list[str]]:
        """Names of the files, and remarks on those that are left out.

        Raises:
            NotReachedError: the path does not exist, and the hub does not give the data set.
            ValueError: there are no such files, or files of several configurations.
        """
        root = Path(self.path).expanduser()
        if root.is_file():
            return [str(root.resolve())], []
        if root.is_dir():
            inside = {
                path.relative_to(root).as_posix(): path
                for path in sorted(filter(is_data, root.rglob("*.parquet")))
                if path.resolve().is_relative_to(root.resolve())
            }
            left_out = sum(map(is_data, root.rglob("*.parquet"))) - len(inside)
            problems = [f"{left_out} parquet files are links that lead out of the data folder"]
            chosen = self._of_split(list(inside))
            return [str(inside[name].resolve()) for name in chosen], problems * bool(left_out)
        if not _HUB_ID.fullmatch(self.path):
            raise self._not_reached("is no file or folder here and no hub id (owner/name)")
        return self._fetched(), []

    def _fetched(self) -> list[str]:
        """Paths of the downloaded files of a hub repository, or their addresses for streaming."""
        from huggingface_hub import HfApi, snapshot_download

        try:
            if self.streaming:
                info = HfApi().dataset_info(self.path, revision=self.revision)
                start = f"hf://datasets/{self.path}@{info.sha}/"
                names = [file.rfilename for file in info.siblings or ()]
            else:
                root = snapshot_download(
                    self.path,
                    repo_type="dataset",
                    revision=self.revision,
                    allow_patterns=[f"{self.name or ''}*{self.split}*.parquet"],
                )
                start = f"{root}/"
                names = [path.relative_to(root).as_posix() for path in Path(root).rglob("*.*")]
        except Exception as error:  # whatever the network makes the client raise
            reason = str(error).strip().splitlines()[0]
            raise self._not_reached(
                f"is no file or folder here and could not be fetched from the hub ({reason}); a "
                "gated data set needs `hf auth login` first; elsewhere, `hf download --repo-type "
                f"dataset {self.path} --local-dir FOLDER` makes a folder for dataset.path"
            ) from error
        return [start + name for name in self._of_split(names)]

    def _of_split(self, names: Sequence[str]) -> list[str]:
        """The parquet files of the split and configuration.

        Raises:
            ValueError: none, or those of several configurations.
        """
        chosen = {}
        for name in sorted(name for name in names if is_data(PurePosixPath(name))):
            path = PurePosixPath(name)
            folders = [part for part in path.parts[:-1] if part != self.split]
            is_of_split = re.match(rf"{re.escape(self.split)}\b", path.name)
            if (is_of_split or self.split in path.parts) and self.name in (None, *folders):
                chosen[name] = "/".join(folders)
        where = f"dataset.path={self.path}"
        if not chosen:
            seen = ", ".join(sorted(names)[:5]) or "none"
            raise ValueError(
                f"{where} has no parquet files of dataset.split={self.split} and dataset.name="
                f"{self.name or 'null'} (files: {seen}); on the hub, "
                "dataset.revision=refs/convert/parquet has those of any data set"
            )
        if len(configurations := sorted(set(chosen.values()))) > 1:
            raise ValueError(
                f"{where} holds several configurations; give dataset.name, one of "
                f"{', '.join(configurations)}"
            )
        return list(chosen)

    def _not_reached(self, what: str) -> NotReachedError:
        return NotReachedError(f"dataset.path={self.path} {what}", self.num_images)


def is_data(path: PurePath) -> bool:
    """Whether a parquet file may hold images; `metadata.parquet` only describes other files."""
    return path.suffix == ".parquet" and path.name not in METADATA_FILES
