# SPDX-License-Identifier: Apache-2.0
"""The quantized output head: tied and untied, its inputs, its rows' scales, and what is written of it."""

import json
import shutil

import numerics
import pytest
import torch
from safetensors.torch import load_file, save_file

from quip_vllm.checkpoint.inspection import inspect
from quip_vllm.checkpoint.store import CheckpointReader
from quip_vllm.evaluation.loading import dense_state, load_model
from quip_vllm.evaluation.report import evaluate
from quip_vllm.ops import LinearSpec, dequantize
from quip_vllm.quantizer import head as head_module
from quip_vllm.quantizer.calibration import calibration_tokens
from quip_vllm.quantizer.head import head_group, quantize_head
from quip_vllm.quantizer.hessian import Group
from quip_vllm.quantizer.model import LayeredModel, run_layer
from quip_vllm.quantizer.pipeline import kwargs_for, quantize
from quip_vllm.quantizer.settings import Settings

QTIP = {"code": "hyb"}
CASES = [  # architecture, its config, settings, name of the head, what keeps its weight
    ("Llama", {}, {}, "model.embed_tokens", ["lm_head"]),
    ("Gemma2", {}, QTIP, "model.embed_tokens", ["lm_head"]),
    ("Mistral", {}, {}, "lm_head", []),
    ("Mistral", {"vocab_size": 301}, QTIP, "lm_head", []),
    ("GPTNeoX", {}, QTIP, "gpt_neox.embed_in", ["lm_head"]),
]


