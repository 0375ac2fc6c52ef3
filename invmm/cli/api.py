"""Measuring from Python: a pipeline in memory, the same code path as the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invmm.config.compose import compose_job
from invmm.config.runs import check_machine, check_measure
from invmm.config.schema import build
from invmm.data.folder import ImageFolder
from invmm.data.memory import MemoryImages
from invmm.faults import Fault
from invmm.models.auto import AutoModel
from invmm.models.borrowed import BorrowedModel

if TYPE_CHECKING:
    import pandas as pd


_TAKEN = {
    "model": "the pipeline is measured as it is; change it beforehand, as by pipeline.to(DTYPE)",
    "dataset": "the images are the second argument, and captions or labels are prompts=",
    "run_dir": "give the argument run_dir=",
    "dry_run": "a call measures; plan with the command invmm",
    "shard": "a call measures all images; give it those of one part",
}
"""Keys that are arguments of `measure` -> what to do instead."""
_CHANGES_THE_PIPELINE = (
    "execution.compile",
    "execution.channels_last",
    "execution.gradient_checkpointing",
)


def measure(
    pipeline: Any,
    images: Any,
    *overrides: str,
    prompts: Any = None,
    run_dir: str | Path | None = None,
) -> pd.DataFrame:
    """Measures how strongly a model in memory has memorized images.

    In a notebook or a training script; the pipeline is given back as it was, in the same mode and
    with the same weights trainable.

    Args:
        pipeline: a diffusers pipeline of a supported family, on its device.
        images: a folder, a list of Pillow images or paths, or a mapping by id.
        overrides: as on the command line, such as "inversion.num_steps=200",
            "measurement=probability", "prompt=caption" or "model.latent_scale=1"; with a folder
            of images also its keys, such as "dataset.caption=COLUMN".
        prompts: captions or class labels in the shape of images; a folder brings its own.
        run_dir: where records and pictures go; by default a folder of its own in results/runs.
            The same call continues a run that stopped.

    Returns:
        The score table, one row an image.

    Raises:
        ValueError: faults in the overrides (all of them), the images or the model.
        RuntimeError: some images have no record, or every image FAILED or DIVERGED; the printed
            table and scores.csv in run_dir give the errors.
        KeyboardInterrupt: a signal stopped the run; the same call continues it.
    """
    import pandas as pd

    from invmm.runtime.measure import measure as run_measure

    model = BorrowedModel(pipeline)
    is_folder = isinstance(images, (str, Path))
    if is_folder and prompts is not None:
        raise ValueError(
            "prompts is for images in memory; a folder has captions of its own, which "
            "dataset.caption=COLUMN may name"
        )
    dataset = None if is_folder else MemoryImages.of(images, prompts)
    _refuse_taken(overrides, is_folder=is_folder)
    faults: list[Fault] = []
    folder_options = ["dataset=folder", "dataset.path=memory"] if is_folder else []
    plain = compose_job("measure", ["model.path=memory", *folder_options, *overrides], faults)
    run = None
    if plain and is_folder:
        dataset = build(ImageFolder, {**plain["dataset"], "path": str(images)}, "dataset", faults)
    if plain and dataset is not None:
        _take_device(plain, model.device, faults)
        if options := build(AutoModel, plain["model"], "model", faults):
            model = replace(model, latent_scale=options.latent_scale)
        folder = {"run_dir": str(run_dir)} if run_dir else {}
        given = {**plain, "model": model, "dataset": dataset, **folder}
        run = check_measure(given, faults)
        check_machine(given, faults)
    if faults or run is None:
        raise ValueError("\n".join(faults))
    if run.trainer.devices > 1:
        raise ValueError("trainer.devices must be 1: a pipeline in memory lives in one process")
    with model.as_it_was():
        code = run_measure(run, run.folder)
    if code > 128:
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(
            f"some images have no record in {run.folder}, or every image failed, as printed "
            'above; the same call continues the run, with "retry_failed=true" the failed ones too'
        )
    return pd.read_parquet(run.folder / "scores.parquet")


def _refuse_taken(overrides: Sequence[str], *, is_folder: bool) -> None:
    """Refuses keys that repeat an argument of `measure`, or would alter the pipeline for good."""
    for text in overrides:
        key = text.lstrip("+").partition("=")[0]
        group = key.partition(".")[0]
        is_option = group == "dataset" != key and key != "dataset.path" and is_folder
        if key == "model.latent_scale" or is_option:
            continue
        if group in _TAKEN:
            raise ValueError(f"{text} cannot be given in Python: {_TAKEN[group]}")
        if key in _CHANGES_THE_PIPELINE:
            raise ValueError(
                f"{text} would alter the pipeline for good; leave it out, and prepare the pipeline "
                "before the call"
            )


def _take_device(plain: dict[str, Any], device: Any, faults: list[Fault]) -> None:
    """Sets the device of the pipeline; another one that the overrides name is a fault."""
    accelerator = "cpu" if device.type == "cpu" else "gpu"
    trainer = plain.get("trainer")
    if not isinstance(trainer, Mapping):
        return  # a fault of its own
    named = trainer.get("accelerator")
    if named in ("cpu", "gpu", "cuda", "mps") and named not in (accelerator, device.type):
        line = (
            f"trainer.accelerator={named} is not where the pipeline is, on {device}; move the "
            "pipeline with pipeline.to(DEVICE)"
        )
        faults.append(Fault(line, "trainer.accelerator"))
    elif named in ("auto", "gpu", "cuda", "mps"):
        plain["trainer"] = {**trainer, "accelerator": accelerator}
