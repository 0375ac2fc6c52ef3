"""The search of a prompt: its relaxation, its gradients, its way through the engine."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from worlds import Direction, MicroNetwork, PixelWorld, linear_schedule, make_setting, make_target

from invmm.diffusion.guidance import Condition
from invmm.engine.engine import Engine
from invmm.engine.outcomes import Outcome, Status
from invmm.engine.requests import Denoise, Embed, EncodePrompt, Minimise
from invmm.engine.searched_prompt import PromptSearch, PromptTokens
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job
from invmm.inversion.controllers import AdaptiveKLWeight, FixedKLWeight
from invmm.inversion.inversion import Inversion
from invmm.inversion.objectives import DenoisingObjective
from invmm.inversion.soft_prompt import RelaxedTokens, SoftPrompt, relaxed_tokens

VOCABULARY, WIDTH, FREE = 7, 3, 2


class _Counted(torch.autograd.Function):
    """The identity; counts the rows whose backward is still to come."""

    @staticmethod
    def forward(ctx, values, network):
        ctx.network, ctx.rows = network, len(values)
        if values.requires_grad:
            network.held += len(values)
            network.most_held = max(network.most_held, network.held)
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient):
        ctx.network.held -= ctx.rows
        return gradient, None


class TextWorld(MicroNetwork):
    """A `MicroNetwork` shifted by what it makes of the mean embedding of its prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most_held = 0
        self.encoded: list[tuple[int, bool]] = []

    def encode_prompt(self, embeddings: Condition, ids: Condition, fixed: Condition) -> Condition:
        (own,) = embeddings.values()
        assert len(own) == len(fixed["embeds"]) == len(ids["encoder"])
        self.encoded.append((len(own), own.requires_grad))
        return {"embeds": _Counted.apply(self.read(own), self) + fixed["embeds"]}

    @staticmethod
    def read(embeddings: Tensor) -> Tensor:
        """(B, L, d) -> (B, d)."""
        return embeddings.mean(1).tanh()

    def predict(self, latents: Tensor, timesteps: Tensor, condition: object) -> Tensor:
        assert isinstance(condition, dict)
        output = super().predict(latents, timesteps, None)
        return output + condition["embeds"][:, :, None, None]


class ColourWorld(PixelWorld):
    """Draws the colour that its prompt says and nothing else, whatever the noise."""

    encode_prompt = TextWorld.encode_prompt
    held = most_held = 0

    def __init__(self) -> None:
        super().__init__(linear_schedule("sample"), (WIDTH, 4, 4))
        self.encoded = []

    @staticmethod
    def read(embeddings: Tensor) -> Tensor:
        return embeddings.mean(1)

    def predict(self, latents: Tensor, timesteps: Tensor, condition: object) -> Tensor:
        assert isinstance(condition, dict)
        return condition["embeds"][:, :, None, None].expand_as(latents)


def make_tokens(*, table: Tensor | None = None, **search: object) -> PromptTokens:
    rng = torch.Generator().manual_seed(5)
    table = torch.randn(VOCABULARY, WIDTH, generator=rng) if table is None else table
    return PromptTokens(
        search=PromptSearch(**search),  # pyright: ignore[reportArgumentType]
        num_free=FREE,
        tables={"encoder": table},
        ids={"encoder": torch.tensor([[0] * (1 + FREE) + [1]])},
        fixed={"embeds": torch.zeros(1, WIDTH)},
        reads_caption=False,
        decode=lambda ids: " ".join(map(str, ids)),
    )


def text_job(network, index: int, tokens: PromptTokens, *, setting=None, **changes) -> Job:
    options = {
        "objective": DenoisingObjective(batch_size=3), "kl_weight": AdaptiveKLWeight(),
        "num_steps": 12, "check_every": 4, **changes,
    }  # fmt: skip

    def start():
        target = replace(make_target(network, index), tokens=tokens)
        rng = torch.Generator().manual_seed(index)
        return Inversion(**options)(target, setting or make_setting(network), rng)

    return Job(f"image-{index}", start)


def run(network, jobs, **settings) -> dict[str, Outcome]:
    engine = Engine(network, Direction(), EngineSettings(**settings))
    return {job.key: outcome for job, outcome in engine.run(jobs)}


# The relaxation -----------------------------------------------------------------------------


