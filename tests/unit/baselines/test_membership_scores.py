"""Membership scores against straight loops, by hand, and what the engine promises of them."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, UNet2DModel
from worlds import (
    LINEAR,
    ConditionalNetwork,
    Direction,
    MicroNetwork,
    PixelWorld,
    linear_schedule,
    make_conditional_target,
    make_setting,
    make_target,
)

from invmm.baselines.denoising_loss import DenoisingLoss
from invmm.baselines.pia import PIA
from invmm.baselines.secmi import SecMI
from invmm.diffusion.schedule import NoiseSchedule
from invmm.engine.engine import Engine
from invmm.engine.finiteness import Stage
from invmm.engine.outcomes import Status
from invmm.engine.protocols import Measurement
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job

RECIPES = {
    "denoising_loss": DenoisingLoss(timesteps=(20, 300), num_noises=5, seed=3),
    "secmi": SecMI(timestep=60, step=20),
    "pia": PIA(timestep=200),
    "pian": PIA(timestep=200, normalised=True),
}
ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
"""alpha-bar of the DDPM paper's schedule, by its definition."""


class RealNetwork(PixelWorld):
    """A diffusers U-Net with random weights."""

    def __init__(self, prediction_type: str) -> None:
        super().__init__(linear_schedule(prediction_type), (3, 8, 8))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.unet = UNet2DModel(
                sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            ).requires_grad_(False).eval()  # fmt: skip

    def predict(self, latents, timesteps, condition):
        return self.unet(latents, timesteps).sample

    def noise(self, latents, timestep: int):
        """epsilon_theta in double precision, from the definitions of the prediction types."""
        output = self.unet(latents.float(), timestep).sample.double()
        alpha = ALPHAS[timestep]
        if self.schedule.prediction_type == "epsilon":
            return output
        if self.schedule.prediction_type == "v_prediction":
            return alpha.sqrt() * output + (1 - alpha).sqrt() * latents
        return (latents - alpha.sqrt() * output) / (1 - alpha).sqrt()


