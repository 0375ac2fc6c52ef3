"""LoRAs, U-Nets and single files through the commands: measured, planned and verified."""

from __future__ import annotations

import json
import sys

import pipelines
import pytest
import single_files
import tiny
import torch
from safetensors.torch import load_file, save_file

from invmm.cli import measure, verify


@pytest.fixture
def invmm(tmp_path, monkeypatch, capsys):
    """Measures two images; (exit code, what it says)."""
    images = tiny.save_images(tmp_path / "images", 2)
    monkeypatch.setattr(sys, "argv", ["invmm"])

    def run(name: str, *overrides: str) -> tuple[int, str]:
        given = [
            *tiny.command(tmp_path / "model", images, tmp_path / name)[3:], "prompt=empty",
            "inversion.num_steps=4", "inversion.check_every=2", "replication.threshold=-1",
            "replication.num_confirm=0", "sampler.num_inference_steps=4", *overrides,
        ]  # fmt: skip
        code = measure.COMMAND.run(given)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture
def verified(tmp_path, monkeypatch, capsys):
    """Verifies a run with the verifier's own files; (exit code, what it says)."""

    def run(name: str, *arguments: object) -> tuple[int, str]:
        folder = tmp_path / name
        root = json.loads((folder / "manifest.json").read_bytes())["root_hash"]
        given = ["invmm-verify", folder, "--min-threshold", -1, "--min-samples", 3, "--expect",
                 root, "--model", tmp_path / "model", *arguments]  # fmt: skip
        monkeypatch.setattr(sys, "argv", list(map(str, given)))
        with pytest.raises(SystemExit) as ended:
            verify.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out + captured.err

    return run


def save_lora(unet, path, seed: int) -> None:
    weights = {}
    rng = torch.Generator().manual_seed(seed)
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_q"):
            for matrix, shape in (("A", (2, module.in_features)), ("B", (module.out_features, 2))):
                weights[f"unet.{name}.lora_{matrix}.weight"] = torch.randn(shape, generator=rng)
    save_file(weights, path)


def test_loras_with_strengths(tmp_path, invmm, verified):
    pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
    pipeline.save_pretrained(tmp_path / "model")
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    for seed, path in enumerate((one, two)):
        save_lora(pipeline.unet, path, seed)
    setting = f"model.lora=[{{path:{one},weight:0.7}},{two}]"
    assert invmm("planned", setting, "dry_run=true")[0] == 0
    assert not (tmp_path / "planned").exists()
    code, output = invmm("run", setting)
    assert code == 0, output
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_bytes())
    assert manifest["config"]["model"]["lora"] == [{"path": str(one), "weight": 0.7}, str(two)]
    inputs = manifest["inputs"]["model"]
    assert (inputs["lora.0 weight"], inputs["lora.1 weight"]) == ("0.7", "1.0")

    code, output = verified("run", "--lora", one, "--lora", two)
    assert code == 0, output
    for arguments, message in (
        ((), "give --lora FILE"),
        (("--lora", one), "was measured with 2 LoRAs, and --lora names 1"),
        (("--lora", two, "--lora", one), r"other inputs (model.lora.0 was"),
        (("--lora", one, "--lora", two, "--unet", tmp_path), "without model.unet; leave it out"),
    ):
        code, output = verified("run", *arguments)
        assert code == 2
        assert message in output

    weights = load_file(one)
    save_file({key: value[:, :1].contiguous() for key, value in weights.items()}, one)
    code, output = invmm("run", setting)
    assert code == 2
    for dry_run in ("true", "false"):
        code, output = invmm("other", setting, f"dry_run={dry_run}")
        assert code == 2
        (line,) = [line for line in output.splitlines() if "model.lora" in line]
        assert f"model.lora.0={one} cannot be loaded: " in line
    code, output = invmm("other", f"model.lora=[{{path:{one},weight:inf}},{two}]")
    assert code == 2
    assert "model.lora.0.weight=inf is not possible: give a finite number" in output


def test_another_unet(tmp_path, invmm, verified):
    pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
    pipeline.save_pretrained(tmp_path / "model")
    torch.nn.init.normal_(pipeline.unet.conv_out.weight)
    pipeline.unet.save_pretrained(tmp_path / "checkpoint" / "unet")
    setting = f"model.unet={tmp_path / 'checkpoint'}"
    assert invmm("planned", setting, "dry_run=true")[0] == 0
    code, output = invmm("run", setting)
    assert code == 0, output
    code, output = verified("run", "--unet", tmp_path / "checkpoint" / "unet")
    assert code == 0, output
    for arguments, message in (
        ((), "give --unet FOLDER"),
        (("--unet", tmp_path / "model"), "other inputs (model.unet/diffusion_pytorch_model"),
    ):
        code, output = verified("run", *arguments)
        assert code == 2
        assert message in output
    for dry_run in ("true", "false"):
        code, output = invmm("other", f"model.unet={tmp_path / 'no'}", f"dry_run={dry_run}")
        assert code == 2
        assert f"model.unet={tmp_path / 'no'} does not exist" in output


def test_a_single_file(tmp_path, invmm, verified):
    pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
    config, model = tmp_path / "config", tmp_path / "model"
    single_files.save_single_file(pipeline, tmp_path / "file.safetensors", config)
    (tmp_path / "file.safetensors").rename(model)  # where the command expects it
    code, output = invmm("other", f"model.config={config}", "dry_run=true")
    assert code == 2
    assert f"model.path={model} is no safetensors file" in output
    own = (f"model.path={tmp_path / 'file.safetensors'}", f"model.config={config}")
    model.rename(tmp_path / "file.safetensors")
    code, output = invmm("planned", *own, "dry_run=true")
    assert code == 0, output
    code, output = invmm("run", *own)
    assert code == 0, output
    file = ("--model", tmp_path / "file.safetensors")
    code, output = verified("run", *file, "--config", config)
    assert code == 0, output
    code, output = verified("run", *file)
    assert code == 2
    assert "give --config FOLDER" in output

    weights = load_file(tmp_path / "file.safetensors")
    save_file({**weights, "more": torch.zeros(1)}, tmp_path / "file.safetensors")
    for dry_run in ("true", "false"):
        code, output = invmm("other", *own, f"dry_run={dry_run}")
        assert code == 2
        assert "holds weights that no part takes (more)" in output
