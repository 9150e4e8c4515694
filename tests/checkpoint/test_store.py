# SPDX-License-Identifier: Apache-2.0
"""Reading a folder: tensors by name; damaged and hostile files are refused."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from quip_vllm.checkpoint.store import CheckpointReader, read_json, write_json

TENSORS = {"b": torch.arange(6, dtype=torch.int16).view(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)}


def test_tensors_are_read_by_name(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    assert sorted(reader.names()) == ["a", "b"] and "a" in reader and "z" not in reader
    assert reader.shapes == {"a": (4,), "b": (2, 3)} and reader.bytes_of == {"a": 8, "b": 12}
    assert set(reader.file_of.values()) == {tmp_path / "model.safetensors"}
    for name, tensor in reader.read(["b", "a"]).items():
        assert reader.dtypes[name] == tensor.dtype == TENSORS[name].dtype and torch.equal(tensor, TENSORS[name])
    with pytest.raises(ValueError, match="has no tensor z: "):
        reader.read(["z"])


def test_one_file_beside_other_copies_of_the_weights(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_file({"other.a": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert CheckpointReader(tmp_path).names() == ["a"]


def write_header(file, header):
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../secret.safetensors"}, "names '../secret.safetensors': a shard must be a plain file name"),
        ({"a": "/etc/secret"}, "names '/etc/secret': a shard must be a plain file name"),
        ({"a": "sub/x.safetensors"}, "names 'sub/x.safetensors': a shard must be a plain file name"),
        ({"a": ".."}, "cannot be read"),
        ({"a": 7}, "cannot be read"),
        ({"a": "gone.safetensors"}, r"gone.safetensors cannot be read .* missing, truncated or damaged"),
        (["a"], "has no weight_map object"),
        (None, "has no weight_map object"),
        ({}, r"has no \*.safetensors file"),
    ],
)
def test_hostile_index(tmp_path, weight_map, message):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(ValueError, match=message):
        CheckpointReader(folder)


def test_damaged_files(tmp_path):
    with pytest.raises(ValueError, match=r"has no \*.safetensors file.*never pickles"):
        CheckpointReader(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="missing, truncated or damaged; fetch or quantize it again"):
        CheckpointReader(tmp_path)
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="cannot be read"):
        CheckpointReader(tmp_path)
    write_header(file, {"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}})
    with pytest.raises(ValueError, match="holds a as F8_E8M0"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read"), ("[]", "holds a list"), (b"\xff", "cannot be read"), (None, "")]
)
def test_read_json_refuses(tmp_path, content, message):
    file = tmp_path / "x.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="x.json " + message):
        read_json(file)
