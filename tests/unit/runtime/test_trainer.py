"""Devices that a config asks for and a machine has not."""

from __future__ import annotations

import pytest
import torch

from invmm.runtime.trainer import TrainerSettings

CASES = [
    # accelerator, devices, CUDA GPUs, Apple's, cure; None where there is no fault
    ("cpu", 64, 0, False, None), ("auto", 3, 0, False, None), ("auto", 1, 1, False, None),
    ("gpu", 2, 2, False, None), ("gpu", 1, 0, True, None), ("mps", 1, 0, True, None),
    ("cuda", 4, 4, True, None),
    ("gpu", 1, 0, False, "use trainer=cpu"), ("cuda", 1, 0, True, "use trainer=cpu"),
    ("mps", 1, 8, False, "use trainer=cpu"), ("gpu", 3, 2, False, "use trainer.devices=2"),
    ("auto", 2, 1, False, "use trainer.devices=1"), ("mps", 2, 0, True, "use trainer.devices=1"),
    ("auto", 2, 4, True, "use trainer.devices=1"),  # Lightning takes the Apple GPU
]  # fmt: skip


@pytest.mark.parametrize(("accelerator", "devices", "num_cuda", "has_mps", "cure"), CASES)
def test_a_machine_has_the_devices_or_says_what_to_use(
    accelerator, devices, num_cuda, has_mps, cure, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    settings = TrainerSettings(accelerator=accelerator, devices=devices)
    if cure is None:
        settings.check_machine()
        return
    with pytest.raises(ValueError, match=cure) as fault:
        settings.check_machine()
    key = "trainer.accelerator" if "cpu" in cure else "trainer.devices"
    value = accelerator if "cpu" in cure else devices
    assert str(fault.value).startswith(f"{key}={value}")
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(("cuda", "visible", "reason"), [
    (None, None, "is built for CPUs"), ("13.0", None, "there is no GPU here; "),
    ("13.0", "", "there is no GPU here that CUDA_VISIBLE_DEVICES='' lets through; "),
])  # fmt: skip
def test_why_there_is_no_gpu(cuda, visible, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=r"trainer\.accelerator=gpu") as fault:
        TrainerSettings(accelerator="gpu").check_machine()
    assert reason in str(fault.value)
