"""`measurement=probability` end to end: what it writes, and that counting agrees."""

from __future__ import annotations

import math
import sys

import pytest
import tiny
import torch

from invmm.cli import measure
from invmm.data.folder import ImageFolder
from invmm.diffusion.sampling import Sampler, draw
from invmm.models.pixel import PixelUNet
from invmm.replication.correlation import PixelCorrelation

THRESHOLD = 0.18


def overrides_for(model, images, run_dir, *more: str) -> list[str]:
    quick = tiny.command(model, images, run_dir)[3:]
    return [
        *[text for text in quick if not text.startswith("inversion.")],
        f"replication.threshold={THRESHOLD}", "engine.rows_sample=64", "engine.rows_embed=64",
        *more,
    ]  # fmt: skip


def test_the_estimate_agrees_with_a_count(tmp_path, monkeypatch, capsys):
    """On a model with random weights, whose samples match an image now and then."""
    monkeypatch.setattr(sys, "argv", ["invmm"])
    model = tiny.save_model(tmp_path / "model")
    images = tiny.save_images(tmp_path / "png", 3)
    splitting = ("measurement=probability", "measurement.bank_size=256")
    overrides = overrides_for(model, images, tmp_path / "run", *splitting)
    assert measure.COMMAND.run(overrides) == 0
    assert "one in ... draws (95 %)" in capsys.readouterr().out

    counting = ("measurement=free_sampling", "measurement.num_samples=1500", "seed=1")
    assert measure.COMMAND.run(overrides_for(model, images, tmp_path / "count", *counting)) == 0
    counts = tiny.scores(tmp_path / "count").set_index("image_id")

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
        counted = counts.loc[entry.image_id]
        assert counted["count"] == round(counted.replication_rate * 1500)
        assert abs(counted.log_p - math.log(p)) < 0.4
        assert counted.log_p_low - 0.1 <= math.log(p) <= counted.log_p_high + 0.1
        estimated += 1
    assert estimated == 3


@pytest.mark.parametrize("measurement", [
    ("measurement=free_sampling", "measurement.num_samples=200"),
    ("measurement=probability", "measurement.bank_size=200", "measurement.min_count=30",
     "measurement.max_samples=768"),
])  # fmt: skip
def test_a_bank_is_shared_by_shards_kept_and_the_same_as_one_run(
    measurement, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["invmm"])
    model = tiny.save_model(tmp_path / "model")
    images = tiny.save_images(tmp_path / "png", 3)
    chosen = (*measurement, "measurement.block_size=32")
    assert measure.COMMAND.run(overrides_for(model, images, tmp_path / "one", *chosen)) == 0
    for shard in ("0/2", "1/2"):
        overrides = overrides_for(model, images, tmp_path / "two", *chosen, f"shard={shard}")
        assert measure.COMMAND.run(overrides) == 0
        blocks = {
            path: path.stat().st_mtime_ns for path in (tmp_path / "two/free_samples").iterdir()
        }
        assert len(blocks) == 7
    assert tiny.records(tmp_path / "one") == tiny.records(tmp_path / "two")
    shown = capsys.readouterr().out
    assert "free samples that replicate any unknown image: " in shown
