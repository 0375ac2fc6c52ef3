"""What only a GPU can show: `make test-gpu`. Every test that is skipped says why.

Tiny models, three minutes at most. Without a GPU nothing here runs, and nothing here has passed.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import pipelines
import pytest
import tiny
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file
from worlds import Direction

from invmm.diffusion.guidance import repeated
from invmm.engine.engine import Engine
from invmm.engine.outcomes import Outcome, Status
from invmm.engine.requests import Denoise, Minimise
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job
from invmm.models.auto import AutoModel
from invmm.models.execution import Execution
from invmm.models.pipeline import LatentPipeline

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="torch sees no GPU here: nothing was tried on one"),
]
DEVICE = torch.device("cuda")
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest deviation from float32 on the CPU, in units of the largest number of the answer."""
ON_GPU = ("trainer=gpu", "inversion.num_steps=60", "inversion.check_every=20")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> folder of a tiny model."""
    place = tmp_path_factory.mktemp("models")
    pipelines.seeded(pipelines.stable_diffusion).save_pretrained(place / "text")
    return {"pixel": tiny.save_model(place / "pixel"), "text": place / "text"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.save_images(tmp_path_factory.mktemp("images") / "png", 5)


@pytest.fixture(scope="module")
def finished(folders, images, tmp_path_factory):
    """A run on one GPU that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    result = tiny.invmm(tiny.command(folders["pixel"], images, run_dir, *ON_GPU))
    assert result.returncode == 0, result.stderr
    return run_dir


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.cpu().float() - expected).abs().max() / expected.abs().max()).item()


def answers(network, prompt: str | None) -> dict[str, torch.Tensor]:
    """Output, its gradient and a decoded picture, from the same noise on any device."""
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(4, *network.latent_shape, generator=rng)
    latents = noise.to(network.device).requires_grad_()
    with torch.no_grad():
        condition = repeated(network.condition(prompt), 4)
        decoded = network.decode(latents.detach())
    timesteps = torch.tensor([1, 200, 600, 990], device=network.device)
    output = network.predict(latents, timesteps, condition)
    output.float().square().sum().backward()
    assert latents.grad is not None
    return {"output": output.detach(), "gradient": latents.grad, "decoded": decoded}


@pytest.mark.parametrize(("family", "prompt"), [("pixel", None), ("text", "a cat")])
def test_every_precision_agrees_with_the_cpu(family, prompt, folders):
    """Weights in each dtype, and autocast; TF32 off, so that float32 is float32."""
    path = str(folders[family])
    on_cpu = Execution().prepare(AutoModel(path=path).load(torch.device("cpu")))
    expected = answers(on_cpu, prompt)
    with torch.backends.cudnn.flags(allow_tf32=False):
        for dtype, tolerance in TOLERANCES.items():
            ways = {"weights": (AutoModel(path=path, dtype=dtype), Execution())}
            if dtype != "float32":
                ways["autocast"] = (AutoModel(path=path), Execution(autocast=dtype))
            for way, (model, execution) in ways.items():
                found = answers(execution.prepare(model.load(DEVICE)), prompt)
                for name, value in expected.items():
                    error = relative_error(found[name], value)
                    print(f"{family}, {dtype} {way}, {name}: off by {error:.1e}")
                    assert error <= tolerance, (dtype, way, name)


def assert_agree(found, expected) -> None:
    """Equal records, up to the rounding of sums that a GPU orders as it likes."""
    left, right = tiny.records(found), tiny.records(expected)
    assert left.keys() == right.keys()
    for image_id, record in right.items():
        other = left[image_id]
        assert other["status"] == record["status"]
        if record["status"] != "FAILED":
            first, second = (
                load_file(next((run / "records").glob(f"{image_id}-*")) / "arrays.safetensors")
                for run in (found, expected)
            )
            torch.testing.assert_close(
                first["curve/loss"], second["curve/loss"], rtol=1e-2, atol=1e-3
            )


def test_a_run_on_the_gpu_says_so_and_agrees_with_the_cpu(finished, folders, images, tmp_path):
    (process,) = map(json.loads, (finished / "processes.jsonl").read_text().splitlines())
    assert process["device"].startswith("cuda")
    on_cpu = tiny.command(folders["pixel"], images, tmp_path / "run", *ON_GPU[1:])
    assert tiny.invmm(on_cpu).returncode == 0
    assert_agree(tmp_path / "run", finished)


def test_a_run_that_was_stopped_goes_on(finished, folders, images, tmp_path):
    command = tiny.command(folders["pixel"], images, tmp_path / "run", *ON_GPU, "engine.slots=1")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("records/*/record.json")):
        assert time.monotonic() < deadline
        assert process.poll() in (None, 0)
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (143, 0)  # 0 if it was faster than the signal
    assert tiny.invmm(command).returncode == 0
    assert_agree(tmp_path / "run", finished)


def test_a_training_goes_on_from_its_checkpoint(images, tmp_path):
    command = [
        sys.executable, "-m", "invmm.cli.train", "dataset=folder", f"dataset.path={images}",
        "model.image_size=8", "training.num_steps=20", "training.batch_size=4",
        "training.checkpoint_every=10", f"run_dir={tmp_path / 'run'}", "trainer=gpu",
    ]  # fmt: skip
    weights = tmp_path / "run" / "final" / "unet" / "diffusion_pytorch_model.safetensors"
    result = tiny.invmm(command)
    assert result.returncode == 0, result.stderr
    expected = load_file(weights)
    # As if it had been killed between the checkpoint of step 10 and the end.
    for left in ("final", "checkpoints/step=00000020.ckpt"):
        (tmp_path / "run" / left).unlink()
    shutil.rmtree(tmp_path / "run" / "step_000020")
    result = tiny.invmm(command)
    assert result.returncode == 0, result.stderr
    assert "20/20" in result.stderr
    for name, value in load_file(weights).items():
        if not name.endswith("to_k.bias"):  # a softmax ignores it: its gradient is rounding
            torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(GPUS < 2, reason=f"two devices were not tried: torch sees {GPUS} GPU here")
