"""`measurement=probability` end to end: what it writes, and that counting agrees."""

from __future__ import annotations

import math
import sys

import tiny
import torch

from invmm.cli import measure
from invmm.data.folder import ImageFolder
from invmm.diffusion.sampling import Sampler, draw
from invmm.models.pixel import PixelUNet
from invmm.replication.correlation import PixelCorrelation

THRESHOLD = 0.18


def test_the_estimate_agrees_with_a_count(tmp_path, monkeypatch, capsys):
    """On a model with random weights, whose samples match an image now and then."""
    monkeypatch.setattr(sys, "argv", ["invmm"])
    model = tiny.save_model(tmp_path / "model")
    images = tiny.save_images(tmp_path / "png", 3)
    overrides = [
        *[text for text in tiny.command(model, images, tmp_path / "run")[3:]
          if not text.startswith("inversion.")],
        "measurement=probability", f"replication.threshold={THRESHOLD}", "engine.rows_sample=64",
        "engine.rows_embed=64",
    ]  # fmt: skip
    assert measure.COMMAND.run(overrides) == 0
    assert "one in ... draws (95 %)" in capsys.readouterr().out

    network = PixelUNet(path=str(model)).load(torch.device("cpu"))
    rng = torch.Generator().manual_seed(99)
    sampler = Sampler(num_inference_steps=4)
    with torch.no_grad():
        noise = torch.randn(6000, 3, 8, 8, generator=rng)
        latents = torch.cat([
            draw(
                lambda x, t: network.predict(x, t, None), part,
                sampler=sampler, schedule=network.schedule,
            )
            for part in noise.split(500)
        ])  # fmt: skip
        samples = PixelCorrelation().embed(network.decode(latents))
    dataset = ImageFolder(path=str(images)).open(8)
    table = tiny.scores(tmp_path / "run").set_index("image_id")
    estimated = 0
    for entry in dataset.entries:
        row = table.loc[entry.image_id]
        if entry.image_id == "broken.png":
            assert row.status == "FAILED"
            continue
        target = PixelCorrelation().embed(dataset.load(entry).pixels[None])[0]
        p = ((samples @ target) >= THRESHOLD).double().mean().item()
        assert row.status == "ESTIMATED"
        assert 0.001 < p < 0.5
        assert abs(row.log_p - math.log(p)) < 0.7
        assert row.log_p_low - 0.1 <= math.log(p) <= row.log_p_high + 0.1
        assert row.score_nats == -row.log_p
        assert row.num_samples == 8
        estimated += 1
    assert estimated == 3
