"""Inputs that change between two commands: the second never returns the table of the first."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pipelines
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

import invmm
from invmm.cli import measure, verify
from invmm.models.auto import AutoModel
from invmm.models.borrowed import BorrowedModel

CONFIGS = {
    "unet/config.json": {
        "act_fn": "relu", "norm_eps": 1e-3, "flip_sin_to_cos": False, "freq_shift": 1,
        "downsample_padding": 0, "mid_block_scale_factor": 2, 
        "resnet_time_scale_shift": "scale_shift",
        "center_input_sample": True, "dropout": 0.5, "norm_num_groups": 2,
    },
    "scheduler/scheduler_config.json": {
        "beta_start": 0.001, "beta_end": 0.01, "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction", "num_train_timesteps": 500, "clip_sample": False,
        "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "variance_type": "learned",
        "trained_betas": [0.1, 0.2],
    },
}  # fmt: skip
CHANGES = [(file, key, value) for file, keys in CONFIGS.items() for key, value in keys.items()]


@pytest.fixture(scope="module")
def measured(images, tmp_path_factory):
    """A model of this module's own, and a run of it."""
    place = tmp_path_factory.mktemp("measured")
    model = tiny.save_model(place / "model")
    result = tiny.invmm(tiny.command(model, images, place / "run"))
    assert result.returncode == 0, result.stderr
    return place


@pytest.fixture
def world(measured, images, monkeypatch, capsys):
    """The model, which each test may change, and what commands then say of its run."""
    model, run = measured / "model", measured / "run"
    kept = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}

    def said() -> list[tuple[int, str]]:
        overrides = tiny.command(model, images, run)[3:]
        monkeypatch.setattr(sys, "argv", ["invmm", *overrides])
        ended = [(measure.COMMAND.run(overrides), capsys.readouterr().err)]
        options = ["--model", model, "--min-threshold", 0.05, "--min-samples", 3]
        monkeypatch.setattr(sys, "argv", ["invmm-verify", str(run), *map(str, options)])
        with pytest.raises(SystemExit) as left:
            verify.main()
        return [*ended, (int(left.value.code or 0), capsys.readouterr().err)]

    yield model, said
    for path, content in kept.items():
        path.write_bytes(content)


def change(path: Path, **keys) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **keys}))


@pytest.mark.parametrize(("file", "key", "value"), CHANGES)
def test_a_changed_config_is_refused_by_name(file, key, value, world):
    model, said = world
    change(model / file, **{key: value})
    for code, line in said():
        assert code == 2
        assert f"model_settings.{file} was" in line or f"model.{file} was" in line or key in line


def test_notes_of_saving_are_no_change(world):
    model, said = world
    for file in CONFIGS:
        change(model / file, _diffusers_version="0.99", _name_or_path="elsewhere")
    (measured, _), (verified, _) = said()
    assert (measured, verified) == (0, 4)  # nobody gave a root hash


def test_changed_weights_are_refused_by_name(world):
    model, said = world
    path = model / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"] += 1e-3
    save_file(weights, path)
    for code, line in said():
        assert code == 2
        assert "model.unet/diffusion_pytorch_model.safetensors was" in line


def test_a_replaced_image_is_refused_by_name(measured, images, monkeypatch, tmp_path):
    """Records stay as they are, and the manifest of a run that is given again."""
    copied = shutil.copytree(images, tmp_path / "png")
    overrides = tiny.command(measured / "model", copied, tmp_path / "own")[3:]
    monkeypatch.setattr(sys, "argv", ["invmm", *overrides])
    assert measure.COMMAND.run(overrides) == 0
    manifest = (tmp_path / "own" / "manifest.json").read_bytes()
    assert measure.COMMAND.run(overrides) == 0
    assert (tmp_path / "own" / "manifest.json").read_bytes() == manifest
    before = tiny.records(tmp_path / "own")
    shutil.copyfile(copied / "image-01.png", copied / "image-00.png")
    again = tiny.invmm(tiny.command(measured / "model", copied, tmp_path / "own"))
    assert again.returncode == 2
    assert "measured another image image-00.png: its SHA-256 was" in again.stderr
    (copied / "image-00.png").write_bytes(b"no image")
    again = tiny.invmm(tiny.command(measured / "model", copied, tmp_path / "own"))
    assert again.returncode == 2
    assert "and is that of no image" in again.stderr
    assert tiny.records(tmp_path / "own") == before


