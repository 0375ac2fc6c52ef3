"""One model and one folder of images for all integration tests."""

from __future__ import annotations

import pytest
import tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "ddpm")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return tiny.save_images(tmp_path_factory.mktemp("images") / "png", 7)


@pytest.fixture(scope="session")
def finished(model, images, tmp_path_factory):
    """An uninterrupted run, the yardstick of all others."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    result = tiny.invmm(tiny.command(model, images, run_dir))
    assert result.returncode == 0, result.stderr
    return run_dir, result