def direct(logits: Tensor, seeds: list[int], temperature: float, *tables: Tensor):
    """All draws at once, by torch's own softmax and autograd."""
    uniform_like = torch.empty_like(logits)
    gumbel = torch.stack([
        -uniform_like.exponential_(generator=torch.Generator().manual_seed(seed)).log()
        for seed in seeds
    ])  # fmt: skip
    weights = torch.softmax((logits + gumbel) / temperature, dim=-1)
    return tuple(torch.einsum("bnv,vd->bnd", weights, table) for table in tables)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_draw_after_draw_equals_all_at_once_gradients_included(temperature):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 50, generator=rng, dtype=torch.float64)
    tables = [torch.randn(50, d, generator=rng, dtype=torch.float64) for d in (6, 9)]
    slopes = [torch.randn(5, 4, d, generator=rng, dtype=torch.float64) for d in (6, 9)]
    results = []
    for function in (direct, RelaxedTokens.apply):
        own = logits.clone().requires_grad_()
        found = function(own, [3, 1, 4, 1, 5], temperature, *tables)
        sum((f * s).sum() for f, s in zip(found, slopes, strict=True)).backward()
        results.append([*(value.detach() for value in found), own.grad])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_gradient_is_the_slope():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    table = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda own: RelaxedTokens.apply(own, [7, 8], 2.0, table), logits
    )


def test_the_likeliest_token_of_a_draw_follows_the_distribution():
    """The Gumbel-max theorem: token v leads with probability softmax(logits)_v."""
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5]])
    draws = torch.cat([relaxed_tokens(logits, seed, 2.0) for seed in range(4000)])
    assert draws.sum(1).allclose(torch.ones(4000))
    share = torch.bincount(draws.argmax(1), minlength=4) / 4000
    expected = logits[0].softmax(0)
    # five standard errors
    assert (share - expected).abs().max() < 5 * math.sqrt(0.25 / 4000)


def test_a_colder_draw_is_nearer_to_a_single_token():
    logits = torch.zeros(1, 20)
    hot, cold = (relaxed_tokens(logits, 0, temperature) for temperature in (2.0, 0.002))
    assert hot.argmax() == cold.argmax()
    assert hot.max() < 0.5 < 0.99 < cold.max()


def test_begin_end_and_padding_stay():
    table = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[2, 2, 2, 3, 4, 4]])
    tokens = replace(make_tokens(table=table), ids={"encoder": ids})
    (drawn,) = SoftPrompt(tokens).draw(5, torch.Generator().manual_seed(0)).values()
    assert drawn.shape == (5, 6, WIDTH)
    given = [0, 3, 4, 5]
    assert torch.equal(drawn[:, given], table[ids[0, given]].expand(5, -1, -1))
    assert len(drawn[:, 1].unique(dim=0)) == 5


# The search ---------------------------------------------------------------------------------


def test_the_token_that_draws_the_image_is_found_and_costs_nothing():
    """Only the colour of token 4 is that of the image; the noise has no influence."""
    network = ColourWorld()
    colour = torch.tensor([0.9, -0.6, 0.3])
    # The begin and end tokens have no colour, so that two free ones of four make the mean.
    table = torch.zeros(VOCABULARY, WIDTH)
    table[2:] = torch.tensor([[-1.0, 1, 1], [1, 1, -1], [0, 0, 0], [-1, -1, -1], [0, 1, 0]])
    table[4] = 2 * colour
    target = make_target(network)
    pixels = colour[:, None, None].expand(WIDTH, 4, 4)
    target = replace(
        target, pixels=pixels, latents=pixels[None], embedding=Direction().embed(pixels[None])[0],
        tokens=make_tokens(table=table),
    )  # fmt: skip
    inversion = Inversion(
        objective=DenoisingObjective(batch_size=16), kl_weight=FixedKLWeight(value=1.0),
        num_steps=200, check_every=200, check_prior=False,
    )  # fmt: skip
    setting = make_setting(network, threshold=0.99)
    job = Job("it", lambda: inversion(target, setting, torch.Generator().manual_seed(0)))
    outcome = run(network, [job])["it"]
    assert outcome.status is Status.REPLICATED
    assert outcome.score == 0
    assert outcome.tensors["prompt_ids"].tolist() == [4, 4]
    assert outcome.columns["prompt"] == "4 4"
    free = outcome.tensors["prompt_embedding"][1 : 1 + FREE]
    torch.testing.assert_close(free, table[[4, 4]], rtol=0, atol=0.1)
    assert outcome.curves["loss"][-1] < 0.01 * outcome.curves["loss"][0]


