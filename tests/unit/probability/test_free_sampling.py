"""Counting over free samples, by hand and against a known probability."""

from __future__ import annotations

import math

import pytest
import torch
from worlds import Direction, MicroNetwork, make_setting, make_target

from invmm.diffusion.sampling import Sampler
from invmm.engine.engine import Engine
from invmm.engine.outcomes import Outcome, Status
from invmm.engine.protocols import Measurement
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job
from invmm.probability.bank import BankMeasurement, DrawnBank, SharedBank
from invmm.probability.free_sampling import FreeSampling
from invmm.probability.splitting import Splitting


def run(network, start) -> Outcome:
    engine = Engine(network, Direction(), EngineSettings(rows_sample=16))
    ((_, outcome),) = engine.run([Job("it", start)])
    assert outcome.error is None, outcome.error
    return outcome


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_a_sample_can_be_drawn_again_from_its_index(scheduler):
    network = MicroNetwork()
    setting = make_setting(network, scheduler=scheduler)
    target = make_target(network)
    bank = FreeSampling(num_samples=50, block_size=16).bank(7, (3, 8, 8), setting.sampler)
    assert bank.num_blocks == 4
    assert [len(bank.draws(block)) for block in range(4)] == [16, 16, 16, 2]
    again = bank.draws_of(torch.tensor([17, 49, 0, 17]))
    for row, (block, place) in enumerate([(1, 1), (3, 1), (0, 0), (1, 1)]):
        assert torch.equal(again.noise[row], bank.draws(block).noise[place])
        assert again.seeds[row] == bank.draws(block).seeds[place]
    outcome = run(
        network,
        lambda: FreeSampling(num_samples=50, block_size=16)(
            target, setting, torch.Generator().manual_seed(0)
        ),
    )
    # Pictures are drawn again, best first: they must have the similarities that were counted.
    similarities = Direction().embed(outcome.samples) @ target.embedding
    assert similarities[0].item() == pytest.approx(outcome.best_similarity, abs=1e-6)
    assert torch.equal(similarities, similarities.sort(descending=True).values)


def test_counts_and_intervals_by_hand():
    network = MicroNetwork()
    setting = make_setting(network, threshold=0.5)
    target = make_target(network)
    embeddings = torch.zeros(10, len(target.embedding))
    embeddings[3] = embeddings[8] = target.embedding
    embeddings[5] = -target.embedding
    recipe = FreeSampling(num_samples=10, block_size=4)
    bank = recipe.bank(0, (3, 8, 8), setting.sampler)
    shared = SharedBank(DrawnBank(bank, embeddings), recipe)
    outcome = run(network, lambda: shared(target, setting, torch.Generator()))
    assert outcome.status is Status.ESTIMATED
    assert outcome.tensors["replicas"].tolist() == [3, 8]
    assert outcome.score_nats == pytest.approx(math.log(5))
    assert outcome.score == pytest.approx(math.log(5) / 192)
    assert outcome.replication_rate == 0.2
    assert outcome.columns["count"] == 2
    assert outcome.columns["one_in"] == 5
    assert outcome.columns["method"] == "counted"
    assert outcome.columns["num_free_samples"] == 10
    # Clopper-Pearson for 2 of 10
    assert math.exp(outcome.columns["log_p_low"]) == pytest.approx(0.02521, abs=1e-5)
    assert math.exp(outcome.columns["log_p_high"]) == pytest.approx(0.55610, abs=1e-5)

    empty = SharedBank(DrawnBank(bank, torch.zeros_like(embeddings)), recipe)
    none = run(network, lambda: empty(target, setting, torch.Generator()))
    assert none.status is Status.CENSORED
    assert none.score is None
    assert none.columns["log_p"] is None
    # 0 of 10: the upper end is 1 - 0.025^(1/10)
    assert math.exp(none.columns["log_p_high"]) == pytest.approx(0.30850, abs=1e-5)


def test_evaluations_are_those_foretold():
    network = MicroNetwork()
    setting = make_setting(network)
    recipe = FreeSampling(num_samples=40, block_size=16)
    rng = torch.Generator().manual_seed(0)
    own = run(network, lambda: recipe(make_target(network), setting, rng))
    cost = recipe.cost(setting.sampler, setting.criterion)
    assert own.evaluations == cost.most
    assert cost.most.forward == (40 + 8) * 10
    bank = recipe.bank(0, (3, 8, 8), setting.sampler)
    shared = SharedBank(DrawnBank(bank, torch.zeros(40, 192)), recipe)
    outcome = run(network, lambda: shared(make_target(network), setting, rng))
    assert outcome.evaluations == recipe.cost_from_bank(setting.sampler).most
    assert outcome.evaluations + bank.cost == cost.most


def test_measurements_that_begin_with_a_bank_are_known_by_what_they_can_do():
    assert isinstance(FreeSampling(), BankMeasurement)
    assert isinstance(Splitting(), BankMeasurement)
    drawn = SharedBank(
        DrawnBank(FreeSampling().bank(0, (3, 8, 8), Sampler()), torch.zeros(1, 1)), FreeSampling()
    )
    assert isinstance(drawn, Measurement)
    assert not isinstance(drawn, BankMeasurement)
