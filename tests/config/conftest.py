"""A model and images for configs to point at."""

from __future__ import annotations

import pytest
import tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "ddpm")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return tiny.save_images(tmp_path_factory.mktemp("images") / "png", 3)


@pytest.fixture(scope="session")
def inputs(model, images):
    """Overrides that every measuring command needs."""
    return [f"model.path={model}", "dataset=folder", f"dataset.path={images}"]


@pytest.fixture
def every_icon(monkeypatch):
    """OpenMoji without the search for distinct icons, which renders all of them."""
    from invmm.data import openmoji

    monkeypatch.setattr(openmoji, "distinct_icons", lambda size, threshold: openmoji.named_icons())
