"""No measurement ends well on numbers that are not finite, whichever part they come from.

A single weight of one part turns NaN or infinite after the model was checked; everything from the
weights to the records is real.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from functools import cache

import pipelines
import pytest
import torch
from PIL import Image
from test_networks import pixel_pipeline
from tiny import QUICK

from invmm.config.compose import compose_job
from invmm.config.runs import check_measure
from invmm.data.memory import MemoryImages
from invmm.engine.finiteness import Stage
from invmm.models.borrowed import BorrowedModel
from invmm.results.ownership import OwnedRunFolder
from invmm.results.records import read_records
from invmm.runtime.worker import Worker

CPU = torch.device("cpu")
PICTURES = {f"{n}": Image.linear_gradient("L").convert("RGB").resize((n, n)) for n in (8, 16, 24)}
MEASUREMENTS = {
    "inversion": ("replication.threshold=0.9",),
    "replicated": ("replication.threshold=-1", "replication.num_confirm=2"),
    "trajectory": ("inversion=trajectory", "inversion.num_steps=2", "inversion.check_every=1",
                   "inversion.sampler_steps=2", "inversion.num_check=4", "inversion.batch_size=2",
                   "replication.threshold=0.9", "replication.num_confirm=2"),
    "learned": ("inversion=paper_sd", "prompt=learned", "prompt.search.num_tokens=2",
                "replication.threshold=0.9"),
    "free_sampling": ("measurement=free_sampling", "measurement.num_samples=4"),
    "own bank": ("measurement=free_sampling", "measurement.num_samples=4", "prompt=caption"),
    "probability": ("measurement=probability", "measurement.bank_size=8", "measurement.repeats=2",
                    "measurement.own_bank_size=8", "measurement.min_count=1", "measurement.moves=1",
                    "measurement.num_particles=4", "measurement.max_samples=16",
                    "replication.threshold=0.9999"),
    "denoising_loss": ("measurement=denoising_loss", "measurement.num_noises=2"),
    "pia": ("measurement=pia",),
    "secmi": ("measurement=secmi", "measurement.timestep=20"),
}  # fmt: skip
BASELINES = ("denoising_loss", "pia", "secmi")
PARTS = {
    "text encoder": lambda pipe: (
        pipe.text_encoder.get_submodule("encoder.layers.0.mlp.fc2").weight
        if hasattr(pipe.text_encoder, "encoder")
        else pipe.text_encoder.text_model.encoder.layers[0].mlp.fc2.weight
    ),
    "denoiser": lambda pipe: pipe.unet.conv_out.weight,
    "encoder": lambda pipe: pipe.vae.encoder.conv_out.weight,
    "decoder": lambda pipe: pipe.vae.decoder.conv_out.weight,
}
STAGES = {
    "text encoder": (Stage.PROMPT,), "denoiser": (Stage.PREDICTION, Stage.SAMPLE),
    "encoder": (Stage.ENCODER,), "decoder": (Stage.DECODER,),
}  # fmt: skip
LASTING = ("inversion.num_steps=4", "inversion.check_every=2", "inversion.objective.batch_size=2")
COMMON = [
    *(text for text in QUICK if not text.startswith("inversion.")), "sampler.num_inference_steps=2",
    "engine.rows_denoise=2", "engine.rows_sample=4",
]  # fmt: skip
MATRIX = [name for name in MEASUREMENTS if name != "replicated"]


@cache
def pipeline(kind: str):
    if kind == "pixel":
        return pixel_pipeline("epsilon")
    return pipelines.seeded(pipelines.MAKERS["sd1 epsilon" if kind == "text" else kind])


@cache
def planned(kind: str, name: str, *more: str):
    """The recipes of a run, checked as the command checks them."""
    model = BorrowedModel(pipeline(kind))
    own = MEASUREMENTS[name]
    given = [*COMMON, *own, "model.path=memory", *more]
    if "inversion=trajectory" not in own:
        given += LASTING
    if kind == "text" and not any(text.startswith("prompt=") for text in own):
        given.append("prompt=empty")
    faults: list[str] = []
    plain = compose_job("measure", given, faults)
    size = {"pixel": "8", "sd3 t5 24 pixels": "24"}.get(kind, "16")
    dataset = MemoryImages.of({"it": PICTURES[size]}, {"it": "a red fox"})
    run = check_measure({**plain, "model": model, "dataset": dataset}, faults) if plain else None
    assert not faults
    assert run is not None
    return run


def measured(run, path):
    """The one record of a run."""
    dataset = run.dataset.open(run.model.describe().image_size)
    with OwnedRunFolder(path, config=run.identity, digest=run.digest) as folder:
        Worker(run, folder, dataset, dataset.entries, CPU).drain()
    (record,) = read_records(path)
    return record


@contextlib.contextmanager
def poisoned(weights, value: float):
    """A single weight that is no number."""
    numbers = weights.data.view(-1)
    before = numbers[0].item()
    numbers[0] = value
    try:
        yield
    finally:
        numbers[0] = before


def assert_diverged(record, *stages: Stage):
    assert record["status"] == "DIVERGED", record
    assert record["score"] is None
    assert any(stage in record["error"] for stage in stages), record["error"]


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_healthy_model_ends_well(name, tmp_path):
    """The controls: what the poison changes."""
    record = measured(planned("text", name), tmp_path)
    assert record["status"] not in ("DIVERGED", "FAILED"), record["error"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", MATRIX)
def test_a_broken_part_of_the_model_ends_the_image_by_name(name, part, value, tmp_path):
    if part == "decoder" and name in BASELINES:
        pytest.skip("decodes nothing")
    run = planned("text", name)
    with poisoned(PARTS[part](pipeline("text")), value):
        assert_diverged(measured(run, tmp_path), *STAGES[part])


OTHERS = {
    "ldm vq": {
        "unet.conv_out": "denoiser", "vqvae.encoder.conv_out": "encoder",
        "vqvae.quantize.embedding": "decoder", "vqvae.decoder.conv_out": "decoder",
    },
    "dit": {
        "transformer.proj_out_2": "denoiser", "vae.quant_conv": "encoder",
        "vae.decoder.conv_in": "decoder",
    },
    "sdxl": {
        "text_encoder.encoder.layers.0.mlp.fc2": "text encoder",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc2": "text encoder",
        "text_encoder_2.text_projection": "text encoder", "unet.add_embedding.linear_2": "denoiser",
        "vae.encoder.conv_out": "encoder", "vae.decoder.conv_out": "decoder",
    },
    "sd3 t5 24 pixels": {
        "text_encoder.text_projection": "text encoder",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc2": "text encoder",
        "text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wo": "text encoder",
        "transformer.proj_out": "denoiser", "vae.encoder.conv_out": "encoder",
        "vae.decoder.conv_out": "decoder",
    },
}  # fmt: skip
"""Family -> what holds a weight -> the part that it belongs to."""


def submodule(pipe, path: str):
    part, _, inner = path.partition(".")
    own = getattr(pipe, part)
    # Older releases of transformers keep all of a CLIP text encoder under this name.
    names = (inner, f"text_model.{inner}", inner.removeprefix("text_model."))
    return next(found for name in names if (found := dict(own.named_modules()).get(name)))


@pytest.mark.parametrize(("kind", "path"), [(k, path) for k, own in OTHERS.items() for path in own])
def test_a_broken_part_of_any_family_ends_the_image_by_name(kind, path, tmp_path):
    family = {
        "ldm vq": ("prompt=none",), "dit": ("prompt=class_label", "prompt.label=3"),
        "sdxl": ("prompt=empty",), "sd3 t5 24 pixels": ("prompt=empty", "sampler=flow_euler"),
    }  # fmt: skip
    run = planned(kind, "inversion", *family[kind])
    with poisoned(submodule(pipeline(kind), path).weight, math.nan):
        assert_diverged(measured(run, tmp_path), *STAGES[OTHERS[kind][path]])


@dataclass(frozen=True)
class Broken:
    """A similarity network that is no number for calls of more than so many rows."""

    value: float
    rows: int

    def load(self, device):
        return self

    def identity(self):
        return {"name": "broken"}

    def embed(self, pixels):
        vectors = torch.nn.functional.normalize(pixels.flatten(1), dim=1)
        if len(pixels) > self.rows:
            vectors[:, 0] = self.value
        return vectors


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("name", MATRIX)
def test_a_broken_similarity_network_ends_the_image(name, rows, value, tmp_path):
    if rows and name in BASELINES:
        pytest.skip("draws no samples")
    run = planned("text", name)
    run = replace(run, replication=replace(run.replication, similarity=Broken(value, rows)))
    shares_a_bank = name in ("free_sampling", "probability")  # drawn before the image is read
    expected = Stage.SIMILARITY if rows or shares_a_bank else Stage.TARGET
    assert_diverged(measured(run, tmp_path), expected)


def test_a_broken_second_opinion_ends_the_image(tmp_path):
    run = planned("text", "replicated")
    second = Broken(math.nan, 0)
    run = replace(run, replication=replace(run.replication, second_opinion=second))
    record = measured(run, tmp_path)
    assert_diverged(record, Stage.SECOND_OPINION)
    assert record["second_similarity"] is None
    assert record["evaluations_forward"] > 0


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_a_sampler_that_clips_hides_no_infinite_prediction(scheduler, tmp_path):
    """DDPM clips the clean pixels and goes on from them: infinity would end as a picture."""
    clipping = (f"sampler={scheduler}", "sampler.clip_sample=true")
    run = planned("pixel", "free_sampling", *clipping)
    assert measured(run, tmp_path / "healthy")["status"] != "DIVERGED"
    bias = pipeline("pixel").unet.conv_out.bias
    with poisoned(bias, math.inf):
        assert_diverged(measured(run, tmp_path / "broken"), *STAGES["denoiser"])


def test_a_gradient_that_is_not_finite_is_no_result(tmp_path):
    """In the last step, after which nothing is drawn any more."""
    run = planned("pixel", "inversion", "inversion.learning_rate=1e38")
    record = measured(replace(run, measurement=replace(run.measurement, check_every=4)), tmp_path)
    assert record["status"] == "DIVERGED"
