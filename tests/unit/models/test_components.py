"""Component configs of other people's models: each key is honoured, or refused with a cure.

The same faults are tried in folders, where JSON alone is read, and in pipelines in memory.
"""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pipelines
import pytest
import torch
import transformers

from invmm.models import pipeline
from invmm.models.auto import AutoModel
from invmm.models.borrowed import BorrowedModel
from invmm.models.components import DEFAULTS, EXPECTED, Parts
from invmm.models.execution import Execution
from invmm.models.trial import try_out

FAMILIES = ("ldm vq", "ldm kl", "dit", "sd1 epsilon", "sdxl", "sd3", "sd3 t5 24 pixels")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Family -> its folder."""
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        pipelines.seeded(pipelines.MAKERS[family]).save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


REFUSED = [
    ("sd1 epsilon", "unet", {"time_cond_proj_dim": 32}, "distilled"),
    ("sd1 epsilon", "unet", {"num_class_embeds": 10}, "gives no class labels"),
    ("sdxl", "unet", {"class_embed_type": "timestep"}, "gives no class labels"),
    ("sdxl", "unet", {"encoder_hid_dim_type": "ip_image_proj"}, "unload_ip_adapter"),
    ("sd1 epsilon", "unet", {"encoder_hid_dim": 16}, "other embeddings"),
    ("sd1 epsilon", "unet", {"addition_embed_type": "text"}, "the prompt's embeddings only"),
    ("sdxl", "unet", {"addition_embed_type": None}, r"\(text_time\)"),
    ("sdxl", "unet", {"projection_class_embeddings_input_dim": 56}, "a refiner"),
    ("sdxl", "unet", {"attention_type": "gated"}, "grounded"),
    ("sd1 epsilon", "unet", {"time_embedding_type": "fourier"}, "positional"),
    ("sd1 epsilon", "unet", {"num_attention_heads": 2}, "attention_head_dim"),
    ("sd1 epsilon", "unet", {"in_channels": 9}, "a mask and an image"),
    ("sd1 epsilon", "unet", {"in_channels": 8}, "reads an image beside"),
    ("sd1 epsilon", "unet", {"out_channels": 8}, "learned variance"),
    ("sd1 epsilon", "unet", {"cross_attention_dim": 32}, "text encoders return 16"),
    ("sd1 epsilon", "unet", {"cross_attention_dim": [16, 32]}, "text encoders return 16"),
    ("sd1 epsilon", "unet", {"cross_attention_dim": []}, "text encoders return 16"),
    ("sd1 epsilon", "unet", {"_class_name": ["my_code", "MyUNet"]}, "says UNet2DConditionModel"),
    ("sd1 epsilon", "vae", {"_class_name": {}}, "model_index.json says AutoencoderKL"),
    ("sdxl", "unet", {"cross_attention_dim": 16}, "text encoders return 32"),
    ("sd1 epsilon", "unet", {"sample_size": None}, "images must be square; "),
    ("sd1 epsilon", "unet", {"sample_size": [8, 16]}, "images must be square; "),
    ("sd1 epsilon", "unet", {"sample_size": [16, 8]}, "images must be square; "),
    ("sd1 epsilon", "unet", {"sample_size": [8, 8, 8]}, "images must be square; "),
    ("sd1 epsilon", "vae", {"latent_channels": 16}, "the vae has latent_channels=16"),
    ("sd1 epsilon", "vae", {"in_channels": 4}, "RGB pictures"),
    ("sd1 epsilon", "vae", {"scaling_factor": None}, "a finite number is needed"),
    ("sd1 epsilon", "vae", {"scaling_factor": 0.0}, "above 0"),
    ("sdxl", "vae", {"latents_mean": [0.0], "latents_std": [1.0]}, "4 finite numbers"),
    *(
        ("sdxl", "vae", {"latents_mean": [0.0] * 3 + [bad], "latents_std": [1.0] * 4}, "4 finite")
        for bad in (float("nan"), float("inf"), "0.0", True)
    ),
    (
        "sdxl",
        "vae",
        {"latents_mean": [0.0] * 4, "latents_std": [0.0] * 4},
        "above 0 for latents_std",
    ),
    ("ldm vq", "unet", {"num_class_embeds": 10}, "gives no class labels"),
    ("ldm vq", "unet", {"sample_size": 7}, "halves them 1 times; use model.image_size=12"),
    ("ldm vq", "vqvae", {"lookup_from_codebook": True}, "decodes tokens"),
    ("ldm vq", "vqvae", {"vq_embed_dim": 4}, "the vqvae has vq_embed_dim=4"),
    ("dit", "transformer", {"num_embeds_ada_norm": 0}, "an integer of 1 or more"),
    ("dit", "transformer", {"sample_size": 7}, "patches of 2x2; use model.image_size=12"),
    ("dit", "transformer", {"out_channels": 5}, "as many as in_channels"),
    ("sd3", "transformer", {"pos_embed_max_size": 3}, "4x4 patches; use model.image_size=12 or"),
    ("sd3", "transformer", {"pooled_projection_dim": 16}, "text encoders return 32"),
    ("sd3", "transformer", {"joint_attention_dim": 16}, "text encoders return 32"),
    ("sd3 t5 24 pixels", "transformer", {"joint_attention_dim": 64}, "text encoders return 32"),
    ("sd3", "vae", {"shift_factor": None}, "a finite number is needed"),
]


def changed(folder: Path, file: str, target: Path, values: dict) -> AutoModel:
    """A copy of a folder with other values in one of its JSON files."""
    copy = Path(shutil.copytree(folder, target))
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**content, **values}))
    return AutoModel(path=str(copy))


@pytest.mark.parametrize(("family", "part", "values", "why"), REFUSED)
def test_a_key_is_refused_by_name_before_weights_are_read(
    family, part, values, why, saved, tmp_path
):
    recipe = changed(saved[family], f"{part}/config.json", tmp_path / "copy", values)
    with pytest.raises(ValueError, match=why) as refusal:
        recipe.describe()
    assert "\n" not in str(refusal.value)
    said = str(refusal.value)
    assert f" of model.path={recipe.path} " in said
    assert "cannot draw 7x7" in said or any(f"{key}=" in said for key in values)


IN_MEMORY = [case for case in REFUSED if case[0] in ("sdxl", "ldm vq", "sd3")]


@pytest.mark.parametrize(("family", "part", "values", "why"), IN_MEMORY)
def test_a_pipeline_in_memory_is_refused_alike(family, part, values, why):
    pipeline = pipelines.seeded(pipelines.MAKERS[family])
    getattr(pipeline, part).register_to_config(**values)
    with pytest.raises(ValueError, match=why):
        BorrowedModel(pipeline).describe()


def test_parts_of_another_class_in_memory_are_refused():
    pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
    pipeline.vae = diffusers.AutoencoderTiny()
    with pytest.raises(ValueError, match=r"names \['diffusers', 'AutoencoderTiny'\] as its vae; "):
        BorrowedModel(pipeline).describe()
    pipeline.vae = None
    with pytest.raises(ValueError, match="names None as its vae; supported"):
        BorrowedModel(pipeline).describe()


def test_a_part_of_another_class_is_named_with_it():
    """As of a pipeline object, whose index a user may have left as it was."""
    parts = SimpleNamespace(first=torch.nn.Linear(1, 1), second=None)
    with pytest.raises(ValueError, match="the first of the pipeline is a Linear; supported are A"):
        Parts.in_memory(parts, {"first": ["lib.A"]})
    with pytest.raises(ValueError, match="the second of the pipeline is a NoneType"):
        Parts.in_memory(parts, {"second": ["lib.A"]})
    assert Parts.in_memory(parts, {"second": ["lib.A"]}, optional=["second"]).classes == {}


@pytest.mark.parametrize("family", ["ldm kl", "sd1 epsilon"])
@pytest.mark.parametrize("size", [None, [8, 12]])
def test_an_image_size_helps_a_denoiser_without_a_square_one(family, size, saved, tmp_path):
    recipe = changed(saved[family], "unet/config.json", tmp_path / "m", {"sample_size": size})
    with pytest.raises(ValueError, match=r"model\.image_size="):
        recipe.describe()
    sized = AutoModel(path=recipe.path, image_size=16)
    assert sized.describe().latent_shape[1:] == (8, 8)
    assert sized.load(torch.device("cpu")).latent_shape[1:] == (8, 8)
    sized.try_out()


def test_widths_for_each_block_are_one_if_they_are_equal(saved, tmp_path):
    values = {"cross_attention_dim": [16, 16]}
    recipe = changed(saved["sd1 epsilon"], "unet/config.json", tmp_path / "m", values)
    assert recipe.describe().latent_shape == (4, 8, 8)
    recipe.try_out()
    assert recipe.call_cost(1, Execution()) == AutoModel(path=str(saved["sd1 epsilon"])).call_cost(
        1, Execution()
    )


def test_another_variant_than_all_parts_have_is_named(saved, tmp_path):
    folder = Path(shutil.copytree(saved["sd1 epsilon"], tmp_path / "m"))
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    with pytest.raises(
        ValueError, match=r"of variant fp16; give model\.variant=fp16, the same for all parts"
    ):
        AutoModel(path=str(folder)).describe()
    assert AutoModel(path=str(folder), variant="fp16").describe().latent_shape == (4, 8, 8)


INDEX = [
    ({"_class_name": ["my_module", "MyPipeline"]}, "a community pipeline"),
    ({"requires_aesthetics_score": True}, "give the base model"),
    ({"force_zeros_for_empty_prompt": "false"}, "use true or false"),
]


@pytest.mark.parametrize(("values", "why"), INDEX)
def test_an_index_is_refused(values, why, saved, tmp_path):
    recipe = changed(saved["sdxl"], "model_index.json", tmp_path / "m", values)
    with pytest.raises(ValueError, match=why):
        recipe.describe()


def test_a_config_of_another_class_than_the_index_says_is_refused(saved, tmp_path):
    values = {"_class_name": "AutoencoderTiny"}
    recipe = changed(saved["sdxl"], "vae/config.json", tmp_path / "m", values)
    with pytest.raises(ValueError, match=r"has _class_name=AutoencoderTiny .*says AutoencoderKL"):
        recipe.describe()


@pytest.mark.parametrize("length", [10**30, None, "77", 0])
def test_more_tokens_than_places_are_refused(length, saved, tmp_path):
    file = "tokenizer/tokenizer_config.json"
    recipe = changed(saved["sdxl"], file, tmp_path / "m", {"model_max_length": length})
    message = r"tokenizer of .* has model_max_length=.*set it to 77"
    with pytest.raises(ValueError, match=message):
        recipe.describe()
    (Path(recipe.path) / file).unlink()  # then transformers sets no limit
    with pytest.raises(ValueError, match=message):
        recipe.describe()


def test_prompts_of_two_lengths_are_refused_where_they_lie_side_by_side(saved, tmp_path):
    file = "tokenizer_2/tokenizer_config.json"
    recipe = changed(saved["sdxl"], file, tmp_path / "m", {"model_max_length": 50})
    with pytest.raises(ValueError, match=r"tokenizer_2 of .* has model_max_length=50.*the same"):
        recipe.describe()


@pytest.mark.parametrize(("version", "side"), [
    ("0.2.2", 64), ("0.8.1", 64), ("0.9.0.dev0", 8), ("0.42.0", 8), (..., 8),
])  # fmt: skip
def test_old_models_have_the_size_that_their_pipeline_sets(version, side, saved, tmp_path):
    recipe = changed(saved["sd1 epsilon"], "unet/config.json", tmp_path / "m", {})
    file = Path(recipe.path) / "unet" / "config.json"
    config = {**json.loads(file.read_text()), "_diffusers_version": version}
    if version is ...:
        del config["_diffusers_version"]
    file.write_text(json.dumps(config))
    own = diffusers.StableDiffusionPipeline.from_pretrained(recipe.path)
    assert own.unet.config.sample_size == side
    info = recipe.describe()
    assert info.latent_shape == (4, side, side)
    assert info.image_size == 2 * side
    assert recipe.load(torch.device("cpu")).latent_shape == info.latent_shape
    assert AutoModel(path=recipe.path, image_size=16).describe().latent_shape == (4, 8, 8)


@pytest.mark.parametrize("version", [None, "main", 3])
def test_a_version_that_the_pipeline_cannot_read_is_refused(version, saved, tmp_path):
    values = {"_diffusers_version": version}
    recipe = changed(saved["sd1 epsilon"], "unet/config.json", tmp_path / "m", values)
    with pytest.raises(ValueError, match=r"has _diffusers_version=.* it is no version"):
        recipe.describe()


@pytest.mark.parametrize(("family", "part"), [("sd1 epsilon", "unet"), ("sdxl", "text_encoder")])
def test_quantised_weights_are_refused_in_folders(family, part, saved, tmp_path):
    values = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    recipe = changed(saved[family], f"{part}/config.json", tmp_path / "m", values)
    with pytest.raises(ValueError, match=f"the {part} of .* has a quantization_config"):
        recipe.describe()


@pytest.mark.parametrize(("family", "values"), [
    ("sd3", {"use_karras_sigmas": None}), ("sd3", {"time_shift_type": "square"}),
    ("sdxl", {"_class_name": None}),
])  # fmt: skip
def test_a_scheduler_that_cannot_be_made_is_refused_at_the_check(family, values, saved, tmp_path):
    file = "scheduler/scheduler_config.json"
    recipe = changed(saved[family], file, tmp_path / "m", values)
    with pytest.raises(ValueError, match=r"the scheduler of model\.path=.* cannot be loaded"):
        recipe.schedule()


@pytest.mark.parametrize("value", [None, "0.02", [], {}])
def test_betas_that_are_no_numbers_are_named(value, saved, tmp_path):
    file = "scheduler/scheduler_config.json"
    recipe = changed(saved["ldm kl"], file, tmp_path / "m", {"beta_end": value})
    with pytest.raises(ValueError, match=r"beta_end=.*give no betas; use numbers"):
        recipe.schedule()


@pytest.mark.parametrize("family", ["sdxl", "dit"])
def test_parts_that_are_absent_are_none(family, saved, tmp_path):
    recipe = changed(saved[family], "model_index.json", tmp_path / "m", {"extra": [None, None]})
    recipe.describe()
    recipe = changed(saved[family], "model_index.json", tmp_path / "n", {"vae": [None, None]})
    with pytest.raises(ValueError, match=r"names \[None, None\] as its vae"):
        recipe.describe()


def test_an_offloaded_pipeline_is_refused():
    hooks = pytest.importorskip("accelerate.hooks")
    pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
    hooks.add_hook_to_module(pipeline.vae, hooks.CpuOffload("cpu"))
    with pytest.raises(ValueError, match=r"the vae of the pipeline is offloaded.*to\(DEVICE\)"):
        BorrowedModel(pipeline)
    hooks.remove_hook_from_module(pipeline.vae)
    BorrowedModel(pipeline)
    pipeline.unet.to("meta")
    with pytest.raises(ValueError, match="the unet of the pipeline is offloaded"):
        BorrowedModel(pipeline)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pipeline_with_a_weight_that_is_no_number_is_refused(part):
    pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
    next(getattr(pipeline, part).parameters()).data.view(-1)[-1] = float("nan")
    with pytest.raises(ValueError, match=f"the {part} of the pipeline holds NaN .*; load the"):
        BorrowedModel(pipeline)


def test_a_compiled_denoiser_is_measured_in_memory():
    pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
    plain = BorrowedModel(pipeline).describe()
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    compiled = BorrowedModel(pipeline)
    assert compiled.device == torch.device("cpu")
    assert compiled.describe() == plain
    compiled.try_out()


BUILT = [
    ("sd1 epsilon", "unet", {"down_block_types": ["Evil", "DownBlock2D"]}),
    ("sd1 epsilon", "unet", {"norm_num_groups": 5}),
    ("sdxl", "vae", {"sample_size": None}),
    ("sd1 epsilon", "vae", {"act_fn": "steep"}),
    ("sd3", "transformer", {"caption_projection_dim": 8}),
    ("ldm kl", "unet", {"layers_per_block": "two"}),
    ("sd1 epsilon", "text_encoder", {"hidden_act": 0}),
]


@pytest.mark.parametrize(("family", "part", "values"), BUILT)
def test_what_cannot_be_built_or_called_is_refused_on_shapes_alone(
    family, part, values, saved, tmp_path
):
    recipe = changed(saved[family], f"{part}/config.json", tmp_path / "m", values)
    for action in (recipe.try_out, lambda: recipe.call_cost(1, Execution())):
        with pytest.raises(ValueError, match=r"model\.path=.*") as refusal:
            action()
        assert "\n" not in str(refusal.value)


MISTYPED = [
    ("unet", "down_block_types", 7, r"\(down_block_types=7 of the unet is no tuple\[str, ...\]\)"),
    ("unet", "layers_per_block", [None], "layers_per_block=\\[None\\] of the unet is no int"),
    ("vae", "up_block_types", [0, "x"], r"up_block_types=\[0, 'x'\] of the vae is no tuple"),
    ("vae", "layers_per_block", {}, r"layers_per_block=\{\} of the vae is no int"),
]


@pytest.mark.parametrize(("part", "key", "value", "why"), MISTYPED)
def test_a_value_of_another_type_is_named(part, key, value, why, saved, tmp_path):
    recipe = changed(saved["sd1 epsilon"], f"{part}/config.json", tmp_path / "m", {key: value})
    with pytest.raises(ValueError, match=why):
        recipe.try_out()


PROMPTS = [
    ("sd1 epsilon", "text_encoder/config.json", {"eos_token_id": None}, "its text_encoder first"),
    ("sd1 epsilon", "text_encoder/config.json", {"vocab_size": 3}, r"has words up to \d+, and the"),
    ("sd3 t5 24 pixels", "text_encoder_3/config.json", {"vocab_size": 5}, "text_encoder_3 5 words"),
    ("sdxl", "tokenizer_2/tokenizer_config.json", {"eos_token": 1}, "tokenizer_2 of .* be loaded"),
    ("sd1 epsilon", "tokenizer/tokenizer.json", {"model": {}}, "tokenizer of .* cannot be loaded"),
]


@pytest.mark.parametrize(("family", "file", "values", "why"), PROMPTS)
def test_prompts_that_cannot_be_read_are_refused_before_weights_load(
    family, file, values, why, saved, tmp_path
):
    folder = saved.get(family) or tmp_path / "own"
    if family not in saved:
        pipelines.seeded(pipelines.MAKERS[family]).save_pretrained(folder)
    recipe = changed(folder, file, tmp_path / "m", values)
    with pytest.raises(ValueError, match=why) as refusal:
        recipe.try_out()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_works_can_be_tried_out(family, saved):
    AutoModel(path=str(saved[family])).try_out()
    BorrowedModel(pipelines.seeded(pipelines.MAKERS[family])).try_out()


def test_parts_that_fit_are_tried_out_once_and_changed_ones_again(saved, tmp_path, monkeypatch):
    folder, tried = tmp_path / "m", []
    shutil.copytree(saved["sd1 epsilon"], folder)
    monkeypatch.setattr(pipeline, "_FITTING", set())

    def counted(*args, **options):
        tried.append(args)
        try_out(*args, **options)

    monkeypatch.setattr(pipeline, "try_out", counted)
    for _ in range(2):
        AutoModel(path=str(folder)).try_out()
    assert len(tried) == 1
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "norm_num_groups": 5}))
    for _ in range(2):
        with pytest.raises(ValueError, match="do not work together"):
            AutoModel(path=str(folder)).try_out()
    assert len(tried) == 3


def test_a_part_of_a_latent_pipeline_is_no_pixel_model(saved):
    recipe = AutoModel(path=str(saved["ldm vq"] / "unet"), noise_schedule={"beta_start": 1e-4})
    with pytest.raises(ValueError, match=r"a part of the LDMPipeline in .* give that folder"):
        recipe.describe()
    recipe = AutoModel(path=str(saved["sd1 epsilon"] / "unet"))
    with pytest.raises(ValueError, match=r"holds a UNet2DConditionModel.*the pipeline's folder"):
        recipe.describe()


# The libraries -------------------------------------------------------------------------------

HONOURED = {
    "UNet2DModel": """sample_size in_channels out_channels center_input_sample time_embedding_dim
        freq_shift flip_sin_to_cos down_block_types mid_block_type up_block_types block_out_channels
        layers_per_block mid_block_scale_factor downsample_padding downsample_type upsample_type
        dropout act_fn attention_head_dim norm_num_groups attn_norm_num_groups norm_eps
        resnet_time_scale_shift add_attention num_train_timesteps""",
    "UNet2DConditionModel": """sample_size in_channels out_channels center_input_sample
        flip_sin_to_cos freq_shift down_block_types mid_block_type up_block_types
        only_cross_attention block_out_channels layers_per_block downsample_padding
        mid_block_scale_factor dropout act_fn norm_num_groups norm_eps cross_attention_dim
        transformer_layers_per_block reverse_transformer_layers_per_block attention_head_dim
        dual_cross_attention use_linear_projection addition_embed_type addition_time_embed_dim
        upcast_attention resnet_time_scale_shift resnet_skip_time_act resnet_out_scale_factor
        time_embedding_dim time_embedding_act_fn timestep_post_act conv_in_kernel conv_out_kernel
        projection_class_embeddings_input_dim class_embeddings_concat
        mid_block_only_cross_attention cross_attention_norm addition_embed_type_num_heads""",
    "DiTTransformer2DModel": """num_attention_heads attention_head_dim in_channels out_channels
        num_layers dropout norm_num_groups attention_bias sample_size patch_size activation_fn
        num_embeds_ada_norm upcast_attention norm_elementwise_affine norm_eps""",
    "SD3Transformer2DModel": """sample_size patch_size in_channels num_layers attention_head_dim
        num_attention_heads joint_attention_dim caption_projection_dim pooled_projection_dim
        out_channels pos_embed_max_size dual_attention_layers qk_norm""",
    "AutoencoderKL": """down_block_types up_block_types block_out_channels layers_per_block act_fn
        latent_channels norm_num_groups sample_size scaling_factor shift_factor latents_mean
        latents_std force_upcast use_quant_conv use_post_quant_conv mid_block_add_attention""",
    "VQModel": """down_block_types up_block_types block_out_channels layers_per_block act_fn
        latent_channels sample_size num_vq_embeddings norm_num_groups vq_embed_dim scaling_factor
        norm_type mid_block_add_attention force_upcast""",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_key_of_the_installed_class_is_honoured_or_refused(name):
    """A release of diffusers with a new key must be looked at."""
    keys = list(inspect.signature(getattr(diffusers, name).__init__).parameters)[1:]
    honoured = HONOURED[name].split()
    assert sorted([*honoured, *EXPECTED[name]]) == sorted(keys)


@pytest.mark.parametrize("name", DEFAULTS)
def test_keys_that_are_left_out_mean_what_the_library_takes(name):
    if name.startswith(("CLIP", "T5")):
        own = getattr(transformers, name).config_class()
        found = {key: getattr(own, key) for key in DEFAULTS[name]}
    else:
        signature = inspect.signature(getattr(diffusers, name).__init__).parameters
        found = {key: signature[key].default for key in DEFAULTS[name]}
        only = {key: signature[key].default for key in EXPECTED[name]}
        assert only == {key: value for key, (value, _) in EXPECTED[name].items()}
    assert found == DEFAULTS[name]
