"""Replaying saved distributions: against a straight loop, by every status, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import written
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.fft import idctn
from scipy.optimize import brentq
from scipy.stats import binomtest
from worlds import (
    ConditionalNetwork,
    Direction,
    MicroNetwork,
    ddim,
    make_conditional_target,
    make_setting,
    make_target,
)

from invmm.data.dataset import LoadedImage
from invmm.engine.engine import Engine
from invmm.engine.outcomes import Evaluations, Outcome, Status
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job
from invmm.inversion.replay import Replay
from invmm.results.ownership import OwnedRunFolder


def eight_bits(target):
    """The image as a file holds it."""
    pixels = ((target.pixels + 1) * 127.5).round() / 127.5 - 1
    embedding = Direction().embed(pixels[None])[0]
    return replace(target, pixels=pixels, latents=pixels[None], embedding=embedding)


def distribution(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean, log_variance = torch.randn(2, *shape, generator=generator)
    return {"mean": 0.5 * mean, "log_variance": 0.3 * log_variance - 1}


@pytest.fixture
def source(tmp_path):
    """A function that writes the record of a search; its folder is `source.path`."""
    path = tmp_path / "source"

    def saved(target, status=Status.REPLICATED, **columns):
        tensors = distribution(target.pixels.shape) if status is Status.REPLICATED else {}
        with OwnedRunFolder(path, config=written.CONFIG, digest=written.DIGEST) as folder:
            written.write(
                folder,
                written.entry(target.image_id),
                written.outcome(status, tensors=tensors, columns=columns, replication_rate=0.875),
                loaded=LoadedImage(pixels=target.pixels, sha256="ab" * 32),
            )
            return folder.record_folder(target.image_id)

    saved.path = path
    return saved


def run(network, source, targets, setting, num_samples=32, **settings) -> dict[str, Outcome]:
    """Replays each target with the generator of seed 5."""
    measurement = Replay(source=str(source.path), num_samples=num_samples)
    engine = Engine(network, Direction(), EngineSettings(**settings))
    jobs = [
        Job(
            target.image_id,
            lambda target=target: measurement(target, setting, torch.Generator().manual_seed(5)),
        )
        for target in targets
    ]
    return {job.key: outcome for job, outcome in engine.run(jobs)}


def replayed(network, source, target, setting, **options) -> Outcome:
    return run(network, source, [target], setting, **options)[target.image_id]


def draws_of(noise, count, seed):
    normal = torch.randn(count, *noise["mean"].shape, generator=torch.Generator().manual_seed(seed))
    return noise["mean"] + (noise["log_variance"] / 2).exp() * normal


def certified(kl_nats, count, total):
    """The least p that a divergence and a count leave possible, by a root finder."""
    low = binomtest(count, total, alternative="greater").proportion_ci(0.95, method="exact").low

    def excess(log_p):
        rest = math.log1p(-math.exp(log_p))
        return low * (math.log(low) - log_p) + (1 - low) * (math.log(1 - low) - rest) - kl_nats

    return brentq(excess, -1e5, math.log(low))


# Euler's steps in sigma are those of DDIM in other variables, but for how they begin.
@pytest.mark.parametrize(("scheduler", "precision"), [("ddim", 1e-5), ("euler", 1e-3)])
@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_the_count_is_that_of_a_straight_loop(basis, scheduler, precision, source):
    network = MicroNetwork()
    target, noise = eight_bits(make_target(network)), distribution(network.latent_shape)
    source(target, **({} if basis == "pixel" else {"basis": basis}))
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(5)))
    draws = draws_of(noise, 32, seed)
    if basis == "dct":
        draws = torch.from_numpy(idctn(draws.numpy(), axes=(2, 3), norm="ortho"))
    pixels = ddim(lambda x, t: network.predict(x, t, None), draws, network.schedule).clamp(-1, 1)
    similarities = torch.cosine_similarity(pixels.flatten(1), target.pixels.flatten()[None])
    threshold = similarities.sort().values[12:14].mean().item()  # 19 of 32 reach it
    setting = make_setting(network, threshold=threshold, scheduler=scheduler)
    found = replayed(network, source, target, setting)

    mean, variance = noise["mean"].double(), noise["log_variance"].double().exp()
    kl = float(0.5 * (mean**2 + variance - variance.log() - 1).sum())
    expected = binomtest(19, 32).proportion_ci(0.95, method="exact")
    assert found.status is Status.ESTIMATED
    assert found.replication_rate == 19 / 32
    assert found.score_nats == pytest.approx(-certified(kl, 19, 32))
    assert found.score == pytest.approx(found.score_nats / 192)
    assert found.best_similarity == pytest.approx(similarities.max().item(), abs=precision)
    best = pixels[similarities.argsort(descending=True)[0]]
    torch.testing.assert_close(found.samples[0], best, atol=10 * precision, rtol=0)
    assert found.columns == {
        "method": "certified", "guidance_scale": 1.0, "basis": basis,
        "kl_nats": pytest.approx(kl), "log_p_certified": pytest.approx(-found.score_nats),
        "confirm_passed": 19, "confirm_drawn": 32, "confirm_confidence": 0.95,
        "rate_low": pytest.approx(expected.low), "rate_high": pytest.approx(expected.high),
        "source_status": "REPLICATED", "source_rate": 0.875, "source_digest": written.DIGEST,
    }  # fmt: skip


def test_it_is_drawn_under_the_guidance_and_condition_of_this_run(source):
    network = ConditionalNetwork()
    target = eight_bits(make_conditional_target(network))
    source(target, guidance_scale=1.0)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(5)))
    own, blank = target.rows(32), target.negative_rows(32)

    def guided(latents, timesteps):
        away = network.predict(latents, timesteps, blank)
        return away + 3 * (network.predict(latents, timesteps, own) - away)

    draws = draws_of(distribution(network.latent_shape), 32, seed)
    pixels = ddim(guided, draws, network.schedule).clamp(-1, 1)
    similarities = torch.cosine_similarity(pixels.flatten(1), target.pixels.flatten()[None])
    threshold = similarities.sort().values[15:17].mean().item()  # 16 of 32 reach it
    setting = make_setting(network, threshold=threshold, guidance_scales=(3.0,))
    found = replayed(network, source, target, setting)
    assert found.columns["confirm_passed"] == 16
    assert found.columns["guidance_scale"] == 3.0
    assert found.evaluations == Evaluations(forward=32 * 20, sampler=32 * 20)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "heun"])
def test_slots_change_nothing_and_the_cost_is_exact(scheduler, source):
    network = MicroNetwork()
    targets = [eight_bits(make_target(network, seed)) for seed in range(5)]
    for target in targets:
        source(target)
    setting = make_setting(network, threshold=0.0, scheduler=scheduler)
    alone = run(network, source, targets, setting, num_samples=5, slots=1, rows_sample=3)
    shared = run(network, source, targets, setting, num_samples=5, slots=4, rows_sample=3)
    assert len({outcome.best_similarity for outcome in alone.values()}) == 5
    cost = Replay(source="any", num_samples=5).cost(setting.sampler, setting.criterion)
    for image_id, outcome in alone.items():
        assert shared[image_id].columns == outcome.columns
        assert torch.equal(shared[image_id].samples, outcome.samples)
        assert outcome.evaluations == cost.fewest == cost.most


def test_a_distribution_that_replicates_nothing_here_has_no_score(source):
    network = MicroNetwork()
    target = eight_bits(make_target(network))
    source(target)
    found = replayed(network, source, target, make_setting(network, threshold=1.0))
    assert (found.status, found.score, found.score_nats) == (Status.NOT_REPLICATED, None, None)
    assert found.replication_rate == 0
    assert found.columns["rate_high"] == pytest.approx(1 - 0.025 ** (1 / 32))
    assert found.columns["source_status"] == "REPLICATED"
    assert len(found.samples) == 32


@pytest.mark.parametrize("status", [Status.NOT_REPLICATED, Status.DIVERGED])
def test_an_image_for_which_none_was_found_costs_nothing(status, source):
    network = MicroNetwork()
    target = eight_bits(make_target(network))
    source(target, status)
    found = replayed(network, source, target, make_setting(network))
    assert (found.status, found.score, found.replication_rate, found.error) == (
        Status.NOT_REPLICATED, None, None, None,
    )  # fmt: skip
    assert found.columns["source_status"] == status
    assert found.evaluations == Evaluations()
    assert network.calls == []


def another_image(place):
    Image.new("RGB", (8, 8), "red").save(place / "target.png")


def without(name):
    def spoil(place):
        arrays = load_file(place / "arrays.safetensors")
        arrays.pop(name)
        save_file(arrays, place / "arrays.safetensors")

    return spoil


@pytest.mark.parametrize(("spoil", "reason"), [
    (lambda place: (place / "record.json").unlink(), "has no record of it; measure it there, then"),
    (another_image, "its target.png shows another image than the one of this name here"),
    (lambda place: (place / "target.png").unlink(), "its target.png is missing or damaged"),
    (without("mean"), "its arrays.safetensors has no mean"),
    (without("log_variance"), "its arrays.safetensors has no log_variance"),
])  # fmt: skip
def test_what_cannot_be_replayed_fails_with_its_reason(spoil, reason, source):
    network = MicroNetwork()
    target = eight_bits(make_target(network))
    spoil(source(target))
    found = replayed(network, source, target, make_setting(network))
    assert found.status is Status.FAILED
    assert reason in found.error
    assert network.calls == []


def test_an_image_that_failed_in_the_source_fails_here(source):
    network = MicroNetwork()
    target = eight_bits(make_target(network))
    source(target, Status.FAILED)
    found = replayed(network, source, target, make_setting(network))
    assert found.status is Status.FAILED
    assert "ended as FAILED; measure it there, then give retry_failed=true" in found.error


def test_a_rate_is_that_of_one_guidance_scale():
    setting = make_setting(ConditionalNetwork(), guidance_scales=(1.0, 3.0))
    with pytest.raises(ValueError, match=r"use one, as sampler.guidance_scales=\[1\]"):
        Replay(source="any").cost(setting.sampler, setting.criterion)
