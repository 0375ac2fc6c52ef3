"""Splitting against events whose probability is known in closed form (`closed_forms`)."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import median

import pytest
import torch
from closed_forms import (
    NoiseNetwork,
    along_diagonal,
    at_height,
    covers,
    either_way,
    half_space,
    measured,
    near_the_corner,
    yes_or_no,
)
from scipy.stats import ncx2, norm
from torch import Tensor
from worlds import (
    ConditionalNetwork,
    Direction,
    make_conditional_target,
    make_setting,
    make_target,
)

from invmm.diffusion.sampling import Sampler, draw
from invmm.engine.engine import Engine
from invmm.engine.outcomes import Evaluations, Outcome, Status
from invmm.engine.protocols import Measurement, Setting
from invmm.engine.requests import Sample
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job
from invmm.probability.certificate import clopper_pearson
from invmm.probability.splitting import Splitting


def assert_close(outcomes: list[Outcome], log_p: float, *, within: float = 1.5) -> None:
    """All but one of them inside their 95 % intervals, none far off."""
    columns = [outcome.columns for outcome in outcomes]
    outside = [c for c in columns if not c["log_p_low"] <= log_p <= c["log_p_high"]]
    assert len(outside) <= 1
    assert max(abs(c["log_p"] - log_p) for c in columns) < within


# Known probabilities ------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("edge", [1.0, 3.0, 4.5, 6.0])
def test_a_half_space(edge, shared):
    outcomes = measured(along_diagonal, edge, *range(8), shared=shared)
    assert {outcome.status for outcome in outcomes} == {Status.ESTIMATED}
    assert_close(outcomes, norm.logsf(edge))


@pytest.mark.parametrize("edge", [2.0, 4.0])
def test_two_half_spaces(edge):
    assert_close(measured(either_way, edge, *range(8)), math.log(2) + norm.logsf(edge))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("radius", [2.5, 1.5])
def test_a_ball(radius, shared):
    outcomes = measured(near_the_corner, -radius, *range(8), shared=shared)
    assert_close(outcomes, math.log(ncx2.cdf(radius**2, 16, 16 * 0.49)))


@pytest.mark.parametrize("shared", [False, True])
def test_the_estimate_is_unbiased_and_its_interval_covers(shared):
    """If survivors' lowest similarity were the level, the mean would be half as high again."""
    truth = norm.logsf(4.5)
    outcomes = measured(along_diagonal, 4.5, *range(100), shared=shared)
    ratios = torch.tensor([math.exp(o.columns["log_p"] - truth) for o in outcomes])
    assert ratios.std().item() / math.sqrt(100) < 0.06
    assert ratios.mean().item() == pytest.approx(1, abs=0.15)
    assert sum(o.columns["log_p_low"] <= truth <= o.columns["log_p_high"] for o in outcomes) >= 95


@pytest.mark.parametrize("expected", [5, 10])
def test_choosing_between_count_and_splitting_keeps_the_interval(expected):
    """Where about `min_count` replicas are in the bank, either way may be taken."""
    p = expected / 2048
    outcomes = measured(along_diagonal, norm.isf(p), *range(100), shared=True)
    columns = [outcome.columns for outcome in outcomes]
    assert [c["method"] == "counted" for c in columns] == [c["count"] >= 10 for c in columns]
    assert len({c["method"] for c in columns}) == 2
    ratios = torch.tensor([math.exp(c["log_p"]) / p for c in columns])
    assert ratios.mean().item() == pytest.approx(1, abs=0.2)
    assert sum(c["log_p_low"] <= math.log(p) <= c["log_p_high"] for c in columns) >= 94


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_interval_covers_for_any_number_of_repeats(repeats):
    truth = norm.logsf(4.5)
    outcomes = measured(along_diagonal, 4.5, *range(60), repeats=repeats)
    covered = [o.columns["log_p_low"] <= truth <= o.columns["log_p_high"] for o in outcomes]
    assert sum(covered) >= 55


