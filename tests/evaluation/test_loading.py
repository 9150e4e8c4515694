# SPDX-License-Identifier: Apache-2.0
"""Dequantizing while loading, and checkpoints that are damaged or hostile."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quip_vllm.checkpoint.store import read_json, write_json
from quip_vllm.evaluation.loading import load_model

LAYER = "model.layers.0.mlp.up_proj"
SHARD = "model-00001-of-00003.safetensors"


@pytest.fixture
def copied(quantized, tmp_path):
    shutil.copytree(quantized(), tmp_path / "copy")
    return tmp_path / "copy"


def change_config(folder, **changes):
    config = read_json(folder / "config.json")
    config["quantization_config"] |= changes
    write_json(folder / "config.json", config)


def test_loads(copied):
    model = load_model(str(copied))
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("su", None, f"{LAYER} has no vector su"),
        ("sv", None, f"{LAYER} has no vector sv"),
        ("codes", None, f"{LAYER}: a layer of code e8p has tensors"),
        ("codes", torch.zeros(64, 8, dtype=torch.int16), r"codes is torch.int16 \(64, 8\): "),
        ("codes", torch.zeros(128, 8, dtype=torch.int32), r"codes is torch.int32 \(128, 8\): "),
        ("su", torch.full((64,), float("nan")), "su holds a NaN"),
        ("su", torch.ones(72), "is wanted"),
        ("weight", torch.zeros(128, 64), f"{LAYER}: a layer of code e8p has tensors"),
    ],
)
def test_damaged_tensors(copied, name, value, message):
    tensors = load_file(copied / SHARD)
    del tensors[f"{LAYER}.{'su' if value is not None and name == 'weight' else name}"]
    if name == "weight":
        message = f"{LAYER} has no vector su"
    if value is not None:
        tensors[f"{LAYER}.{name}"] = value
    save_file(tensors, copied / SHARD)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(str(copied))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 4}, "a layer of code e8p has tensors"),
        ({"bits": 10**9}, "bits is 1000000000: "),
        ({"quant_method": "qtip"}, "code is 'e8p': it belongs to"),
        ({"quant_method": "qtip", "code": "5mad"}, "code is '5mad': "),
        ({"format_version": 9}, "format_version is 9: "),
        ({"modules_to_not_convert": [LAYER]}, f"{LAYER} holds quantized tensors: config.json says that it has none"),
    ],
)
def test_hostile_config(copied, changes, message):
    change_config(copied, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(str(copied))


@pytest.mark.parametrize("value", ["quip_sharp", ["quip_sharp"], {"quant_method": ["quip_sharp"]}])
def test_ill_typed_quantization_config(copied, value):
    write_json(copied / "config.json", {**read_json(copied / "config.json"), "quantization_config": value})
    with pytest.raises(ValueError, match="it must name quant_method"):
        load_model(str(copied))


def test_config_of_another_model(copied):
    write_json(copied / "config.json", {**read_json(copied / "config.json"), "num_hidden_layers": 3})
    with pytest.raises(ValueError, match="is in one of them only"):
        load_model(str(copied))
    write_json(copied / "config.json", {**read_json(copied / "config.json"), "vocab_size": 300})
    with pytest.raises(ValueError, match="do not belong together"):
        load_model(str(copied))
    write_json(copied / "config.json", {**read_json(copied / "config.json"), "hidden_size": "x"})
    with pytest.raises(ValueError, match="config.json cannot be used"):
        load_model(str(copied))


def test_path_traversal(copied):
    index = read_json(copied / "model.safetensors.index.json")
    index["weight_map"]["lm_head.weight"] = "../other.safetensors"
    write_json(copied / "model.safetensors.index.json", index)
    with pytest.raises(ValueError, match="a shard must be a plain file name"):
        load_model(str(copied))