def test_two_gpus_agree_with_one(finished, folders, images, tmp_path):
    command = tiny.command(folders["pixel"], images, tmp_path / "run", *ON_GPU, "trainer.devices=2")
    result = tiny.invmm(command)
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "run" / "processes.jsonl").read_text().splitlines()
    assert {json.loads(line)["device"] for line in lines} == {"cuda:0", "cuda:1"}
    assert_agree(tmp_path / "run", finished)


def test_out_of_memory_halves_the_rows_and_changes_no_answer(tmp_path):
    """The real thing: the allocator refuses, and its blocks are free again for smaller calls."""
    unet = UNet2DModel(
        sample_size=64, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    network = Execution().prepare(AutoModel(path=str(tmp_path / "ddpm")).load(DEVICE))

    def answered(rows: int) -> tuple[dict[str, Outcome], int]:
        async def measure(index: int) -> Outcome:
            rng = torch.Generator().manual_seed(index)
            latents = torch.randn(2, 3, 64, 64, generator=rng).to(DEVICE).requires_grad_()
            prediction = await Denoise(latents, torch.tensor([10, 500], device=DEVICE))
            await Minimise(prediction.output.square().sum())
            assert latents.grad is not None
            return Outcome(status=Status.NOT_REPLICATED, tensors={"gradient": latents.grad.cpu()})

        engine = Engine(network, Direction(), EngineSettings(slots=4, rows_denoise=rows))
        jobs = [Job(str(index), lambda index=index: measure(index)) for index in range(4)]
        return {job.key: outcome for job, outcome in engine.run(jobs)}, engine.rows[Denoise]

    expected, rows = answered(16)
    assert rows == 16
    assert [outcome.error for outcome in expected.values()] == [None] * 4
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    limit = torch.cuda.memory_reserved() + 2**30
    if free < 2 * 2**30:
        pytest.skip(f"only {free / 2**30:.1f} GiB are free: running out of memory was not tried")
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        found, rows = answered(1024)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print(f"with 1 GiB, 1024 rows became {rows}")
    assert rows < 1024
    for key, outcome in expected.items():
        assert found[key].error is None
        error = relative_error(found[key].tensors["gradient"], outcome.tensors["gradient"])
        assert error < 1e-2


@pytest.mark.parametrize(("path", "rows", "autocast"), [
    ("google/ddpm-cifar10-32", 32, None), ("CompVis/stable-diffusion-v1-4", 8, None),
    ("CompVis/stable-diffusion-v1-4", 8, "float16"),
])  # fmt: skip
def test_a_published_model_needs_the_memory_that_a_dry_run_plans(path, rows, autocast):
    """The real architecture with random weights: a call with gradients, and its speed."""
    execution = Execution(autocast=autocast)
    recipe = AutoModel(path=path).recipe()
    planned = recipe.call_cost(rows, execution)
    with torch.device("meta"):
        if isinstance(recipe, LatentPipeline):
            folder = recipe._folder(weights=False)
            unet = folder.blank(folder.network.family.denoiser)
            blank = folder.network.blank_condition(dict(unet.config), rows, folder.num_tokens)
        else:
            unet = UNet2DModel.from_config(dict(recipe._folder(weights=False).unet_config))
            blank = {}
    unet = unet.to_empty(device=DEVICE).eval().requires_grad_(False)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    condition = {name: torch.zeros(value.shape, device=DEVICE) for name, value in blank.items()}
    channels, side = unet.config.in_channels, unet.config.sample_size
    timesteps = torch.full((rows,), 500, device=DEVICE)

    def call() -> None:
        latents = torch.randn(rows, channels, side, side, device=DEVICE, requires_grad=True)
        dtype = getattr(torch, autocast or "float32")
        with torch.autocast("cuda", dtype=dtype, enabled=autocast is not None):
            output = unet(latents, timesteps, *condition.values()).sample
        output.float().square().mean().backward()
        assert latents.grad is not None
        assert latents.grad.isfinite().all()

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / 5
    held = torch.cuda.max_memory_allocated() - before
    print(
        f"{path}, {rows} rows, autocast {autocast}: {held / 2**30:.2f} GiB held, "
        f"{planned.activation_bytes / 2**30:.2f} GiB planned; {seconds:.3f} s, "
        f"{2 * planned.flop / seconds / 1e12:.1f} TFLOP/s"
    )
    assert 0.7 <= held / planned.activation_bytes <= 1.1


def test_a_call_of_many_rows_pays(folders):
    """A short bench: rows a second of calls with gradients, printed."""
    network = Execution().prepare(AutoModel(path=str(folders["pixel"])).load(DEVICE))

    def rate(rows: int) -> float:
        latents = torch.randn(rows, *network.latent_shape, device=DEVICE, requires_grad=True)
        timesteps = torch.full((rows,), 500, device=DEVICE)
        for repeat in range(12):
            if repeat == 2:  # the first ones warm up
                torch.cuda.synchronize()
                started = time.perf_counter()
            network.predict(latents, timesteps, None).sum().backward()
        torch.cuda.synchronize()
        return 10 * rows / (time.perf_counter() - started)

    rates = {rows: rate(rows) for rows in (1, 16, 256)}
    print(f"{torch.cuda.get_device_name()}: rows a second by rows a call:", rates)
    assert rates[256] > 4 * rates[1]
