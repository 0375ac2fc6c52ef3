"""The inversion against exact optima and against a straight-line reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from worlds import Direction, IdealNetwork, MicroNetwork, make_setting, make_target

from invmm.engine.engine import Engine
from invmm.engine.finiteness import Stage
from invmm.engine.outcomes import Outcome, Status
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job
from invmm.inversion.controllers import AdaptiveKLWeight, FixedKLWeight
from invmm.inversion.inversion import Inversion
from invmm.inversion.objectives import DenoisingObjective
from invmm.probability.certificate import lower_rate


def invert(inversion: Inversion, network, setting, seed: int = 0, **settings) -> Outcome:
    engine = Engine(network, Direction(), EngineSettings(**settings))
    rng = torch.Generator().manual_seed(seed)
    job = Job("it", lambda: inversion(make_target(network, seed), setting, rng))
    return next(iter(engine.run([job])))[1]


@pytest.mark.parametrize(
    ("prediction_type", "timesteps"), [("sample", "uniform"), ("v_prediction", "importance")]
)
def test_the_optimum_on_gaussian_data_is_found(prediction_type, timesteps):
    """With the ideal denoiser, E[P] + weight * KL is quadratic in the mean and solvable.

    x_0_hat - x_0 = (1 - c a)(m - x_0) + c s e with gain c, signal a and noise scale s; its square
    has the mean A (mu^2 + sigma^2) + 2 B mu + const, A = mean (c s)^2, B = mean (1 - c a) c s
    (m - x_0). Adding weight / 2 (mu^2 + sigma^2 - log sigma^2) gives mu = -2 B / (2 A + weight)
    and sigma^2 = weight / (2 A + weight).
    """
    network = IdealNetwork(prediction_type, mean=0.2, std=0.5)
    weight = 0.05
    inversion = Inversion(
        objective=DenoisingObjective(batch_size=256, timesteps=timesteps),
        kl_weight=FixedKLWeight(value=weight),
        num_steps=400,
        check_every=400,
        learning_rate=0.03,
        check_prior=False,
    )
    setting = make_setting(network, threshold=1.0)
    outcome = invert(inversion, network, setting, rows_denoise=256)

    alpha = network.schedule.alphas_cumprod.double()
    signal, scale = alpha.sqrt(), (1 - alpha).sqrt()
    gain = signal * 0.25 / (alpha * 0.25 + 1 - alpha)
    x0 = make_target(network).latents[0].double()
    quadratic = (gain * scale).square().mean()
    linear = ((1 - gain * signal) * gain * scale).mean() * (0.2 - x0)
    mean = -2 * linear / (2 * quadratic + weight)
    variance = weight / (2 * quadratic + weight)
    assert (outcome.tensors["mean"] - mean).abs().max() < 0.12
    assert outcome.tensors["log_variance"].mean().item() == pytest.approx(
        math.log(variance), abs=0.1
    )
    kl = 0.5 * (mean.square() + variance - math.log(variance) - 1).mean().item()
    assert outcome.curves["kl"][-1] == pytest.approx(kl, rel=0.15)


def reference(network, x0: Tensor, seed: int, *, steps, batch, every, threshold, count, delta, ksi):
    """The published algorithm for one image, written straight down without the engine.

    Randomness in the order the project uses it: timesteps, then noises; at a check, noises.
    """
    rng = torch.Generator().manual_seed(seed)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    mu = torch.zeros_like(x0, requires_grad=True)
    logvar = torch.zeros_like(x0, requires_grad=True)
    adam = torch.optim.Adam([mu, logvar], lr=0.1)
    lam, previous, history = 1.0, float("inf"), []
    losses, kls, lams, checks = [], [], [], []
    for step in range(1, steps + 1):
        t = torch.randint(1000, (batch,), generator=rng)
        e = mu + (logvar / 2).exp() * torch.randn(batch, *x0.shape[1:], generator=rng)
        a = alphas[t].view(-1, 1, 1, 1)
        xt = a.sqrt() * x0 + (1 - a).sqrt() * e
        x0_hat = (xt - (1 - a).sqrt() * network.predict(xt, t, None)) / a.sqrt()
        p = ((x0_hat - x0) ** 2).mean()
        r = (0.5 * (mu**2 + logvar.exp() - logvar - 1)).mean()
        losses.append(p.item()), kls.append(r.item()), lams.append(lam)
        adam.zero_grad()
        (p + lam * r).backward()
        adam.step()
        history.append(p.item())
        if step % every:
            lam += delta
            continue
        now = sum(history[-100:]) / len(history[-100:])
        lam = lam / 2 if previous - now < ksi else lam + delta
        previous = now
        with torch.no_grad():
            x = mu + (logvar / 2).exp() * torch.randn(count, *x0.shape[1:], generator=rng)
            for at in range(999, 0, -100):
                eps = network.predict(x, torch.full((count,), at), None)
                clean = (x - (1 - alphas[at]).sqrt() * eps) / alphas[at].sqrt()
                after = alphas[at - 100] if at >= 100 else torch.tensor(1.0)
                x = after.sqrt() * clean + (1 - after).sqrt() * eps
            x = x.clamp(-1, 1).flatten(1)
            flat = x0.flatten()
            similarity = (x @ flat) / (x.norm(dim=1) * flat.norm())
        checks.append(similarity.tolist())
        if similarity.min() >= threshold:
            return (0.5 * (mu**2 + logvar.exp() - logvar - 1)).mean().item(), locals()
    return None, locals()


@pytest.mark.parametrize(
    ("make", "threshold", "replicates"),
    [(MicroNetwork, 0.999, False), (lambda: IdealNetwork(std=1.0), 0.5, True)],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_engine_agrees_with_the_straight_line_reference(make, threshold, replicates, seed):
    network = make()
    rule = {"batch": 8, "every": 10, "threshold": threshold, "count": 4}
    steps, delta, ksi = 60, 1e-3, 0.05
    x0 = make_target(network, seed).latents
    score, seen = reference(network, x0, seed, steps=steps, delta=delta, ksi=ksi, **rule)
    inversion = Inversion(
        objective=DenoisingObjective(batch_size=8),
        kl_weight=AdaptiveKLWeight(increment=delta, tolerance=ksi),
        num_steps=steps,
        check_every=10,
        check_prior=False,
    )
    setting = make_setting(network, threshold=threshold, early_exit=False)
    outcome = invert(inversion, network, setting, seed, rows_denoise=8, rows_sample=4)

    assert (outcome.status is Status.REPLICATED) == (score is not None) == replicates
    assert outcome.steps == len(seen["losses"])
    if score is not None:
        assert outcome.score == pytest.approx(score, rel=1e-3)
        assert outcome.score_nats == pytest.approx(score * x0.numel(), rel=1e-3)
    assert outcome.curves["loss"] == pytest.approx(seen["losses"], rel=2e-3)
    assert outcome.curves["kl"] == pytest.approx(seen["kls"], rel=2e-3, abs=1e-6)
    assert outcome.curves["kl_weight"] == pytest.approx(seen["lams"], rel=1e-9)
    assert outcome.curves["similarity_min"] == pytest.approx(
        [min(check) for check in seen["checks"]], abs=2e-3
    )
    torch.testing.assert_close(outcome.tensors["mean"], seen["mu"][0].detach(), rtol=0, atol=5e-3)


def test_the_untouched_prior_is_tested_first_and_scores_zero():
    network = IdealNetwork()
    inversion = Inversion(
        objective=DenoisingObjective(), kl_weight=AdaptiveKLWeight(), num_steps=10, check_every=5
    )
    outcome = invert(inversion, network, make_setting(network, threshold=-1.0))
    assert (outcome.status, outcome.score, outcome.steps) == (Status.REPLICATED, 0.0, 0)
    assert outcome.evaluations.backward == 0
    assert outcome.samples.shape == (4, 3, 4, 4)


def test_fresh_samples_tell_the_rate_and_change_no_score():
    """At the prior, where the rate of the fresh samples can be counted beside."""
    network = MicroNetwork()
    inversion = Inversion(
        objective=DenoisingObjective(), kl_weight=AdaptiveKLWeight(), num_steps=10, check_every=5
    )

    def outcome_at(threshold: float, **settings) -> Outcome:
        return invert(inversion, network, make_setting(network, threshold=threshold, **settings))

    # The check of one sample passes at its own similarity; about half of the others replicate.
    threshold = outcome_at(1.0, num_samples=1).curves["similarity"][0] - 1e-6
    plain = outcome_at(threshold, num_samples=1)
    confirmed = outcome_at(threshold, num_samples=1, num_confirm=200)
    assert plain.replication_rate == 1
    assert "confirm_passed" not in plain.columns
    assert (confirmed.score, confirmed.steps) == (plain.score, plain.steps) == (0.0, 0)
    columns = confirmed.columns
    assert columns["confirm_drawn"] == 200
    assert 0 < columns["confirm_passed"] < 200
    assert confirmed.replication_rate == columns["confirm_passed"] / 200
    assert columns["rate_low"] < confirmed.replication_rate < columns["rate_high"]
    # The prior certifies the lower end of its own rate.
    assert columns["log_p_certified"] == pytest.approx(
        math.log(lower_rate(columns["confirm_passed"], 200)), abs=1e-9
    )
    evaluations = confirmed.evaluations.sampler - plain.evaluations.sampler
    assert evaluations == 200 * 10


def test_an_unreplicated_image_has_no_score_and_keeps_its_closest_samples():
    network = MicroNetwork()
    inversion = Inversion(
        objective=DenoisingObjective(), kl_weight=AdaptiveKLWeight(), num_steps=10, check_every=5
    )
    outcome = invert(inversion, network, make_setting(network, threshold=1.0))
    assert outcome.status is Status.NOT_REPLICATED
    assert outcome.score is None
    assert outcome.score_nats is None
    assert outcome.replication_rate is None
    assert outcome.best_similarity == max(outcome.curves["similarity"])
    assert outcome.curves["similarity_step"] == [0, 5, 10]
    similarity = Direction().embed(outcome.samples) @ make_target(network).embedding
    assert similarity.max().item() == pytest.approx(outcome.best_similarity, abs=1e-6)


def test_divergence_keeps_the_step_and_the_curves():
    class Explodes(MicroNetwork):
        def predict(self, latents, timesteps, condition):
            output = super().predict(latents, timesteps, condition)
            return output * math.inf if len(self.calls) > 7 else output

    network = Explodes()
    inversion = Inversion(
        objective=DenoisingObjective(batch_size=4),
        kl_weight=AdaptiveKLWeight(),
        num_steps=10,
        check_every=10,
        check_prior=False,
    )
    outcome = invert(inversion, network, make_setting(network), rows_denoise=4)
    assert outcome.status is Status.DIVERGED
    assert outcome.error == f"at step 8: the loss is inf: {Stage.PREDICTION}"
    assert outcome.steps == 7
    assert len(outcome.curves["loss"]) == 7


def test_a_check_that_is_never_reached_is_refused():
    with pytest.raises(ValueError, match=r"inversion\.num_steps=4 never reaches"):
        Inversion(
            objective=DenoisingObjective(),
            kl_weight=AdaptiveKLWeight(),
            num_steps=4,
            check_every=50,
        )
