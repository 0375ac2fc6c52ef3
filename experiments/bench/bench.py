"""What sharing the network between images gains: seconds per inversion against slots.

A network of the demo's size with random weights is inverted for a fixed number of steps; every
repetition times all numbers of slots in turn, so that a drifting machine drifts for all of them.
Writes results/bench/bench.json.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch

from invmm.diffusion.sampling import Sampler
from invmm.diffusion.schedule import NoiseSchedule
from invmm.engine.engine import Engine, EngineSettings, Job
from invmm.engine.protocols import Setting, Target
from invmm.inversion.controllers import AdaptiveKLWeight
from invmm.inversion.inversion import Inversion
from invmm.inversion.objectives import DenoisingObjective
from invmm.models.architectures import UNet
from invmm.models.pixel import PixelNetwork
from invmm.replication.replication import Replication
from invmm.replication.sscd import SscdOnnx

SLOTS = (1, 2, 4, 8, 16)
REPETITIONS = 5
NUM_IMAGES = 16
NUM_STEPS = 20


def main() -> None:
    """Runs the benchmark."""
    torch.manual_seed(0)
    unet, scheduler = UNet(block_out_channels=[32, 64, 64], attention_levels=[1, 2]).build()
    schedule = NoiseSchedule.from_config(scheduler.config)
    network = PixelNetwork(unet, schedule, torch.device("cpu"))
    similarity = SscdOnnx().load(torch.device("cpu"))
    setting = Setting(
        schedule=schedule,
        sampler=Sampler(num_inference_steps=20),
        criterion=Replication(threshold=1.0, similarity=SscdOnnx()),
    )
    inversion = Inversion(
        objective=DenoisingObjective(batch_size=4, timesteps="importance"),
        kl_weight=AdaptiveKLWeight(),
        num_steps=NUM_STEPS,
        check_every=NUM_STEPS,
    )
    pixels = torch.rand(NUM_IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def start(index: int):
        image = pixels[index : index + 1]
        target = Target(
            image_id=str(index),
            pixels=image[0],
            latents=image,
            embedding=similarity.embed(image)[0],
        )
        return inversion(target, setting, torch.Generator().manual_seed(index))

    def seconds(slots: int) -> float:
        jobs = [Job(str(index), lambda index=index: start(index)) for index in range(NUM_IMAGES)]
        begun = time.perf_counter()
        for _ in Engine(network, similarity, EngineSettings(slots=slots)).run(jobs):
            pass
        return (time.perf_counter() - begun) / NUM_IMAGES

    seconds(4)  # warm-up
    runs = [{slots: seconds(slots) for slots in SLOTS} for _ in range(REPETITIONS)]
    medians = {slots: statistics.median(run[slots] for run in runs) for slots in SLOTS}
    ratios = {slots: statistics.median(run[1] / run[slots] for run in runs) for slots in SLOTS}
    result = {
        "threads": torch.get_num_threads(),
        "steps": NUM_STEPS,
        "images": NUM_IMAGES,
        "repetitions": REPETITIONS,
        "seconds_per_image": medians,
        "speed_against_one_slot": ratios,
    }
    path = Path("results/bench/bench.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    for slots in SLOTS:
        print(f"{slots:3} slots: {medians[slots]:.3f} s an image, {ratios[slots]:.2f}x one slot")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
