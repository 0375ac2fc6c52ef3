"""Measuring from Python: a pipeline in memory, the same code path as the command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invmm.cli.compose import compose_job, identity_of
from invmm.cli.recipes import check_machine, check_measure, plan_of
from invmm.cli.schema import build
from invmm.data.folder import ImageFolder
from invmm.data.memory import MemoryImages
from invmm.models.auto import AutoModel
from invmm.models.borrowed import BorrowedModel

if TYPE_CHECKING:
    import pandas as pd


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
            "measurement=probability", "prompt=caption" or "model.latent_scale=1".
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
    dataset = _dataset(images, prompts)
    _check_overrides(overrides)
    accelerator = "cpu" if model.device.type == "cpu" else "gpu"
    faults: list[str] = []
    plain = compose_job(
        "measure",
        ["model.path=memory", f"trainer.accelerator={accelerator}", *overrides],
        faults,
    )
    recipes = None
    if plain:
        if options := build(AutoModel, plain["model"], "model", faults):
            model = replace(model, latent_scale=options.latent_scale)
        given = {**plain, "model": model, "dataset": dataset}
        recipes = check_measure(given, faults)
        check_machine(given, faults)
    if faults or recipes is None:
        raise ValueError("\n".join(faults))
    if recipes.trainer.devices > 1:
        raise ValueError("trainer.devices must be 1: a pipeline in memory lives in one process")
    with model.as_it_was():
        config = {**plain, "model": _identity(model), "dataset": _described(dataset)}
        identity = identity_of(config)
        folder = Path(run_dir) if run_dir else None
        plan = plan_of(recipes, folder=folder, config=config, identity=identity)
        code = run_measure(plan)
    if code > 128:
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(
            f"some images have no record in {plan.run_dir}, or every image failed, as printed "
            "above; the same call continues the run"
        )
    return pd.read_parquet(plan.run_dir / "scores.parquet")


def _check_overrides(overrides: Sequence[str]) -> None:
    """Refuses keys that repeat an argument of `measure`, or would alter the pipeline for good."""
    for text in overrides:
        key = text.lstrip("+").partition("=")[0]
        if key == "model.latent_scale":  # no argument, and some VQ autoencoders need it
            continue
        if key.partition(".")[0] in ("model", "dataset", "run_dir", "dry_run", "shard"):
            raise ValueError(
                f"{text} cannot be given in Python: the arguments of measure() decide it; leave it "
                "out"
            )
        if key in _CHANGES_THE_PIPELINE:
            raise ValueError(
                f"{text} would alter the pipeline for good; leave it out, and prepare the pipeline "
                "before the call"
            )


def _dataset(images: Any, prompts: Any) -> ImageFolder | MemoryImages:
    if isinstance(images, (str, Path)):
        if prompts is not None:
            raise ValueError(
                "prompts= is for images in memory; put those of a folder into its metadata.jsonl"
            )
        return ImageFolder(path=str(images))
    return MemoryImages.of(images, prompts)


def _identity(model: BorrowedModel) -> dict[str, Any]:
    scale = model.describe().latent_scale
    return model.fingerprint() if scale is None else {**model.fingerprint(), "latent_scale": scale}


def _described(dataset: ImageFolder | MemoryImages) -> Any:
    if isinstance(dataset, ImageFolder):
        return {"path": dataset.path}
    return {"images": dataset.fingerprint(), "prompts": dict(dataset.prompts)}
