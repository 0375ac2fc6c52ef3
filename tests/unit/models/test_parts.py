"""Which files are the weights of a part."""

from __future__ import annotations

import pytest

from invmm.models.parts import weight_files

FILES = (
    "model.safetensors",
    "model.fp16.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.fp16-00001-of-00002.safetensors",
    "model.fp16-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "model.non_ema.safetensors",
    "model.bin",
)


@pytest.mark.parametrize(("variant", "places"), [(None, (0, 2, 3)), ("fp16", (1, 4, 5)), ("f", ())])
def test_whole_and_sharded_files_of_the_variant_alone(variant, places, tmp_path):
    (tmp_path / "text_encoder").mkdir()
    for name in FILES:
        (tmp_path / "text_encoder" / name).touch()
    found = weight_files(tmp_path, "text_encoder", variant)
    assert {file.name for file in found} == {FILES[place] for place in places}
