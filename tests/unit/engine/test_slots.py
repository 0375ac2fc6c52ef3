"""Which requests go into the next call."""

from __future__ import annotations

import torch

from invmm.diffusion.sampling import Sampler
from invmm.engine.batching import signature
from invmm.engine.requests import Denoise, Embed, Minimise, Sample
from invmm.engine.slots import PATIENCE, Job, Slot, next_group

ROWS = {Denoise: 8, Sample: 4, Embed: 4}


def slot(kind: str, rows: int = 1, *, asked: int = 0, scale: float = 1.0) -> Slot:
    latents = torch.zeros(rows, 1, 2, 2)
    request = {
        "denoise": lambda: Denoise(latents, torch.zeros(rows)),
        "sample": lambda: Sample(latents, Sampler(), guidance_scale=scale),
        "embed": lambda: Embed(latents),
        "minimise": lambda: Minimise(latents.sum()),
    }[kind]()
    same = () if kind == "minimise" else signature(request)
    return Slot(Job(kind, lambda: None), request=request, signature=same, asked=asked)


def chosen(*slots: Slot, calls: int = 0) -> tuple[str, int, bool]:
    group, full = next_group(slots, ROWS, calls=calls)
    assert len({slot.job.key for slot in group}) == 1
    return group[0].job.key, len(group), full


def test_losses_free_memory_first():
    assert chosen(slot("sample", 4), slot("minimise"), slot("minimise")) == ("minimise", 2, True)


def test_a_full_pool_of_samples_comes_before_the_denoiser():
    denoisers = [slot("denoise", 4), slot("denoise", 4)]
    assert chosen(*denoisers, *[slot("sample")] * 4) == ("sample", 4, True)
    assert chosen(*denoisers, *[slot("sample")] * 3) == ("denoise", 2, True)


def test_what_is_full_comes_before_what_is_not():
    assert chosen(slot("denoise", 4), *[slot("embed")] * 4) == ("embed", 4, True)


def test_what_fills_no_call_lets_samples_gather():
    assert chosen(slot("sample"), slot("embed"), slot("denoise", 4)) == ("denoise", 1, False)
    assert chosen(slot("sample"), slot("embed")) == ("embed", 1, False)
    assert chosen(slot("sample"), slot("sample")) == ("sample", 2, False)


def test_scales_of_guidance_mix_but_not_with_none():
    guided = [slot("sample", 2, scale=2), slot("sample", 2, scale=7)]
    assert chosen(slot("sample", scale=1), *guided) == ("sample", 2, True)


def test_a_request_that_does_not_fit_waits_and_one_too_large_goes_alone():
    assert chosen(slot("denoise", 5), slot("denoise", 5)) == ("denoise", 1, True)
    assert chosen(slot("denoise", 20), slot("denoise", 1)) == ("denoise", 1, True)


def test_nothing_waits_for_ever():
    """A lone sample among images whose denoising always fills the calls."""
    waiting = [slot("sample", asked=1), slot("denoise", 4, asked=3), slot("denoise", 4, asked=3)]
    assert chosen(*waiting, calls=PATIENCE + 1) == ("denoise", 2, True)
    assert chosen(*waiting, calls=PATIENCE + 2) == ("sample", 1, True)
