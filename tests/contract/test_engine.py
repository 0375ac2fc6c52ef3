"""What the engine promises to every measurement."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from worlds import Direction, IdealNetwork, MicroNetwork, make_setting, make_target

from invmm.engine.engine import Engine
from invmm.engine.outcomes import Outcome, Status
from invmm.engine.requests import Denoise, Embed, Minimise, Sample
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job
from invmm.inversion.controllers import AdaptiveKLWeight
from invmm.inversion.inversion import Inversion
from invmm.inversion.objectives import DenoisingObjective


def inversion(**changes) -> Inversion:
    options = {
        "objective": DenoisingObjective(batch_size=3),
        "kl_weight": AdaptiveKLWeight(),
        "num_steps": 12,
        "check_every": 4,
    }
    return Inversion(**{**options, **changes})


def job(network, index: int, *, measurement=None, setting=None) -> Job:
    def start():
        rng = torch.Generator().manual_seed(index)
        target = make_target(network, index)
        return (measurement or inversion())(target, setting or make_setting(network), rng)

    return Job(f"image-{index}", start)


def run(network, jobs, **settings) -> dict[str, Outcome]:
    engine = Engine(network, Direction(), EngineSettings(**settings))
    return {job.key: outcome for job, outcome in engine.run(jobs)}


def assert_same(left: Outcome, right: Outcome) -> None:
    assert left.status == right.status
    assert left.score == right.score
    assert left.best_similarity == right.best_similarity
    assert left.curves == right.curves
    assert left.evaluations == right.evaluations
    for name, tensor in left.tensors.items():
        assert torch.equal(tensor, right.tensors[name])
    assert torch.equal(left.samples, right.samples)


@pytest.mark.parametrize(("sampler", "threshold"), [("ddim", -0.05), ("ddpm", 0.0)])
@pytest.mark.parametrize("slots", [2, 4, 16])
def test_slots_do_not_change_a_bit(slots, sampler, threshold):
    network = MicroNetwork()
    setting = make_setting(network, threshold=threshold, scheduler=sampler)
    jobs = [job(network, index, setting=setting) for index in range(7)]
    alone = run(network, jobs, slots=1, rows_denoise=8, rows_sample=5)
    shared = run(network, jobs, slots=slots, rows_denoise=8, rows_sample=5)
    assert len({outcome.status for outcome in alone.values()}) == 2
    for key, outcome in alone.items():
        assert_same(outcome, shared[key])


def test_a_request_larger_than_a_call_is_split():
    network = MicroNetwork()
    whole = run(network, [job(network, 0)], rows_denoise=3)["image-0"]
    network.calls.clear()
    run(network, [job(network, 0)], rows_denoise=2, rows_sample=3)
    assert set(network.calls) == {2, 3}
    assert whole.evaluations.backward == 12 * 3


def test_gradients_equal_those_of_a_straight_loop():
    network = MicroNetwork()
    inputs = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    found: dict[int, Tensor] = {}

    async def measure(index):
        latents = inputs[index].clone().requires_grad_()
        prediction = await Denoise(latents, torch.tensor([10, 500]))
        await Minimise(prediction.clean_latents.square().mean())
        found[index] = latents.grad
        return Outcome(status=Status.NOT_REPLICATED)

    jobs = [Job(str(index), lambda index=index: measure(index)) for index in range(3)]
    run(network, jobs, slots=3, rows_denoise=4)
    for index, own in enumerate(inputs):
        latents = own.clone().requires_grad_()
        timesteps = torch.tensor([10, 500])
        output = network.predict(latents, timesteps, None)
        network.schedule.clean_latents(output, latents, timesteps).square().mean().backward()
        torch.testing.assert_close(found[index], latents.grad, rtol=1e-4, atol=1e-6)


def test_an_unfinished_graph_survives_the_backward_of_its_neighbour():
    """One measurement asks twice before it minimises, its neighbour in the same call once."""
    network = MicroNetwork()
    grads = {}

    async def measure(index, times):
        latents = make_target(network, index).latents.clone().requires_grad_()
        losses = [
            (await Denoise(latents, torch.tensor([100 * (1 + n)]))).output.mean()
            for n in range(times)
        ]
        await Minimise(sum(losses))
        grads[index] = latents.grad
        return Outcome(status=Status.NOT_REPLICATED)

    jobs = [Job(str(i), lambda i=i, t=t: measure(i, t)) for i, t in enumerate((2, 1))]
    outcomes = run(network, jobs, slots=2, rows_denoise=2)
    assert [outcomes[str(i)].error for i in range(2)] == [None, None]
    assert [outcomes[str(i)].evaluations.backward for i in range(2)] == [2, 1]
    alone = dict(grads)
    run(network, jobs, slots=1, rows_denoise=2)
    assert all(torch.equal(alone[i], grads[i]) for i in range(2))


class Poisoned(MicroNetwork):
    """Turns rows whose first pixel is above a limit into NaN."""

    def predict(self, latents, timesteps, condition):
        output = super().predict(latents, timesteps, condition)
        return torch.where(latents[:, :1, :1, :1] > 4, math.nan, output)


def poison(network, index: int) -> Job:
    def start():
        target = make_target(network, index)
        target.latents[0, 0, 0, 0] = 1e4
        return inversion()(target, make_setting(network), torch.Generator().manual_seed(index))

    return Job(f"image-{index}", start)


async def raises(target, setting, rng):
    await Embed(target.latents)
    raise RuntimeError("two\nlines")


def test_nan_and_raising_neighbours_end_alone():
    network = Poisoned()
    good = [job(network, index) for index in (0, 2, 4)]
    bad = [poison(network, 1), job(network, 3, measurement=raises)]
    alone = run(network, good, slots=1)
    mixed = run(network, [good[0], bad[0], good[1], bad[1], good[2]], slots=5)
    assert mixed["image-1"].status is Status.DIVERGED
    assert mixed["image-1"].error == "the loss is nan at step 1"
    assert mixed["image-3"].status is Status.FAILED
    assert mixed["image-3"].error == "RuntimeError: two lines"
    for key, outcome in alone.items():
        assert_same(outcome, mixed[key])


def test_an_image_that_cannot_be_prepared_fails_alone():
    network = MicroNetwork()

    def start():
        raise OSError("cannot identify image file")

    outcomes = run(network, [Job("bad", start), job(network, 0)])
    assert outcomes["bad"].status is Status.FAILED
    assert outcomes["bad"].error == "OSError: cannot identify image file"
    assert outcomes["image-0"].status is not Status.FAILED


def test_samples_that_are_not_finite_diverge():
    network = Poisoned()

    async def measure(target, setting, rng):
        await Sample(torch.full((1, 3, 8, 8), 5.0), setting.sampler)
        raise AssertionError

    outcome = run(network, [job(network, 0, measurement=measure)])["image-0"]
    assert (outcome.status, outcome.error) == (Status.DIVERGED, "a sample is not finite")


def hold_no_grad():
    return torch.no_grad()


def hold_autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize(("hold", "name"), [(hold_no_grad, "no_grad"), (hold_autocast, "autocast")])
def test_state_held_across_an_await_is_caught(hold, name):
    network = MicroNetwork()

    async def leaky(target, setting, rng):
        with hold():
            await Denoise(target.latents, torch.tensor([1]))
        return Outcome(status=Status.NOT_REPLICATED)

    outcomes = run(network, [job(network, 0, measurement=leaky), job(network, 1)])
    assert outcomes["image-0"].status is Status.FAILED
    assert f"leaky held {name} across an await" in outcomes["image-0"].error
    assert_same(outcomes["image-1"], run(network, [job(network, 1)])["image-1"])
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_a_global_seed_is_caught():
    network = MicroNetwork()

    async def seeds(target, setting, rng):
        torch.manual_seed(torch.initial_seed() + 1)
        await Embed(target.latents)

    outcome = run(network, [job(network, 0, measurement=seeds)])["image-0"]
    assert "a global seed" in outcome.error


@pytest.mark.parametrize("early_exit", [True, False])
def test_counts_are_those_of_the_real_rows(early_exit):
    """12 steps of 3 rows; checks at 0, 4, 8, 12, which all fail, of 1 or 4 samples x 10 steps."""
    network = MicroNetwork()
    setting = make_setting(network, threshold=1.0, early_exit=early_exit)
    outcome = run(network, [job(network, 0, setting=setting)], rows_denoise=16)["image-0"]
    assert outcome.evaluations.backward == 36
    assert outcome.evaluations.forward == 36 + 4 * (1 if early_exit else 4) * 10
    assert outcome.evaluations.sampler == 4 * (1 if early_exit else 4) * 10
    cost = inversion().cost(setting.sampler, setting.criterion)
    assert outcome.evaluations == cost.fewest
    assert (cost.most.forward, cost.most.backward, cost.most.sampler) == (36 + 160, 36, 160)
    assert cost.most.in_forwards == 232


def test_early_exit_decides_the_same():
    network = IdealNetwork(std=0.5)
    for threshold in (0.0, 0.2, 0.4):
        settings = [
            make_setting(network, threshold=threshold, early_exit=early) for early in (True, False)
        ]
        early, full = (
            run(network, [job(network, i, setting=setting) for i in range(6)], rows_sample=4)
            for setting in settings
        )
        for key, outcome in full.items():
            assert outcome.status == early[key].status
            assert outcome.score == early[key].score
            assert outcome.steps == early[key].steps


def test_calls_have_a_constant_number_of_rows():
    network = MicroNetwork()
    run(network, [job(network, i) for i in range(5)], slots=3, rows_denoise=7, rows_sample=6)
    assert set(network.calls) == {7, 6}


class Formats(MicroNetwork):
    """Notes whether the network ever sees another memory format than the usual one."""

    def predict(self, latents, timesteps, condition):
        assert latents.is_contiguous()
        return super().predict(latents, timesteps, condition)


def test_the_memory_format_of_an_image_never_reaches_the_network():
    """Kernels differ by format, and whether cat keeps it depends on the neighbours."""
    network = Formats()
    sampler = make_setting(network).sampler
    latents = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)

    async def measure():
        await Denoise(latents, torch.tensor([1, 2]))
        await Sample(latents, sampler)
        return Outcome(status=Status.NOT_REPLICATED)

    outcome = run(network, [Job("it", measure)], rows_denoise=2, rows_sample=2)["it"]
    assert outcome.error is None


def test_the_queue_is_taken_lazily():
    network = MicroNetwork()
    taken = []

    def jobs():
        for index in range(6):
            taken.append(index)
            yield job(network, index)

    engine = Engine(network, Direction(), EngineSettings(slots=2))
    next(engine.run(jobs()))
    assert len(taken) <= 3


class Small(MicroNetwork):
    """Runs out of memory above a number of rows, forwards or backwards."""

    def __init__(self, limit: int, where: str) -> None:
        super().__init__()
        self.limit, self.where = limit, where

    def predict(self, latents, timesteps, condition):
        if len(latents) > self.limit:
            if self.where == "forward":
                raise torch.OutOfMemoryError("forward")
            latents = _BackwardRunsOut.apply(latents)
        return super().predict(latents, timesteps, condition)


class _BackwardRunsOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latents):
        return latents.clone()

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("backward")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_goes_on_with_fewer_rows(where):
    roomy = run(MicroNetwork(), [job(MicroNetwork(), i) for i in range(3)], rows_denoise=4)
    network = Small(4, where)
    tight = run(network, [job(network, i) for i in range(3)], rows_denoise=16, rows_sample=4)
    assert set(network.calls[-3:]) <= {4}
    for key, outcome in roomy.items():
        assert outcome.status == tight[key].status
        assert outcome.curves["loss"] == tight[key].curves["loss"]


def test_a_network_without_room_for_one_row_fails_the_image():
    network = Small(0, "forward")
    outcome = run(network, [job(network, 0)])["image-0"]
    assert outcome.status is Status.FAILED
    assert "one row does not fit into memory" in outcome.error


async def not_a_request(target, setting, rng):
    return await _Stranger()


class _Stranger:
    def __await__(self):
        return (yield 42)


async def loss_without_gradient(target, setting, rng):
    await Minimise(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("measurement", "message"),
    [(not_a_request, "42 is not a request"), (loss_without_gradient, "scalar with gradients")],
)
def test_misuse_fails_with_its_reason(measurement, message):
    network = MicroNetwork()
    outcome = run(network, [job(network, 0, measurement=measurement)])["image-0"]
    assert outcome.status is Status.FAILED
    assert message in outcome.error
