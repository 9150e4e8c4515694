# SPDX-License-Identifier: Apache-2.0
"""Whole runs on tiny models: every architecture, what is written, what a layer sees, what stays in memory."""

import json
import math

import numerics
import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from quip_vllm.checkpoint.inspection import inspect
from quip_vllm.checkpoint.store import CheckpointReader
from quip_vllm.evaluation.loading import dense_state, load_model
from quip_vllm.evaluation.report import evaluate
from quip_vllm.quantizer import pipeline
from quip_vllm.quantizer.calibration import calibration_tokens
from quip_vllm.quantizer.pipeline import quantize


def weights(folder):
    reader = CheckpointReader(folder)
    return reader.read(reader.names())


@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
def test_architectures(architecture, quantized, tiny_model, tiny_text):
    out, original = quantized(architecture), weights(tiny_model(architecture))
    dense, stored = dense_state(out), weights(out)
    found = inspect(out)["layers"]
    linears = 4 if architecture == "Phi3" else 7
    assert len(found) == 2 * linears
    assert set(dense) == set(original)
    for layer in found:
        name = layer["name"] + ".weight"
        assert layer["bits"] == 2 and tuple(layer["shape"]) == original[name].shape
        difference = (dense[name] - original[name].float()).norm() / original[name].float().norm()
        # A weight's own error is larger than its outputs', the more so where it mends drift; any other matrix has 1.4.
        assert 0.05 < difference < 0.9
        assert 0.0 < layer["proxy_loss"] < 0.15
        assert name not in stored
    for name in set(original) & set(stored):  # biases, norms, embeddings
        assert torch.equal(stored[name], original[name]) and stored[name].dtype == original[name].dtype
    if architecture == "Qwen2":
        assert "model.layers.1.self_attn.q_proj.bias" in stored
    figures = evaluate(str(out), str(tiny_text), str(tiny_model(architecture)), 64, 4)
    assert math.isfinite(figures["perplexity"])
    assert 0.0 < figures["kl_divergence"] < 0.3


def test_files_and_report(quantized, tiny_model, make_settings):
    from transformers import AutoTokenizer

    out = quantized()
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "quantization_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((out / "config.json").read_text())
    before = json.loads((tiny_model() / "config.json").read_text())
    described = config.pop("quantization_config")
    assert config == before and config["dtype"] == "bfloat16"
    assert described == {
        "quant_method": "quip_sharp",
        "format_version": 1,
        "code": "e8p",
        "bits": 2,
        "hadamard_block": None,
        "modules_to_not_convert": ["lm_head"],
        "layers": {},
    }
    assert (
        AutoTokenizer.from_pretrained(out)("ab")["input_ids"]
        == AutoTokenizer.from_pretrained(tiny_model())("ab")["input_ids"]
    )
    report = json.loads((out / "quantization_report.json").read_text())
    assert set(report) == {
        "quip_vllm", "settings", "compute_dtype", "calibration_tokens", "calibration_sha256", "layers"
    }  # fmt: skip
    assert report["settings"] == make_settings(tiny_model()).to_dict()
    assert report["calibration_tokens"] == 8 * 48
    keys = {"name", "shape", "bits", "proxy_loss", "damping_added", "dead_columns", "group_seconds"}
    assert all(set(layer) == keys for layer in report["layers"])
    assert [layer["name"] for layer in report["layers"]][:8] == [
        *(f"model.layers.0.self_attn.{letter}_proj" for letter in "qkvo"),
        *(f"model.layers.0.mlp.{word}_proj" for word in ("gate", "up", "down")),
        "model.layers.1.self_attn.q_proj",
    ]


def test_shared_su(quantized):
    stored = weights(quantized())
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for readers in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
            signs = [stored[f"{prefix}{name}.su"] for name in readers]
            assert all(torch.equal(sign, signs[0]) for sign in signs)
            assert signs[0].dtype == torch.float16
    assert not torch.equal(stored["model.layers.0.self_attn.q_proj.su"], stored["model.layers.1.self_attn.q_proj.su"])


