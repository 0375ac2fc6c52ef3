"""Replays the distributions of a search: do they replicate under another sampler (ours)?

A noise distribution is found under one sampler, guidance scale and prompt. Here fresh samples are
drawn from it under those of this run, and the replicas are counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, MinLen

from invmm.diffusion.sampling import Sampler
from invmm.engine.criterion import ReplicationCriterion
from invmm.engine.outcomes import CostRange, Outcome, Status
from invmm.engine.protocols import Setting, Target, Use, refuse_searched_prompt
from invmm.faults import Refusal
from invmm.files import record_key
from invmm.inversion.confirmation import Confirmation, confirm
from invmm.inversion.saved import check_picture, saved_noise, saved_tensors
from invmm.probability.bank import only_guidance_scale, sampling_cost
from invmm.results.ownership import differences
from invmm.results.record_files import load_record, read_manifest

_SEARCHES = ("invmm.inversion.inversion.Inversion", "invmm.inversion.trajectory.Trajectory")
_MEASURED = (Status.REPLICATED, Status.NOT_REPLICATED, Status.DIVERGED)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Counts replicas among fresh samples of the distributions that an earlier run found.

    The score is not InvMM, because the distribution need not replicate under this run's sampler.
    It is -log of a certified lower bound of p, per latent dimension; p is the probability that a
    sample from the prior replicates the image under this run's sampler. An image is NOT_REPLICATED
    if none of its samples replicates or the source found no distribution for it, and FAILED if the
    source did not measure it.

    Columns beside the score: method "certified", guidance_scale, basis, kl_nats of the
    distribution, the columns of `Confirmation`; source_status, source_rate (the replication rate in
    the source) and source_digest (of its config).

    Attributes:
        source: folder of a run with measurement=inversion, of the same model.
        num_samples: fresh samples of each distribution.
    """

    source: Annotated[str, MinLen(1)]
    num_samples: Annotated[int, Ge(1)] = 64

    def manifest(self) -> dict[str, Any]:
        """The manifest of the source run.

        Raises:
            ValueError: it is no folder of a search; naming the key, the value and the cure.
        """
        try:
            manifest = read_manifest(Path(self.source))
            measurement = dict(manifest["config"]["measurement"])
            if measurement.get("_target_") not in _SEARCHES:
                raise ValueError("it holds no distributions; give a run with measurement=inversion")
        except (ValueError, KeyError, TypeError) as error:
            raise Refusal(
                f"measurement.source={self.source} cannot be replayed: {error}",
                "measurement.source",
            ) from error
        return manifest

    def check(self, use: Use) -> None:
        """See `Measurement`: the source searched this model, and one guidance scale is meant."""
        refuse_searched_prompt(self, use)
        only_guidance_scale(use.sampler)
        searched = self.manifest()["inputs"]
        if use.is_plan:
            return
        changed = differences(searched["model"], use.model.fingerprint(), "model")
        if "model_settings" in searched:
            changed += differences(searched["model_settings"], use.model.settings(), "model")
        if changed:
            raise Refusal(
                f"measurement.source={self.source} searched another model "
                f"({'; '.join(changed)}); give the model.path of that run, or a run of this model",
                "measurement.source",
                "model.path",
            )

    async def __call__(self, target: Target, setting: Setting, rng: torch.Generator) -> Outcome:
        """Draws and counts; see `Measurement`.

        Raises:
            ValueError: the source did not measure this image, or what it saved cannot be drawn
                from.
        """
        place = Path(self.source) / "records" / record_key(target.image_id)
        record = load_record(place / "record.json")
        if record is None or record["status"] not in _MEASURED:
            how = "has no record of it" if record is None else f"ended as {record['status']}"
            raise ValueError(
                f"measurement.source={self.source} {how}; measure it there, then give "
                "retry_failed=true"
            )
        check_picture(place, target.pixels)
        origin = {
            "source_status": record["status"],
            "source_rate": record["replication_rate"],
            "source_digest": record["config_digest"],
        }
        if record["status"] != Status.REPLICATED:
            return Outcome(status=Status.NOT_REPLICATED, columns=origin)
        tensors = saved_tensors(place, tuple(target.latents.shape[1:]))
        basis = record["columns"].get("basis", "pixel")
        # Another stream than rng, whose numbers a search of the same seed has used.
        seed = int(torch.randint(2**62, (), generator=rng))
        confirmation = await confirm(
            saved_noise(tensors, target.latents.device),
            target,
            setting,
            torch.Generator().manual_seed(seed),
            num_samples=self.num_samples,
            guidance_scale=only_guidance_scale(setting.sampler),
            basis=basis,
        )
        return _outcome(confirmation, target, {**origin, "basis": basis})

    def cost(self, sampler: Sampler, criterion: ReplicationCriterion) -> CostRange:
        """See `Measurement`; an image without a distribution costs nothing."""
        cost = sampling_cost(self.num_samples, sampler)
        return CostRange(fewest=cost, most=cost)


def _outcome(confirmation: Confirmation, target: Target, columns: Mapping[str, Any]) -> Outcome:
    """The outcome of a count, with its samples sorted by similarity, closest first."""
    check = confirmation.check
    order = check.similarities.argsort(descending=True)
    nats = -confirmation.log_p_certified if confirmation.count else None
    return Outcome(
        status=Status.NOT_REPLICATED if nats is None else Status.ESTIMATED,
        score=None if nats is None else nats / target.latents[0].numel(),
        score_nats=nats,
        replication_rate=confirmation.rate,
        best_similarity=check.best,
        samples=check.pixels[order].cpu(),
        columns={
            "method": "certified",
            "guidance_scale": check.guidance_scale,
            "kl_nats": confirmation.kl_nats,
            **confirmation.columns(),
            **columns,
        },
    )
