"""Our published presets against the release's decisions, step by step with the same randomness."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import release
import torch
from release import SCRIPTS, Run, Script
from torch import Tensor
from worlds import Direction, PixelWorld, make_target

from invmm.config.compose import compose_job
from invmm.config.schema import build
from invmm.data.prompt import Prompt
from invmm.diffusion.sampling import Sampler
from invmm.diffusion.schedule import NoiseSchedule
from invmm.engine.engine import Engine
from invmm.engine.outcomes import Outcome, Status
from invmm.engine.protocols import Measurement, Setting, Target
from invmm.engine.searched_prompt import PromptTokens
from invmm.engine.settings import EngineSettings
from invmm.engine.slots import Job
from invmm.models.json_files import read_json
from invmm.models.known import known_architecture
from invmm.replication.replication import Replication

PRESETS = {
    "paper_ddpm": "ddpm", "paper_cifar10": "ddpm", "paper_celebahq": "ldm", "paper_ffhq": "ldm",
    "paper_sd14": "sd1", "paper_sd21": "sd2", "paper_sd35": "sd3",
}  # fmt: skip
"""`experiment=` -> the script that it follows."""
FIRST_OF_EACH = ("paper_ddpm", "paper_celebahq", "paper_sd14", "paper_sd35")
WORLDS = {
    "ddpm": (0, 0.2, 0.3),
    "ldm": (0, -0.2, 0.3),
    "sd1": (2, 0.55, 0.6),
    "sd2": (2, 0.55, 0.6),
    "sd3": (2, 0.56, 0.6),
}
"""Script -> seed, share of the image in the world's mean, deviation, by trial: the image is found
within 400 steps, after checks that halve lambda and checks that do not, and the loss that the
script does not track would have decided otherwise."""
OPPOSED = (2, -0.5, 0.05)
"""A world that draws the negative of the image, whatever the noise."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What an experiment consists of, its model but for the noise schedule left out."""

    inversion: Any
    sampler: Sampler
    replication: Any
    prompt: Any
    schedule: NoiseSchedule


class GaussianWorld(PixelWorld):
    """The exact denoiser of N(mean, std^2), its mean moved by what a prompt says."""

    def __init__(self, schedule: NoiseSchedule, mean: Tensor, std: float) -> None:
        super().__init__(schedule, (3, 4, 4))
        self.mean, self.std = mean, std

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        signal, scale = self.schedule.scales(timesteps)
        mean = self.mean
        if condition is not None:
            mean = mean + condition["embeds"][:, :, None, None]
        gain = signal * self.std**2 / (signal**2 * self.std**2 + scale**2)
        clean = mean + gain * (latents - signal * mean)
        if self.schedule.is_flow:
            return (latents - clean) / scale
        return (latents - signal * clean) / scale

    def encode_prompt(self, embeddings: Any, ids: Any, fixed: Any) -> dict[str, Tensor]:
        return {"embeds": embeddings["encoder"].mean(1) + fixed["embeds"]}


@cache
def preset(name: str) -> Preset:
    """An `experiment=` as its command builds it."""
    config, faults = compose_job("measure", [f"experiment={name}"], []), []
    if name == "paper_ddpm":  # leaves the similarity network, like the model, to its user
        config["replication"]["similarity"]["size"] = 32
    found = Preset(
        inversion=build(Measurement, config["measurement"], "measurement", faults),
        sampler=build(Sampler, config["sampler"], "sampler", faults),
        replication=build(Replication, config["replication"], "replication", faults),
        prompt=build(Prompt, config["prompt"], "prompt", faults),
        schedule=schedule_of(config["model"]["path"]),
    )
    assert faults == []
    return found


def schedule_of(path: str) -> NoiseSchedule:
    """That of the model which a preset names, from the package's table."""
    folder = known_architecture(path) or known_architecture("google/ddpm-cifar10-32")
    assert folder is not None
    (file,) = folder.rglob("scheduler_config.json")
    return NoiseSchedule.from_config(read_json(file))


def target_of(script: Script, network: GaussianWorld, prompt: Prompt) -> Target:
    target = make_target(network)
    if script.prompt is None:
        return target
    assert prompt.search is not None
    rng = torch.Generator().manual_seed(5)
    tokens = PromptTokens(
        search=prompt.search,
        num_free=75,
        tables={"encoder": torch.randn(5, 3, generator=rng)},
        ids={"encoder": torch.tensor([[0] * 76 + [1]])},
        fixed={"embeds": torch.zeros(1, 3)},
        reads_caption=False,
        decode=str,
    )
    return replace(target, tokens=tokens, negative={"embeds": torch.tensor([[0.1, -0.1, 0.05]])})


def world(name: str, *, opposed: bool) -> tuple[GaussianWorld, Target, torch.Generator]:
    """A model, an image and randomness for a preset."""
    script, own = PRESETS[name], preset(name)
    seed, share, std = OPPOSED if opposed else WORLDS[script]
    network = GaussianWorld(
        own.schedule, share * make_target(PixelWorld(own.schedule)).latents, std
    )
    target = target_of(SCRIPTS[script], network, own.prompt)
    return network, target, torch.Generator().manual_seed(seed)


