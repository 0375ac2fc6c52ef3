"""Blocks of a bank vouch for their values and their place."""

from __future__ import annotations

import os

import numpy as np
import pytest
import written
from safetensors.numpy import save_file

from invmm.results.free_samples import read_block, set_blocks_aside, write_block
from invmm.results.ownership import OwnedRunFolder


@pytest.fixture
def folder(tmp_path):
    with OwnedRunFolder(tmp_path / "run", config=written.CONFIG, digest=written.DIGEST) as folder:
        folder.bank_block(0).parent.mkdir()
        for block in (0, 1):
            write_block(folder.bank_block(block), np.full((4, 3), float(block), np.float32))
    return folder


def test_a_block_comes_back(folder):
    assert np.array_equal(read_block(folder.bank_block(1)), np.ones((4, 3)))
    assert set_blocks_aside(folder) == []


def swap(first, second):
    other = second.read_bytes()
    second.write_bytes(first.read_bytes())
    first.write_bytes(other)


def test_blocks_that_changed_places_are_both_drawn_again(folder):
    swap(folder.bank_block(0), folder.bank_block(1))
    lines = set_blocks_aside(folder)
    assert len(lines) == 2
    assert all("was altered; set aside in" in line for line in lines)
    assert not folder.bank_block(0).exists()
    assert (folder.path / "damaged" / "00000.safetensors").is_file()


def test_every_kind_of_damage_is_seen(folder):
    path = folder.bank_block(0)
    whole, faults = path.read_bytes(), []
    for byte in range(len(whole)):
        path.write_bytes(whole[:byte])
        with pytest.raises(ValueError, match=r"00000\.safetensors"):
            read_block(path)
        content = bytearray(whole)
        content[byte] ^= 1
        path.write_bytes(content)
        try:
            found = read_block(path)
        except ValueError as error:
            faults.append(str(error))
        else:  # a blank of the header became another
            assert np.array_equal(found, np.zeros((4, 3)))
    assert len(faults) > len(whole) // 2
    assert not any("\n" in fault for fault in faults)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="no regular file"):
        read_block(path)


def test_a_block_of_an_earlier_version_is_taken_if_it_can_be_read(folder):
    save_file({"embeddings": np.ones((2, 2))}, folder.bank_block(0))
    assert read_block(folder.bank_block(0)).shape == (2, 2)
    for tensors in ({"embeddings": np.ones(2)}, {"other": np.ones((2, 2))}):
        save_file(tensors, folder.bank_block(0))
        with pytest.raises(ValueError, match=r"00000\.safetensors (was altered|cannot be read)"):
            read_block(folder.bank_block(0))
