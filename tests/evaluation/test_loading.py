# SPDX-License-Identifier: Apache-2.0
"""Dequantizing while loading, and checkpoints that are damaged or hostile."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quip_vllm.checkpoint.store import read_json, write_json
from quip_vllm.evaluation.loading import load_model

LAYER = "model.layers.0.mlp.up_proj"
SHARD = "model.safetensors"


@pytest.fixture
def copied(quantized, tmp_path):
    shutil.copytree(quantized(), tmp_path / "copy")
    return tmp_path / "copy"


def test_loads(copied):
    model = load_model(str(copied))
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((64,), float("nan"), dtype=torch.float16), f"{LAYER}: su holds a NaN"),
        (torch.ones(72), f"{LAYER}, said to be e8p at 2 bits, has codes"),
    ],
)
def test_damaged_tensors(copied, value, message):
    save_file(load_file(copied / SHARD) | {f"{LAYER}.su": value}, copied / SHARD)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(str(copied))
    assert "\n" not in str(caught.value)


def test_config_with_other_bits(copied):
    config = read_json(copied / "config.json")
    config["quantization_config"]["bits"] = 4
    write_json(copied / "config.json", config)
    with pytest.raises(ValueError, match="said to be e8p at 4 bits, has tensors"):
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
