"""`trainer.fit` on a micro network: what it exports, and that a kill changes nothing of it.

Each training runs in a process of its own, forked off a server that has imported everything.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from invmm.data.dataset import ImageEntry, ImageError, LoadedImage
from invmm.data.manifest import TrainingManifest
from invmm.models.pixel import PixelUNet
from invmm.runtime.trainer import TrainerSettings
from invmm.training.architectures import UNet
from invmm.training.images import read_training_set
from invmm.training.run import TrainRun
from invmm.training.settings import TrainingSettings

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
COPIES = {"one": 1, "three": 3, "broken": 1, "held": 0}


@dataclass(frozen=True, kw_only=True)
class FewImages:
    """A data set of random images, one of which cannot be read and one of which is held out."""

    copies: tuple[tuple[str, int], ...] = tuple(COPIES.items())
    entries: tuple[ImageEntry, ...] = ()
    problems: tuple[str, ...] = ()
    size: int = 8
    source: str = "few images"

    def described(self) -> str:
        """The same config, whatever images are there."""
        return self.source

    def open(self, size: int) -> FewImages:
        assert size == self.size
        return self

    def training_entries(self) -> list[ImageEntry]:
        return [
            ImageEntry(image_id=name, path=name, split="train", copies=count)
            for name, count in self.copies
            if count
        ]

    def load(self, entry: ImageEntry) -> LoadedImage:
        if entry.image_id == "broken":
            raise ImageError("it is broken")
        rng = torch.Generator().manual_seed(len(entry.image_id))
        pixels = torch.randint(256, (3, 8, 8), generator=rng) / 127.5 - 1
        return LoadedImage(pixels=pixels, sha256=entry.image_id * 2)


MODEL = UNet(
    image_size=8, block_out_channels=[8, 16], attention_levels=[1], norm_num_groups=4,
    attention_head_dim=4, dropout=0.3, num_train_timesteps=50,
)  # fmt: skip
TRAINING: Mapping[str, Any] = {
    "num_steps": 10, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2, "ema_decay": 0.8,
    "horizontal_flip": True, "export_steps": [4], "checkpoint_every": 3,
}  # fmt: skip
SEED = 3


@dataclass(frozen=True)
class Job:
    """One training, and when it is struck: by `signum` at step `at`, or while exporting."""

    run_dir: Path
    training: Mapping[str, Any]
    model: UNet = MODEL
    dataset: FewImages = FewImages()
    devices: int = 1
    at: int | None = None
    while_exporting: bool = False
    signum: int = signal.SIGKILL

    @property
    def output(self) -> Path:
        """What the child said; capfd does not reach a forked process."""
        return self.run_dir.with_suffix(".txt")


@dataclass(frozen=True)
class Ended:
    """Exit code (minus the signal's number if the child was killed) and what it said."""

    code: int
    output: str


def _work(job: Job) -> None:
    """Runs in the child."""
    from diffusers import DDPMPipeline

    from invmm.training import train as module

    output = os.open(job.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    step, save = module.TrainModule.training_step, DDPMPipeline.save_pretrained

    def struck_step(self, batch, batch_idx):
        if self.global_step == job.at:
            os.kill(os.getpid(), job.signum)
        return step(self, batch, batch_idx)

    def struck_save(self, *args, **options):
        save(self, *args, **options)
        if job.while_exporting:
            os.kill(os.getpid(), job.signum)

    module.TrainModule.training_step = struck_step
    DDPMPipeline.save_pretrained = struck_save
    run = TrainRun(
        model=job.model, dataset=job.dataset, training=TrainingSettings(**job.training),
        trainer=TrainerSettings(accelerator="cpu", devices=job.devices, threads_per_device=1),
        seed=SEED,
    )  # fmt: skip
    try:
        code = module.train(run, job.run_dir)
    except ValueError as error:
        print(f"ValueError: {error}", flush=True)
        code = 2
    raise SystemExit(code)


@pytest.fixture(scope="session")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffusers", "invmm.training.train"])
    return context


@pytest.fixture(scope="session")
def train(processes):
    """Trains in a child."""

    def run(run_dir: Path, *, training: Mapping[str, Any] = TRAINING, **options: Any) -> Ended:
        job = Job(run_dir, training, **options)
        child = processes.Process(target=_work, args=(job,))
        child.start()
        child.join(timeout=90)
        assert child.exitcode is not None, "the training hangs"
        return Ended(child.exitcode, job.output.read_text())

    return run


@pytest.fixture(scope="session")
def uninterrupted(train, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert train(run_dir).code == 0
    return run_dir


def exports(run_dir: Path) -> dict[str, bytes]:
    """Every file of every export; a finished run has nothing half done beside them."""
    assert not list(run_dir.glob(".*"))
    return {
        file.relative_to(run_dir).as_posix(): file.read_bytes()
        for folder in run_dir.glob("step_*")
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def assert_same_weights(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        # A softmax ignores the bias of its keys: the gradient is rounding, which Adam blows up.
        if not name.endswith("to_k.bias"):
            torch.testing.assert_close(found[name], weights, rtol=1e-4, atol=1e-5)


def test_the_exports_are_pipelines_that_can_be_measured(uninterrupted):
    from diffusers import DDPMPipeline

    assert sorted(path.name for path in uninterrupted.glob("step_*")) == [
        "step_000004", "step_000010",
    ]  # fmt: skip
    pipeline = DDPMPipeline.from_pretrained(uninterrupted / "step_000004")
    assert pipeline.scheduler.config.num_train_timesteps == 50
    recipe = PixelUNet(path=str(uninterrupted / "final"))
    assert recipe.describe().latent_shape == (3, 8, 8)
    network = recipe.load(torch.device("cpu"))
    output = network.predict(torch.zeros(1, 3, 8, 8), torch.tensor([10]), None)
    assert torch.isfinite(output).all()


def test_the_final_link_is_relative_so_that_a_run_can_be_moved(uninterrupted, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(uninterrupted, moved, symlinks=True)
    assert (moved / "final").resolve() == (moved / "step_000010").resolve()


def test_the_manifest_lists_what_was_trained_on_and_how_often(uninterrupted):
    for folder in ("step_000004", "final"):
        manifest = TrainingManifest.read(uninterrupted / folder / "training_manifest.json")
        assert {(e.image_id, e.copies, e.sha256) for e in manifest.entries} == {
            ("one", 1, "oneone"),
            ("three", 3, "threethree"),
        }


def test_the_weights_are_those_of_a_plain_loop(train, tmp_path):
    """Adam with decoupled decay, clipping, cosine and moving average, written out by hand."""
    from diffusers import UNet2DModel

    plain = UNet(**{**vars(MODEL), "dropout": 0.0})
    assert train(tmp_path / "run", model=plain).code == 0

    images, _ = read_training_set(FewImages(), SEED)
    torch.manual_seed(SEED)
    unet, scheduler = plain.build()
    assert isinstance(unet, UNet2DModel)
    parameters = list(unet.parameters())
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    average: list[torch.Tensor] = []
    for step in range(10):
        batch = images.batch(step, 4, num_timesteps=50, mirror=True)
        alpha = scheduler.alphas_cumprod[batch.timesteps].reshape(-1, 1, 1, 1)
        noisy = alpha.sqrt() * batch.pixels + (1 - alpha).sqrt() * batch.noise
        error = unet(noisy, batch.timesteps).sample - batch.noise
        gradients = torch.autograd.grad(error.square().mean(), parameters)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        # The schedule of diffusers gives the first step the rate 0 while it warms up.
        rate = 1e-2 * (step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 8)))
        for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
            g = g * min(1.0, 1.0 / (norm + 1e-6))
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            p.data = p.data * (1 - rate * 0.01) - rate * m_hat / (v_hat.sqrt() + 1e-8)
        if step == 0:
            average = [p.data.clone() for p in parameters]
        else:
            decay = min(0.8, (1 + step) / (10 + step))
            average = [
                decay * a + (1 - decay) * p.data for a, p in zip(average, parameters, strict=True)
            ]
    stored = load_file(tmp_path / "run" / "final" / WEIGHTS)
    names = [name for name, _ in unet.named_parameters()]
    assert_same_weights(stored, dict(zip(names, average, strict=True)))
    moved = max((stored[n] - p.data).abs().max().item() for n, p in unet.named_parameters())
    assert moved > 1e-3, "the raw weights were exported, not their average"


@pytest.mark.parametrize(
    "strikes",
    [
        pytest.param([{"at": 1}], id="before the first checkpoint"),
        pytest.param([{"at": 7}], id="between checkpoints"),
        pytest.param([{"at": 3}, {"at": 8}, {"at": 9}], id="three times"),
        pytest.param([{"while_exporting": True}], id="while exporting"),
    ],
)
def test_a_killed_training_goes_on_to_the_same_weights_bit_by_bit(
    strikes, train, uninterrupted, tmp_path
):
    """Dropout, mirroring, noises, optimiser and moving average included."""
    for strike in strikes:
        assert train(tmp_path / "run", **strike).code == -signal.SIGKILL
    assert not (tmp_path / "run" / "final").exists()
    assert train(tmp_path / "run").code == 0
    assert exports(tmp_path / "run") == exports(uninterrupted)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def flip_one_bit(path: Path) -> None:
    """In the middle of the weights, where torch.load reads on without a word."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [cut_short, flip_one_bit, pipe])
def test_a_damaged_checkpoint_is_set_aside(damage, train, uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    assert train(run_dir, at=7).code == -signal.SIGKILL
    newest = max((run_dir / "checkpoints").glob("*.ckpt"))
    damage(newest)
    ended = train(run_dir)
    assert ended.code == 0
    place = run_dir / "damaged" / newest.name
    assert f"{newest} is damaged; set aside in {place}" in ended.output
    assert exports(run_dir) == exports(uninterrupted)


@pytest.mark.parametrize("damage", [cut_short, flip_one_bit, pipe, Path.unlink])
@pytest.mark.parametrize("step", ["step_000004", "step_000010"])
def test_a_damaged_export_is_made_again(damage, step, train, uninterrupted, tmp_path):
    run_dir = shutil.copytree(uninterrupted, tmp_path / "run", symlinks=True)
    damage(run_dir / step / WEIGHTS)
    ended = train(run_dir)
    assert ended.code == 0, ended.output
    assert f"{run_dir / step / WEIGHTS}" in ended.output
    assert f"set aside in {run_dir / 'damaged' / step}, trained again" in ended.output
    assert exports(run_dir) == exports(uninterrupted)
    assert "already trained" in train(run_dir).output


def test_a_training_killed_while_it_makes_a_damaged_export_again_still_makes_it(
    train, uninterrupted, tmp_path
):
    run_dir = shutil.copytree(uninterrupted, tmp_path / "run", symlinks=True)
    flip_one_bit(run_dir / "step_000004" / WEIGHTS)
    assert train(run_dir, at=2).code == -signal.SIGKILL
    assert train(run_dir, at=7).code == -signal.SIGKILL
    assert train(run_dir).code == 0
    assert exports(run_dir) == exports(uninterrupted)
    assert "already trained" in train(run_dir).output


def test_the_last_export_is_made_again_and_one_deleted_on_purpose_is_not(
    train, uninterrupted, tmp_path
):
    run_dir = shutil.copytree(uninterrupted, tmp_path / "run", symlinks=True)
    shutil.rmtree(run_dir / "step_000004")
    assert "already trained" in train(run_dir).output
    (run_dir / "final").unlink()
    assert "already trained" in train(run_dir).output
    assert (run_dir / "final").readlink() == Path("step_000010")
    shutil.rmtree(run_dir / "step_000010")
    assert train(run_dir).code == 0
    assert exports(run_dir).items() < exports(uninterrupted).items()
    assert (run_dir / "final" / WEIGHTS).is_file()


CHANGED = {
    "gone": ({"three": 3, "broken": 1, "held": 0}, "one is gone"),
    "added": ({**COPIES, "five": 1}, "five is new"),
    "more copies": ({**COPIES, "one": 2}, "one changed"),
    "another order": (dict(reversed(COPIES.items())), "their order changed"),
}


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("is_finished", [True, False])
def test_other_images_are_refused_by_name(name, is_finished, train, uninterrupted, tmp_path):
    """Before, a training went on with what was left, and its manifest forgot the others."""
    run_dir = tmp_path / "run"
    if is_finished:
        shutil.copytree(uninterrupted, run_dir, symlinks=True)
    else:
        assert train(run_dir, at=7).code == -signal.SIGKILL
    copies, fault = CHANGED[name]
    ended = train(run_dir, dataset=FewImages(copies=tuple(copies.items())))
    assert ended.code == 2
    assert f"run_dir={run_dir} trains on other images ({fault}); put them back" in ended.output


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_training_in_good_order(signum, code, train, uninterrupted, tmp_path):
    ended = train(tmp_path / "run", at=7, signum=signum)
    assert ended.code == code
    assert "the same command goes on" in ended.output
    assert "Traceback" not in ended.output
    ended = train(tmp_path / "run")
    assert ended.code == 0
    assert " 10/10 [" in ended.output  # the bar counts the steps before, too
    assert exports(tmp_path / "run") == exports(uninterrupted)


def test_a_finished_training_is_not_repeated(train, uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("step_*/**/*")}
    ended = train(uninterrupted, at=0)
    assert ended.code == 0
    assert f"already trained: {uninterrupted / 'final'}" in ended.output
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("step_*/**/*")}


def test_another_config_is_refused_with_the_key_that_differs(train, uninterrupted):
    ended = train(uninterrupted, training={**TRAINING, "learning_rate": 0.5})
    assert ended.code == 2
    assert "training.learning_rate was 0.01 and is 0.5" in ended.output
    assert "batch_size" not in ended.output


def test_the_loss_is_written_down_and_falls(train, tmp_path):
    training = {**TRAINING, "num_steps": 200, "checkpoint_every": 200, "export_steps": []}
    plain = UNet(**{**vars(MODEL), "dropout": 0.0})
    assert train(tmp_path / "run", training=training, model=plain).code == 0
    (file,) = (tmp_path / "run").rglob("metrics.csv")
    header, *rows = [line.split(",") for line in file.read_text().split()]
    steps = [int(row[header.index("step")]) for row in rows]
    losses = [float(row[header.index("loss")]) for row in rows]
    assert steps == [49, 99, 149, 199]
    assert 0 < losses[-1] < 0.8, "an untrained network loses 1.0"


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_training_that_diverges_leaves_no_model(devices, train, tmp_path):
    """Its checkpoints are finite too: going on from one ends in the same words."""
    settings = {**TRAINING, "learning_rate": 1e30, "export_steps": [6], "checkpoint_every": 2}
    for _ in range(2):
        ended = train(tmp_path / "run", training=settings, devices=devices)
        assert ended.code == 2, ended.output
        assert "training.learning_rate=1e+30 made the weights non-finite by step " in ended.output
        assert "Traceback" not in ended.output
    assert not list((tmp_path / "run").glob("**/*.safetensors"))
    assert not (tmp_path / "run" / "final").is_symlink()
    for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt"):
        stored = torch.load(path, weights_only=True)
        for weights in (stored["state_dict"], stored["current_model_state"]):
            assert all(bool(value.isfinite().all()) for value in weights.values())


def test_a_data_set_without_a_usable_image_is_refused(train, tmp_path):
    ended = train(tmp_path / "run", dataset=FewImages(copies=(("broken", 1),)))
    assert ended.code == 2
    assert "left out of the training: broken: it is broken" in ended.output
    assert "no image to train on" in ended.output


def test_a_batch_that_devices_cannot_share_is_refused(train, tmp_path):
    ended = train(tmp_path / "run", devices=3)
    assert ended.code == 2
    assert "training.batch_size=4 cannot be shared out over trainer.devices=3" in ended.output


@pytest.mark.slow
def test_two_devices_train_the_same_model_as_one(train, tmp_path):
    """Each takes half of every batch; the mean of their gradients is that of the whole."""
    plain = UNet(**{**vars(MODEL), "dropout": 0.0})
    for devices in (1, 2):
        assert train(tmp_path / f"{devices}", model=plain, devices=devices).code == 0
    one, two = (load_file(tmp_path / name / "final" / WEIGHTS) for name in ("1", "2"))
    assert_same_weights(two, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "signum", "code"),
    [("parent", signal.SIGTERM, 143), ("worker", signal.SIGKILL, 3)],
)
def test_a_training_on_two_devices_ends_without_orphans(
    victim, signum, code, processes, train, tmp_path
):
    endless = {**TRAINING, "num_steps": 100_000, "export_steps": []}
    job = Job(tmp_path / "run", endless, devices=2)
    child = processes.Process(target=_work, args=(job,))
    child.start()
    wait_for(lambda: list(job.run_dir.glob("checkpoints/*.ckpt")))
    workers = children_of(child.pid)
    assert len(workers) == 2
    os.kill(child.pid if victim == "parent" else workers[1], signum)
    child.join(timeout=30)
    assert child.exitcode == code, job.output.read_text()
    assert "the same command goes on" in job.output.read_text()
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), seconds=5)


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    """The training processes below one, oldest first (Python's resource tracker is none)."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(child) for child in pids if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


# Batches ------------------------------------------------------------------------------------


def test_images_are_drawn_in_proportion_to_their_copies():
    images, _ = read_training_set(FewImages(), 0)
    three = FewImages().load(FewImages().training_entries()[1]).pixels
    batch = images.batch(0, 4000, num_timesteps=50, mirror=False)
    share = (batch.pixels - three).abs().flatten(1).amax(1).lt(1e-6).double().mean().item()
    assert share == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 4000))


def test_a_batch_is_a_function_of_seed_and_step():
    def batch(seed: int, step: int):
        images, _ = read_training_set(FewImages(), seed)
        drawn = images.batch(step, 8, num_timesteps=50, mirror=True)
        return torch.cat([drawn.pixels.flatten(), drawn.noise.flatten(), drawn.timesteps.float()])

    images, _ = read_training_set(FewImages(), 1)
    images.batch(6, 8, num_timesteps=50, mirror=True)
    assert torch.equal(batch(1, 7), batch(1, 7))
    assert not torch.equal(batch(1, 7), batch(1, 8))
    assert not torch.equal(batch(1, 7), batch(2, 7))


def test_noises_are_standard_normal_and_timesteps_uniform():
    images, _ = read_training_set(FewImages(), 0)
    batch = images.batch(5, 5000, num_timesteps=50, mirror=False)
    assert batch.noise.mean().abs() < 5 / math.sqrt(batch.noise.numel())
    assert batch.noise.var().item() == pytest.approx(1, abs=0.01)
    counts = torch.bincount(batch.timesteps, minlength=50)
    assert len(counts) == 50
    chi_square = ((counts - 100.0) ** 2 / 100).sum().item()
    assert chi_square < 49 + 4 * math.sqrt(2 * 49)


def test_half_of_the_images_are_mirrored_if_asked():
    images, _ = read_training_set(FewImages(copies=(("one", 1),)), 0)
    (entry,) = FewImages(copies=(("one", 1),)).training_entries()
    upright = FewImages().load(entry).pixels
    pixels = images.batch(0, 400, num_timesteps=50, mirror=True).pixels
    is_upright = (pixels - upright).abs().flatten(1).amax(1) < 1e-6
    is_mirrored = (pixels - upright.flip(2)).abs().flatten(1).amax(1) < 1e-6
    assert (is_upright ^ is_mirrored).all()
    assert is_mirrored.double().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("step", [0, 11])
def test_an_export_that_is_never_reached_is_refused(step):
    with pytest.raises(ValueError, match=rf"training\.export_steps names step {step}.*use 1 to 10"):
        TrainingSettings(num_steps=10, export_steps=[step])