@pytest.mark.parametrize(("architecture", "changes", "format", "name", "skipped"), CASES)
def test_architectures(architecture, changes, format, name, skipped, tiny_model, make_settings, tiny_text, tmp_path):
    model = tiny_model(architecture, **changes)
    report = quantize(make_settings(model, lm_head=4, **format), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert described["head"] == {
        "module": name,
        "stored": {"code": format.get("code", "e8p"), "bits": 4},
        "tied": bool(skipped),
    }
    assert described["modules_to_not_convert"] == skipped and described["layers"] == {}
    layer = next(layer for layer in inspect(tmp_path)["layers"] if layer["name"] == name)
    assert layer["bits"] == 4 and layer["proxy_loss"] == report["layers"][-1]["proxy_loss"] < 0.02
    original = CheckpointReader(model).read([f"{name}.weight"])[f"{name}.weight"].float()
    assert layer["shape"] == list(original.shape) == report["layers"][-1]["shape"]
    dense = dense_state(tmp_path)
    assert set(dense) == set(CheckpointReader(model).names())
    assert (dense[f"{name}.weight"] - original).norm() / original.norm() < 0.2
    loaded = load_model(str(tmp_path))
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == bool(skipped)
    assert evaluate(str(tmp_path), str(tiny_text), str(model), 64, 4)["kl_divergence"] < 0.3


def test_other_layers_do_not_change(quantized, tiny_model, make_settings, tmp_path):
    quantize(make_settings(tiny_model(), lm_head=4), tmp_path)
    for index in (1, 2):
        ours = load_file(tmp_path / f"model-0000{index}-of-00004.safetensors")
        usual = load_file(quantized() / f"model-0000{index}-of-00003.safetensors")
        assert all(torch.equal(ours[name], tensor) for name, tensor in usual.items()) and len(ours) == len(usual)
    assert "head" not in json.loads((quantized() / "config.json").read_text())["quantization_config"]


def test_a_tied_weight_stored_twice_is_written_once(tiny_model, make_settings, tmp_path):
    shutil.copytree(tiny_model(), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    quantize(make_settings(tmp_path / "model", lm_head=2), tmp_path / "out")
    names = CheckpointReader(tmp_path / "out").names()
    assert "model.embed_tokens.codes" in names
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(names)
    load_model(str(tmp_path / "out"))


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ["Mistral", "Gemma2", "GPTNeoX"])
def test_head_inputs_are_those_of_the_whole_model(tiny_model, make_settings, architecture):
    folder = tiny_model(architecture, dtype="float32")
    source = LayeredModel(folder)
    tokens = calibration_tokens(make_settings(folder, sequences=5), str(folder))
    hidden, kwargs = source.first_hidden_states(tokens, 3)
    for index in range(len(source.layers)):
        layer = source.fill(index)
        hidden = [run_layer(layer, x, kwargs_for(kwargs[index], x)) for x in hidden]
        source.empty(index)
    found = list(source.head_inputs(tokens, hidden))
    assert [x.shape[0] for x in found] == [3, 2]
    expected = load_model(str(folder)).base_model(tokens, use_cache=False).last_hidden_state
    tolerance = {"rtol": numerics.FLOAT32_LAYERS, "atol": numerics.FLOAT32_LAYERS}
    torch.testing.assert_close(torch.cat(found), expected, **tolerance)
    rows = expected.flatten(0, 1).double()
    group = head_group("lm_head", found)
    torch.testing.assert_close(group.hessian, rows.T @ rows, **tolerance)
    assert group.tokens == tokens.numel()


def group_of(k, seed=1):
    x = torch.randn(500, k, generator=torch.Generator().manual_seed(seed)).double()
    return Group(["head"], x.T @ x, 500)


def settings(code="e8p", bits=4, **changes):
    return Settings("m", code, 2, lm_head=bits, **changes)


def dense(result, chosen, n, k):
    tensors = dict(result.tensors)
    return dequantize(LinearSpec(chosen.code, result.bits, k, (n,), chosen.hadamard_block, False), tensors)


@pytest.mark.parametrize("code", ["e8p", "1mad"])
def test_rows_have_scales_of_their_own(code):
    chosen = settings(code)
    weight = torch.randn(37, 96) * torch.logspace(-2, 2, 37)[:, None]
    weight[5] = 0.0
    weight[6] = 1e-12  # too small for a scale in fp16
    result = quantize_head("head", weight, group_of(96), chosen)
    restored = dense(result, chosen, 37, 96)
    assert not restored[5:7].any()
    live = [i for i in range(37) if i not in (5, 6)]
    assert ((restored - weight).norm(dim=1) / weight.norm(dim=1))[live].max() < 0.2
    hessian, error = group_of(96).hessian, (restored - weight).double()
    loss = float((error @ hessian * error).sum() / (weight.double() @ hessian * weight.double()).sum())
    undamped = quantize_head("head", weight, group_of(96), settings(code, damping=1e-6))
    assert undamped.proxy_loss == pytest.approx(loss, rel=0.2)


@pytest.mark.parametrize("code", ["e8p", "hyb"])
def test_chunks_do_not_change_a_bit(code, monkeypatch):
    weight, chosen = torch.randn(90, 64), settings(code, 2)
    whole = quantize_head("head", weight, group_of(64), chosen)
    monkeypatch.setattr(head_module, "CHUNK_WEIGHTS", 32 * 64)
    pieces = quantize_head("head", weight, group_of(64), chosen)
    assert all(torch.equal(pieces.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert pieces.proxy_loss == pytest.approx(whole.proxy_loss)


def test_dead_columns():
    group, weight = group_of(64), torch.randn(32, 64)
    group.hessian[7] = group.hessian[:, 7] = 0.0
    weight[:, 7] = 1e4
    assert quantize_head("head", weight, group, settings()).dead_columns == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.nan, "head.weight holds a NaN or an infinity"), (1e12, "head.weight has a row whose scale does not fit")],
)
def test_weights_that_cannot_be_stored(value, message):
    weight = torch.randn(32, 64)
    weight[3] = value
    with pytest.raises(ValueError, match=f"{message}.*leave --lm-head away"):
        quantize_head("head", weight, group_of(64), settings())


def test_refusals(tiny_model, make_settings, tmp_path):
    with pytest.raises(ValueError, match="bits is 7: quip_sharp with code e8p has 2, 3, 4"):
        make_settings(tiny_model(), lm_head=7)
    model = tiny_model("Llama", hidden_size=8 * 47 * 3, num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(ValueError, match="model.embed_tokens cannot be quantized: .*--hadamard-block"):
        quantize(make_settings(model, lm_head=4, ignore=(".",)), tmp_path / "out")
    model = tiny_model("GPTNeoX", tie_word_embeddings=False)  # embed_out.weight in the file, lm_head in the module
    with pytest.raises(ValueError, match="has no tensor lm_head.weight: .*leave --lm-head away"):
        quantize(make_settings(model, lm_head=4), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_head_alone(tiny_model, make_settings, tmp_path):
    report = quantize(make_settings(tiny_model(), lm_head=4, ignore=(".",)), tmp_path)
    assert [layer["name"] for layer in report["layers"]] == ["model.embed_tokens"]
    load_model(str(tmp_path))
