"""Views of a finished run. The records are the truth; these show them elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from invmm.files import write_atomically
from invmm.results.collect import has_score
from invmm.results.records import read_curves, read_records

if TYPE_CHECKING:
    import pandas as pd


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
    """A Weights & Biases run with one table, the pictures and the curves.

    Attributes:
        project: of the run.
        mode: offline writes below run_dir/wandb, to be sent later by `wandb sync`; null follows
            the environment variable WANDB_MODE, or is online without it.
        group: runs of one study share it.
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
                group=self.group,
                name=self.name or run_dir.name,
                tags=self.tags,
                dir=str(run_dir),
                config=dict(config),
                settings={"quiet": True},
            )
        except wandb.Error as error:
            raise ValueError(
                f"logger=wandb cannot start a run ({str(error).splitlines()[0]}); the records are "
                "safe. Run `wandb login` or set logger.mode=offline and repeat the command"
            ) from error
        try:
            frame = _scores(run_dir)
            table = wandb.Table(dataframe=frame.astype(object).where(frame.notna(), None))
            run.log({"scores": table})
            run.define_metric("*", step_metric="optimiser_step")
            for step, values in sorted(_values_by_step(run_dir).items()):
                run.log({**values, "optimiser_step": step})
            run.log({name: wandb.Image(picture) for name, picture in _pictures(run_dir)})
            run.summary["images"] = len(frame)
            run.summary["with_score"] = int(has_score(frame).sum())
            run.summary["score_median_of_those"] = float(frame.score.median())
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
    from PIL import Image

    for name in ("gallery", "scores"):
        yield name, np.array(Image.open(run_dir / f"{name}.png").convert("RGB"))


def _scores(run_dir: Path) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(run_dir / "scores.parquet")
