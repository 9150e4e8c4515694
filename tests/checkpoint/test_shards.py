# SPDX-License-Identifier: Apache-2.0
"""Shards: whole or absent, readable by all, equal bytes for equal tensors, and copied without a change."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quip_vllm.checkpoint import shards, store
from quip_vllm.checkpoint.shards import (
    amount,
    check_room,
    copy_shard,
    plan_shards,
    read_shard,
    shard_name,
    tensor_sizes,
    write_index,
    write_shard,
)
from quip_vllm.checkpoint.store import CheckpointReader, read_json, write_json

TENSORS = {"b": torch.arange(6, dtype=torch.int16).view(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)}


def test_written_shards_are_read_back(tmp_path):
    write_shard(tmp_path / shard_name(0, 2), TENSORS)
    write_shard(tmp_path / shard_name(1, 2), {"c": torch.zeros(2, 2)})
    write_index(tmp_path, 2)
    index = read_json(tmp_path / "model.safetensors.index.json")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index == {"metadata": {"total_size": 36}, "weight_map": {"a": first, "b": first, "c": second}}
    assert tensor_sizes(tmp_path / first) == {"a": 8, "b": 12}
    reader = CheckpointReader(tmp_path)
    assert reader.shapes == {"a": (4,), "b": (2, 3), "c": (2, 2)} and reader.bytes_of == {"a": 8, "b": 12, "c": 16}
    for name, tensor in read_shard(tmp_path / first).items():
        assert tensor.dtype == TENSORS[name].dtype and torch.equal(tensor, TENSORS[name])


def test_a_single_shard_has_no_index(tmp_path):
    write_shard(tmp_path / shard_name(0, 1), TENSORS)
    write_index(tmp_path, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", store.DTYPES.values(), ids=store.DTYPES)
def test_every_dtype_and_shape_is_what_the_library_reads_and_writes(tmp_path, dtype):
    """Also scalars, empty tensors, views of another's memory, and tensors of another size of element beside them."""
    source = torch.arange(24, dtype=torch.float32).view(4, 6).to(dtype)
    tensors = {"t": source.T, "row": source[1], "scalar": source[1, 1], "empty": source[:0], "a": torch.ones(3).char()}
    write_shard(tmp_path / "ours.safetensors", tensors)
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, tmp_path / "theirs.safetensors")
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape
        assert ours[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_equal_tensors_are_equal_bytes(tmp_path):
    write_shard(tmp_path / "x.safetensors", TENSORS)
    write_shard(tmp_path / "y.safetensors", dict(reversed(TENSORS.items())))
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0, 0o666)])
def test_files_have_the_permissions_that_the_umask_leaves(tmp_path, umask, mode):
    usual = os.umask(umask)
    try:
        write_shard(tmp_path / "x.safetensors", TENSORS)
        copy_shard(tmp_path / "y.safetensors", dict.fromkeys(TENSORS, tmp_path / "x.safetensors"))
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(usual)
    assert [file.stat().st_mode & 0o777 for file in tmp_path.iterdir()] == [mode] * 3


def test_shards_are_filled_in_order(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 10)
    sizes = {"a": 4, "b": 6, "c": 1, "too large": 30, "d": 9, "e": 2}
    assert plan_shards(sizes) == [["a", "b"], ["c"], ["too large"], ["d"], ["e"]]


def test_a_copy_is_the_file_that_its_tensors_make(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "COPY_BYTES", 5)
    parts = [{"a": torch.ones(3, 5), "b": torch.arange(7)}, {"c": torch.full((9,), -1, dtype=torch.int8)}]
    for i, part in enumerate(parts):
        save_file(part, tmp_path / f"{i}.safetensors")
    files = {name: tmp_path / f"{i}.safetensors" for i, part in enumerate(parts) for name in part if name != "a"}
    copy_shard(tmp_path / "copied.safetensors", files)
    write_shard(tmp_path / "written.safetensors", {"b": parts[0]["b"], **parts[1]})
    assert (tmp_path / "copied.safetensors").read_bytes() == (tmp_path / "written.safetensors").read_bytes()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_shard(tmp_path / "x.safetensors", TENSORS)
    write_json(tmp_path / "x.json", {"a": 1})
    before = (tmp_path / "x.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path / "x.safetensors", {"b": torch.zeros(1)})
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert (tmp_path / "x.safetensors").read_bytes() == before
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.json", "x.safetensors"]


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (7_300_000, "7.3 MB"),
        (4.2e9, "4.2 GB"),
        (3e15, "3000.0 TB"),
    ],
)
def test_an_amount_has_the_unit_that_fits(size, said):
    assert amount(size) == said


def test_room_counts_what_is_there(tmp_path, monkeypatch):
    (tmp_path / "shard").write_bytes(bytes(600))
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9000, 0, 2000))
    check_room(tmp_path, 2600, "go on")
    with pytest.raises(ValueError, match="has 2.0 kB free, and about 2.1 kB are needed: make room, then go on$"):
        check_room(tmp_path, 2700, "go on")