def test_ignore_overrides_and_blocks(quantized):
    out = quantized(
        code="hyb",
        bits=1,
        hadamard_block=32,
        ignore=("layers.1.self_attn", "o_proj"),
        overrides=(("down_proj", 4), ("v_proj", 2)),
    )
    bits = {layer["name"].removeprefix("model.layers."): layer["bits"] for layer in inspect(out)["layers"]}
    mlp = {"mlp.gate_proj": 1, "mlp.up_proj": 1, "mlp.down_proj": 4}
    own = {"self_attn.q_proj": 1, "self_attn.k_proj": 1, "self_attn.v_proj": 2, **mlp}
    assert bits == {**{f"0.{name}": n for name, n in own.items()}, **{f"1.{name}": n for name, n in mlp.items()}}
    described = json.loads((out / "config.json").read_text())["quantization_config"]
    assert described["hadamard_block"] == 32
    assert described["modules_to_not_convert"] == [
        "lm_head",
        "model.layers.0.self_attn.o_proj",
        *(f"model.layers.1.self_attn.{letter}_proj" for letter in "qkvo"),
    ]
    assert described["layers"]["model.layers.1.mlp.down_proj"] == {"code": "hyb", "bits": 4}
    assert load_file(out / "model-00001-of-00003.safetensors")["model.layers.0.mlp.up_proj.table"].shape == (512, 2)
    load_model(str(out))


def test_second_layer_sees_the_quantized_first(tiny_model, make_settings, tmp_path, monkeypatch):
    model = tiny_model(dtype="float32")
    settings = make_settings(model, sequences=50)  # two batches, the second one smaller
    hessians = []

    def recording(group, *args):
        hessians.append((group.names, group.hessian.clone()))
        return original(group, *args)

    original = pipeline.quantize_group
    monkeypatch.setattr(pipeline, "quantize_group", recording)
    quantize(settings, tmp_path)
    assert hessians[4][0] == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    tokens = calibration_tokens(settings, str(model))

    def expected(folder):
        loaded, seen = load_model(str(folder)), []
        loaded.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.inference_mode():
            loaded(tokens)
        rows = torch.cat(seen).flatten(0, 1).double()
        return rows.T @ rows

    scale = hessians[4][1].norm()
    assert (hessians[4][1] - expected(tmp_path)).norm() / scale < numerics.FLOAT32_HESSIAN
    assert (hessians[4][1] - expected(model)).norm() / scale > 10 * numerics.FLOAT32_HESSIAN


def test_one_layer_in_memory(tiny_model, make_settings, tmp_path, monkeypatch):
    sources, ran = [], []

    class Watched(pipeline.LayeredModel):
        def __init__(self, folder):
            super().__init__(folder)
            sources.append(self)

    def watching(layer, *args):
        (source,) = sources
        real = [i for i, other in enumerate(source.layers) if any(p.device.type != "meta" for p in other.parameters())]
        assert [source.layers[i] for i in real] == [layer]
        assert source.model.lm_head.weight.device.type == "meta"
        ran.append(real[0])
        return original(layer, *args)

    original = pipeline.run_layer
    monkeypatch.setattr(pipeline, "LayeredModel", Watched)
    monkeypatch.setattr(pipeline, "run_layer", watching)
    quantize(make_settings(tiny_model("Llama", num_hidden_layers=3)), tmp_path)
    # Original, Hessians (of the first the same), and of all but the last, outputs: each has one batch.
    assert ran == [0, 0, 1, 1, 1, 2, 2]


def test_same_settings_same_bytes(quantized, tiny_model, make_settings, tmp_path):
    quantize(make_settings(tiny_model()), tmp_path / "again")
    quantize(make_settings(tiny_model(), seed=1), tmp_path / "other")
    name = "model-00001-of-00003.safetensors"
    first = (quantized() / name).read_bytes()
    assert (tmp_path / "again" / name).read_bytes() == first
    assert (tmp_path / "other" / name).read_bytes() != first


def test_refused_settings_do_not_block_the_folder(tiny_model, make_settings, tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="no linear layer of .* is left to quantize: give a narrower --ignore"):
        quantize(make_settings(model, ignore=(".",)), tmp_path / "out")
    with pytest.raises(ValueError, match="give a longer text"):
        quantize(make_settings(model, sequences=10**6), tmp_path / "out")
    quantize(make_settings(model), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
