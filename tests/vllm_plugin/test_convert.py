# SPDX-License-Identifier: Apache-2.0
"""Converted checkpoints in vLLM: layers that share a rotation, rotations in chunks on every rank, and served models."""

import importlib.util
from types import SimpleNamespace

import exl3_files
import pytest
import relaxml_files
import torch
from numerics import FLOAT32_LINEAR, SERVED_LOG_PROBABILITY, relative
from served_layers import SENT, apply, build, finish, load, quant_config, served_difference
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.checkpoint.convert import convert
from quip_vllm.checkpoint.qtip import QtipConfig
from quip_vllm.checkpoint.quip_sharp import QuipSharpConfig
from quip_vllm.vllm_plugin import arrival

pytestmark = pytest.mark.usefixtures("set_rank")


def numbered(monkeypatch, config, name, tensors):
    """What the code of a vLLM model gets for a layer of the files."""
    served = SimpleNamespace(quant_config=config, load_config=SimpleNamespace(load_format="auto"))
    monkeypatch.setattr(arrival, "get_current_vllm_config_or_none", lambda: served)
    return dict(arrival._numbered([(f"{name}.{leaf}", tensor) for leaf, tensor in tensors.items()], SENT))


def quip_sharp(name, parts, k, bits=3):
    """(config for vLLM, tensors, dense weight of each part) of one layer of several parts."""
    rows = tuple(rows for _, rows in parts)
    raw, dense = relaxml_files.quip_sharp_layer(sum(rows), k, bits, rows, seed=bits)
    stored = LayerFormat("e8p", bits)
    source = QuipSharpConfig(stored, parts={name: parts}, codebook_id=relaxml_files.CODEBOOKS[bits][3])
    weights = dict(zip((f"m.{part}.weight" for part, _ in parts), dense.split(rows), strict=True))
    return quant_config("e8p", bits, parts={name: parts}), source.tensors(name, raw), weights


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_queries_keys_and_values_share_a_rotation(monkeypatch, bits):
    parts = (("q_proj", 128), ("k_proj", 32), ("v_proj", 32))
    config, tensors, dense = quip_sharp("m.qkv_proj", parts, 64, bits)
    layer = build(QKVParallelLinear, config, 64, 32, 4, 1, prefix="m.qkv_proj")
    pieces = numbered(monkeypatch, config, "m.qkv_proj", tensors)
    assert list(pieces) == list(dense)
    for part, piece in zip("qkv", pieces.values(), strict=True):
        layer.weight.weight_loader(layer.weight, piece, part)
    x = torch.randn(3, 64)
    y = apply(finish(layer), x)
    assert len(layer.quip_calls) == 1 and layer.quip_order is None
    assert relative(y, x.double() @ torch.cat(list(dense.values())).double().T) < FLOAT32_LINEAR


def test_gate_and_up_change_places(monkeypatch):
    config, tensors, dense = quip_sharp("m.upgate_proj", (("up_proj", 96), ("gate_proj", 96)), 64)
    layer = build(MergedColumnParallelLinear, config, 64, [96, 96], prefix="m.gate_up_proj")
    pieces = numbered(monkeypatch, config, "m.upgate_proj", tensors)
    for i, name in enumerate(("gate_proj", "up_proj")):
        layer.weight.weight_loader(layer.weight, pieces[f"m.{name}.weight"], i)
    x, bias = torch.randn(2, 64), torch.randn(192)
    wanted = torch.cat([dense["m.gate_proj.weight"], dense["m.up_proj.weight"]]).double()
    assert relative(apply(finish(layer), x, bias), x.double() @ wanted.T + bias) < FLOAT32_LINEAR


def test_a_shared_rotation_is_not_cut(set_rank):
    config, _, _ = quip_sharp("m.qkv_proj", (("q_proj", 128), ("k_proj", 64), ("v_proj", 64)), 64)
    set_rank(0, 2)
    with pytest.raises(ValueError, match="rotated as a whole, which cannot be split .* --tensor-parallel-size 1"):
        build(QKVParallelLinear, config, 64, 32, 4, 2, prefix="m.qkv_proj")


