"""A fine-tuned U-Net in place of a model's own, against diffusers' own loading of both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pipelines
import pytest
import test_pipelines
import torch
from safetensors.torch import load_file, save_file

from invmm.diffusion.sampling import Sampler
from invmm.models.auto import AutoModel
from invmm.models.execution import Execution
from invmm.models.pipeline import LatentPipeline

CPU = torch.device("cpu")
KINDS = ["sd1 epsilon", "sdxl", "ldm kl"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def another(kind: str):
    """The U-Net of the family with other weights."""
    unet = pipelines.seeded(pipelines.MAKERS[kind]).unet
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return unet


def save_checkpoint(unet, folder: Path) -> Path:
    """As accelerate leaves one: unet, its average beside it, and the state of the training."""
    unet.save_pretrained(folder / "unet")
    for parameter in unet.parameters():
        parameter.data.mul_(0.5)
    unet.save_pretrained(folder / "unet_ema")
    (folder / "scheduler.bin").write_bytes(b"")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    """(kind, folder of the base, folder of the checkpoint)."""
    folder = tmp_path_factory.mktemp("unets")
    pipelines.seeded(pipelines.MAKERS[request.param]).save_pretrained(folder / "base")
    checkpoint = save_checkpoint(another(request.param), folder / "checkpoint-5")
    return request.param, folder / "base", checkpoint


@pytest.fixture
def sd(tmp_path):
    """(folder of a base, folder of a U-Net)."""
    pipelines.seeded(pipelines.MAKERS["sd1 epsilon"]).save_pretrained(tmp_path / "base")
    another("sd1 epsilon").save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


def drawn(network, scale: float) -> torch.Tensor:
    sampler = Sampler(num_inference_steps=test_pipelines.STEPS)
    return test_pipelines.ours(network, sampler, test_pipelines.noise_for(network), scale)


def test_another_unet_equals_the_pipeline_with_it(case):
    """From a checkpoint or the folder of the U-Net itself; the average only if it is named."""
    kind, base, checkpoint = case
    scale = 1.0 if kind == "ldm kl" else 3.0
    own = drawn(LatentPipeline(path=str(base)).load(CPU), scale)
    seen = [own]
    for folder, part in ((checkpoint, "unet"), (checkpoint / "unet", "unet"),
                         (checkpoint / "unet_ema", "unet_ema")):  # fmt: skip
        network = AutoModel(path=str(base), unet=str(folder)).load(CPU)
        pipeline = pipelines.seeded(pipelines.MAKERS[kind])
        pipeline.unet = type(pipeline.unet).from_pretrained(checkpoint / part)
        noise = test_pipelines.noise_for(network)
        expected = test_pipelines.theirs(pipeline, noise, scale)
        found = drawn(network, scale)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        seen.append(found)
    assert torch.equal(seen[1], seen[2])
    assert all((seen[a] - seen[b]).abs().max() > 1e-3 for a, b in ((0, 1), (0, 3), (1, 3)))


def test_it_is_the_model_of_a_folder_that_holds_it(case, tmp_path):
    """The same fingerprint and settings, as no other file is read: the base's U-Net is not."""
    _, base, checkpoint = case
    merged = Path(shutil.copytree(base, tmp_path / "merged"))
    shutil.rmtree(merged / "unet")
    shutil.copytree(checkpoint / "unet", merged / "unet")
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    shutil.rmtree(bare / "unet")
    plain, whole = LatentPipeline(path=str(base)), LatentPipeline(path=str(merged))
    tuned, other = (
        LatentPipeline(path=str(bare), unet=str(folder))
        for folder in (checkpoint, checkpoint / "unet_ema")
    )
    assert tuned.fingerprint() == whole.fingerprint()
    assert tuned.settings() == whole.settings()
    assert tuned.describe() == whole.describe()
    assert tuned.call_cost(2, Execution()) == whole.call_cost(2, Execution())
    tuned.try_out()
    key = f"unet/{WEIGHTS}"
    assert len({recipe.fingerprint()[key] for recipe in (plain, tuned, other)}) == 3
    plain_rest, tuned_rest = (
        {name: value for name, value in recipe.fingerprint().items() if name != key}
        for recipe in (plain, tuned)
    )
    assert plain_rest == tuned_rest


