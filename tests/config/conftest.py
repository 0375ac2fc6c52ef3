"""A model and images for configs to point at."""

from __future__ import annotations

import huggingface_hub
import pipelines
import pytest
import tiny

from invmm.models import loading


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "ddpm")


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory):
    """(family) -> folder of a tiny pipeline, made once."""
    folder = tmp_path_factory.mktemp("pipelines")

    def saved(family):
        path = folder / family.replace(" ", "-")
        if not path.exists():
            pipelines.seeded(pipelines.MAKERS[family]).save_pretrained(path)
        return path

    return saved


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


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A machine without network and files."""

    def fail(*args, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    loading._described.cache_clear()
    yield
    loading._described.cache_clear()
