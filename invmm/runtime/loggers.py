"""Views of a finished run. The records are the truth; these show them elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from invmm.files import write_atomically
from invmm.results.collect import has_score
from invmm.results.records import read_curves, read_records

if TYPE_CHECKING:
    import pandas as pd

_OF_RUN = ("curves", "gallery", "scores")
"""Names of the tables and pictures that a run ends with."""


@runtime_checkable
class RunLog(Protocol):
    """Where the records are shown."""

    def publish(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Shows all records of a run; called by the parent process once it is over."""
        ...


@dataclass(frozen=True, kw_only=True)
class CsvLog:
    """curves.csv: every curve of every image in long form (image_id, curve, step, value)."""

    def publish(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        """See `RunLog`."""
        import pandas as pd

        rows = [
            (record["image_id"], name, int(step), float(value))
            for record, name, steps, values in _curves(run_dir)
            for step, value in zip(steps, values, strict=True)
        ]
        frame = pd.DataFrame(rows, columns=["image_id", "curve", "step", "value"])
        write_atomically(run_dir / "curves.csv", frame.to_csv(index=False).encode())


@dataclass(frozen=True, kw_only=True)
class TensorBoardLog:
    """Event files below run_dir/tensorboard: `tensorboard --logdir RUN_DIR/tensorboard`."""

    def publish(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        """See `RunLog`.

        Raises:
            ValueError: the package tensorboard is missing.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "logger=tensorboard needs the package tensorboard; install it by "
                "`pip install 'invmm[tensorboard]'`"
            ) from None
        place = run_dir / "tensorboard"
        shutil.rmtree(place, ignore_errors=True)  # a rerun shows all records anew, not twice
        with SummaryWriter(str(place)) as writer:
            for record, name, steps, values in _curves(run_dir):
                for step, value in zip(steps, values, strict=True):
                    writer.add_scalar(f"{name}/{record['image_id']}", value, int(step))
            for name, picture in _pictures(run_dir):
                writer.add_image(name, picture, dataformats="HWC")


@dataclass(frozen=True, kw_only=True)
class WandbLog:
    """A Weights & Biases run with one table, the pictures and the curves; another of a study.

    Attributes:
        project: of the run.
        mode: offline writes below run_dir/wandb, to be sent later by `wandb sync`; null follows
            the environment variable WANDB_MODE, or is online without it.
        group: runs of one study share it; null follows the environment variable WANDB_RUN_GROUP, or
            takes the name of the folder above the run's without it.
        name: of the run; null takes the folder's.
        tags: of the run.
    """

    project: str = "invmm"
    mode: Literal["online", "offline", "disabled"] | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] | None = None

    def publish(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        """See `RunLog`.

        Raises:
            ValueError: the package wandb is missing, or nobody is logged in.
        """
        with self._run(run_dir, run_dir.resolve().parent.name, "run", config) as (wandb, run):
            frame = _scores(run_dir)
            run.log({"scores": _table(wandb, frame)})
            run.define_metric("*", step_metric="optimiser_step")
            for step, values in sorted(_values_by_step(run_dir).items()):
                run.log({**values, "optimiser_step": step})
            run.log({name: wandb.Image(picture) for name, picture in _pictures(run_dir)})
            run.summary["images"] = len(frame)
            run.summary["with_score"] = int(has_score(frame).sum())
            run.summary["score_median_of_those"] = float(frame.score.median())

    def publish_study(self, results: Path) -> None:
        """Shows what a study found as one more run of its group: numbers, tables and figures.

        Args:
            results: the folder of the study; its runs lie below it, or one of them in it.

        Raises:
            ValueError: the study has no summary yet, or as of `publish`.
        """
        import pandas as pd

        if not (results / "summary.json").is_file():
            raise ValueError(f"{results / 'summary.json'} is missing; run the study's plot.py")
        summary = json.loads((results / "summary.json").read_text(encoding="utf-8"))
        others = _OF_RUN if (results / "records").is_dir() else ()
        with self._run(results, results.name, "study", {"study": results.name}) as (wandb, run):
            run.summary.update(summary)
            for path in sorted(results.iterdir()):
                if path.suffix == ".csv" and path.stem not in others:
                    run.log({f"{path.stem}_table": _table(wandb, pd.read_csv(path))})
                if path.suffix == ".png" and path.stem not in others:
                    run.log({path.stem: wandb.Image(_picture(path))})

    @contextmanager
    def _run(
        self, folder: Path, group: str, job_type: str, config: Mapping[str, Any]
    ) -> Iterator[tuple[Any, Any]]:
        """The package and a started run, that is finished whatever happens."""
        try:
            import wandb
        except ImportError:
            raise ValueError(
                "logger=wandb needs the package wandb; install it by `pip install 'invmm[wandb]'`"
            ) from None
        try:
            run = wandb.init(
                project=self.project,
                mode=self.mode,
                group=self.group or os.environ.get("WANDB_RUN_GROUP") or group,
                job_type=job_type,
                name=self.name or folder.name,
                tags=self.tags,
                dir=str(folder),
                config=dict(config),
                settings={"quiet": True},
            )
        except wandb.Error as error:
            raise ValueError(
                f"logger=wandb cannot start a run ({str(error).splitlines()[0]}); the records are "
                "safe. Run `wandb login` or set logger.mode=offline and repeat the command"
            ) from error
        try:
            yield wandb, run
        finally:
            wandb.finish()


def _curves(
    run_dir: Path,
) -> Iterator[tuple[dict[str, Any], str, np.ndarray, np.ndarray]]:
    """(record, name, steps, values) of every curve.

    Dense curves start at step 1; `rate_step` holds the steps of `rate`, `similarity_step` those of
    `similarity` and `similarity_min`.
    """
    for record in read_records(run_dir):
        curves = read_curves(run_dir, record)
        sparse = {k.removesuffix("_step"): curves[k] for k in curves if k.endswith("_step")}
        for name, values in sorted(curves.items()):
            if name.endswith("_step"):
                continue
            steps = np.arange(1, len(values) + 1)
            for prefix, own in sparse.items():
                if name.startswith(prefix):
                    steps = own
            yield record, name, steps, values


def _values_by_step(run_dir: Path) -> dict[int, dict[str, float]]:
    """Step -> "curve/image id" -> value: one log call a step, however many images."""
    by_step: dict[int, dict[str, float]] = {}
    for record, name, steps, values in _curves(run_dir):
        for step, value in zip(steps, values, strict=True):
            by_step.setdefault(int(step), {})[f"{name}/{record['image_id']}"] = float(value)
    return by_step


def _pictures(run_dir: Path) -> Iterator[tuple[str, np.ndarray]]:
    for name in ("gallery", "scores"):
        yield name, _picture(run_dir / f"{name}.png")


def _picture(path: Path) -> np.ndarray:
    from PIL import Image

    return np.array(Image.open(path).convert("RGB"))


def _table(wandb: Any, frame: pd.DataFrame) -> Any:
    return wandb.Table(dataframe=frame.astype(object).where(frame.notna(), None))


def _scores(run_dir: Path) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(run_dir / "scores.parquet")
