"""What a verification rests on beside the distributions: records and the model, each checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from invmm.engine.outcomes import Status
from invmm.models.borrowed import BorrowedModel
from invmm.models.execution import LoadedNetwork
from invmm.models.latent import LatentNetwork
from invmm.results.ownership import differences
from invmm.results.records import read_records
from invmm.runtime.run import MeasureRun

SEARCHED = frozenset({Status.REPLICATED, Status.NOT_REPLICATED, Status.DIVERGED, Status.FAILED})
"""How a search for a noise distribution can end."""
DRAWN_FROM = frozenset({Status.REPLICATED, Status.NOT_REPLICATED})
"""How one ends that saves the distribution."""


def chosen_records(run_dir: Path, image_ids: Sequence[str]) -> list[dict[str, Any]]:
    """The records to verify; all of them if no image is named.

    Raises:
        ValueError: none that could be.
    """
    records = read_records(run_dir, only_whole=False)
    if not records:
        raise ValueError(f"{run_dir} holds no records; give the folder of a run")
    if others := sorted({record["status"] for record in records} - SEARCHED):
        raise ValueError(
            f"{run_dir} holds {' and '.join(others)} records without noise distributions to draw "
            "from; only measurement=inversion leaves those"
        )
    by_id = {record["image_id"]: record for record in records}
    for image_id in image_ids:
        if image_id not in by_id:
            near = difflib.get_close_matches(image_id, by_id, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{run_dir} has no record of {image_id}{hint}")
    return [by_id[image_id] for image_id in dict.fromkeys(image_ids)] or records


def checked_network(
    run_dir: Path, run: MeasureRun, manifest: Mapping[str, Any], device: torch.device
) -> LoadedNetwork:
    """The model, once it and the similarity network are known to be those of the run.

    Args:
        run_dir: folder of the run.
        run: what was run, the model wherever it is now.
        manifest: of the run.
        device: of the network.

    Raises:
        ValueError: they are not.
    """
    inputs = manifest["inputs"]
    was_in_memory = "_target_" not in manifest["config"]["model"]
    similarity = {**run.replication.similarity.identity(), "name": inputs["similarity"].get("name")}
    changed = differences(inputs["similarity"], similarity, "similarity")
    if not was_in_memory:
        changed += differences(inputs["model"], run.model.fingerprint(), "model")
        if "model_settings" in inputs:
            changed += differences(inputs["model_settings"], run.model.settings(), "model")
    _refuse(run_dir, changed)
    network = run.model.load(device)
    if was_in_memory:
        _refuse(run_dir, _differences_in_memory(inputs["model"], network))
    return network


def _refuse(run_dir: Path, changed: Sequence[str]) -> None:
    if changed:
        raise ValueError(f"{run_dir} was measured with other inputs ({'; '.join(changed)})")


def _differences_in_memory(stored: Mapping[str, str], network: LoadedNetwork) -> list[str]:
    """As `differences`, for a run whose model was a pipeline in memory."""
    from diffusers import DDPMPipeline, DDPMScheduler

    if isinstance(network, LatentNetwork):
        pipeline, ignored = network.pipeline, network.family.ignored
    else:
        unet: Any = network.denoiser
        pipeline, ignored = DDPMPipeline(unet, DDPMScheduler()), ()
    needed = {name: digest for name, digest in stored.items() if name not in ignored}
    return differences(needed, BorrowedModel(pipeline).fingerprint(), "model")