def test_the_losses_equal_those_of_a_straight_loop():
    """Two images through the engine, each against its own loop without it."""
    network, tokens, steps, batch = TextWorld(), make_tokens(), 12, 3
    outcomes = run(network, [text_job(network, index, tokens) for index in range(2)])
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    for index in range(2):
        rng, x0 = torch.Generator().manual_seed(index), make_target(network, index).latents
        mu, logvar = (torch.zeros_like(x0, requires_grad=True) for _ in range(2))
        logits = torch.zeros(FREE, VOCABULARY, requires_grad=True)
        adam, losses = torch.optim.Adam([mu, logvar, logits], lr=0.1), []
        table, (ids,) = tokens.tables["encoder"], tokens.ids["encoder"]

        def embeds(count, logits=logits, rng=rng, table=table, ids=ids):
            seeds = torch.randint(2**62, (count,), generator=rng).tolist()
            (free,) = direct(logits, seeds, 2.0, table)
            begin, end = (table[i].expand(count, 1, WIDTH) for i in (ids[0], ids[-1]))
            return network.read(torch.cat([begin, free, end], 1))

        for step in range(steps):
            if step % 4 == 0:  # a check, the prior included, draws noises and one prompt
                torch.randn(4, *x0.shape[1:], generator=rng)
                embeds(1)
            t = torch.randint(1000, (batch,), generator=rng)
            e = mu + (logvar / 2).exp() * torch.randn(batch, *x0.shape[1:], generator=rng)
            a = alphas[t].view(-1, 1, 1, 1)
            xt = a.sqrt() * x0 + (1 - a).sqrt() * e
            output = network.predict(xt, t, {"embeds": embeds(batch)})
            loss = ((xt - (1 - a).sqrt() * output) / a.sqrt() - x0).square().mean()
            kl = (0.5 * (mu**2 + logvar.exp() - logvar - 1)).mean()
            adam.zero_grad()
            (loss + outcomes[f"image-{index}"].curves["kl_weight"][step] * kl).backward()
            adam.step()
            losses.append(loss.item())
        outcome = outcomes[f"image-{index}"]
        assert outcome.status is Status.NOT_REPLICATED
        assert outcome.curves["loss"] == pytest.approx(losses, rel=2e-3)
        assert logits.abs().max() > 0.3
        assert outcome.tensors["prompt_ids"].tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize("check_prompts", ["shared", "each"])
def test_one_prompt_for_all_samples_of_a_check_or_one_for_each(check_prompts):
    network = TextWorld()
    tokens = make_tokens(check_prompts=check_prompts)
    setting = make_setting(network, threshold=1.0, early_exit=False)
    outcome = run(network, [text_job(network, 0, tokens, setting=setting)])["image-0"]
    embedding = outcome.tensors["prompt_embedding"]
    length = len(tokens.ids["encoder"][0])
    if check_prompts == "shared":
        assert embedding.shape == (length, WIDTH)
    else:
        assert embedding.shape == (4, length, WIDTH)
        assert len(embedding[:, 1].unique(dim=0)) == 4


def test_what_is_stored_draws_the_samples_that_passed():
    network = ColourWorld()
    tokens = make_tokens(table=torch.rand(VOCABULARY, WIDTH, generator=torch.Generator()) / 2)
    setting = make_setting(network, threshold=-1.0)
    outcome = run(network, [text_job(network, 0, tokens, setting=setting)])["image-0"]
    assert (outcome.status, outcome.steps) == (Status.REPLICATED, 0)
    colour = outcome.tensors["prompt_embedding"].mean(0)[:, None, None]
    torch.testing.assert_close(outcome.samples, colour.expand(4, WIDTH, 4, 4))


@pytest.mark.parametrize("check_prompts", ["shared", "each"])
def test_prompts_that_were_found_take_turns(check_prompts):
    network, tokens = TextWorld(), make_tokens(check_prompts=check_prompts)
    seen = {}

    async def measure(target, setting, rng) -> Outcome:
        prompt = SoftPrompt(tokens)
        assert prompt.conditioned(target) is target  # nothing was checked
        seen["checked"] = await prompt.check_rows(3, rng)
        seen["found"] = prompt.conditioned(target).rows(7)
        return Outcome(status=Status.NOT_REPLICATED)

    job = Job("it", lambda: measure(make_target(network), None, torch.Generator().manual_seed(0)))
    [(_, outcome)] = Engine(network, Direction(), EngineSettings()).run([job])
    assert outcome.error is None
    for name, rows in seen["checked"].items():
        assert torch.equal(seen["found"][name], rows[torch.arange(7) % 3])
        assert len(rows.unique(dim=0)) == (1 if check_prompts == "shared" else 3)


def test_a_found_prompt_certifies_nothing_about_the_caption():
    network = ColourWorld()
    tokens = make_tokens(table=torch.rand(VOCABULARY, WIDTH, generator=torch.Generator()) / 2)
    setting = make_setting(network, threshold=-1.0, num_confirm=16)
    outcome = run(network, [text_job(network, 0, tokens, setting=setting)])["image-0"]
    assert outcome.columns["confirm_passed"] == outcome.columns["confirm_drawn"] == 16
    assert outcome.columns["log_p_certified"] is None