class FlowNetwork(MicroNetwork):
    """Predicts the velocity of a rectified flow with shift 3."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = NoiseSchedule.from_config({"num_train_timesteps": 1000, "shift": 3.0})


def run(network, measurement: Measurement, indices=(0,), *, make=make_target, **settings):
    """Image index -> outcome."""

    def job(index: int) -> Job:
        rng = torch.Generator().manual_seed(index)
        target = make(network, index)
        return Job(str(index), lambda: measurement(target, make_setting(network), rng))

    engine = Engine(network, Direction(), EngineSettings(**settings))
    return {int(job.key): outcome for job, outcome in engine.run(map(job, indices))}


def score_of(network, measurement: Measurement) -> float:
    (outcome,) = run(network, measurement).values()
    assert outcome.error is None
    return outcome.score


# Formulas -------------------------------------------------------------------------------------

REAL = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])


@REAL
def test_the_denoising_loss_is_a_plain_loop(prediction_type):
    network = RealNetwork(prediction_type)
    clean = make_target(network).latents.double()
    noises = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    losses = []
    for timestep in (20, 300):
        for noise in noises:
            noisy = ALPHAS[timestep].sqrt() * clean + (1 - ALPHAS[timestep]).sqrt() * noise
            losses.append((noise - network.noise(noisy, timestep)).square().mean().item())
    (outcome,) = run(network, RECIPES["denoising_loss"]).values()
    assert outcome.score == pytest.approx(sum(losses) / 10, rel=1e-4)
    assert outcome.tensors["losses"].flatten().tolist() == pytest.approx(losses, rel=1e-4)


@REAL
def test_secmi_is_the_ddim_of_diffusers_up_and_down(prediction_type):
    """Inversion by `DDIMInverseScheduler`, the step back by `DDIMScheduler`."""
    network = RealNetwork(prediction_type)
    options = {**LINEAR, "prediction_type": prediction_type, "clip_sample": False}
    down = DDIMScheduler(**options)
    down.set_timesteps(50)  # steps of 20
    up = DDIMInverseScheduler(**options)
    up.set_timesteps(50)

    def step_up(latents, timestep):
        """`DDIMInverseScheduler.step(t)` leads to t, and expects the output one step below."""
        output = network.unet(latents, timestep).sample
        return up.step(output, timestep + 20, latents).prev_sample

    latents = make_target(network).latents
    for timestep in (0, 20, 40):
        latents = step_up(latents, timestep)
    higher = step_up(latents, 60)
    returned = down.step(network.unet(higher, 80).sample, 80, higher).prev_sample
    expected = (returned - latents).square().mean().item()
    assert score_of(network, RECIPES["secmi"]) == pytest.approx(expected, rel=1e-3)


@REAL
def test_secmi_by_hand(prediction_type):
    network = RealNetwork(prediction_type)

    def moved(latents, start, end):
        noise = network.noise(latents, start)
        clean = (latents - (1 - ALPHAS[start]).sqrt() * noise) / ALPHAS[start].sqrt()
        return ALPHAS[end].sqrt() * clean + (1 - ALPHAS[end]).sqrt() * noise

    latents = make_target(network).latents.double()
    for start in (0, 20, 40):
        latents = moved(latents, start, start + 20)
    error = moved(moved(latents, 60, 80), 80, 60) - latents
    expected = error.square().mean().item()
    assert score_of(network, RECIPES["secmi"]) == pytest.approx(expected, rel=1e-3)


@REAL
@pytest.mark.parametrize("normalised", [False, True])
def test_pia_by_hand(prediction_type, normalised):
    network = RealNetwork(prediction_type)
    clean = make_target(network).latents.double()
    noise = network.noise(clean, 0)
    if normalised:
        noise = math.sqrt(2 / math.pi) * noise.numel() * noise / noise.norm(p=1)
    noisy = ALPHAS[200].sqrt() * clean + (1 - ALPHAS[200]).sqrt() * noise
    distance = (noise - network.noise(noisy, 200)).flatten().norm(p=4).item()
    found = score_of(network, PIA(timestep=200, normalised=normalised))
    assert found == pytest.approx(distance**4 / 192, rel=1e-3)


def test_a_flow_by_hand():
    """x_t = (1 - sigma) x_0 + sigma epsilon, the network says epsilon - x_0; Euler moves along."""
    network = FlowNetwork()
    levels = torch.arange(1, 1001, dtype=torch.float64) / 1000
    sigmas = 3 * levels / (1 + 2 * levels)
    clean = make_target(network).latents.double()

    def velocity(latents, level):
        timesteps = (1000 * sigmas[level]).float().expand(len(latents))
        return network.predict(latents.float(), timesteps, None).double()

    def noise(latents, level):
        return latents + (1 - sigmas[level]) * velocity(latents, level)

    def moved(latents, start, end):
        return latents + (sigmas[end] - sigmas[start]) * velocity(latents, start)

    shared = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    losses = [
        (noise((1 - sigmas[t]) * clean + sigmas[t] * shared, t) - shared).square().mean().item()
        for t in (20, 300)
    ]
    found = score_of(network, RECIPES["denoising_loss"])
    assert found == pytest.approx(sum(losses) / 2, rel=1e-4)

    latents = clean
    for start in (0, 20, 40):
        latents = moved(latents, start, start + 20)
    error = moved(moved(latents, 60, 80), 80, 60) - latents
    expected = error.square().mean().item()
    assert score_of(network, RECIPES["secmi"]) == pytest.approx(expected, rel=1e-2)

    first = noise(clean, 0)
    noisy = (1 - sigmas[200]) * clean + sigmas[200] * first
    expected = (first - noise(noisy, 200)).pow(4).mean().item()
    assert score_of(network, RECIPES["pia"]) == pytest.approx(expected, rel=1e-3)


def test_the_noises_are_those_of_the_seed_and_not_of_the_image():
    network = MicroNetwork()

    def measured(index, rng_seed, seed):
        recipe = DenoisingLoss(num_noises=4, seed=seed)
        target, rng = make_target(network, index), torch.Generator().manual_seed(rng_seed)
        engine = Engine(network, Direction(), EngineSettings())
        job = Job("it", lambda: recipe(target, make_setting(network), rng))
        ((_, outcome),) = engine.run([job])
        return outcome.score

    assert measured(0, rng_seed=1, seed=0) == measured(0, rng_seed=2, seed=0)
    assert measured(0, rng_seed=1, seed=0) != measured(0, rng_seed=1, seed=1)


# What every measurement promises ----------------------------------------------------------------

EVERY = pytest.mark.parametrize("name", RECIPES)


@EVERY
def test_the_outcome_is_a_score_without_a_threshold(name):
    (outcome,) = run(MicroNetwork(), RECIPES[name]).values()
    assert outcome.status is Status.SCORED
    assert outcome.status.has_score
    assert not outcome.status.is_censored
    assert outcome.score > 0
    assert outcome.score_nats is outcome.best_similarity is outcome.samples is None


@EVERY
def test_slots_and_neighbours_do_not_change_a_bit(name):
    network, images = MicroNetwork(), range(6)
    alone = run(network, RECIPES[name], images, slots=1, rows_denoise=4)
    shared = run(network, RECIPES[name], images, slots=4, rows_denoise=4)
    assert {i: o.score for i, o in alone.items()} == {i: o.score for i, o in shared.items()}
    assert len({outcome.score for outcome in alone.values()}) == 6


class Poisoned(MicroNetwork):
    """Turns rows whose first pixel is far out into NaN."""

    def predict(self, latents, timesteps, condition):
        output = super().predict(latents, timesteps, condition)
        return torch.where(latents[:, :1, :1, :1].abs() > 1e3, math.nan, output)


def poisoned_target(network, index: int):
    target = make_target(network, index)
    if index == 1:
        target.latents[0, 0, 0, 0] = 1e5
    return target


@EVERY
def test_a_nan_ends_one_image_alone(name):
    mixed = run(Poisoned(), RECIPES[name], range(3), make=poisoned_target, slots=3)
    alone = run(Poisoned(), RECIPES[name], (0, 2), slots=1)
    assert (mixed[1].status, mixed[1].error) == (
        Status.DIVERGED, f"the score is nan: {Stage.PREDICTION}"
    )  # fmt: skip
    assert {i: mixed[i].score for i in alone} == {i: o.score for i, o in alone.items()}


@EVERY
def test_evaluations_are_those_foretold(name):
    network = MicroNetwork()
    (outcome,) = run(network, RECIPES[name], rows_denoise=1).values()
    setting = make_setting(network)
    cost = RECIPES[name].cost(setting.sampler, setting.criterion)
    assert outcome.evaluations == cost.fewest == cost.most
    assert outcome.evaluations.forward == len(network.calls)
    expected = {"denoising_loss": 10, "secmi": 3 + 2, "pia": 2, "pian": 2}
    assert outcome.evaluations.forward == expected[name]


@EVERY
def test_a_conditional_model_is_asked_under_the_condition_of_the_image(name):
    network = ConditionalNetwork()
    (outcome,) = run(network, RECIPES[name], make=make_conditional_target).values()
    target = make_conditional_target(network)
    assert target.condition is not None
    shift = target.condition["embeds"][:, :, None, None]

    class Shifted(MicroNetwork):
        def predict(self, latents, timesteps, condition):
            return super().predict(latents, timesteps, None) + shift

    assert outcome.score == pytest.approx(score_of(Shifted(), RECIPES[name]), rel=1e-5)
    assert outcome.score != pytest.approx(score_of(MicroNetwork(), RECIPES[name]), rel=1e-2)


@pytest.mark.parametrize(("recipe", "message"), [
    (DenoisingLoss(timesteps=(10, 1000)), r"measurement\.timesteps reaches timestep 1000 of a model"
     r" with 1000, counted from 0; use at most 999"),
    (SecMI(timestep=990), r"measurement\.timestep \+ measurement\.step reaches timestep 1000"),
    (PIA(timestep=2000), r"measurement\.timestep reaches timestep 2000"),
])  # fmt: skip
def test_a_noise_level_that_the_model_lacks_is_refused_with_its_cure(recipe, message):
    with pytest.raises(ValueError, match=message):
        recipe.check_schedule(linear_schedule())
    (outcome,) = run(MicroNetwork(), recipe).values()
    assert outcome.status is Status.FAILED
    assert "use at most 999" in outcome.error


def test_secmi_must_meet_its_timestep():
    with pytest.raises(ValueError, match=r"measurement\.timestep=105 .*use measurement\.timestep="):
        SecMI(timestep=105)
    with pytest.raises(ValueError, match=r"use measurement\.timestep=10$"):
        SecMI(timestep=3)