def test_the_words_of_a_tokenizer_and_the_encoders_config_are_settings(tmp_path):
    pytest.importorskip("transformers")
    pipelines.seeded(pipelines.MAKERS["sd1 epsilon"]).save_pretrained(tmp_path)
    before = AutoModel(path=str(tmp_path)).settings()
    assert before.keys() >= {
        "unet/config.json", "vae/config.json", "text_encoder/config.json",
        "scheduler/scheduler_config.json", "tokenizer/tokenizer.json",
    }  # fmt: skip
    change(tmp_path / "text_encoder/config.json", hidden_act="gelu")
    change(tmp_path / "tokenizer/tokenizer.json", truncation=None, version="2.0")
    after = AutoModel(path=str(tmp_path)).settings()
    assert {name for name in before if before[name] != after[name]} == {
        "text_encoder/config.json", "tokenizer/tokenizer.json",
    }  # fmt: skip


def test_a_pipeline_in_memory_has_settings_too():
    """Its scheduler, its configs, and its adapters with their strengths."""
    peft = pytest.importorskip("peft")
    pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), "it")
    states = [BorrowedModel(pipeline).settings()]

    def differs(name: str) -> None:
        states.append(BorrowedModel(pipeline).settings())
        old, new = states[-2:]
        assert [key for key in old if old[key] != new[key]] == [name]

    pipeline.unet.set_adapters(["it"], 0.5)
    differs("unet adapters")
    pipeline.unet.disable_lora()
    differs("unet adapters")
    pipeline.scheduler.register_to_config(beta_end=0.02)
    differs("scheduler")
    pipeline.vae.register_to_config(scaling_factor=0.5)
    differs("vae")
    pipeline.tokenizer.add_tokens(["newword"])
    differs("tokenizer")
    assert BorrowedModel(pipeline).settings() == states[-1]


def rescheduled(pipeline, scheduler=DDPMScheduler, **keys):
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **keys)


def halved(module):
    with torch.no_grad():
        next(module.parameters()).mul_(0.5)


IN_MEMORY = {
    "adapter strength": (lambda p: p.unet.set_adapters(["it"], 0.5), "unet adapters was .* and is"),
    "adapter off": (lambda p: p.unet.disable_lora(), "unet adapters was .* and is"),
    "betas": (lambda p: rescheduled(p, DDIMScheduler, beta_end=0.02), "scheduler was .* and is"),
    "another scheduler": (rescheduled, "scheduler was .* and is"),
    "scale of latents": (
        lambda p: p.vae.register_to_config(scaling_factor=0.5),
        r"model\.latent_scale was 0\.7 and is 0\.5",
    ),
    "words": (lambda p: p.tokenizer.add_tokens(["newword"]), "tokenizer was .* and is"),
    "weights": (lambda p: halved(p.unet), "unet.* was .* and is"),
    "weights of the encoder": (lambda p: halved(p.text_encoder), "text_encoder.* was .* and is"),
}  # fmt: skip
"""Name -> what is done to the pipeline, and what the next call says was changed."""


def test_a_pipeline_changed_in_memory_is_refused_by_name(tmp_path):
    """As are other pictures and other prompts; the same ones go on."""
    peft = pytest.importorskip("peft")
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(2)]
    options = (*tiny.QUICK[2:], "measurement=denoising_loss", "prompt=caption")

    def measured(change=lambda pipeline: None, images=None, prompts=("a fox", "a bird")):
        pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
            pipeline.unet.add_adapter(config, "it")
        change(pipeline)
        given = [text for text in options if not text.startswith("trainer=")]
        images = images or pictures
        return invmm.measure(pipeline, images, *given, prompts=prompts, run_dir=tmp_path / "run")

    before = measured()
    assert before.score.notna().all()
    for change, said in IN_MEMORY.values():
        with pytest.raises(
            ValueError,
            match=rf"run (was measured with other inputs|holds a run of another config) \(.*{said}",
        ):
            measured(change)
    for given in ({"images": pictures[::-1]}, {"prompts": ("a fox", "a cat")}):
        with pytest.raises(ValueError, match=r"run holds a run of another config \(dataset\."):
            measured(**given)
    pd.testing.assert_frame_equal(measured(), before)
