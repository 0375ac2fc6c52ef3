"""The denoising objective against its expectation, noise level by noise level."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from invmm.diffusion.sampling import Sampler
from invmm.diffusion.schedule import NoiseSchedule, Prediction, PredictionType
from invmm.engine.criterion import ReplicationCriterion
from invmm.engine.protocols import Setting, Target
from invmm.inversion.noise import GaussianNoise
from invmm.inversion.objectives import DenoisingObjective
from invmm.inversion.soft_prompt import FixedPrompt

BATCH_SIZE = 20_000
BETAS = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5]


def schedule_of(prediction_type: PredictionType) -> NoiseSchedule:
    if prediction_type == "flow":
        return NoiseSchedule.from_config({"num_train_timesteps": len(BETAS), "shift": 3.0})
    own = {"num_train_timesteps": len(BETAS), "trained_betas": BETAS}
    return NoiseSchedule.from_config({**own, "prediction_type": prediction_type})


def scales(prediction_type: PredictionType) -> tuple[Tensor, Tensor]:
    """Signal and noise scale of every level in double precision, from the definitions."""
    if prediction_type == "flow":
        uniform = torch.arange(1, len(BETAS) + 1, dtype=torch.float64) / len(BETAS)
        sigmas = 3 * uniform / (1 + 2 * uniform)
        return 1 - sigmas, sigmas
    alphas = torch.cumprod(1 - torch.tensor(BETAS, dtype=torch.float64), 0)
    return alphas.sqrt(), (1 - alphas).sqrt()


SCALES = {kind: scales(kind) for kind in get_args(PredictionType)}


def loss_of_errors_at(level: int, timesteps: str, schedule: NoiseSchedule) -> tuple[float, Tensor]:
    """The loss of a network whose raw output is off by 2 at one level, and the levels drawn."""
    image = torch.full((1, 1, 1, 2), 0.5)
    target = Target(image_id="it", pixels=image[0], latents=image, embedding=image.flatten())
    criterion = ReplicationCriterion(threshold=0.5, num_samples=1)
    setting = Setting(schedule=schedule, sampler=Sampler(), criterion=criterion)
    objective = DenoisingObjective(batch_size=BATCH_SIZE, timesteps=timesteps)
    rng = torch.Generator().manual_seed(0)
    asked = objective(GaussianNoise.prior(image), FixedPrompt(), target, setting, rng)
    request = asked.send(None)
    levels = (request.timesteps[:, None] - schedule.timesteps).abs().argmin(1)
    own = SCALES[schedule.prediction_type]
    signal, noise_scale = (scale.float()[levels, None, None, None] for scale in own)
    noise = (request.latents - signal * image) / noise_scale
    perfect = {
        "epsilon": noise,
        "v_prediction": signal * noise - noise_scale * image,
        "sample": image.expand_as(noise),
        "flow": noise - image,
    }[schedule.prediction_type]
    output = perfect + 2.0 * (levels == level)[:, None, None, None]
    with pytest.raises(StopIteration) as answer:
        asked.send(Prediction(output, request.latents, request.timesteps, schedule))
    return answer.value.value.item(), levels


@pytest.mark.parametrize("timesteps", ["uniform", "importance"])
@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_each_level_counts_as_often_as_in_the_published_loss(prediction_type, timesteps):
    """Drawn uniformly, a level adds its squared error of the clean latents / T to the mean.

    Drawn by weight, it is drawn with probability p and must count 1 / (T p) times as much.
    """
    schedule = schedule_of(prediction_type)
    signal, noise_scale = SCALES[prediction_type]
    factors = {
        "epsilon": (noise_scale / signal) ** 2,
        "v_prediction": noise_scale**2,
        "sample": torch.ones_like(signal),
        "flow": noise_scale**2,
    }[prediction_type]
    weights = factors if timesteps == "importance" else torch.ones_like(factors)
    probabilities = weights / weights.sum()
    for level, (probability, factor) in enumerate(zip(probabilities, factors, strict=True)):
        loss, levels = loss_of_errors_at(level, timesteps, schedule)
        counts = torch.bincount(levels, minlength=len(BETAS))
        expected = counts[level] / BATCH_SIZE / (len(BETAS) * probability) * 2.0**2 * factor
        assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert chisquare(counts, BATCH_SIZE * probabilities).pvalue > 0.01