def config_of(**changes):
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def reweighted(change):
    def edit(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def two_of_them(folder: Path) -> None:
    shutil.copytree(folder, folder / "unet")


def as_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


def with_variant(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")


EARLY = {
    "width of the text": (config_of(cross_attention_dim=32), "has cross_attention_dim=32 in its c"),
    "channels": (
        config_of(in_channels=9, out_channels=4),
        "has in_channels=9 in its config: it re",
    ),
    "another class": (config_of(_class_name="UNet2DModel"), "has _class_name=UNet2DModel in its"),
    "distilled": (config_of(time_cond_proj_dim=8), "has time_cond_proj_dim=8"),
    "a program": (config_of(auto_map={"x": "evil.py"}), "has auto_map=.*run a program"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds neither a config.json"),
    "two": (two_of_them, "holds a config.json and a folder unet with another"),
    "nothing": (shutil.rmtree, "does not exist; give the folder of a U-Net"),
    "pickle": (as_pickle, "has no safetensors files in .*is a pickle and is never loaded"),
    "variant": (with_variant, "has no safetensors files in .*give model.variant=fp16"),
}
"""What `describe` tells, and with it a dry run."""
ON_META = {
    "levels": (config_of(block_out_channels=[8]), "do not work together as|the same number of"),
}
AT_LOADING = {
    "damaged": (
        lambda folder: (folder / WEIGHTS).write_bytes(b"{"),
        "cannot be loaded .*Unable to load weights",
    ),
    "other layers": (config_of(layers_per_block=2), "cannot be loaded .*size mismatch"),
    "another width": (config_of(block_out_channels=[8, 24]), "cannot be loaded .*size mismatch"),
    "missing weight": (
        reweighted(lambda old: {k: v for k, v in old.items() if k != "conv_in.bias"}),
        "does not hold the weights its config.json describes .*conv_in.bias",
    ),
    "NaN": (
        reweighted(lambda old: {**old, "conv_in.bias": old["conv_in.bias"] * float("nan")}),
        "holds NaN or infinite weights",
    ),
}


@pytest.mark.parametrize("fault", [*EARLY, *ON_META, *AT_LOADING])
def test_a_unet_that_does_not_fit_is_refused_by_name(fault, sd):
    base, folder = sd
    change, message = {**EARLY, **ON_META, **AT_LOADING}[fault]
    change(folder)
    recipe = LatentPipeline(path=str(base), unet=str(folder))
    actions = [lambda: recipe.load(CPU)]
    if fault not in AT_LOADING:
        actions += [recipe.try_out, lambda: recipe.call_cost(1, Execution())]
    if fault in EARLY:
        actions.append(recipe.describe)
    for action in actions:
        with pytest.raises(ValueError, match=rf"{folder}.*({message})") as caught:
            action()
        assert "\n" not in str(caught.value)


def test_a_file_is_no_unet(sd):
    base, folder = sd
    with pytest.raises(ValueError, match=r"^model\.unet=.* is a file; give the folder"):
        LatentPipeline(path=str(base), unet=str(folder / WEIGHTS)).describe()


def test_the_variant_is_that_of_the_base_where_the_unet_has_none(tmp_path):
    pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
    pipeline.save_pretrained(tmp_path / "base", variant="fp16")
    another("sd1 epsilon").save_pretrained(tmp_path / "tuned")
    plain = LatentPipeline(path=str(tmp_path / "base"), unet=str(tmp_path / "tuned"))
    with pytest.raises(ValueError, match=r"the text_encoder of .* has no safetensors|the vae of"):
        plain.describe()
    recipe = LatentPipeline(**{**vars(plain), "variant": "fp16"})
    found = recipe.fingerprint()
    assert f"unet/{WEIGHTS}" in found
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in found
    network = recipe.load(CPU)
    state = load_file(tmp_path / "tuned" / WEIGHTS)
    assert all(torch.equal(network.denoiser.state_dict()[key], state[key]) for key in state)


@pytest.mark.parametrize("kind", ["dit", "sd3"])
def test_a_transformer_has_no_unet(kind, tmp_path):
    pipelines.seeded(pipelines.MAKERS[kind]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^model\.unet=x has no meaning for a .*transformer"):
        AutoModel(path=str(tmp_path), unet="x").describe()


def test_a_pixel_model_has_no_base(tmp_path):
    from test_networks import pixel_pipeline

    pixel_pipeline("epsilon").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^model\.unet=x has no meaning for a DDIMPipeline"):
        AutoModel(path=str(tmp_path), unet="x").describe()
