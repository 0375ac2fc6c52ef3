"""The command on a tiny pipeline of each family: prompts, guidance, labels, records."""

from __future__ import annotations

import sys

import pipelines
import pytest
import tiny

import invmm
from invmm.cli import measure

CASES = {
    "ldm vq": (),
    "ldm kl": (),
    "dit": ("prompt=class_label", "sampler.guidance_scales=[1,4]"),
    "sd1 epsilon": ("prompt=caption", "sampler.guidance_scales=[1,3,7]"),
    "sd2 v": ("prompt=empty", "sampler.guidance_scales=[2]"),
    "sdxl": ("prompt=caption", "sampler.guidance_scales=[1,3]"),
    "sd3": ("prompt=caption", "sampler=flow_euler", "sampler.guidance_scales=[1,3]"),
}


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Three images of 16x16, all but the last with a caption and a label; and a broken one."""
    folder = tiny.save_images(tmp_path_factory.mktemp("images") / "png", 3)
    return tiny.save_captions(folder)


@pytest.mark.parametrize("family", CASES)
def test_every_family_is_measured(family, captioned, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["invmm"])
    pipelines.seeded(pipelines.MAKERS[family]).save_pretrained(tmp_path / "model")
    overrides = [
        *tiny.command(tmp_path / "model", captioned, tmp_path / "run")[3:],
        "inversion=paper_sd", "inversion.num_steps=4", "inversion.check_every=2",
        "inversion.objective.batch_size=4", *CASES[family], "sampler.num_inference_steps=4",
        "replication.threshold=-1", "replication.num_confirm=2",
    ]  # fmt: skip
    assert measure.COMMAND.run(overrides) == 0
    records = tiny.records(tmp_path / "run")
    needs = {"caption": "no caption", "class_label": "no class label"}
    prompt = next((text[7:] for text in overrides if text.startswith("prompt=")), "none")
    for name in ("image-00.png", "image-01.png"):
        record = records[name]
        assert record["status"] == "REPLICATED", record["error"]
        assert record["steps"] == 2  # the first check passes at a threshold of -1
        assert record["score"] > 0
        scales = [1.0] if "guidance" not in str(CASES[family]) else None
        first = record["columns"]["guidance_scale"]
        assert first == (scales or [2.0 if family == "sd2 v" else 1.0])[0]
        calls = 2 if family == "sd2 v" else 1
        assert record["evaluations_sampler"] == (3 + 2) * 4 * calls
        assert record["columns"]["confirm_drawn"] == 2
        assert record["evaluations_backward"] == 2 * 4
    if prompt in needs:
        assert records["image-02.png"]["status"] == "FAILED"
        assert needs[prompt] in records["image-02.png"]["error"]
    else:
        assert records["image-02.png"]["status"] == "REPLICATED"
    assert records["broken.png"]["status"] == "FAILED"


@pytest.mark.parametrize(("family", "overrides", "width", "reads_caption"), [
    ("sd2 v", ["sampler.guidance_scales=[1,2]"], 16, False),
    ("sdxl", ["prompt.search.num_tokens=5", "execution.autocast=bfloat16"], 32, False),
    ("sd3", ["sampler=flow_euler", "prompt.search.check_prompts=each"], 16, True),
])  # fmt: skip
def test_a_prompt_is_searched(
    family, overrides, width, reads_caption, captioned, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["invmm"])
    pipelines.seeded(pipelines.MAKERS[family]).save_pretrained(tmp_path / "model")
    given = [
        *tiny.command(tmp_path / "model", captioned, tmp_path / "run")[3:], "prompt=learned",
        "inversion.num_steps=4", "inversion.check_every=2", *overrides,
        "sampler.num_inference_steps=4", "replication.threshold=1",
    ]  # fmt: skip
    assert measure.COMMAND.run(given) == 0
    records = tiny.records(tmp_path / "run")
    num_free = 5 if family == "sdxl" else 75
    prompts = set()
    for name in ("image-00.png", "image-01.png"):
        record = records[name]
        assert record["status"] == "NOT_REPLICATED", record["error"]
        assert record["evaluations_backward"] == 4 * 4
        assert len(record["arrays"]["prompt_ids"]) == 8 * num_free
        rows = 3 if family == "sd3" else 1
        assert len(record["arrays"]["prompt_embedding"]) == 4 * rows * 77 * width
        assert "log_p_certified" not in record["columns"]
        prompts.add(record["columns"]["prompt"])
    assert len(prompts) == 2
    uncaptioned = records["image-02.png"]
    assert uncaptioned["status"] == ("FAILED" if reads_caption else "NOT_REPLICATED")
    assert "no caption" in (uncaptioned["error"] or "") or not reads_caption


def test_a_pipeline_in_memory_is_searched_and_given_back(tmp_path, captioned):
    pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
    table = invmm.measure(
        pipeline, captioned, "prompt=learned", *tiny.QUICK, "inversion.num_steps=5",
        run_dir=tmp_path / "run",
    )  # fmt: skip
    assert table["prompt"].notna().sum() == 3
    encoder = pipeline.text_encoder
    assert not encoder.get_input_embeddings()._forward_hooks
    assert all(weight.requires_grad for weight in encoder.parameters())


def test_the_prompt_changes_the_record(captioned, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["invmm"])
    pipelines.seeded(pipelines.MAKERS["sd1 epsilon"]).save_pretrained(tmp_path / "model")
    losses = {}
    for prompt in ("caption", "empty"):
        run_dir = tmp_path / prompt
        overrides = [
            *tiny.command(tmp_path / "model", captioned, run_dir)[3:], f"prompt={prompt}",
            "inversion.num_steps=5", "dataset.ids=[image-00.png]",
        ]  # fmt: skip
        assert measure.COMMAND.run(overrides) == 0
        losses[prompt] = tiny.records(run_dir)["image-00.png"]["arrays"]["curve/loss"]
    assert losses["caption"] != losses["empty"]