@cache
def ours(name: str, *, opposed: bool = False) -> Outcome:
    network, target, rng = world(name, opposed=opposed)
    own, batch = preset(name), SCRIPTS[PRESETS[name]].B
    criterion = replace(own.replication, num_confirm=0)
    setting = Setting(schedule=own.schedule, sampler=own.sampler, criterion=criterion)
    settings = EngineSettings(slots=1, rows_denoise=batch, rows_sample=8, rows_embed=8)
    job = Job("it", lambda: own.inversion(target, setting, rng))
    ((_, outcome),) = Engine(network, Direction(), settings).run([job])
    return outcome


def theirs(script: Script, name: str, *, opposed: bool = False) -> Run:
    network, target, rng = world(name, opposed=opposed)
    return release.run(script, network, target, Direction(), rng)


def disagreements(script: Script, run: Run, outcome: Outcome) -> list[str]:
    """What differs between the traces, rounding apart."""
    curves, checks = outcome.curves, range(script.C, len(run.P) + 1, script.C)
    # Of the scales that pass, ours records the one that it tries first.
    failed = run.checks if run.score is None else run.checks[:-1]
    bests = [found.max().item() for found in failed]
    pairs = {
        "lambda": (curves["kl_weight"], run.lam, 1e-12),
        "P": (curves["loss"], run.P, 1e-5),
        "R": (curves["kl"], run.R, 1e-5),
        "checks": (curves["similarity_step"], checks, 0),
        "similarity": (curves["similarity"][: len(bests)], bests, 1e-4),
        "passed": ([outcome.score is None], [run.score is None], 0),
        "score": ([outcome.score or 0.0], [run.score or 0.0], 1e-5),
    }
    return [
        key
        for key, (found, expected, tolerance) in pairs.items()
        if found != pytest.approx(list(expected), rel=tolerance, abs=tolerance)
    ]


def assert_nothing_hangs_on_rounding(script: Script, run: Run) -> None:
    assert min(run.margins) > 2e-6
    assert (torch.cat(run.checks) - script.beta).abs().min() > 1e-5


@pytest.mark.parametrize("name", FIRST_OF_EACH)
def test_traces_agree_step_by_step(name):
    script = SCRIPTS[PRESETS[name]]
    run, outcome = theirs(script, name), ours(name)
    assert_nothing_hangs_on_rounding(script, run)
    assert disagreements(script, run, outcome) == []
    assert outcome.status is Status.REPLICATED
    # Both decisions were taken, and the other loss would have taken others.
    assert {True, False} <= set(run.halvings(script))
    swapped = "total" if script.tracked == "reconstruction" else "reconstruction"
    assert run.halvings(script) != run.halvings(replace(script, tracked=swapped))


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_traces_agree_over_the_whole_budget(name):
    script = SCRIPTS[PRESETS[name]]
    run, outcome = (
        theirs(script, name, opposed=True),
        ours(name, opposed=True),
    )
    assert_nothing_hangs_on_rounding(script, run)
    assert disagreements(script, run, outcome) == []
    assert (outcome.status, outcome.steps) == (Status.NOT_REPLICATED, script.total)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_one_script_decide_alike(name):
    """So that one trace stands for all of them; and what no trace tells."""
    script, own = SCRIPTS[PRESETS[name]], preset(name)
    first = preset(next(x for x in PRESETS if SCRIPTS[PRESETS[x]] == script))
    assert (own.inversion, own.sampler, own.prompt) == (
        first.inversion,
        first.sampler,
        first.prompt,
    )
    assert own.schedule.trained == first.schedule.trained
    replication = own.replication
    assert (replication.threshold, replication.num_samples) == (script.beta, script.N)
    assert replication.similarity.size == script.size
    assert not replication.early_exit
    assert own.inversion.num_steps == script.total
    assert list(own.sampler.guidance_scales) == list(script.scales)
    if script.prompt:
        assert (own.prompt.search.num_tokens, own.prompt.search.encoders) == (None, None)


@pytest.mark.parametrize(("name", "wrong"), [
    ("paper_cifar10", {"tracked": "total"}), ("paper_cifar10", {"B": 16}),
    ("paper_cifar10", {"C": 25}), ("paper_cifar10", {"delta": 1e-3}),
    ("paper_cifar10", {"ksi": 1e-2}), ("paper_cifar10", {"window": 50}),
    ("paper_cifar10", {"lr": 0.05}), ("paper_cifar10", {"N": 4}),
    ("paper_cifar10", {"beta": 0.3}), ("paper_cifar10", {"sampling_steps": 100}),
    ("paper_cifar10", {"betas": (1e-4, 0.02, True)}), ("paper_sd14", {"prompt": "each"}),
    ("paper_sd14", {"temperature": 1.0}), ("paper_sd35", {"shift": 1.0}),
])  # fmt: skip
def test_every_wrong_number_shows(name, wrong):
    """So the comparison has power; the first is how the DDPM preset once was."""
    script = replace(SCRIPTS[PRESETS[name]], total=ours(name).steps, **wrong)
    assert disagreements(script, theirs(script, name), ours(name))
