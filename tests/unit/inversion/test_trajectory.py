"""The tight inversion against a straight loop, a known optimum and its own promises."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import worlds
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence
from worlds import (
    ConditionalNetwork,
    Direction,
    IdealNetwork,
    MicroNetwork,
    PixelWorld,
    linear_schedule,
    make_conditional_target,
    make_target,
)

from invmm.diffusion.sampling import Sampler, draw
from invmm.diffusion.schedule import NoiseSchedule
from invmm.engine.check import Check
from invmm.engine.engine import Engine
from invmm.engine.outcomes import Outcome, Status
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job
from invmm.inversion.confirmation import Confirmation, exact_kl, from_basis
from invmm.inversion.frequency import (
    dct_matrix,
    from_frequencies,
    low_frequencies,
    to_frequencies,
)
from invmm.inversion.noise import GaussianNoise
from invmm.inversion.trajectory import Look, Trajectory
from invmm.probability.certificate import clopper_pearson, log_p_certified, lower_rate


def trajectory(**changes) -> Trajectory:
    options = {"num_steps": 8, "batch_size": 4, "check_every": 4, "num_check": 4}
    return Trajectory(**{**options, **changes})


def make_setting(network, **options):
    return worlds.make_setting(network, **{"num_confirm": 8, **options})


def run(measure, network, setting, seeds=(0,), make=make_target, **settings) -> list[Outcome]:
    engine = Engine(network, Direction(), EngineSettings(**settings))

    def job(seed: int) -> Job:
        rng = torch.Generator().manual_seed(seed)
        return Job(str(seed), lambda: measure(make(network, seed), setting, rng))

    found = {job.key: outcome for job, outcome in engine.run([job(seed) for seed in seeds])}
    return [found[str(seed)] for seed in seeds]


# The frequency basis ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_the_basis_is_orthonormal_and_that_of_scipy(size):
    from scipy.fft import dct

    basis = dct_matrix(size)
    torch.testing.assert_close(basis @ basis.T, torch.eye(size), atol=1e-6, rtol=0)
    expected = torch.from_numpy(dct(torch.eye(size).numpy(), axis=0, norm="ortho"))
    torch.testing.assert_close(basis, expected, atol=1e-6, rtol=0)


def test_the_transform_is_undone_on_planes_that_are_not_square():
    latents = torch.randn(2, 3, 4, 6)
    frequencies = to_frequencies(latents)
    torch.testing.assert_close(from_frequencies(frequencies), latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(frequencies[..., 0, 0], latents.sum((2, 3)) / math.sqrt(24))


def test_the_divergence_is_the_same_in_both_bases():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1, 1, 4, 4, generator=generator)
    log_variance = torch.randn(1, 1, 4, 4, generator=generator)
    rotation = torch.kron(dct_matrix(4), dct_matrix(4)).T.double()
    covariance = rotation @ log_variance.exp().flatten().double().diag() @ rotation.T
    in_latents = MultivariateNormal(from_frequencies(mean).flatten().double(), covariance)
    prior = MultivariateNormal(torch.zeros(16).double(), torch.eye(16).double())
    own = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum()
    assert kl_divergence(in_latents, prior).item() == pytest.approx(own.item(), rel=1e-5)


def test_low_frequencies():
    assert low_frequencies(4, 8, 2.0).sum() == 32
    assert low_frequencies(4, 4, 0.5).tolist() == [
        [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]
    ]  # fmt: skip


# The search ---------------------------------------------------------------------------------


def straight_loop(network, x0: Tensor, measure: Trajectory, rng, schedule) -> tuple[list, Tensor]:
    """The steps without an engine, diffusers or checks: losses and the last mean."""
    basis = dct_matrix(x0.shape[-1])
    mean, log_variance = (torch.zeros_like(x0, requires_grad=True) for _ in range(2))
    first, second = [0.0, 0.0], [0.0, 0.0]
    losses, alphas = [], schedule.alphas_cumprod
    stride = 1000 // measure.sampler_steps
    for step in range(1, measure.num_steps + 1):
        normal = torch.randn(measure.batch_size, *x0.shape[1:], generator=rng)
        x = basis.T @ (mean + (log_variance / 2).exp() * normal) @ basis
        for at in range(999, 0, -stride):
            eps = network.predict(x, torch.full((len(x),), at), None)
            clean = (x - (1 - alphas[at]).sqrt() * eps) / alphas[at].sqrt()
            after = alphas[at - stride] if at >= stride else torch.tensor(1.0)
            x = after.sqrt() * clean + (1 - after).sqrt() * eps
        loss = ((x - x0) ** 2).mean((1, 2, 3)).sqrt().mean()
        kl = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).mean()
        gradients = torch.autograd.grad(loss + measure.kl_weight * kl, (mean, log_variance))
        losses.append(loss.item())
        with torch.no_grad():
            for index, own in enumerate((mean, log_variance)):
                first[index] = 0.9 * first[index] + 0.1 * gradients[index]
                square = (gradients[index] ** 2).mean()
                second[index] = 0.99 * second[index] + 0.01 * square
                scale = (second[index] / (1 - 0.99**step)) ** 0.5
                own -= measure.learning_rate * first[index] / (1 - 0.9**step) / scale
    return losses, mean.detach()


def test_gradients_flow_through_every_step_of_the_sampler():
    network = MicroNetwork()
    measure = trajectory(sampler_steps=5, check_every=8, check_prior=False, bandwidth=2.0)
    setting = make_setting(network, threshold=1.0)
    [outcome] = run(measure, network, setting)
    x0, rng = make_target(network).latents, torch.Generator().manual_seed(0)
    losses, mean = straight_loop(network, x0, measure, rng, network.schedule)
    assert outcome.curves["loss"] == pytest.approx(losses, rel=1e-3)
    torch.testing.assert_close(outcome.tensors["mean"], mean[0], atol=2e-4, rtol=0)
    assert mean.abs().max() > 0.01


def test_a_step_of_each_coordinate_is_that_of_adam():
    network = MicroNetwork()
    options = {"num_steps": 1, "check_every": 1, "check_prior": False, "bandwidth": 2.0}
    measure = trajectory(step_size="coordinate", learning_rate=0.01, **options)
    [outcome] = run(measure, network, make_setting(network, threshold=1.0))
    moved = outcome.tensors["mean"].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), atol=1e-5, rtol=0)


def test_frequencies_outside_the_band_stay_those_of_the_prior():
    network = MicroNetwork()
    [outcome] = run(trajectory(bandwidth=0.5), network, make_setting(network, threshold=1.0))
    inside = low_frequencies(8, 8, 0.5).bool()
    for found in outcome.tensors.values():
        assert found[:, ~inside].abs().max() == 0
        assert found[:, inside].abs().min() > 0
    assert outcome.columns["basis"] == "dct"


def optimum(shift: Tensor, slope: float, image: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Mean and log-variance that minimise E |shift + slope e - image| + weight KL, pixel by pixel.

    By L-BFGS on one large set of draws, where the search takes noisy steps on small ones.
    """
    normal = torch.randn(4096, *image.shape, generator=torch.Generator().manual_seed(1))
    mean, log_variance = (torch.zeros(image.shape, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.LBFGS([mean, log_variance], max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        errors = shift + slope * (mean + (log_variance / 2).exp() * normal) - image
        loss = errors.square().mean((1, 2, 3)).sqrt().mean()
        loss = loss + weight * 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return mean.detach(), log_variance.detach()


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_the_optimum_on_gaussian_data_is_found(basis):
    """The sampler of an ideal denoiser is affine, x = shift + slope e.

    Its slope is the same for all pixels, so that a rotation changes nothing but the coordinates.
    """
    network, weight = IdealNetwork(mean=0.2, std=0.6), 0.5
    measure = trajectory(
        num_steps=150, batch_size=64, check_every=150, check_prior=False, learning_rate=0.02,
        sampler_steps=4, basis=basis, bandwidth=2.0, kl_weight=weight, step_size="coordinate",
    )  # fmt: skip
    [outcome] = run(measure, network, make_setting(network, threshold=1.0))
    ends = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    shift, end = draw(
        lambda latents, timesteps: network.predict(latents, timesteps, None),
        ends,
        sampler=Sampler(num_inference_steps=measure.sampler_steps),
        schedule=network.schedule,
    )
    slope = (end - shift).mean().item()
    torch.testing.assert_close(end - shift, torch.full((3, 4, 4), slope), atol=1e-4, rtol=0)
    mean, log_variance = optimum(shift, slope, make_target(network).latents[0], weight)
    found = from_basis(outcome.tensors["mean"][None], basis)[0]
    torch.testing.assert_close(found, mean, atol=0.1, rtol=0)
    kl = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).mean().item()
    assert kl > 0.1
    assert outcome.curves["kl"][-1] == pytest.approx(kl, rel=0.05)


def test_an_image_that_the_prior_replicates_scores_zero():
    network = IdealNetwork()
    measure = trajectory()
    setting = make_setting(network, threshold=-1.0)
    [outcome] = run(measure, network, setting)
    assert (outcome.status, outcome.score, outcome.steps) == (Status.REPLICATED, 0.0, 0)
    assert (outcome.replication_rate, outcome.evaluations.backward) == (1.0, 0)
    assert outcome.evaluations.forward == (measure.num_check + setting.criterion.num_confirm) * 10


# The confirmation ---------------------------------------------------------------------------


class Coin(PixelWorld):
    """What is drawn in one step is the image of seed 0 with some chance, else its negative.

    No gradient says which way to go, so the distribution stays the prior and its rate the chance.
    """

    def __init__(self, chance: float) -> None:
        super().__init__(linear_schedule("sample"))
        self.image = make_target(self).latents
        self.limit = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(chance))

    def predict(self, latents: Tensor, timesteps: Tensor, condition: object) -> Tensor:
        is_replica = latents[:, :1, :1, :1] < self.limit
        return torch.where(is_replica, self.image, -self.image) + 0 * latents


def test_a_distribution_that_passed_its_checks_by_luck_is_not_replicated():
    network = Coin(0.7)
    setting = make_setting(network, num_inference_steps=1, num_confirm=64)
    measure = trajectory(sampler_steps=1, num_steps=80, num_confirmations=1)
    for seed in range(6):
        [outcome] = run(of_first_image(measure), network, setting, (seed,))
        assert outcome.status is Status.NOT_REPLICATED
        assert outcome.score is None
        assert 1.0 in outcome.curves["rate"]
        assert outcome.columns["confirm_drawn"] == 64
        assert 0.5 < outcome.replication_rate < 0.9
    [outcome] = run(of_first_image(measure), Coin(0.99), setting)
    assert outcome.status is Status.REPLICATED


def of_first_image(measure):
    """The measurement of the image of seed 0, whatever the seed of its random numbers."""
    return lambda target, setting, rng: measure(make_target(Coin(0.5)), setting, rng)


def test_the_confirmation_is_reported_with_what_it_proves():
    network = Coin(0.99)
    setting = make_setting(network, num_inference_steps=1, num_confirm=64)
    measure = trajectory(sampler_steps=1, check_prior=False, num_confirmations=2)
    [outcome] = run(measure, network, setting)
    columns = outcome.columns
    passed, kl = columns["confirm_passed"], outcome.score_nats
    assert outcome.replication_rate == passed / 64
    ends = columns["rate_low"], columns["rate_high"]
    assert ends == clopper_pearson(passed, 64, 0.975)  # two looks share the 5 %
    assert columns["log_p_certified"] == log_p_certified(kl, lower_rate(passed, 64, 0.975))
    assert columns["log_p_certified"] < math.log(0.99)
    assert len(outcome.samples) == 64


def test_nothing_to_confirm_with_is_refused():
    network = Coin(0.5)
    [outcome] = run(trajectory(), network, make_setting(network, num_confirm=0))
    assert outcome.status is Status.FAILED
    assert "replication.num_confirm=0" in outcome.error


# The way back to the prior ----------------------------------------------------------------------


def asked(network, setting, question, seed: int = 0):
    """The answer to a question put to the engine: a coroutine of (target, rng)."""
    answers = []

    async def measurement() -> Outcome:
        rng = torch.Generator().manual_seed(seed)
        answers.append(await question(make_target(network), rng))
        return Outcome(status=Status.NOT_REPLICATED)

    [(_, outcome)] = Engine(network, Direction(), EngineSettings()).run([Job("it", measurement)])
    assert outcome.error is None
    return answers[0]


class HalfSpace(Coin):
    """Drawn in one step, the image comes out where the first coordinate is above an edge."""

    def predict(self, latents: Tensor, timesteps: Tensor, condition: object) -> Tensor:
        return torch.where(latents[:, :1, :1, :1] > 1.05, self.image, -self.image) + 0 * latents


def test_the_way_back_to_the_prior_ends_where_a_check_fails():
    """Of N(4, e^-8), 0.98 is above the edge after 6 steps of 0.85 back, 0.80 after 7."""
    network = HalfSpace(0.5)
    setting = make_setting(network, num_inference_steps=1)
    start = GaussianNoise(torch.full((1, 3, 4, 4), 4.0), torch.full((1, 3, 4, 4), -8.0))
    for num_shrinks, expected in ((20, 7), (3, 4), (0, 1)):
        measure = trajectory(num_check=64, candidate_rate=0.9, basis="pixel", bandwidth=2.0)

        def shrunk(target, rng, measure=measure, num_shrinks=num_shrinks):
            return measure._shrunk(start, num_shrinks, 1.0, target, setting, rng)

        candidates = asked(network, setting, shrunk)
        assert len(candidates) == expected
        for k, candidate in enumerate(candidates):
            torch.testing.assert_close(candidate.mean, start.mean * 0.85**k)
            torch.testing.assert_close(candidate.log_variance, start.log_variance * 0.85**k)
    assert candidates[0].mean is not start.mean


def test_the_nearest_that_is_confirmed_is_scored():
    network = MicroNetwork()
    setting = make_setting(network, threshold=-1.0)  # whatever is drawn replicates
    found, nearer = (
        run(trajectory(check_prior=False, num_shrinks=num_shrinks), network, setting)[0]
        for num_shrinks in (0, 3)
    )
    assert found.steps == nearer.steps == 4
    for name, tensor in found.tensors.items():
        torch.testing.assert_close(nearer.tensors[name], tensor * 0.85**3)
    assert 0 < nearer.score < found.score


# The looks ----------------------------------------------------------------------------------


def ten(replicas: int, scale: float = 1.0) -> Check:
    """A check of ten samples."""
    similarities = torch.linspace(0.9, 0.1, 10)
    return Check(similarities, torch.zeros(10, 3, 4, 4), replicas, replicas >= 9, scale)


class Scripted(Trajectory):
    """A search whose checks and looks are told how many of ten samples replicate.

    Every check offers means of 4, 3 and 2 on the way back to the prior.
    """

    def told(self, checks: list[int], looks: list[int]) -> Outcome:
        """The outcome; `seen` keeps the mean of each look, `tried` the scales of each check."""
        seen, tried = [], []
        object.__setattr__(self, "seen", seen)
        object.__setattr__(self, "tried", tried)
        object.__setattr__(self, "scripts", (iter(checks), iter(looks)))
        network = ConditionalNetwork()
        setting = make_setting(network, num_confirm=10, guidance_scales=(1.0, 3.0))
        [outcome] = run(self, network, setting, make=make_conditional_target)
        assert outcome.error is None
        return outcome

    async def _check(self, noise, guidance_scales, target, setting, rng):
        self.tried.append(list(guidance_scales))
        return ten(next(self.scripts[0]), guidance_scales[-1])

    async def _shrunk(self, noise, num_shrinks, guidance_scale, target, setting, rng):
        return [self._at(mean, target) for mean in (4.0, 3.0, 2.0)]

    async def _look(self, noise, guidance_scale, target, setting, rng):
        self.seen.append((noise.mean.mean().item(), guidance_scale))
        count = next(self.scripts[1])
        return Look(
            noise=noise,
            confirmation=Confirmation(check=ten(count), kl_nats=exact_kl(noise) * 48),
            is_confirmed=count / 10 >= self.confirmed_rate,
        )

    @staticmethod
    def _at(mean: float, target):
        return GaussianNoise(
            torch.full_like(target.latents, mean), torch.zeros_like(target.latents)
        )


def scripted(**more) -> Scripted:
    given = dict(num_steps=12, check_every=4, check_prior=False, sampler_steps=2, batch_size=2,
                 num_confirmations=4, confirmed_rate=0.9)  # fmt: skip
    return Scripted(**{**given, **more})


def test_the_nearest_are_looked_at_first_until_one_is_confirmed():
    """At a rate of just 0.9, on the third look; nothing is drawn after it."""
    search = scripted()
    outcome = search.told([10], [3, 8, 9])
    assert [mean for mean, _ in search.seen] == [2, 3, 4]
    assert (outcome.status, outcome.steps, outcome.replication_rate) == (Status.REPLICATED, 4, 0.9)
    assert outcome.score == pytest.approx(8.0)  # of a mean of 4: 4^2 / 2
    assert outcome.columns["confirm_passed"] == 9


def test_the_looks_left_go_to_the_nearest():
    """Four looks: three after the first check, one after the second; then the search ends."""
    search = scripted()
    outcome = search.told([10, 10], [5, 7, 6, 2])
    assert [mean for mean, _ in search.seen] == [2, 3, 4, 2]
    assert (outcome.status, outcome.steps) == (Status.NOT_REPLICATED, 8)
    # the best look is reported, not the first or the last one
    assert (outcome.replication_rate, outcome.score) == (0.7, None)
    assert outcome.tensors["mean"].mean().item() == pytest.approx(3)


def test_a_failed_look_leaves_the_search_going():
    search = scripted()
    outcome = search.told([10, 0, 10], [1, 2, 3, 10])
    assert (outcome.status, outcome.steps) == (Status.REPLICATED, 12)
    assert outcome.score == pytest.approx(2.0)  # of a mean of 2
    few = scripted(num_confirmations=2)
    assert few.told([10], [1, 2]).steps == 4
    assert [mean for mean, _ in few.seen] == [2, 3]


def test_the_scale_of_a_check_is_that_of_its_looks_and_the_next_to_be_tried_first():
    """Each check here is decided by the scale that is tried last."""
    search = scripted(num_confirmations=6)
    search.told([10, 0, 10], [0] * 6)
    assert search.tried == [[1.0, 3.0], [3.0, 1.0], [1.0, 3.0]]
    assert [scale for _, scale in search.seen] == [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]


# Cost, reproducibility, faults ---------------------------------------------------------------


def test_the_cost_is_what_is_evaluated():
    network = MicroNetwork()
    setting = make_setting(network, threshold=1.0)
    measure = trajectory()
    [outcome] = run(measure, network, setting)
    assert outcome.evaluations == measure.cost(setting.sampler, setting.criterion).fewest

    coin = Coin(0.5)
    setting = make_setting(coin, num_inference_steps=1)
    measure = trajectory(
        sampler_steps=1, num_steps=4, check_prior=False, num_check=32, candidate_rate=0.01,
        num_shrinks=1, confirmed_rate=1.0, num_confirmations=1,
    )  # fmt: skip
    [outcome] = run(measure, coin, setting)
    assert outcome.status is Status.NOT_REPLICATED
    assert outcome.evaluations == measure.cost(setting.sampler, setting.criterion).most


def test_guided_models_are_driven_and_checked_at_their_scales():
    network = ConditionalNetwork()
    setting = make_setting(network, threshold=1.0, guidance_scales=(1.0, 3.0))
    measure = trajectory()
    [outcome] = run(measure, network, setting, make=make_conditional_target)
    cost = measure.cost(setting.sampler, setting.criterion)
    assert outcome.status is Status.NOT_REPLICATED
    assert cost.fewest.backward <= outcome.evaluations.backward <= cost.most.backward
    assert cost.most.backward == 2 * cost.fewest.backward


@pytest.mark.parametrize("stochastic", [False, True])
def test_images_in_flight_do_not_change_a_bit(stochastic):
    network = MicroNetwork()
    setting = make_setting(network, threshold=0.0, eta=1.0 if stochastic else 0.0)
    seeds, measure = (0, 1, 2, 3, 4), trajectory(candidate_rate=0.5)
    alone = run(measure, network, setting, seeds, slots=1)
    together = run(measure, network, setting, seeds, slots=4)
    again = run(measure, network, setting, seeds, slots=4)
    for left, *others in zip(alone, together, again, strict=True):
        for right in others:
            assert (left.status, left.score, left.curves) == (
                right.status, right.score, right.curves
            )  # fmt: skip
            assert left.columns == right.columns
            for name, tensor in left.tensors.items():
                assert torch.equal(tensor, right.tensors[name])
    assert alone[0].curves["loss"] != alone[1].curves["loss"]


def test_divergence_keeps_the_curves_before_it():
    class Explodes(MicroNetwork):
        def predict(self, latents, timesteps, condition):
            output = super().predict(latents, timesteps, condition)
            return output * math.inf if len(self.calls) > 14 else output

    network = Explodes()
    measure = trajectory(check_prior=False)
    [outcome] = run(measure, network, make_setting(network, threshold=1.0))
    assert outcome.status is Status.DIVERGED
    assert "not finite" in outcome.error
    assert len(outcome.curves["loss"]) == len(outcome.curves["kl"]) == outcome.steps
    assert len(outcome.curves["rate"]) == len(outcome.curves["rate_step"])


def test_a_flow_is_driven_by_eulers_method():
    schedule = NoiseSchedule.from_config({"num_train_timesteps": 1000, "shift": 3.0})
    sampler = Sampler(scheduler="flow_heun", num_inference_steps=10, timestep_spacing="linspace")
    setting = replace(make_setting(MicroNetwork()), schedule=schedule, sampler=sampler)
    short = trajectory(sampler_steps=7).short_sampler(setting)
    assert (short.scheduler, short.num_inference_steps) == ("flow_euler", 7)


def test_faults_name_the_key_the_value_and_the_cure():
    with pytest.raises(ValueError, match=r"inversion\.num_steps=2 never reaches"):
        Trajectory(num_steps=2, check_every=4)
    with pytest.raises(ValueError, match=r"inversion\.bandwidth=0.5 has no meaning"):
        Trajectory(basis="pixel", bandwidth=0.5)
    network = MicroNetwork()
    [outcome] = run(trajectory(sampler_steps=3), network, make_setting(network))
    assert outcome.status is Status.FAILED
    assert "inversion.sampler_steps=3 does not divide" in outcome.error
