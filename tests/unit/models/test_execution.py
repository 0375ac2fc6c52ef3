"""Precision, kernels and memory: the same function, computed in another way."""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch
from worlds import MicroNetwork

from invmm.engine.protocols import Network
from invmm.models.execution import Execution
from invmm.models.pixel import PixelUNet


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(tiny.save_model(tmp_path_factory.mktemp("model") / "ddpm"))


class Bare(MicroNetwork):
    """A `LoadedNetwork` without a diffusers module."""

    denoiser = torch.nn.Identity()

    def condition(self, prompt):
        return None

    def negative(self, prompt):
        return None


def evaluate(path: str, execution: Execution):
    """Output and gradient of a fixed loss."""
    network = execution.prepare(PixelUNet(path=path).load(torch.device("cpu")))
    assert isinstance(network, Network)
    latents = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    latents.requires_grad_()
    output = network.predict(latents, torch.tensor([1, 400, 700, 999]), None)
    output.square().mean().backward()
    return output.detach(), latents.grad


@pytest.mark.parametrize(
    "changes",
    [
        {"channels_last": True},
        {"attention": "math"},
        {"gradient_checkpointing": True},
        {"gradient_scale": 64.0},
    ],
    ids=str,
)
def test_kernels_change_nothing_but_rounding(path, changes):
    output, gradient = evaluate(path, Execution())
    other, other_gradient = evaluate(path, Execution(**changes))
    torch.testing.assert_close(other, output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_comes_out_in_float32_and_close(path, dtype):
    output, gradient = evaluate(path, Execution())
    other, other_gradient = evaluate(path, Execution(autocast=dtype))
    assert other.dtype == other_gradient.dtype == torch.float32
    assert not torch.equal(other, output)
    assert (other - output).norm() < 0.05 * output.norm()
    assert (other_gradient - gradient).norm() < 0.1 * gradient.norm()
    assert not torch.is_autocast_enabled("cpu")


def test_small_gradients_survive_float16():
    """In float16 the smallest number is 6e-8; a tinier gradient vanishes unless it is scaled."""

    class Chain(Bare):
        denoiser = torch.nn.Linear(3, 3, bias=False).requires_grad_(False)

        def predict(self, latents, timesteps, condition):
            return self.denoiser(latents.movedim(1, -1)).movedim(-1, 1)

    def gradient(**changes):
        latents = torch.ones(1, 3, 4, 4, requires_grad=True)
        network = Execution(**changes).prepare(Chain())
        (network.predict(latents, torch.tensor([0]), None).sum() * 1e-9).backward()
        return latents.grad

    exact = gradient()
    assert exact.abs().min() > 0
    assert gradient(autocast="float16", gradient_scale=1.0).abs().max() == 0
    scaled = gradient(autocast="float16", gradient_scale=2.0**20)
    torch.testing.assert_close(scaled, exact, rtol=1e-2, atol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.slow
def test_compiled(path):
    output, gradient = evaluate(path, Execution())
    other, other_gradient = evaluate(path, Execution(compile=True))
    torch.testing.assert_close(other, output, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-3, atol=1e-6)


def test_what_a_denoiser_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"execution\.gradient_checkpointing=true"):
        Execution(gradient_checkpointing=True).prepare(Bare())
