"""JSON files of other people's models: what they may not ask for, and their digests."""

from __future__ import annotations

import hashlib
import json
import os

import pipelines
import pytest

from invmm.models.auto import AutoModel
from invmm.models.json_files import read_json, settings_digest, settings_digests

PROGRAMS = [
    ("attn_implementation", "owner/repo"), ("_attn_implementation", "owner/repo:kernel"),
    ("_attn_implementation", "flash_attention_2"), ("attn_implementation", {"": "owner/repo"}),
    ("_attn_implementation_internal", "paged|owner/repo"), ("attn_implementation", 1),
    ("experts_implementation", "owner/repo"), ("auto_map", {"AutoModel": "owner/repo--code.Model"}),
    ("trust_remote_code", True), ("use_kernels", True), ("kernel_config", {"RMSNorm": "a/b:C"}),
    ("custom_pipelines", {"a": "b"}), ("trust_remote_code", 1.0),
]  # fmt: skip
HARMLESS = [
    ("attn_implementation", None), ("_attn_implementation", "eager"), ("auto_map", None),
    ("attn_implementation", "sdpa"), ("trust_remote_code", False), ("auto_map", {}),
    ("_attn_implementation_autoset", True),
]  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("key", "value"), PROGRAMS)
def test_a_key_that_fetches_a_program_is_refused(key, value, nested, tmp_path):
    path = tmp_path / "config.json"
    content = {key: value}
    path.write_text(json.dumps({"text_config": [content]} if nested else content))
    with pytest.raises(ValueError, match=f"{key}=.*may fetch and run a program; set it to null"):
        read_json(path)


@pytest.mark.parametrize(("key", "value"), HARMLESS)
def test_values_of_the_libraries_own(key, value, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value}))
    assert read_json(path) == {key: value}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_every_part_is_looked_at_before_weights_load(part, tmp_path):
    pytest.importorskip("transformers")
    pipelines.seeded(pipelines.MAKERS["sd1 epsilon"]).save_pretrained(tmp_path)
    path = tmp_path / part / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_bytes()), "attn_implementation": "owner/repo"})
    )
    with pytest.raises(ValueError, match="attn_implementation='owner/repo'"):
        AutoModel(path=str(tmp_path)).describe()


def test_a_digest_is_of_the_settings():
    digest = settings_digest({"a": 1, "_class_name": "UNet", "b": {"c": [None, 2.5]}})
    for same in ({"_diffusers_version": "9"}, {"transformers_version": "9"}):
        assert settings_digest(
            {"b": {"c": [None, 2.5]}, "_class_name": "UNet", "a": 1, **same}
        ) == (digest)
    for other in ({"a": 2}, {"a": 1.5}, {"_class_name": "Other"}, {"d": None}):
        assert settings_digest(
            {"a": 1, "_class_name": "UNet", "b": {"c": [None, 2.5]}, **other}
        ) != (digest)


def test_a_long_file_counts_byte_by_byte(tmp_path):
    """A tokenizer.json of megabytes is not parsed; of a short one only the settings count."""
    (tmp_path / "tokenizer").mkdir()
    path = tmp_path / "tokenizer" / "tokenizer.json"
    digests = []
    for filler in ("a", "a" * (1 << 20)):
        for indent in (None, 1):
            path.write_text(json.dumps({"vocab": filler}, indent=indent))
            digests.append(settings_digests(tmp_path, ["tokenizer"])["tokenizer/tokenizer.json"])
    short, short_indented, long, long_indented = digests
    assert short == short_indented == settings_digest({"vocab": "a"})
    assert long != long_indented
    assert long_indented == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_of_absurd_size_is_not_read(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "merges.txt").touch()
    os.truncate(tmp_path / "tokenizer" / "merges.txt", 2**40)
    with pytest.raises(ValueError, match=r"merges\.txt has 1,099,511,627,776 bytes, more than any"):
        settings_digests(tmp_path, ["tokenizer"])


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "unet" / "config.json").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"config\.json is no regular file"):
        settings_digests(tmp_path, ["unet"])
