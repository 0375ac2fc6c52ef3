"""Token embeddings in place of a text, against the pipelines that read the text itself."""

from __future__ import annotations

import copy
from dataclasses import replace

import pipelines
import pytest
import torch
from torch import Tensor

from invmm.data.dataset import ImageEntry
from invmm.data.prompt import Prompt
from invmm.engine.protocols import Network, TextNetwork
from invmm.engine.searched_prompt import PromptSearch, PromptTokens
from invmm.models.execution import Execution, SearchableNetwork
from invmm.models.pipeline import PIPELINES
from invmm.runtime.conditions import Conditions

CPU = torch.device("cpu")
SEARCHES = {
    "sd1 epsilon": ("sd1 epsilon", None),
    "sd2 v": ("sd2 v", None),
    "sdxl": ("sdxl", None),
    "sdxl first": ("sdxl", ["text_encoder"]),
    "sdxl second": ("sdxl", ["text_encoder_2"]),
    "sd3": ("sd3", None),
    "sd3 both": ("sd3", ["text_encoder", "text_encoder_2"]),
    "sd3 t5": ("sd3 t5 24 pixels", None),
}
CAPTION = "a red fox"
ENTRY = ImageEntry(image_id="it", path="it.png", caption=CAPTION)


def network_of(family: str):
    """Padded as the released ones: only SD 1 and first encoders pad with the end token."""
    pipeline = pipelines.seeded(pipelines.MAKERS[family])
    for name in ["tokenizer"] if family == "sd2 v" else ["tokenizer_2"]:
        if hasattr(pipeline, name):
            getattr(pipeline, name).pad_token = "<unk>"
    return PIPELINES[type(pipeline).__name__](pipeline, CPU)


@pytest.fixture(params=SEARCHES)
def case(request):
    """(network, search)."""
    family, encoders = SEARCHES[request.param]
    return network_of(family), PromptSearch(encoders=encoders)


def one_hot(tokens: PromptTokens, text_ids: list[int]) -> dict[str, Tensor]:
    """Embeddings (1, L, d) of a text, as rows of a one-hot matrix times the table."""
    found = {}
    for name, table in tokens.tables.items():
        ids = tokens.ids[name][0].tolist()
        ids[1 : 1 + tokens.num_free] = text_ids
        weights = torch.nn.functional.one_hot(torch.tensor(ids), len(table)).to(table)
        found[name] = (weights @ table)[None]
    return found


def words(network, text: str) -> list[int]:
    return network.pipeline.tokenizer(text).input_ids[1:-1]


def encoded(network, tokens: PromptTokens, embeddings: dict[str, Tensor]):
    count = len(next(iter(embeddings.values())))

    def rows(values):
        return {name: value.expand(count, *value.shape[1:]) for name, value in values.items()}

    return network.encode_prompt(embeddings, rows(tokens.ids), rows(tokens.fixed))


@pytest.mark.parametrize("text", [CAPTION, "z" * 75])
def test_one_hot_weights_equal_the_text(case, text):
    """Whether the text fills all places or is followed by the padding of its tokenizer."""
    network, search = case
    ids = words(network, text)
    tokens = network.searched_prompt(PromptSearch(encoders=search.encoders, num_tokens=len(ids)))
    fixed = network.condition(text)
    with torch.no_grad():
        own = PromptTokens(**{**vars(tokens), "fixed": fixed})
        found = encoded(network, own, one_hot(tokens, ids))
    assert found.keys() == fixed.keys()
    for name, value in fixed.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    if len(ids) == 75:
        assert network.searched_prompt(search).num_free == 75


@pytest.mark.parametrize("rows", [1, 3])
def test_a_prompt_from_a_record_is_the_text_again(case, rows):
    network, search = case
    ids = words(network, CAPTION)
    prompt = Prompt(kind="learned", search=replace(search, num_tokens=len(ids)))
    conditions = Conditions(Execution().prepare(network), prompt)
    tokens = conditions.tokens(ENTRY)
    assert tokens is not None
    stored = torch.cat(list(one_hot(tokens, ids).values()), 2).expand(rows, -1, -1)
    found = conditions.found(ENTRY, stored if rows > 1 else stored[0])
    for name, value in network.condition(CAPTION).items():
        torch.testing.assert_close(
            found[name], value.expand(rows, *value.shape[1:]), rtol=0, atol=1e-5
        )
    with pytest.raises(ValueError, match="its prompt_embedding has the shape"):
        conditions.found(ENTRY, stored[:, :-1])


def test_what_is_not_searched_keeps_reading_the_caption(case):
    network, search = case
    caption, other = network.condition(CAPTION), network.condition("z" * 75)
    tokens = network.searched_prompt(search)
    own = PromptTokens(**{**vars(tokens), "fixed": caption})
    with torch.no_grad():
        found = encoded(network, own, one_hot(tokens, words(network, "z" * 75)))
    for name, value in found.items():
        of_caption = (value - caption[name]).abs() < 1e-5
        of_prompt = (value - other[name]).abs() < 1e-5
        assert (of_caption | of_prompt).all()
        if not tokens.reads_caption:
            assert of_prompt.all()
    differs = (found["prompt_embeds"] - other["prompt_embeds"]).abs().max() > 1e-3
    assert bool(differs) == tokens.reads_caption


