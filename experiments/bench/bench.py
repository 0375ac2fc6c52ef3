"""What the engine gains: against a straight loop, by slots, by sequential checks, by processes.

Every comparison repeats its candidates in turn, so that a drifting machine drifts for all of them,
and reports medians of the ratios. Writes results/bench/bench.json and prints its table.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from commands import memory_against_queue, processes_against_one
from straight_loop import invert_one_by_one
from text import text_evaluations

from invmm.data.openmoji import OpenMoji
from invmm.diffusion.sampling import Sampler
from invmm.engine.engine import Engine
from invmm.engine.outcomes import Outcome
from invmm.engine.protocols import Network, Setting, Target
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job
from invmm.inversion.controllers import AdaptiveKLWeight
from invmm.inversion.inversion import Inversion
from invmm.inversion.objectives import DenoisingObjective
from invmm.models.execution import Execution
from invmm.models.pixel import PixelUNet
from invmm.replication.replication import Replication
from invmm.replication.sscd import SscdOnnx

MODEL = "results/demo/model/final"
OUTPUT = Path("results/bench/bench.json")
SLOTS = (1, 2, 4, 8, 16, "auto")
REPETITIONS = 5
EXECUTIONS = {
    "float32": Execution(),
    "float32, channels_last": Execution(channels_last=True),
    "bfloat16": Execution(autocast="bfloat16"),
    "bfloat16, channels_last": Execution(autocast="bfloat16", channels_last=True),
    "float32, attention=math": Execution(attention="math"),
    "float32, gradient_checkpointing": Execution(gradient_checkpointing=True),
    "float32, compile": Execution(compile=True),
}


class Bench:
    """The demo's model and icons.

    Args:
        device: cpu or cuda.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.network = Execution().prepare(PixelUNet(path=MODEL).load(device))
        self.similarity = SscdOnnx().load(device)
        dataset = OpenMoji(take={"duplicated": 6, "single": 5, "held_out": 5}).open(16)
        self.targets = [self._target(dataset.load(entry)) for entry in dataset.entries]

    def _target(self, loaded: Any) -> Target:
        pixels = loaded.pixels[None].to(self.device)
        return Target(
            image_id=loaded.sha256,
            pixels=pixels[0],
            latents=self.network.encode(pixels),
            embedding=self.similarity.embed(pixels)[0],
        )

    def setting(self, *, early_exit: bool = True) -> Setting:
        """The demo's checks."""
        return Setting(
            schedule=self.network.schedule,
            sampler=Sampler(num_inference_steps=20),
            criterion=Replication(similarity=SscdOnnx(), early_exit=early_exit),
        )

    def engine(
        self, steps: int, every: int, *, early_exit: bool = True, **settings: Any
    ) -> tuple[float, Engine, list[Outcome]]:
        """Seconds, the engine and the outcomes of a run over all icons."""
        setting, measure = self.setting(early_exit=early_exit), inversion(steps, every)

        def job(index: int) -> Job:
            rng = torch.Generator().manual_seed(index)
            return Job(str(index), lambda: measure(self.targets[index], setting, rng))

        jobs = [job(index) for index in range(len(self.targets))]
        engine = Engine(self.network, self.similarity, EngineSettings(**settings))
        start = time.perf_counter()
        found = {job.key: outcome for job, outcome in engine.run(jobs)}
        return time.perf_counter() - start, engine, [found[job.key] for job in jobs]

    def loop(self, steps: int, every: int) -> tuple[float, list[list[float]]]:
        """Seconds and losses of the straight loop over all icons."""
        start = time.perf_counter()
        curves = invert_one_by_one(
            self.targets, inversion(steps, every), self.network, self.similarity, self.setting()
        )
        return time.perf_counter() - start, curves

    def executions(self, rows: int) -> list[dict[str, float]]:
        """Seconds of a forward and backward pass of the denoiser, by how it is computed."""
        networks = {
            name: execution.prepare(PixelUNet(path=MODEL).load(self.device))
            for name, execution in EXECUTIONS.items()
        }
        timesteps = torch.full((rows,), 500, device=self.device)

        def seconds(network: Network) -> float:
            latents = torch.randn(rows, *network.latent_shape, device=self.device)
            start = time.perf_counter()
            network.predict(latents.requires_grad_(), timesteps, None).sum().backward()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        for network in networks.values():  # compiles, too
            seconds(network)
        return [
            {
                name: statistics.median(seconds(network) for _ in range(8))
                for name, network in networks.items()
            }
            for _ in range(REPETITIONS)
        ]


