"""What the engine promises to every measurement."""

from __future__ import annotations

import math
import time
import traceback

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import (
    ConditionalNetwork,
    Direction,
    IdealNetwork,
    MicroNetwork,
    make_conditional_target,
    make_setting,
    make_target,
)

from invmm.diffusion.sampling import draw
from invmm.engine.engine import Engine
from invmm.engine.finiteness import Stage
from invmm.engine.outcomes import Outcome, Status
from invmm.engine.requests import Denoise, Embed, Minimise, Sample
from invmm.engine.settings import EngineSettings, fastest_rows
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


def job(network, index: int, *, measurement=None, setting=None, make=make_target) -> Job:
    def start():
        rng = torch.Generator().manual_seed(index)
        target = make(network, index)
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
@pytest.mark.parametrize("slots", [2, 4, 16, "auto"])
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
    said = mixed["image-1"].error
    assert said.startswith(f"at step 1: the loss is nan: {Stage.PREDICTION}")
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
    assert (outcome.status, outcome.error) == (Status.DIVERGED, str(Stage.SAMPLE))


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


# Full calls ---------------------------------------------------------------------------------


def test_auto_begins_images_until_calls_are_full():
    network = MicroNetwork()
    jobs = [job(network, index) for index in range(24)]
    engine = Engine(network, Direction(), EngineSettings(rows_denoise=12, rows_sample=4))
    for _ in engine.run(jobs):
        pass
    alone = Engine(network, Direction(), EngineSettings(slots=1, rows_denoise=12, rows_sample=4))
    for _ in alone.run(jobs):
        pass
    assert alone.summary.rows == engine.summary.rows
    assert alone.summary.padding > 3 * engine.summary.rows / 4
    assert engine.summary.padding < engine.summary.rows / 4  # from the tail
    assert engine.summary.slots > 4


def test_no_slot_is_idle_while_images_wait():
    network = MicroNetwork()
    engine = Engine(network, Direction(), EngineSettings(slots=3, rows_denoise=6))
    for _ in engine.run([job(network, index) for index in range(8)]):
        pass
    assert engine.summary.images == 8
    assert engine.summary.idle_slot_seconds == 0
    assert 0 < engine.summary.tail_slot_seconds < engine.summary.slots * engine.summary.seconds


def test_a_row_count_of_auto_is_refused_until_it_is_measured():
    network = MicroNetwork()
    settings = EngineSettings(rows_denoise="auto", rows_embed="auto")
    with pytest.raises(ValueError, match=r"engine\.rows_denoise=auto was not measured"):
        Engine(network, Direction(), settings)
    chosen = settings.chosen(network, Direction())
    assert chosen.rows_to_measure == []
    assert chosen.rows_sample == 8
    assert network.calls[0] == 1
    assert max(network.calls) <= 2 * chosen.rows_denoise
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("limit", "expected"), [(40, 16), (2, 1), (1, 1)])
def test_measured_rows_leave_room_in_memory(limit, expected, monkeypatch):
    """Rows per second grow without end; memory does not: half of the most that fits is taken."""
    sizes = []

    def call(rows):
        sizes.append(rows)
        if rows > limit:
            raise torch.OutOfMemoryError("too many")

    monkeypatch.setattr("time.perf_counter", iter(range(10**6)).__next__)
    assert fastest_rows(call, torch.device("cpu")) == expected
    assert sizes[:4] == [1, 1, 1, 1]


