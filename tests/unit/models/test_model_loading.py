"""Model folders that nobody vouches for: each is loaded whole or refused with a reason."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pipelines
import pytest
import tiny
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from invmm.models import pipeline
from invmm.models.execution import Execution
from invmm.models.pipeline import LatentPipeline
from invmm.models.pixel import PixelUNet

CPU = torch.device("cpu")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
UNET = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"

Mutation = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("whole") / "ddpm")


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "model"))


def put(file: str, **values: object) -> Mutation:
    def mutate(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **values}))

    return mutate


def write(file: str, content: bytes) -> Mutation:
    return lambda folder: (folder / file).write_bytes(content) and None


def remove(file: str) -> Mutation:
    return lambda folder: (folder / file).unlink()


def drop_key(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["conv_out.weight"]
    save_file(weights, folder / WEIGHTS)


def add_key(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, "conv_surprise.weight": torch.zeros(1)}, folder / WEIGHTS)


def spoil(value: float) -> Mutation:
    def mutate(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        weights["conv_out.bias"][-1] = value
        save_file(weights, folder / WEIGHTS)

    return mutate


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


LISTED = {
    "pipeline": (put("model_index.json", _class_name="StableDiffusionPipeline"),
                 "holds a StableDiffusionPipeline; supported are DDPMPipeline"),
    "component climbing out": (put("model_index.json", **{"../evil": ["diffusers", "X"]}),
                               r"the component '\.\./evil'"),
    "unet of another library": (put("model_index.json", unet=["my_code", "UNet2DModel"]),
                                "my_code.* as its unet; supported are diffusers' UNet2DModel"),
    "unet of another class": (put("model_index.json", unet=["diffusers", "UNet2DConditionModel"]),
                              "supported are diffusers' UNet2DModel"),
    "scheduler without betas": (
        put("model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]),
        "names .*FlowMatch.* as its scheduler .*supported are diffusers' DDPMScheduler"),
    "no unet": (put("model_index.json", unet=None), "names None as its unet"),
    "index is no JSON": (write("model_index.json", b"{"), r"model_index\.json cannot be read"),
    "index is no object": (write("model_index.json", b"[]"), "does not hold a JSON object"),
    "index is bottomless": (write("model_index.json", b"[" * 100_000), "cannot be read"),
    "index is no text": (write("model_index.json", b"\xff\xfe\x00"), "cannot be read"),
    "index is huge": (write("model_index.json", b" " * (1 << 21)), "too large"),
    "unet config missing": (remove(UNET), r"unet/config\.json is missing"),
    "scheduler config missing": (remove(SCHEDULER), r"scheduler_config\.json is missing"),
    "config of another class": (put(UNET, _class_name="UNet2DConditionModel"),
                                "supported is UNet2DModel"),
    "not square": (put(UNET, sample_size=[8, 16]), r"sample_size=\[8, 16\].*square"),
    "no size": (put(UNET, sample_size=None), "sample_size=None"),
    "size zero": (put(UNET, sample_size=0), "sample_size=0"),
    "size true": (put(UNET, sample_size=True), "sample_size=True"),
    "latent channels": (put(UNET, in_channels=4, out_channels=4), "maps 4 to 4 channels"),
    "odd outputs": (put(UNET, out_channels=5), "maps 3 to 5 channels"),
    "class embeddings of a kind": (put(UNET, class_embed_type="timestep"),
                                   "class_embed_type=timestep"),
    "widths as text": (put(UNET, block_out_channels="x"), "block_out_channels=x in its config"),
    "timesteps as text": (put(SCHEDULER, num_train_timesteps="1000"),
                          "num_train_timesteps='1000'"),
    "weights twice": (write(f"{WEIGHTS}.index.json", b"{}"), "it is open which of them"),
    "pickle only": (pickle_only, r"\.bin is a pickle and is never loaded; save with safe"),
}  # fmt: skip
"""Faults that the JSON files and the list of files show, before any weight is read."""

LOADED = {
    "key missing": (drop_key, r"missing conv_out\.weight"),
    "key too many": (add_key, r"unexpected conv_surprise\.weight"),
    "infinite": (spoil(-math.inf), r"infinite weights in float32 \(conv_out\.bias\); export"),
    "NaN": (spoil(math.nan), r"NaN or .* \(conv_out\.bias\); export the model again$"),
    "other shapes": (put(UNET, block_out_channels=[8, 32]), "cannot be loaded .*size mismatch"),
    "unknown block": (put(UNET, down_block_types=["Evil", "DownBlock2D"]), "cannot be loaded"),
    "weights cut short": (truncate, "cannot be loaded"),
    "weights empty": (write(WEIGHTS, b""), "cannot be loaded"),
    "unknown betas": (put(SCHEDULER, beta_schedule="steep"), "noise schedule of .* is unusable"),
    "unknown prediction": (put(SCHEDULER, prediction_type="flow"), "prediction_type=flow"),
}


def test_the_whole_folder_loads_with_its_own_weights(folder):
    network = PixelUNet(path=str(folder)).load(CPU)
    stored = load_file(folder / WEIGHTS)
    loaded = dict(network.denoiser.named_parameters())
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


@pytest.mark.parametrize("fault", LISTED)
def test_a_fault_in_the_files_is_found_before_weights_are_read(fault, folder):
    mutate, message = LISTED[fault]
    mutate(folder)
    recipe = PixelUNet(path=str(folder))
    with pytest.raises(ValueError, match=message):
        recipe.describe()
    with pytest.raises(ValueError, match=message):
        recipe.load(CPU)


@pytest.mark.parametrize("fault", LOADED)
def test_a_fault_in_weights_or_values_is_an_error_and_never_random_output(fault, folder):
    mutate, message = LOADED[fault]
    mutate(folder)
    with pytest.raises(ValueError, match=message):
        PixelUNet(path=str(folder)).load(CPU)


def test_a_weight_beyond_the_range_of_float16_is_refused_there_alone(folder):
    spoil(70_000.0)(folder)
    for dtype in ("float32", "bfloat16"):
        PixelUNet(path=str(folder), dtype=dtype).load(CPU)
    with pytest.raises(ValueError, match=r"weights in float16 \(conv_out\.bias\); float16 ends"):
        PixelUNet(path=str(folder), dtype="float16").load(CPU)


def test_a_repository_with_its_parts_side_by_side_loads(folder):
    """As google/ddpm-cifar10-32 and other repositories of 2022 have them."""
    expected = PixelUNet(path=str(folder)).load(CPU)
    for name in ("unet", "scheduler"):
        for file in (folder / name).iterdir():
            file.rename(folder / file.name)
        (folder / name).rmdir()
    recipe = PixelUNet(path=str(folder))
    assert list(recipe.fingerprint()) == ["diffusion_pytorch_model.safetensors"]
    latents, timesteps = torch.ones(2, 3, 8, 8), torch.tensor([3, 900])
    assert torch.equal(
        recipe.load(CPU).predict(latents, timesteps, None),
        expected.predict(latents, timesteps, None),
    )


def test_weights_beside_the_network_are_not_loaded_in_its_place(folder):
    """As diffusers would with subfolder=."""
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    weights = load_file(folder / WEIGHTS)
    other = {name: value + 1 for name, value in weights.items()}
    save_file(other, folder / "diffusion_pytorch_model.safetensors")
    own = PixelUNet(path=str(folder)).load(CPU).denoiser.state_dict()
    assert all(torch.equal(own[name], value) for name, value in weights.items())


@pytest.mark.parametrize("path", ["not/a/folder", "../nowhere", "nowhere", "https://x.org/y"])
def test_neither_a_folder_nor_a_hub_id(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"model\.path=.* is no folder here and no hub id"):
        PixelUNet(path=path).describe()


def test_a_folder_that_holds_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"neither model_index\.json .* nor config\.json"):
        PixelUNet(path=str(tmp_path)).describe()


def test_a_hub_that_cannot_be_reached_says_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def fail(*args, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"model\.path=someone/ddpm .*hub \(no connection\)"):
        PixelUNet(path="someone/ddpm").describe()


NAMES = (
    "diffusion_pytorch_model.safetensors",  # where parts lie side by side
    "pytorch_model.bin",
    "safety_checker/model.safetensors",
    "sd_xl_base_1.0.safetensors",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoders/t5xxl_fp16.safetensors",
    "tokenizer/merges.txt",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
)


def test_a_hub_id_is_described_from_json_and_loaded_from_safetensors(whole, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked, fetched = [], []

    def fetch(name, *, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision))
        offered = ["model_index.json", *NAMES]
        chosen = filter_repo_objects(
            offered, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        fetched.append(sorted(chosen))
        return str(whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    recipe = PixelUNet(path="someone/ddpm", revision="abc")
    info = recipe.describe()
    assert info.weight_bytes is None
    assert info.latent_shape == (3, 8, 8)
    assert fetched == [["model_index.json"]]
    recipe.load(CPU)
    assert set(asked) == {("someone/ddpm", "abc")}
    assert fetched[1] == [
        "diffusion_pytorch_model.safetensors",
        "model_index.json",
        "text_encoder/model-00001-of-00002.safetensors",
        "tokenizer/merges.txt",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    with suppress(ValueError):  # the folder has no such weights
        replace(recipe, variant="fp16").load(CPU)
    assert fetched[-1] == [
        "model_index.json",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "tokenizer/merges.txt",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ]


def test_weights_of_a_hub_id_are_fetched_to_be_hashed_and_loaded_alone(monkeypatch, tmp_path):
    """A dry run asks all else of a model, and fetches a few kilobytes."""
    pipelines.seeded(pipelines.stable_diffusion).save_pretrained(tmp_path / "saved")
    offered = [
        path.relative_to(tmp_path / "saved").as_posix()
        for path in (tmp_path / "saved").rglob("*")
        if path.is_file()
    ]
    fetched = set()

    def fetch(name, *, revision, allow_patterns, ignore_patterns):
        fetched.update(
            filter_repo_objects(
                offered, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        return str(tmp_path / "saved")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(pipeline, "_FITTING", set())
    recipe = LatentPipeline(path="someone/sd")
    recipe.describe()
    recipe.schedule()
    recipe.try_out()
    recipe.call_cost(1, Execution())
    assert {"tokenizer/tokenizer.json", "unet/config.json"} <= fetched
    assert not any(name.endswith(".safetensors") for name in fetched)
    for use in (recipe.fingerprint, recipe.settings, lambda: recipe.load(CPU)):
        fetched.clear()
        use()
        assert sum(name.endswith(".safetensors") for name in fetched) == 3


# Refusals that name the real cause --------------------------------------------------------------


def renamed(folder: Path, name: str) -> PixelUNet:
    (folder / WEIGHTS).rename(folder / "unet" / name)
    return PixelUNet(path=str(folder))


@pytest.mark.parametrize("asked", [None, "fp16", "bf16"])
def test_another_variant_than_the_folder_has_is_named(asked, folder):
    recipe = replace(renamed(folder, "diffusion_pytorch_model.fp16.safetensors"), variant=asked)
    if asked == "fp16":
        assert recipe.load(CPU).latent_shape == (3, 8, 8)
        return
    for action in (recipe.describe, lambda: recipe.load(CPU)):
        with pytest.raises(ValueError, match=r"of variant fp16; give model\.variant=fp16"):
            action()


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_of_a_variant_are_its_weights(variant, whole, tmp_path):
    from diffusers import UNet2DModel

    unet = UNet2DModel.from_pretrained(whole / "unet")
    shutil.copytree(whole, tmp_path / "model")
    (tmp_path / "model" / WEIGHTS).unlink()
    unet.save_pretrained(tmp_path / "model" / "unet", variant=variant, max_shard_size="40KB")
    recipe = PixelUNet(path=str(tmp_path / "model"), variant=variant)
    files = list(recipe.fingerprint())
    assert len(files) > 1
    assert all(("fp16-0000" in file) == (variant == "fp16") for file in files)
    own, expected = recipe.load(CPU).denoiser.state_dict(), unet.state_dict()
    assert all(torch.equal(own[name], expected[name]) for name in expected)


def test_a_file_is_no_folder_and_is_not_looked_for_on_the_hub(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ValueError, match=r"is a file, and models are folders .*from_single_file"):
        PixelUNet(path=str(folder / WEIGHTS)).describe()


@pytest.mark.parametrize("size", [None, [8, 16]])
def test_a_size_helps_a_network_without_a_square_one(size, folder):
    put(UNET, sample_size=size)(folder)
    with pytest.raises(ValueError, match=r"give model\.image_size="):
        PixelUNet(path=str(folder)).describe()
    recipe = PixelUNet(path=str(folder), image_size=16)
    assert recipe.describe().latent_shape == recipe.load(CPU).latent_shape == (3, 16, 16)
    with pytest.raises(ValueError, match=r"halves them 1 times; use model\.image_size=10"):
        PixelUNet(path=str(folder), image_size=11).describe()


def test_a_network_without_a_class_name_is_of_the_class_in_the_index(folder):
    """As in diffusers; and what the index calls absent is no surprise."""
    content = json.loads((folder / UNET).read_text())
    del content["_class_name"]
    (folder / UNET).write_text(json.dumps(content))
    put("model_index.json", feature_extractor=[None, None])(folder)
    assert PixelUNet(path=str(folder)).describe().latent_shape == (3, 8, 8)