def test_a_blend_of_tokens_equals_a_token_that_has_its_embedding(case):
    """The control that is not one-hot: unused rows of the table are given the blends."""
    network, search = case
    tokens = network.searched_prompt(PromptSearch(encoders=search.encoders, num_tokens=2))
    rng = torch.Generator().manual_seed(0)
    weights = torch.rand(2, len(next(iter(tokens.tables.values()))), generator=rng).softmax(1)
    soft, expected = {}, {}
    for name, table in tokens.tables.items():
        ids = tokens.ids[name].clone()
        soft[name] = table[ids]
        soft[name][0, 1:3] = weights @ table
        encoder = copy.deepcopy(getattr(network.pipeline, name))
        unused = [len(table), len(table) + 1]
        encoder.get_input_embeddings().weight[unused] = weights @ table
        ids[0, 1:3] = torch.tensor(unused)
        with torch.no_grad():
            expected[name] = encoder(ids, output_hidden_states=True)
    with torch.no_grad():
        found = encoded(network, tokens, soft)
    is_first_family = network.family.name == "stable_diffusion"
    states = [o.last_hidden_state if is_first_family else o.hidden_states[-2]
              for o in expected.values()]  # fmt: skip
    starts = [16 * (name == "text_encoder_2") for name in expected]
    for own, start in zip(states, starts, strict=True):
        part = found["prompt_embeds"][:, :77, start : start + 16]
        torch.testing.assert_close(part, own, rtol=0, atol=1e-5)
    if network.family.name == "sdxl" and "text_encoder_2" in expected:
        pooled = expected["text_encoder_2"].text_embeds
        torch.testing.assert_close(found["pooled_embeds"], pooled, rtol=0, atol=1e-5)
    if network.family.name == "sd3":
        for (name, output), start in zip(expected.items(), starts, strict=True):
            part = found["pooled_embeds"][:, start : start + 16]
            torch.testing.assert_close(part, output.text_embeds, rtol=0, atol=1e-5), name


def random_embeddings(tokens: PromptTokens, rows: int, seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    length = len(next(iter(tokens.ids.values()))[0])
    return {
        name: 0.02 * torch.randn(rows, length, table.shape[1], generator=rng)
        for name, table in tokens.tables.items()
    }


def test_gradients_reach_the_embeddings_of_their_row_and_no_weight(case):
    network, search = case
    tokens = network.searched_prompt(search)
    embeddings = {k: v.requires_grad_() for k, v in random_embeddings(tokens, 3, 0).items()}
    found = encoded(network, tokens, embeddings)
    sum(value[0].square().sum() for value in found.values()).backward()
    for own in embeddings.values():
        assert own.grad[0].abs().amax(1).min() > 0
        assert own.grad[1:].abs().max() == 0
    parts = [part for part in network.pipeline.components.values() if hasattr(part, "parameters")]
    assert all(weight.grad is None for part in parts for weight in part.parameters())


def test_rows_are_independent_to_the_last_bit(case):
    network, search = case
    tokens = network.searched_prompt(search)
    first, others = random_embeddings(tokens, 3, 1), random_embeddings(tokens, 3, 2)
    moved = {name: torch.stack([o[0], o[1], first[name][0]]) for name, o in others.items()}
    with torch.no_grad():
        expected, found = (encoded(network, tokens, own) for own in (first, moved))
    for name, value in expected.items():
        assert torch.equal(found[name][2], value[0])


def test_the_table_serves_the_next_text_as_before(case):
    """The hook is gone, whether the encoder succeeded or not."""
    network, search = case
    tokens = network.searched_prompt(search)
    before = network.condition(CAPTION)
    with torch.no_grad():
        encoded(network, tokens, random_embeddings(tokens, 1, 3))
        with pytest.raises(RuntimeError):
            encoded(
                network, tokens, {k: v[:, :5] for k, v in random_embeddings(tokens, 1, 3).items()}
            )
    after = network.condition(CAPTION)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_only_real_tokens_are_candidates_and_they_decode():
    network = network_of("sd1 epsilon")
    tokens = network.searched_prompt(PromptSearch())
    (table,) = tokens.tables.values()
    assert len(table) == len(network.pipeline.tokenizer) < 60
    assert tokens.decode(words(network, "a red fox")).replace(" ", "") == "aredfox"


@pytest.mark.parametrize(("family", "options", "cure"), [
    ("sd1 epsilon", {"num_tokens": 76}, "use at most 75"),
    ("sd1 epsilon", {"encoders": ["text_encoder_2"]}, "there are text_encoder"),
    ("sd3", {"encoders": ["text_encoder_3"]}, "there are text_encoder, text_encoder_2"),
])  # fmt: skip
def test_a_search_that_a_model_does_not_have_is_refused(family, options, cure):
    with pytest.raises(ValueError, match=cure):
        network_of(family).searched_prompt(PromptSearch(**options))


def test_encoders_of_different_vocabularies_share_no_prompt():
    network = network_of("sdxl")
    network.pipeline.tokenizer_2.add_tokens(["new"])
    with pytest.raises(ValueError, match="different vocabularies"):
        network.searched_prompt(PromptSearch())


def test_an_executed_network_searches_too_unless_it_reads_no_text():
    network = Execution().prepare(network_of("sd1 epsilon"))
    assert isinstance(network, SearchableNetwork)
    tokens = network.searched_prompt(PromptSearch())
    embeddings = random_embeddings(tokens, 1, 0)
    assert encoded(network, tokens, embeddings)["prompt_embeds"].shape == (1, 77, 16)


@pytest.mark.parametrize("family", ["ldm vq", "dit", "pixel"])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_network_that_reads_no_text_is_no_text_network(family, prepared):
    network = pixel_network() if family == "pixel" else network_of(family)
    network = Execution().prepare(network) if prepared else network
    assert isinstance(network, Network)
    assert not isinstance(network, TextNetwork)
    with pytest.raises(ValueError, match="prompt=learned: the model reads no text to search"):
        Conditions(network, Prompt(kind="learned", search=PromptSearch()))


def pixel_network():
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    from invmm.models.pixel import PixelNetwork

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    return PixelNetwork.from_pipeline(DDPMPipeline(unet, DDPMScheduler()))