def inversion(steps: int, every: int) -> Inversion:
    """The demo's inversion for fewer steps, without the one check before the first."""
    return Inversion(
        objective=DenoisingObjective(batch_size=4, timesteps="importance"),
        kl_weight=AdaptiveKLWeight(),
        num_steps=steps,
        check_every=every,
        check_prior=False,
    )


def repeated(run: Callable[[], Mapping[Any, float]]) -> list[Mapping[Any, float]]:
    """Five times."""
    return [run() for _ in range(REPETITIONS)]


def medians(runs: Sequence[Mapping[Any, float]], base: Any) -> dict[str, dict[str, float]]:
    """Median seconds of each candidate, and median ratio of the base's seconds to its own."""
    return {
        str(name): {
            "seconds": statistics.median(run[name] for run in runs),
            "speed": statistics.median(run[base] / run[name] for run in runs),
        }
        for name in runs[0]
    }


def engine_against_loop(bench: Bench) -> dict[str, Any]:
    """The same random numbers, images and thread count; the losses must agree."""
    shares: list[dict[str, float]] = []
    idle: list[float] = []
    tails: list[float] = []

    def run() -> dict[str, float]:
        with_loop, curves = bench.loop(25, 25)
        with_engine, engine, outcomes = bench.engine(25, 25)
        for curve, outcome in zip(curves, outcomes, strict=True):
            mine = outcome.curves["loss"]
            assert abs(curve[0] - mine[0]) <= 1e-3 * abs(curve[0])
        summary = engine.summary
        shares.append({kind: spent / summary.seconds for kind, spent in summary.by_kind.items()})
        idle.append(summary.idle_slot_seconds)
        tails.append(summary.tail_slot_seconds / (summary.slots * summary.seconds))
        return {"straight loop": with_loop, "engine": with_engine}

    result = medians(repeated(run), "straight loop")
    share = {kind: statistics.median(run[kind] for run in shares) for kind in shares[0]}
    inside = ("network", "sampler", "similarity")
    outside = [1 - sum(run[kind] for kind in inside) for run in shares]
    return {
        **result,
        "share_of_time": share,
        "share_outside_network_sampler_similarity": statistics.median(outside),
        "idle_slot_seconds_while_images_waited": max(idle),
        "share_of_slots_idle_in_the_tail": statistics.median(tails),
    }


def checks(bench: Bench) -> dict[str, Any]:
    """Evaluations of the sampler by sequential and by full checks; the decisions must agree."""
    by_mode = {}
    ends = []
    for name, early_exit in (("sequential", True), ("full", False)):
        _, _, outcomes = bench.engine(250, 25, early_exit=early_exit)
        by_mode[name] = sum(outcome.evaluations.sampler for outcome in outcomes)
        ends.append([(outcome.status, outcome.steps, outcome.score) for outcome in outcomes])
    assert ends[0] == ends[1]
    replicated = sum(score is not None for _, _, score in ends[0])
    saved = 1 - by_mode["sequential"] / by_mode["full"]
    return {**by_mode, "share_saved": saved, "images": len(ends[0]), "replicated": replicated}


def network_seconds(bench: Bench) -> dict[str, Any]:
    """By precision and kernels, and the arithmetic that this device sustains."""
    found = medians(bench.executions(16), "float32")
    flop = PixelUNet(path=MODEL).call_cost(16, Execution()).flop
    return {**found, "sustained_tflops": 2 * flop / found["float32"]["seconds"] / 1e12}


def main() -> None:
    """Runs all of it, or one part anew."""
    parts: dict[str, Callable[[Bench], Any]] = {
        "engine_against_loop": engine_against_loop,
        "slots": lambda bench: medians(
            repeated(lambda: {slots: bench.engine(4, 4, slots=slots)[0] for slots in SLOTS}), 1
        ),
        "checks": checks,
        "text_setting": lambda bench: text_evaluations(),
        "execution": network_seconds,
        "processes": lambda bench: medians(processes_against_one(MODEL, REPETITIONS), 1),
        "memory_mib_by_queued_images": lambda bench: memory_against_queue(),
    }
    parser = argparse.ArgumentParser()
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--only", choices=parts)
    options = parser.parse_args()
    device = torch.device(options.device)
    bench = Bench(device)
    bench.engine(4, 4)  # warm-up
    result: dict[str, Any] = json.loads(OUTPUT.read_text()) if options.only else {}
    result |= {
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "images": len(bench.targets),
        "repetitions": REPETITIONS,
    }
    for name, part in parts.items():
        if options.only in (None, name):
            started = time.perf_counter()
            result[name] = part(bench)
            seconds = time.perf_counter() - started
            print(f"{name} ({seconds:.0f} s)\n{json.dumps(result[name], indent=1)}", flush=True)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(result, indent=1))
    print(f"written: {OUTPUT}")


if __name__ == "__main__":
    main()
