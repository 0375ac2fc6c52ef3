"""The weights of a part are those of its files: no others are read, and none is left out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pipelines
import pytest
import torch
from safetensors.torch import load_file, save_file

from invmm.models.parts import load_part
from invmm.models.weights import check_loaded, weight_files

UNET, CLIP = "diffusers.UNet2DModel", "transformers.CLIPTextModel"
WHOLE, HALF = "model.safetensors", "model.fp16.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def write_index(path: Path, places: object, metadata: object = None) -> None:
    path.write_text(json.dumps({"metadata": metadata or {"total_size": 1}, "weight_map": places}))


@pytest.mark.parametrize("class_name", [UNET, CLIP])
def test_one_whole_file_or_the_shards_of_an_index_and_of_the_variant_alone(class_name, tmp_path):
    prefix = "diffusion_pytorch_" if class_name == UNET else ""
    for name in (WHOLE, HALF, "model.non_ema.safetensors", "model.bin", "evil.safetensors"):
        (tmp_path / f"{prefix}{name}").touch()
    for variant, name in ((None, WHOLE), ("fp16", HALF), ("bf16", None)):
        files = weight_files(tmp_path, class_name, variant)
        assert [file.name for file in files] == ([f"{prefix}{name}"] if name else [])
    (tmp_path / f"{prefix}{WHOLE}").unlink()
    for name in SHARDS:
        (tmp_path / f"{prefix}{name}").touch()
    assert weight_files(tmp_path, class_name, None) == []  # without an index nobody reads them
    places = {"a": prefix + SHARDS[1], "b": prefix + SHARDS[0], "c": prefix + SHARDS[1]}
    write_index(tmp_path / f"{prefix}{INDEX}", places)
    files = weight_files(tmp_path, class_name, None)
    assert [file.name for file in files] == [f"{prefix}{name}" for name in SHARDS]


def pipe(folder: Path) -> None:
    (folder / WHOLE).unlink()
    os.mkfifo(folder / WHOLE)


OPEN = {
    "both": (lambda folder: write_index(folder / INDEX, {"a": WHOLE}), "holds .*and .*index"),
    "an adapter": (lambda folder: (folder / "adapter_config.json").touch(), "and adapter_config"),
    "a pipe": (pipe, "is no regular file"),
}


@pytest.mark.parametrize("case", OPEN)
def test_it_must_be_clear_which_files_are_the_weights(case, tmp_path):
    (tmp_path / WHOLE).touch()
    change, message = OPEN[case]
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        weight_files(tmp_path, CLIP, None)


@pytest.mark.parametrize(
    "name",
    ["../evil.safetensors", "/evil.safetensors", "a/b.safetensors", "evil.bin", "", 7, None, ["x"]],
)
def test_an_index_names_files_of_its_folder_alone(name, tmp_path):
    write_index(tmp_path / INDEX, {"a": name})
    with pytest.raises(ValueError, match=r"says that 'a' is in .* no name of a safetensors file"):
        weight_files(tmp_path, CLIP, None)


@pytest.mark.parametrize("places", [{}, [], None, "model.safetensors"])
def test_an_index_without_files_is_none(places, tmp_path):
    write_index(tmp_path / INDEX, places)
    with pytest.raises(ValueError, match="is no index: it needs weight_map and metadata"):
        weight_files(tmp_path, CLIP, None)
    write_index(tmp_path / INDEX, {"a": SHARDS[0]})
    with pytest.raises(ValueError, match=rf"{SHARDS[0]} is missing"):
        weight_files(tmp_path, CLIP, None)


# What was loaded -------------------------------------------------------------------------------


@pytest.fixture
def vae(tmp_path):
    part = pipelines.seeded(pipelines.dit).vae
    part.save_pretrained(tmp_path / "vae")
    return part


AUTOENCODER = "diffusers.AutoencoderKL"
VAE = "vae/diffusion_pytorch_model.safetensors"


def load(folder: Path, dtype: torch.dtype = torch.float32):
    return load_part(folder, "vae", AUTOENCODER, variant=None, dtype=dtype)


def test_weights_with_the_names_of_old_releases_are_the_same_in_any_precision(vae, tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(tmp_path / VAE)
    for new, before in old.items():
        weights = {key.replace(f".{new}.", f".{before}."): weights[key] for key in weights}
    assert any(".query." in key for key in weights)
    save_file(weights, tmp_path / VAE)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        own = load(tmp_path, dtype).state_dict()
        assert all(
            torch.equal(own[key], value.to(dtype)) for key, value in vae.state_dict().items()
        )


def test_a_weight_that_is_in_no_file_is_found_although_the_index_lists_it(vae, tmp_path):
    (tmp_path / VAE).unlink()
    vae.save_pretrained(tmp_path / "vae", max_shard_size="20KB")
    own = load(tmp_path).state_dict()
    assert all(torch.equal(own[key], value) for key, value in vae.state_dict().items())
    shard, second, *_ = sorted((tmp_path / "vae").glob("*.safetensors"))
    weights = load_file(shard)
    name = sorted(weights)[0]
    value = weights.pop(name)
    save_file(weights, shard)
    with pytest.raises(ValueError, match=rf"the vae of .*\({name}\)"):
        load(tmp_path)
    save_file({name: value, **weights}, shard)
    save_file({name: value.clone(), **load_file(second)}, second)
    with pytest.raises(ValueError, match=rf"the vae of .* has {name} in two files"):
        load(tmp_path)


@pytest.mark.parametrize("change", ["value", "shape", "name"])
def test_a_part_with_other_weights_than_its_files_is_refused(change, vae, tmp_path):
    info, files = {}, weight_files(tmp_path / "vae", AUTOENCODER, None)
    check_loaded(vae, info, files, "the vae")
    name = "decoder.conv_out.bias"
    if change == "value":
        vae.decoder.conv_out.bias.data[0] += 1e-6
    elif change == "shape":
        vae.decoder.conv_out.bias.data = vae.decoder.conv_out.bias.data[:2]
    else:
        vae.decoder.register_buffer("more", torch.full((3,), 0.5))
        name = "decoder.more"
    with pytest.raises(ValueError, match=rf"the vae was loaded with other weights .*\({name}\)"):
        check_loaded(vae, info, files, "the vae")
