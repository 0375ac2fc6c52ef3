"""Checkpoints in one file, against diffusers' own `from_single_file`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pipelines
import pytest
import single_files
import test_pipelines
import torch
from safetensors.torch import load_file, save_file

from invmm.diffusion.sampling import Sampler
from invmm.models.auto import AutoModel
from invmm.models.execution import Execution
from invmm.models.pipeline import LatentPipeline

CPU = torch.device("cpu")
MAKERS = {
    "sd1 epsilon": pipelines.MAKERS["sd1 epsilon"],
    "sd2 v": pipelines.MAKERS["sd2 v"],
    "sdxl": lambda: pipelines.sdxl(second_width=24),
}


@pytest.fixture(scope="module", params=MAKERS)
def case(request, tmp_path_factory):
    """(pipeline, its file, the folder that describes it); its own folder lies beside them."""
    folder = tmp_path_factory.mktemp("single")
    pipeline = pipelines.seeded(MAKERS[request.param])
    pipeline.save_pretrained(folder / "whole")  # before a use changes the tokenizer's padding
    single_files.save_single_file(pipeline, folder / "model.safetensors", folder / "config")
    return pipeline, folder / "model.safetensors", folder / "config"


@pytest.fixture
def sd(tmp_path):
    """(file, the folder that describes it), of Stable Diffusion 1."""
    pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
    single_files.save_single_file(pipeline, tmp_path / "model.safetensors", tmp_path / "config")
    return tmp_path / "model.safetensors", tmp_path / "config"


def drawn(network) -> torch.Tensor:
    sampler = Sampler(num_inference_steps=test_pipelines.STEPS)
    return test_pipelines.ours(network, sampler, test_pipelines.noise_for(network), 3.0)


def test_a_single_file_equals_the_pipeline_that_diffusers_loads(case):
    original, file, config = case
    network = AutoModel(path=str(file), config=str(config)).load(CPU)
    own = type(original).from_single_file(str(file), config=str(config), local_files_only=True)
    own.set_progress_bar_config(disable=True)
    noise = test_pipelines.noise_for(network)
    found = drawn(network)
    for pipeline in (own, original):
        expected = test_pipelines.theirs(pipeline, noise, 3.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.std() > 0.01
    for name in network.family.parts:
        part = getattr(network.pipeline, name)
        if isinstance(part, torch.nn.Module):
            theirs = getattr(original, name).state_dict()
            assert all(torch.equal(part.state_dict()[key], theirs[key]) for key in theirs)
            assert not any(parameter.requires_grad for parameter in part.parameters())


def test_it_is_described_and_priced_as_the_folder_with_its_weights(case):
    _, file, config = case
    single = LatentPipeline(path=str(file), config=str(config))
    whole = LatentPipeline(path=str(file.parent / "whole"))
    one, other = single.describe(), whole.describe()
    assert one.weight_bytes == file.stat().st_size
    assert {**vars(one), "weight_bytes": 0} == {**vars(other), "weight_bytes": 0}
    assert single.call_cost(2, Execution()) == whole.call_cost(2, Execution())
    assert single.settings() == whole.settings()
    assert torch.equal(single.schedule().alphas_cumprod, whole.schedule().alphas_cumprod)
    single.try_out()


def test_the_fingerprint_is_that_of_the_file_and_the_settings_those_of_the_folder(sd, tmp_path):
    file, config = sd
    recipe = LatentPipeline(path=str(file), config=str(config))
    moved = shutil.copy(file, tmp_path / "moved.safetensors")
    assert list(recipe.fingerprint()) == ["checkpoint"]
    same = LatentPipeline(path=str(moved), config=str(config))
    assert recipe.fingerprint() == same.fingerprint()
    weights = load_file(file)
    key = next(key for key in weights if key.endswith("out.2.bias"))
    save_file({**weights, key: weights[key] + 1}, moved)
    assert recipe.fingerprint() != same.fingerprint()
    scheduler = config / "scheduler" / "scheduler_config.json"
    before = recipe.settings()
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "beta_end": 0.02}))
    after = recipe.settings()
    assert [key for key in before if before[key] != after[key]] == [
        "scheduler/scheduler_config.json"
    ]


def test_a_lora_is_added_to_a_single_file(sd, tmp_path):
    pytest.importorskip("peft")
    from test_loras import save_loras

    file, config = sd
    one, two = save_loras("sd1 epsilon", tmp_path)
    lora = [{"path": str(one), "weight": 0.7}, str(two)]
    pipelines.seeded(pipelines.MAKERS["sd1 epsilon"]).save_pretrained(tmp_path / "whole")
    single = LatentPipeline(path=str(file), config=str(config), lora=lora)
    whole = LatentPipeline(path=str(tmp_path / "whole"), lora=lora)
    single.try_out()
    assert torch.equal(drawn(single.load(CPU)), drawn(whole.load(CPU)))
    assert single.fingerprint().keys() - whole.fingerprint().keys() == {"checkpoint"}


def changed(change):
    def edit(file: Path, config: Path) -> None:
        save_file(change(load_file(file)), file)

    return edit


def without(part: str):
    return changed(lambda old: {k: v for k, v in old.items() if not k.startswith(part)})


def config_of(part: str, **changes):
    def edit(file: Path, config: Path) -> None:
        path = config / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def index_of(**changes):
    def edit(file: Path, config: Path) -> None:
        path = config / "model_index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


CLIP = "cond_stage_model.transformer.text_model"
EARLY = {
    "no file": (lambda file, config: file.unlink(), "model.safetensors does not exist"),
    "no folder": (lambda file, config: shutil.rmtree(config), "model.config=.* is no folder here"),
    "no index": (
        lambda file, config: (config / "model_index.json").unlink(), "has no model_index.json"
    ),
    "another width": (config_of("unet", cross_attention_dim=32), "has cross_attention_dim=32"),
    "a program": (config_of("unet", auto_map={"x": "evil.py"}), "auto_map=.*run a program"),
    "another family": (index_of(_class_name="KandinskyPipeline"), "holds a KandinskyPipeline"),
}  # fmt: skip
"""What `describe` tells."""
BY_NAMES = {
    "damaged": (lambda file, config: file.write_bytes(b"{"), "is damaged"),
    "no unet": (without("model.diffusion_model."), "the weights of the unet .* is missing"),
    "no vae": (without("first_stage_model."), "the weights of the vae .* is missing"),
    "no text encoder": (without(CLIP), "the weights of the text_encoder .* is missing"),
    "a missing weight": (
        without("model.diffusion_model.out.2.bias"), r"the unet .*\(conv_out.bias is missing\)"
    ),
    "a missing word": (without(f"{CLIP}.final_layer_norm.bias"), "final_layer_norm.bias is missi"),
    "another shape": (
        changed(lambda old: {**old, "model.diffusion_model.out.2.bias": torch.zeros(9)}),
        r"the unet .*\(conv_out.bias is \[9\]\)",
    ),
    "more layers": (config_of("unet", layers_per_block=2), "the weights of the unet"),
    "more words": (config_of("text_encoder", vocab_size=99), "embedding.weight is "),
    "a weight too many": (
        changed(lambda old: {**old, "control_model.x": torch.zeros(9)}),
        r"weights that no part takes \(control_model.x\)",
    ),
    "a weight of the unet too many": (
        changed(lambda old: {**old, "model.diffusion_model.extra.bias": torch.zeros(9)}),
        r"weights that no part takes \(model.diffusion_model.extra.bias\)",
    ),
    "averages beside it": (
        changed(lambda old: {
            **old, **{f"model_ema.{k[6:].replace('.', '')}": v.clone()
                      for k, v in old.items() if k.startswith("model.")},
        }),
        r"no part takes \(model_ema\..*the averaged weights \(model_ema\) or the others, not both",
    ),
    "another kind of file": (
        changed(lambda old: {"conv_in.weight": torch.zeros(8, 4, 3, 3)}), "the weights of the"
    ),
}  # fmt: skip
"""What the names and shapes in the file tell, before a weight is read."""
AT_LOADING = {
    "NaN": (
        changed(lambda old: {k: v * float("nan") if k.endswith("out.2.bias") else v
                             for k, v in old.items()}),
        "the unet of .* holds NaN or infinite weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", [*EARLY, *BY_NAMES, *AT_LOADING])
def test_a_file_that_is_not_what_its_folder_describes_is_refused(fault, sd):
    file, config = sd
    change, message = {**EARLY, **BY_NAMES, **AT_LOADING}[fault]
    change(file, config)
    recipe = LatentPipeline(path=str(file), config=str(config))
    actions = [lambda: recipe.load(CPU)]
    if fault not in AT_LOADING:
        actions += [recipe.try_out, lambda: recipe.call_cost(1, Execution())]
    if fault in EARLY:
        actions.append(recipe.describe)
    for action in actions:
        with pytest.raises(ValueError, match=message) as caught:
            action()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 700


def test_encoders_of_one_width_are_not_told_apart(tmp_path):
    """Diffusers would read the first one's weights for both, and leave the rest without any."""
    pipeline = pipelines.seeded(pipelines.MAKERS["sdxl"])
    file, config = tmp_path / "model.safetensors", tmp_path / "config"
    single_files.save_single_file(pipeline, file, config)
    recipe = LatentPipeline(path=str(file), config=str(config))
    for action in (recipe.try_out, lambda: recipe.load(CPU)):
        with pytest.raises(ValueError, match="two text encoders of the width 16"):
            action()


