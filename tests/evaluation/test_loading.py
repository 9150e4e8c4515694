# SPDX-License-Identifier: Apache-2.0
"""Dequantizing while loading, and checkpoints that are damaged or hostile."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quip_vllm.checkpoint.store import read_json, write_json
from quip_vllm.evaluation.loading import check_complete, load_model
from quip_vllm.quantizer.run import quantize

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
    with pytest.raises(ValueError, match="has no weight model.layers.2.input_layernorm.weight"):
        load_model(str(copied))
    write_json(copied / "config.json", {**read_json(copied / "config.json"), "num_hidden_layers": 1})
    with pytest.raises(ValueError, match=r"holds model.layers.1.*, which the model of its config.json has not"):
        load_model(str(copied))
    write_json(copied / "config.json", {**read_json(copied / "config.json"), "num_hidden_layers": 2, "vocab_size": 300})
    with pytest.raises(ValueError, match=r"of which config.json makes \(300, 64\)"):
        load_model(str(copied))
    write_json(copied / "config.json", {**read_json(copied / "config.json"), "hidden_size": "x"})
    with pytest.raises(ValueError, match="config.json cannot be used"):
        load_model(str(copied))


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"quant_method": "of_another", "bits": 4}, "by the method 'of_another', which neither"),
        (None, "as int8, which is"),
    ],
)
def test_weights_that_nobody_here_can_read(tiny_model, tmp_path, described, message):
    """With names and shapes of the model, so that they would be taken for its weights."""
    shutil.copytree(tiny_model(), tmp_path / "foreign")
    if described:
        config = read_json(tmp_path / "foreign" / "config.json")
        write_json(tmp_path / "foreign" / "config.json", {**config, "quantization_config": described})
    else:
        tensors = load_file(tmp_path / "foreign" / SHARD)
        tensors["model.layers.1.mlp.down_proj.weight"] = torch.ones(64, 128, dtype=torch.int8)
        save_file(tensors, tmp_path / "foreign" / SHARD, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path / "foreign"))


def test_an_empty_quantization_config_is_none(tiny_model, tmp_path):
    shutil.copytree(tiny_model(), tmp_path / "plain")
    config = read_json(tmp_path / "plain" / "config.json")
    write_json(tmp_path / "plain" / "config.json", {**config, "quantization_config": {}})
    assert load_model(str(tmp_path / "plain")).model.norm.weight.dtype == torch.float32


def test_a_weight_that_is_missing_is_not_made_up(tiny_model, tmp_path):
    shutil.copytree(tiny_model(), tmp_path / "part")
    tensors = load_file(tmp_path / "part" / SHARD)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "part" / SHARD, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weight model.norm.weight"):
        load_model(str(tmp_path / "part"))


def test_names_that_transformers_changes(tiny_model, make_settings, tmp_path):
    """GPT-NeoX names its head embed_out in files and lm_head in transformers."""
    folder = tiny_model("GPTNeoX", tie_word_embeddings=False, rotary_pct=1.0)
    assert "embed_out.weight" in load_file(folder / SHARD)
    quantize(make_settings(folder, bits=4), tmp_path / "out")
    check_complete(tmp_path / "out")
    head = load_model(str(tmp_path / "out")).lm_head.weight
    assert torch.equal(head, load_model(str(folder)).lm_head.weight)


def test_check_complete(copied):
    check_complete(copied)
    tensors = load_file(copied / SHARD)
    save_file({k: v for k, v in tensors.items() if not k.startswith(LAYER)}, copied / SHARD)
    with pytest.raises(ValueError, match=f"has no weight {LAYER}.weight"):
        check_complete(copied)
