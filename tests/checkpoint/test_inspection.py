# SPDX-License-Identifier: Apache-2.0
"""quip-vllm inspect on checkpoints written by hand: sizes equal the files, damage is named."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from quip_vllm.checkpoint.config import CheckpointConfig, LayerFormat
from quip_vllm.checkpoint.inspection import format_inspection, inspect
from quip_vllm.checkpoint.store import read_json, write_json


@pytest.fixture
def checkpoint(tmp_path):
    """Layers 2 and 10 of 32 x 64 weights, at 2 and 4 bits, hyb; an embedding of 5 x 64."""
    tensors = {"embed.weight": torch.zeros(5, 64, dtype=torch.bfloat16)}
    for layer, bits in ((10, 2), (2, 4)):
        tensors[f"layers.{layer}.up.packed"] = torch.zeros(2, 64 * bits, dtype=torch.int16)
        tensors[f"layers.{layer}.up.su"] = torch.ones(64, dtype=torch.float16)
        tensors[f"layers.{layer}.up.sv"] = torch.ones(32, dtype=torch.float16)
        tensors[f"layers.{layer}.up.table"] = torch.ones(512, 2, dtype=torch.float16)
        tensors[f"layers.{layer}.up.bias"] = torch.ones(32, dtype=torch.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    config = CheckpointConfig(LayerFormat("hyb", 2), layers={"layers.2.up": LayerFormat("hyb", 4)})
    write_json(tmp_path / "config.json", {"quantization_config": config.to_dict()})
    write_json(tmp_path / "quantization_report.json", {"layers": [{"name": "layers.2.up", "proxy_loss": 0.0123}]})
    return tmp_path


def test_inspect(checkpoint):
    found = inspect(checkpoint)
    sizes = {4: 2 * 2 * 256 + 2 * 96 + 2 * 1024, 2: 2 * 2 * 128 + 2 * 96 + 2 * 1024}
    common = {"code": "hyb", "shape": [32, 64]}
    assert found["layers"] == [
        {"name": "layers.2.up", **common, "bits": 4, "bytes": sizes[4], "proxy_loss": 0.0123},
        {"name": "layers.10.up", **common, "bits": 2, "bytes": sizes[2], "proxy_loss": None},
    ]
    embedding = {"name": "embed", "dtype": "bfloat16", "bits": 16, "shape": [5, 64], "bytes": 640}
    assert found["ordinary"] == [embedding]
    total = sum(t.numel() * t.element_size() for t in load_file(checkpoint / "model.safetensors").values())
    assert found["totals"] == {
        "layers": 2,
        "weights": 4096,
        "bits_per_weight": round(8 * sum(sizes.values()) / 4096, 4),
        "quantized_bytes": sum(sizes.values()),
        "bytes": total,
    }
    assert found["quantization_config"] == read_json(checkpoint / "config.json")["quantization_config"]
    table = format_inspection(found).splitlines()
    assert len(table) == 5
    assert table[1].split() == ["layers.2.up", "hyb", "4", "32x64", "3,264", "0.01230"]
    assert table[2].split() == ["layers.10.up", "hyb", "2", "32x64", "2,752", "-"]
    assert table[3].split() == ["embed", "bfloat16", "16", "5x64", "640", "-"]
    assert table[4] == f"2 layers, 4,096 weights, 11.750 bits per weight; 6,016 of {total:,} bytes"


def test_experts_are_one_row(checkpoint):
    found = inspect(checkpoint)
    row = found["layers"][0]
    experts = [{**row, "name": f"mlp.experts.{i}.up", "proxy_loss": 0.01 * (i + 1)} for i in range(3)]
    other = {**row, "name": "mlp.experts.3.up", "bits": 2, "proxy_loss": None}
    table = format_inspection({**found, "layers": [*experts, other, row]}).splitlines()
    assert table[1].split() == ["mlp.experts.*.up", "hyb", "4", "32x64", "9,792", "0.02000"]
    assert table[2].split() == ["mlp.experts.*.up", "hyb", "2", "32x64", "3,264", "-"]
    assert [line.split()[0] for line in table[3:5]] == ["layers.2.up", "embed"] and len(table) == 6


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"layers": [1]},
        {"layers": [{"name": "x"}]},
        {"layers": 3},
        {"layers": [{"name": "x", "proxy_loss": 10**400}]},
    ],
)
def test_damaged_report(checkpoint, report):
    write_json(checkpoint / "quantization_report.json", report)
    with pytest.raises(ValueError, match="quantization_report.json is damaged: delete it"):
        inspect(checkpoint)