def test_rows_stop_where_they_no_longer_pay(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def call(rows):
        clock[0] += max(8, rows)  # free up to 8 rows, proportional above

    assert fastest_rows(call, torch.device("cpu")) == 8


def test_the_first_call_of_a_size_is_not_timed(monkeypatch):
    """It is quick here, as if the clock began late: counted, 1 row a call would look best."""
    clock, seen = [0.0], set()
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def call(rows):
        clock[0] += 8 if rows in seen or rows > 1 else 0.01
        seen.add(rows)

    assert fastest_rows(call, torch.device("cpu")) > 1


# Waiting ------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts how often a number is read back from a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "item", "equal"):
            # Adam counts its steps in a tensor of its own, which never leaves the host.
            in_adam = any("torch/optim" in frame.filename for frame in traceback.extract_stack())
            self.count += not in_adam
        return function(*arguments, **(options or {}))


def test_no_number_is_read_between_checks():
    """Ten times the steps between two checks cost not one host read more."""

    def reads(steps: int) -> int:
        network = MicroNetwork()
        measurement = inversion(num_steps=steps, check_every=steps)
        jobs = [job(network, i, measurement=measurement) for i in range(2)]
        with HostReads() as mode:
            run(network, jobs, slots=2, rows_denoise=6)
        return mode.count

    assert reads(40) == reads(4)


# Checks at several guidance scales ----------------------------------------------------------


def text_jobs(network, count: int, **setting) -> list[Job]:
    chosen = make_setting(network, guidance_scales=(1, 2, 3, 4, 5, 6, 7), **setting)
    make = make_conditional_target
    return [job(network, index, setting=chosen, make=make) for index in range(count)]


def test_sequential_checks_decide_as_full_ones_do():
    network = ConditionalNetwork()
    decided = set()
    for threshold in (-0.02, 0.0, 0.02, 0.05):
        options = {"threshold": threshold, "num_samples": 4}
        full, early = (
            run(network, text_jobs(network, 6, early_exit=early, **options), rows_sample=4)
            for early in (False, True)
        )
        for key, outcome in full.items():
            decided.add((outcome.status, outcome.steps))
            assert early[key].status == outcome.status
            assert early[key].steps == outcome.steps
            assert early[key].score == outcome.score
            assert early[key].evaluations.sampler < outcome.evaluations.sampler
            assert early[key].evaluations.backward == outcome.evaluations.backward
    assert {status for status, _ in decided} == {Status.REPLICATED, Status.NOT_REPLICATED}
    assert len(decided) > 2


def test_guided_samples_cost_two_evaluations_a_step():
    network = ConditionalNetwork()
    (one,) = run(network, text_jobs(network, 1, threshold=1.0), rows_sample=4).values()
    # checks at 0, 4, 8 and 12, of one sample of 10 steps at scale 1 and at six greater ones
    assert one.evaluations.sampler == 4 * 10 * (1 + 6 * 2)
    setting = make_setting(network, guidance_scales=(1, 2, 3, 4, 5, 6, 7))
    assert inversion().cost(setting.sampler, setting.criterion).fewest == one.evaluations
    assert one.columns["guidance_scale"] in range(1, 8)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_guided_sampling_equals_its_formula(scale):
    network = ConditionalNetwork()
    target = make_conditional_target(network, 1)
    sampler = make_setting(network).sampler
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []

    async def measure():
        found.append(
            await Sample(noise, sampler, target.rows(3), None, scale, target.negative_rows(3))
        )
        return Outcome(status=Status.NOT_REPLICATED)

    assert run(network, [Job("it", measure)], rows_sample=2)["it"].error is None

    def predict(latents, timesteps):
        with_prompt = network.predict(latents, timesteps, target.rows(len(latents)))
        if scale <= 1:
            return with_prompt
        without = network.predict(latents, timesteps, target.negative_rows(len(latents)))
        return without + scale * (with_prompt - without)

    expected = draw(predict, noise, sampler=sampler, schedule=network.schedule)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


def test_images_at_different_scales_share_a_call():
    network = ConditionalNetwork()
    target = make_conditional_target(network)
    sampler = make_setting(network).sampler

    async def measure(scale):
        await Sample(target.latents, sampler, target.rows(1), None, scale, target.negative_rows(1))
        return Outcome(status=Status.NOT_REPLICATED)

    jobs = [Job(str(scale), lambda scale=scale: measure(scale)) for scale in (2.0, 5.0)]
    run(network, jobs, slots=2, rows_sample=2)
    assert network.calls == [4] * 10


def test_guidance_without_a_negative_fails_with_its_cure():
    network = MicroNetwork()
    setting = make_setting(network, guidance_scales=(3,))
    outcome = run(network, [job(network, 0, setting=setting)])["image-0"]
    assert outcome.status is Status.FAILED
    assert "use sampler.guidance_scales=[1]" in outcome.error


# Accounting ---------------------------------------------------------------------------------


class Slow(MicroNetwork):
    """Takes a millisecond a row."""

    def predict(self, latents, timesteps, condition):
        time.sleep(len(latents) / 1000)
        return super().predict(latents, timesteps, condition)


def test_the_time_of_shared_calls_is_split_by_rows():
    network = Slow()

    async def measure(rows):
        await Denoise(torch.zeros(rows, 3, 8, 8), torch.zeros(rows, dtype=torch.long))
        time.sleep(0.05)
        return Outcome(status=Status.NOT_REPLICATED)

    jobs = [Job(str(rows), lambda rows=rows: measure(rows)) for rows in (30, 10)]
    engine = Engine(network, Direction(), EngineSettings(slots=2, rows_denoise=40))
    seconds = {job.key: outcome.seconds.on for job, outcome in engine.run(jobs)}
    assert seconds["30"].get("network", 0) == pytest.approx(3 * seconds["10"].get("network", 0))
    assert seconds["30"].get("network", 0) + seconds["10"].get("network", 0) >= 0.04
    assert seconds["30"].get("measurement", 0) >= 0.05
    assert seconds["30"].get("sampler", 0) == seconds["30"].get("similarity", 0) == 0
    by_kind = engine.summary.by_kind
    assert by_kind["network"] == pytest.approx(sum(s["network"] for s in seconds.values()))
    assert 0.14 <= sum(by_kind.values()) <= engine.summary.seconds