def qtip(names, n, k, side, ranks=8):
    """(config for vLLM, tensors and dense weight of each layer) of layers with rotations in chunks."""
    stored = LayerFormat("hyb", 2, **{("input_chunks", "output_chunks")[side - 1]: ranks})
    found = []
    for i, name in enumerate(names):
        raw, dense = relaxml_files.qtip_layer(n[i], k, 2, "quantlut_sym", side, ranks, seed=i)
        source = QtipConfig(stored, layers={name: stored}, specs={name: stored.spec(k, (n[i],), None)})
        found.append((source.tensors(name, raw), dense))
    return quant_config("hyb", 2, layers=dict.fromkeys(names, stored)), found


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_rotations_in_chunks_are_cut_over_ranks(set_rank, ranks):
    """Chunks of 12 and of 16 outputs, of 48 inputs."""
    rank = ranks - 1
    set_rank(rank, ranks)
    config, found = qtip(["m.gate_proj", "m.up_proj"], [1536, 1536], 64, side=2)
    layer = build(MergedColumnParallelLinear, config, 64, [1536, 1536], prefix="m.gate_up_proj")
    for i, (tensors, _) in enumerate(found):
        load(layer, tensors, i)
    x = torch.randn(2, 64)
    own = torch.cat([dense.chunk(ranks)[rank] for _, dense in found])
    assert relative(apply(finish(layer), x), x.double() @ own.double().T) < FLOAT32_LINEAR

    config, [(tensors, dense)] = qtip(["m.down_proj"], [64], 384, side=1)
    layer = build(RowParallelLinear, config, 384, 64, prefix="m.down_proj")
    load(layer, tensors)
    x, own = torch.randn(2, 384 // ranks), dense.chunk(ranks, 1)[rank]
    assert relative(apply(finish(layer), x), x.double() @ own.double().T) < FLOAT32_LINEAR


def test_a_share_within_a_chunk_is_refused(set_rank):
    set_rank(0, 4)
    config, _ = qtip(["m.down_proj"], [64], 384, side=1, ranks=2)
    with pytest.raises(ValueError, match="rotated in blocks of 192, which cannot be split .* of 96"):
        build(RowParallelLinear, config, 384, 64, prefix="m.down_proj")


SKIPPED = ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.gate_proj")
KINDS = {
    "exl3": lambda source, out: exl3_files.write(source, out, "mul1", widths=(128, 128)),
    "quip_sharp-2": lambda source, out: relaxml_files.write_quip_sharp(source, out, 2),
    "quip_sharp-3": lambda source, out: relaxml_files.write_quip_sharp(source, out, 3, wscale=0.8),
    "quip_sharp-4": lambda source, out: relaxml_files.write_quip_sharp(source, out, 4, rescaled=True),
    "qtip": lambda source, out: relaxml_files.write_qtip(source, out, 2, v_bits=4),
    "qtip-rows": lambda source, out: relaxml_files.write_qtip(source, out, 3, mode="1mad", v_bits=5),
    "qtip-2mad": lambda source, out: relaxml_files.write_qtip(source, out, 2, mode="2mad"),
    "qtip-table": lambda source, out: relaxml_files.write_qtip(source, out, 2, "lut", table_bits=14, dim=2),
    "qtip-skipped": lambda source, out: relaxml_files.write_qtip(source, out, 2, skipped=SKIPPED),
    "qtip-chunks": lambda source, out: relaxml_files.write_qtip(source, out, 3, split=True),
}
ARCHITECTURES = ["Llama", "Qwen3", "Gemma3Text"]
SERVED = [
    pytest.param(
        kind,
        one,
        marks=[] if (kind, one) in (("quip_sharp-2", "Llama"), ("qtip-skipped", "Llama")) else pytest.mark.exhaustive,
    )
    for kind in KINDS
    for one in ARCHITECTURES
    if one == "Llama" or kind in ("quip_sharp-3", "qtip", "exl3")
]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize(("kind", "architecture"), SERVED)
def test_served_log_probabilities_are_those_of_the_dequantized_model(engine, tiny_model, tmp_path, kind, architecture):
    source = tiny_model(architecture, hidden_size=192, head_dim=64, num_attention_heads=2, intermediate_size=256)
    KINDS[kind](source, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    assert served_difference(engine, tmp_path / "out") < SERVED_LOG_PROBABILITY
