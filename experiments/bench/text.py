"""Evaluations of the published text-to-image setting, counted on a small conditional model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invmm.diffusion.guidance import Condition
from invmm.diffusion.sampling import Sampler
from invmm.diffusion.schedule import NoiseSchedule
from invmm.engine.criterion import ReplicationCriterion
from invmm.engine.engine import Engine
from invmm.engine.protocols import Setting, Target
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job
from invmm.inversion.controllers import AdaptiveKLWeight
from invmm.inversion.inversion import Inversion
from invmm.inversion.objectives import DenoisingObjective

STEPS, BATCH, CHECK_EVERY, SAMPLES, SAMPLER_STEPS = 2000, 16, 50, 8, 50
SCALES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)


class TextNetwork:
    """A `UNet2DConditionModel` with random weights, as small as it gets."""

    def __init__(self) -> None:
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        self.unet: Any = UNet2DConditionModel(
            sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8,),
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1, cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
        )  # fmt: skip
        self.unet.eval().requires_grad_(False)
        self.latent_shape: tuple[int, int, int] = (4, 4, 4)
        self.device = torch.device("cpu")
        self.schedule = NoiseSchedule.from_config({
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        })  # fmt: skip

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition | None) -> Tensor:
        """See `Network`."""
        assert condition is not None
        return self.unet(latents, timesteps, condition["prompt_embeds"]).sample

    def encode(self, pixels: Tensor) -> Tensor:
        """Not needed: the target is given as latents."""
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        """The first three channels."""
        return latents[:, :3].clamp(-1, 1)


class NeverSimilar:
    """A similarity that no sample reaches."""

    def embed(self, pixels: Tensor) -> Tensor:
        """Orthogonal to every target."""
        return torch.zeros(len(pixels), 2)


def text_evaluations() -> dict[str, Any]:
    """An image that never replicates: ours, counted, against the release's, worked out.

    The release draws all samples at all scales, guides at every scale above 1, does not check the
    prior, and backpropagates into unfrozen weights, so that a step costs three forwards a row.
    """
    network = TextNetwork()
    inversion = Inversion(
        objective=DenoisingObjective(batch_size=BATCH),
        kl_weight=AdaptiveKLWeight(increment=1e-3),
        num_steps=STEPS,
        check_every=CHECK_EVERY,
    )
    setting = Setting(
        schedule=network.schedule,
        sampler=Sampler(num_inference_steps=SAMPLER_STEPS, guidance_scales=SCALES),
        criterion=ReplicationCriterion(num_samples=SAMPLES),
    )
    embeds = torch.randn(1, 5, 8)
    target = Target(
        image_id="text",
        pixels=torch.zeros(3, 4, 4),
        latents=torch.zeros(1, 4, 4, 4),
        embedding=torch.tensor([1.0, 0.0]),
        condition={"prompt_embeds": embeds},
        negative={"prompt_embeds": torch.zeros_like(embeds)},
    )
    engine = Engine(network, NeverSimilar(), EngineSettings(rows_sample=1, rows_embed=1))
    jobs = [Job("text", lambda: inversion(target, setting, torch.Generator().manual_seed(0)))]
    ((_, outcome),) = engine.run(jobs)
    ours = outcome.evaluations
    assert ours == inversion.cost(setting.sampler, setting.criterion).fewest
    of_sample = SAMPLER_STEPS * sum(2 if scale > 1 else 1 for scale in SCALES)
    checks = STEPS // CHECK_EVERY * SAMPLES * of_sample
    release = 3 * STEPS * BATCH + checks
    return {
        "ours_in_forwards": ours.in_forwards,
        "ours_in_samplers": ours.sampler,
        "release_in_forwards": release,
        "release_in_samplers": checks,
        "times_fewer": release / ours.in_forwards,
    }