def test_a_stochastic_sampler_is_split_over_its_noise_too():
    options = {"num_inference_steps": 2, "eta": 0.3}
    network, sampler = NoiseNetwork(), Sampler(**options)

    def deviation(noise: Tensor) -> float:
        seeds = [*range(len(noise))]
        drawn = draw(
            lambda latents, _: latents,
            noise,
            sampler=sampler,
            seeds=seeds,
            schedule=network.schedule,
        )
        return drawn.std().item()

    shape = (500, 1, 8, 8)
    of_seed = deviation(torch.zeros(shape))
    of_both = deviation(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert 0.2 < of_seed / of_both < 0.9  # both of them matter
    edge = 3.5 * of_both
    assert_close(measured(along_diagonal, edge, *range(4), sampler=options), norm.logsf(3.5))


# What is reported ---------------------------------------------------------------------------


def test_the_outcome_says_what_was_found():
    (outcome,) = measured(along_diagonal, 4.0, 0)
    columns, levels = outcome.columns, outcome.curves["level"]
    assert outcome.score_nats == -columns["log_p"]
    assert outcome.score == pytest.approx(outcome.score_nats / 16)
    assert columns["one_in"] == pytest.approx(math.exp(-columns["log_p"]), rel=5e-3)
    assert len(f"{columns['one_in']:g}".strip("0")) <= 4
    assert [*levels] == sorted({*levels})
    assert levels[-1] == columns["highest_level"] == at_height(4.0)
    assert columns["num_levels"] >= len(levels) == len(outcome.curves["acceptance"]) + 1
    assert columns["num_reached"] == 4
    assert columns["method"] == "split"
    assert columns["num_free_samples"] == 256
    assert 0.15 < columns["acceptance"] < 0.55  # adapted towards 0.35
    heights = along_diagonal(outcome.samples.flatten(1))
    assert heights.shape == (8,)
    assert heights.min() >= 4.0
    assert heights.tolist() == sorted(heights.tolist(), reverse=True)
    assert outcome.best_similarity == pytest.approx(at_height(heights[0].item()), abs=1e-6)


def test_the_score_is_per_latent_dimension_of_all_channels():
    (outcome,) = half_space(1e-3, (3, 4, 4)).measured([0])
    assert outcome.columns["method"] == "split"
    assert outcome.score == pytest.approx(-outcome.columns["log_p"] / 48)


def test_a_common_image_is_counted():
    (outcome,) = measured(along_diagonal, 0.0, 0)
    columns = outcome.columns
    assert columns["method"] == "counted"
    assert columns["num_free_samples"] == 256
    assert columns["log_p"] == math.log(columns["count"] / 256)
    low, high = clopper_pearson(columns["count"], 256)
    assert (columns["log_p_low"], columns["log_p_high"]) == (math.log(low), math.log(high))
    assert low < 0.5 < high
    assert len(outcome.tensors["replicas"]) == columns["count"]


def test_replicas_in_the_bank_are_counted_if_the_budget_ends_before_others_are_reached():
    edge = norm.isf(1 / 2048)
    outcomes = measured(along_diagonal, edge, *range(8), shared=True, max_samples=256)
    assert {outcome.columns["method"] for outcome in outcomes} == {"counted", "split"}
    for outcome in outcomes:
        count = outcome.columns["count"]
        assert (outcome.status is Status.ESTIMATED) == (count > 0)
        if count:
            assert outcome.columns["method"] == "counted"
            assert outcome.columns["log_p"] == math.log(count / 2048)


def test_what_the_model_always_returns_scores_zero():
    (outcome,) = measured(along_diagonal, -20.0, 0)
    assert outcome.score == outcome.score_nats == outcome.columns["log_p_high"] == 0
    assert outcome.columns["log_p_low"] == pytest.approx(math.log(0.025) / 256)
    assert outcome.columns["one_in"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_short_budget_gives_a_bound_above_the_truth(seed):
    (outcome,) = measured(along_diagonal, 6.0, seed, max_samples=1280)
    assert outcome.status is Status.CENSORED
    assert outcome.score is None
    columns = outcome.columns
    assert (columns["log_p"], columns["log_p_low"], columns["one_in"]) == (None, None, None)
    assert columns["log_p_high"] > norm.logsf(6.0) + 5
    assert columns["log_p_high"] < 7 * math.log(0.5) + 1.5
    # it is the probability of the highest level, which is known here
    reached = along_diagonal(outcome.samples.flatten(1)).min().item()
    assert at_height(reached) >= columns["highest_level"] > at_height(2.0)
    assert columns["highest_level"] < at_height(6.0)


# Ties ---------------------------------------------------------------------------------------


def test_quantised_similarities_are_climbed():
    def stairs(noise: Tensor) -> Tensor:
        return along_diagonal(noise).floor()

    outcomes = measured(stairs, 3.99, *range(8))  # between two steps
    assert_close(outcomes, norm.logsf(4.0), within=2.5)
    assert max(outcome.columns["num_levels"] for outcome in outcomes) < 20


def test_a_plateau_ends_censored():
    (outcome,) = measured(lambda noise: 0 * noise[:, 0], 1.0, 0, max_samples=768)
    assert outcome.status is Status.CENSORED
    assert outcome.columns["log_p_high"] == 0
    assert outcome.columns["highest_level"] == -1
    assert outcome.curves["acceptance"] == [1, 1, 1]


@pytest.mark.parametrize(("own_bank_size", "method"), [(256, "split"), (4096, "counted")])
def test_what_is_exactly_as_similar_as_the_threshold_replicates(own_bank_size, method):
    p, network = 0.01, NoiseNetwork()
    setting = make_setting(network, threshold=1.0, num_inference_steps=1)
    target = replace(make_target(network), embedding=torch.tensor([1.0, 0.0]))

    class YesOrNo:
        def embed(self, pixels: Tensor) -> Tensor:
            """Similarity 1 or 0."""
            yes = (along_diagonal(pixels.flatten(1)) >= norm.isf(p)).float()
            return torch.stack([yes, 1 - yes], 1)

    splitting = Splitting(own_bank_size=own_bank_size)
    rng = torch.Generator().manual_seed(0)
    engine = Engine(network, YesOrNo(), EngineSettings(slots=1, rows_sample=256))
    ((_, outcome),) = engine.run([Job("it", lambda: splitting(target, setting, rng))])
    assert outcome.error is None
    assert outcome.columns["method"] == method
    assert len(outcome.tensors["replicas"]) == outcome.columns["count"] > 0
    assert covers(outcome, math.log(p))
    assert outcome.columns["log_p"] == pytest.approx(math.log(p), abs=1)


def test_rounds_that_find_nothing_better_are_counted():
    """If only the round that finds a replica counted, p would be 1 / 128 at least."""
    world = yes_or_no(1e-3)
    found = [outcome.columns["log_p"] for outcome in world.measured(range(12))]
    assert median(found) == pytest.approx(world.log_p, abs=1.5)


def test_repeats_that_cannot_move_leave_the_budget():
    """Replicas are points: every move leaves them, and h falls until it is at its smallest."""
    seen: list[Tensor] = []

    def needles(noise: Tensor) -> Tensor:
        """The first samples differ; what is drawn later is lower than all of them."""
        first = sum(map(len, seen)) < 256 + 8
        seen.append(noise)
        return along_diagonal(noise) if first else torch.full((len(noise),), -9.0)

    (outcome,) = measured(needles, 6.0, 0)
    assert outcome.status is Status.CENSORED
    assert outcome.evaluations.forward < 10240 / 2
    assert outcome.curves["acceptance"] == [0] * len(outcome.curves["acceptance"])
    # of 64 free samples the best is left, in 32 copies
    assert outcome.columns["log_p_high"] > math.log(1 / 64)


# Reproducibility and cost -------------------------------------------------------------------


def test_the_same_seed_gives_the_same_result_in_any_company():
    seeds = (0, 1, 2, 3, 4)
    alone = measured(along_diagonal, 3.0, *seeds)
    shared = measured(along_diagonal, 3.0, *seeds, slots=4)
    for left, right in zip(alone, shared, strict=True):
        assert left.columns == right.columns
        assert left.curves == right.curves
        assert left.evaluations == right.evaluations
        assert torch.equal(left.samples, right.samples)
    assert len({outcome.columns["log_p"] for outcome in alone}) > 1


def test_cost_is_what_the_engine_counts():
    sampler = {"num_inference_steps": 5}
    options = {
        "num_particles": 20, "max_samples": 360, "moves": 2, "repeats": 3,
        "own_bank_size": 70, "bank_size": 500, "block_size": 64,
    }  # fmt: skip
    setting = make_setting(NoiseNetwork(), **sampler)
    cost = Splitting(**options).cost(setting.sampler, setting.criterion)
    shown, bank, climb = 8 * 5, 70 * 5, 360 * 5
    assert cost.fewest == Evaluations(forward=shown + bank, sampler=shown + bank)
    assert cost.most == Evaluations(forward=shown + bank + climb, sampler=shown + bank + climb)
    (easy,) = measured(along_diagonal, -20.0, 0, sampler=sampler, **options)
    assert easy.evaluations == cost.fewest
    (hard,) = measured(along_diagonal, 20.0, 0, sampler=sampler, **options)
    assert hard.evaluations == cost.most


def test_repeats_that_have_arrived_cost_nothing_more():
    for outcome in measured(along_diagonal, 3.0, 0, 1, 2, repeats=1):
        rows = 256 + 8 + 32 * 2 * (outcome.columns["num_levels"] - 1)
        assert outcome.evaluations.forward == rows
    for outcome in measured(along_diagonal, 4.0, *range(6)):
        rows = 256 + 8 + 4 * 32 * 2 * (outcome.columns["num_levels"] - 1)
        assert outcome.evaluations.forward <= rows


def test_a_larger_bank_saves_levels():
    own = measured(along_diagonal, 4.0, *range(6))
    shared = measured(along_diagonal, 4.0, *range(6), shared=True)

    def levels(outcomes: list[Outcome]) -> float:
        return sum(outcome.columns["num_levels"] for outcome in outcomes) / len(outcomes)

    # 16 of 512 are kept instead of 16 of 64: a factor of 8, or 3 levels of 1 / 2
    assert levels(own) - levels(shared) == pytest.approx(3, abs=1)


def test_repeats_share_one_budget():
    """Those that arrive leave it to the others, and a round that it cannot pay is not begun."""
    outcomes = half_space(1e-6).measured(range(6), shared=True, repeats=3, max_samples=2900)
    spent = [outcome.evaluations.forward - 2048 - 8 for outcome in outcomes]
    assert max(spent) <= 2900
    levels = [outcome.columns["num_levels"] for outcome in outcomes]
    assert max(levels) > 2900 // (3 * 64) + 1


def test_it_is_a_measurement():
    assert isinstance(Splitting(), Measurement)


# Guidance and refusals ----------------------------------------------------------------------


def test_guidance_and_prompt_reach_every_sample():
    network = ConditionalNetwork()
    setting = make_setting(network, guidance_scales=(3.0,), threshold=0.9)
    target = make_conditional_target(network)
    splitting = Splitting(
        num_particles=8, max_samples=32, moves=2, repeats=2, own_bank_size=20, block_size=16
    )
    seen: list[Sample] = []

    async def watched() -> Outcome:
        measurement = splitting(target, setting, torch.Generator().manual_seed(0))
        answer = None
        while True:
            try:
                request = measurement.send(answer)
            except StopIteration as stop:
                return stop.value
            seen.extend([request] if isinstance(request, Sample) else [])
            answer = await request

    engine = Engine(network, Direction(), EngineSettings(slots=1, rows_sample=16))
    ((_, outcome),) = engine.run([Job("it", watched)])
    assert outcome.error is None
    assert [len(request.noise) for request in seen] == [16, 4, 8, 16, 16]
    for request in seen:
        assert request.guidance_scale == 3.0
        count = len(request.noise)
        assert torch.equal(request.condition["embeds"], target.rows(count)["embeds"])
        assert torch.equal(request.negative["embeds"], target.negative_rows(count)["embeds"])
    cost = splitting.cost(setting.sampler, setting.criterion)
    assert outcome.evaluations == cost.most
    assert cost.fewest.forward == (20 + 8) * 10 * 2


def test_several_guidance_scales_are_refused():
    network = NoiseNetwork()
    setting: Setting = make_setting(network, guidance_scales=(1, 2.5))
    message = r"sampler\.guidance_scales=\[1, 2.5\] .* use one, as sampler\.guidance_scales=\[1\]"
    with pytest.raises(ValueError, match=message):
        Splitting().cost(setting.sampler, setting.criterion)
    measurement = Splitting()(make_target(network), setting, torch.Generator())
    with pytest.raises(ValueError, match=message):
        measurement.send(None)


def test_a_level_that_keeps_nobody_is_refused():
    message = r"measurement\.level_probability=0\.1 keeps none .* measurement\.num_particles=10"
    with pytest.raises(ValueError, match=message):
        Splitting(num_particles=9, level_probability=0.1)
    assert Splitting(num_particles=10, level_probability=0.1)


@pytest.mark.parametrize(("changes", "message"), [
    ({"bank_size": 127}, "bank_size=127 .* use at least 128"),
    ({"own_bank_size": 50, "repeats": 2}, "own_bank_size=50 .* use at least 64"),
    ({"max_samples": 255}, "max_samples=255 is too small for one level .* use at least 256"),
    ({"min_count": 300}, "own_bank_size=256 .* measurement.min_count=300; use at least 300"),
])  # fmt: skip
def test_what_is_too_small_to_begin_with_is_refused(changes, message):
    with pytest.raises(ValueError, match=rf"measurement\.{message}"):
        Splitting(**changes)