# Through the engine -------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [2, 5, "auto"])
@pytest.mark.parametrize("check_prompts", ["shared", "each"])
def test_slots_do_not_change_a_bit(slots, check_prompts):
    network, tokens = TextWorld(), make_tokens(check_prompts=check_prompts)
    jobs = [text_job(network, index, tokens) for index in range(7)]
    alone = run(network, jobs, slots=1, rows_denoise=8, rows_sample=5)
    shared = run(network, jobs, slots=slots, rows_denoise=8, rows_sample=5)
    for key, outcome in alone.items():
        assert outcome.error is None
        other = shared[key]
        assert (outcome.status, outcome.score) == (other.status, other.score)
        assert outcome.curves == other.curves
        assert outcome.evaluations == other.evaluations
        assert outcome.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(value, other.tensors[k]) for k, value in outcome.tensors.items())


def test_prompts_are_encoded_together_in_calls_of_constant_rows_and_cost_no_evaluation():
    network = TextWorld()
    setting = make_setting(network, threshold=1.0)
    jobs = [text_job(network, index, make_tokens(), setting=setting) for index in range(8)]
    outcomes = run(network, jobs, rows_denoise=6, rows_sample=4)
    assert {rows for rows, _ in network.encoded} == {6}
    with_graph = sum(graph for _, graph in network.encoded)
    assert with_graph == 8 * 12 // 2  # two images of 3 rows a call
    for outcome in outcomes.values():
        assert outcome.evaluations.backward == 12 * 3
        assert outcome.evaluations.forward == 12 * 3 + 4 * 10
        assert outcome.seconds.on["network"] > 0


@pytest.mark.parametrize("rows", [3, 4, 8, 12])
def test_graphs_of_prompts_do_not_pile_up_with_the_slots(rows):
    """Whether or not the images' three rows fill the calls, which mix with those of checks."""
    network = TextWorld()
    jobs = [
        text_job(network, index, make_tokens(), check_every=index % 3 + 2) for index in range(9)
    ]
    outcomes = run(network, jobs, rows_denoise=rows, rows_sample=2)
    assert not any(outcome.error for outcome in outcomes.values())
    assert 0 < network.most_held <= rows
    assert network.held == 0


def test_a_prompt_whose_neighbour_minimises_first_keeps_its_graph():
    """One call encodes both prompts; one image has more to ask before it minimises."""
    network, tokens = TextWorld(), make_tokens()
    grads = {}

    async def measure(index, times):
        prompt = SoftPrompt(tokens)
        adam = torch.optim.Adam(prompt.parameters(), lr=0.1)
        rng = torch.Generator().manual_seed(index)
        latents = make_target(network, index).latents
        for _ in range(2):
            rows = await prompt.rows(1, rng)
            if times > 1:
                await Embed(latents)
            outputs = [
                (await Denoise(latents, torch.tensor([n]), rows)).output for n in range(times)
            ]
            await Minimise(sum(output.square().mean() for output in outputs))
            grads[index] = prompt.logits.grad.clone()
            adam.step()
            adam.zero_grad()
        return Outcome(status=Status.NOT_REPLICATED)

    jobs = [Job(str(i), lambda i=i, n=n: measure(i, n)) for i, n in enumerate((3, 1))]
    outcomes = run(network, jobs, slots=2, rows_denoise=2)
    assert [outcomes[str(i)].error for i in range(2)] == [None, None]
    assert [outcomes[str(i)].evaluations.backward for i in range(2)] == [6, 2]
    together = dict(grads)
    run(network, jobs, slots=1, rows_denoise=2)
    for index in range(2):
        assert together[index].abs().max() > 0
        assert torch.equal(together[index], grads[index])


def test_an_encoder_without_memory_goes_on_with_fewer_rows():
    class Small(TextWorld):
        def encode_prompt(self, embeddings, ids, fixed):
            if len(ids["encoder"]) > 3:
                raise torch.OutOfMemoryError("too many")
            return super().encode_prompt(embeddings, ids, fixed)

    roomy, small = TextWorld(), Small()
    tokens = make_tokens()
    expected = run(roomy, [text_job(roomy, i, tokens) for i in range(3)], rows_denoise=3)
    found = run(small, [text_job(small, i, tokens) for i in range(3)], rows_denoise=12)
    for key, outcome in expected.items():
        assert found[key].error is None
        assert found[key].curves["loss"] == outcome.curves["loss"]


def test_a_network_that_reads_no_text_fails_the_image_with_its_name():
    network = MicroNetwork()

    async def measure():
        await EncodePrompt({"encoder": torch.zeros(1, 4, WIDTH)}, make_tokens())

    outcome = run(network, [Job("it", measure)])["it"]
    assert outcome.status is Status.FAILED
    assert outcome.error == "TypeError: a MicroNetwork encodes no prompts"