def test_weights_that_diffusers_did_not_read_are_noticed(sd, monkeypatch):
    """Whatever it does with a file: each weight in memory is compared with the file."""
    import diffusers

    file, config = sd
    original = diffusers.StableDiffusionPipeline.from_single_file

    def loaded(*arguments, **options):
        pipeline = original(*arguments, **options)
        with torch.no_grad():
            pipeline.vae.quant_conv.bias.add_(1)
        return pipeline

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", loaded)
    with pytest.raises(ValueError, match=r"the vae of .* with other weights .*quant_conv\.bias"):
        LatentPipeline(path=str(file), config=str(config)).load(CPU)


def test_weights_beside_the_configs_are_not_read(sd):
    """Neither those of a part that the file lacks, which diffusers would take from there."""
    file, config = sd
    pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
    with torch.no_grad():
        for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
            for parameter in part.parameters():
                parameter.zero_()
    pipeline.save_pretrained(config)
    found = drawn(LatentPipeline(path=str(file), config=str(config)).load(CPU))
    assert found.std() > 0.01
    (config / "text_encoder" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    without(CLIP)(file, config)
    with pytest.raises(ValueError, match="the weights of the text_encoder"):
        LatentPipeline(path=str(file), config=str(config)).load(CPU)


def test_what_is_no_single_file(sd, tmp_path):
    file, config = sd
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"")
    for path, message in {
        pickle: "is no safetensors file; a pickle is never loaded, convert it",
        config: "is a folder, and model.config=.* describes a single file",
        tmp_path / "no.safetensors": "does not exist",
    }.items():
        for recipe in (LatentPipeline, AutoModel):
            with pytest.raises(ValueError, match=rf"^model\.path={path} {message}"):
                recipe(path=str(path), config=str(config)).describe()
    for recipe in (LatentPipeline, AutoModel):
        with pytest.raises(ValueError, match=r"is a file, .*give .*with model\.config=FOLDER"):
            recipe(path=str(file)).describe()
        for option in ("variant", "revision", "unet"):
            with pytest.raises(ValueError, match=rf"^model\.{option}=x has no meaning for a si"):
                recipe(path=str(file), config=str(config), **{option: "x"}).describe()


@pytest.mark.parametrize("kind", ["dit", "sd3", "ldm vq"])
def test_other_families_are_not_read_from_one_file(kind, sd, tmp_path):
    file, _ = sd
    pipelines.seeded(pipelines.MAKERS[kind]).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"single files are read of Stable Diffusion 1, 2 and XL"):
        AutoModel(path=str(file), config=str(tmp_path / "other")).describe()


def test_half_precision_is_that_of_the_weights_in_the_file(sd):
    file, config = sd
    network = LatentPipeline(path=str(file), config=str(config), dtype="bfloat16").load(CPU)
    weights = load_file(file)["model.diffusion_model.out.2.weight"]
    assert torch.equal(network.denoiser.conv_out.weight, weights.to(torch.bfloat16))
    assert {value.dtype for value in network.denoiser.parameters()} == {torch.bfloat16}
