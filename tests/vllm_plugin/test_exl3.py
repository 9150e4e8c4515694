# SPDX-License-Identifier: Apache-2.0
"""EXL3 in vLLM: layers against the dense weights of the specification, shares of ranks, refusals, and served models."""

import importlib.util
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import exl3_files
import pytest
import torch
from exl3_files import quantized_layer
from numerics import FLOAT32_LINEAR, SERVED_LOG_PROBABILITY, relative
from safetensors.torch import save_file
from served_layers import FUSED, apply, build, finish, load, served_difference
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from quip_vllm.checkpoint import exl3
from quip_vllm.vllm_plugin import arrival
from quip_vllm.vllm_plugin import exl3 as plugin
from quip_vllm.vllm_plugin.exl3 import Exl3QuipConfig

pytestmark = pytest.mark.usefixtures("set_rank")


LLAMA = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 25, "intermediate_size": 1, "vocab_size": 1}


def config_of(layers, **model):
    """The config of a checkpoint with these layers (name -> tensors) that vLLM has read."""
    raw = {"quant_method": "exl3", **model.pop("quantization", {})}
    found = {
        f"{name}.{leaf}": exl3.Header(tuple(tensor.shape), tensor.dtype)
        for name, tensors in layers.items()
        for leaf, tensor in tensors.items()
    }
    config = Exl3QuipConfig.from_config(raw)
    config.checkpoint = config.on_disk = exl3.read({"quantization_config": raw, **model}, found)
    config.packed_modules_mapping = dict(FUSED)
    return config


def put(layer, tensors, dense, *shard_id):
    """What a vLLM model does with the weight [n, k] that a layer of the checkpoint, or its slices, stands for."""
    load(layer, tensors, *shard_id, size=tuple(dense.shape))


@pytest.mark.parametrize(
    ("code", "bits"), [*product(["3inst", "mcg", "mul1"], [1, 4, 7]), ("mul1", 1.5), ("mul1", 2.5), ("mul1", 3.5)]
)
@pytest.mark.parametrize("older", [False, True])
def test_a_layer_with_a_bias(code, bits, older):
    tensors, dense = quantized_layer(256, 384, bits, code, older, seed=int(bits))
    layer = build(ReplicatedLinear, config_of({"m.layer": tensors}), 384, 256, bias=True)
    put(layer, tensors, dense)
    layer.bias.data.copy_(torch.randn(256))
    x = torch.randn(3, 384)
    y, _ = finish(layer)(x)
    assert relative(y, x.double() @ dense.double().T + layer.bias) < FLOAT32_LINEAR
    assert not [name for name, _ in layer.named_parameters() if name in exl3.LEAVES]


@pytest.mark.parametrize("rates", [(2, 5), (2.5, 3)])
def test_parts_have_bits_and_input_vectors_of_their_own_and_padding_is_cut(rates):
    parts = {
        name: quantized_layer(200, 192, bits, "mul1", seed=i)
        for i, (name, bits) in enumerate(zip(("gate", "up"), rates, strict=True))
    }
    config = config_of({f"m.{name}_proj": tensors for name, (tensors, _) in parts.items()})
    # the sizes of a model that is not known are those of the files: say what vLLM's layer has
    layer = build(MergedColumnParallelLinear, config, 192, [200, 200], prefix="m.gate_up_proj")
    for i, (tensors, weight) in enumerate(parts.values()):
        put(layer, tensors, weight, i)
    x = torch.randn(2, 192)
    y = apply(finish(layer), x)
    dense = torch.cat([weight for _, weight in parts.values()])
    assert y.shape == (2, 400) and relative(y, x.double() @ dense.double().T) < FLOAT32_LINEAR


@pytest.mark.parametrize("rank", [0, 1])
def test_shares_of_ranks_are_cut_at_blocks(set_rank, rank):
    sizes = {"q": 512, "k": 256, "v": 256}
    parts = {name: quantized_layer(n, 256, 3, "mcg", seed=n) for name, n in sizes.items()}
    set_rank(rank, 2)
    config = config_of({f"m.{name}_proj": tensors for name, (tensors, _) in parts.items()})
    layer = build(QKVParallelLinear, config, 256, 128, 4, 2, prefix="m.qkv_proj")
    for name, (tensors, weight) in parts.items():
        put(layer, tensors, weight, name)
    x = torch.randn(2, 256)
    own = [
        dense[rank * n // 2 : (rank + 1) * n // 2] for n, (_, dense) in zip(sizes.values(), parts.values(), strict=True)
    ]
    assert relative(apply(finish(layer), x), x.double() @ torch.cat(own).double().T) < FLOAT32_LINEAR

    tensors, dense = quantized_layer(128, 512, 2, "mcg")
    layer = build(RowParallelLinear, config_of({"m.down_proj": tensors}), 512, 128, prefix="m.down_proj")
    put(layer, tensors, dense)
    share = slice(rank * 256, rank * 256 + 256)
    x = torch.randn(2, 256)
    assert relative(apply(finish(layer), x), x.double() @ dense[:, share].double().T) < FLOAT32_LINEAR


def test_a_share_within_a_block_is_refused(set_rank):
    tensors, _ = quantized_layer(128, 384, 2, "mul1")
    set_rank(0, 2)
    with pytest.raises(ValueError, match="m.down_proj in .* of 192: .* multiples of 128; serve with fewer"):
        build(RowParallelLinear, config_of({"m.down_proj": tensors}), 384, 128, prefix="m.down_proj")


def test_what_is_not_in_the_files_is_refused():
    tensors, _ = quantized_layer(128, 128, 2, "mul1")
    config = config_of({"m.up_proj.slice.0": tensors, "m.up_proj.slice.1": tensors})
    with pytest.raises(ValueError, match="m.gate_proj is not in the checkpoint, quantized or not"):
        build(MergedColumnParallelLinear, config, 128, [256, 256], prefix="m.gate_up_proj")


def in_slices(name, n, k, widths, inner):
    """(tensors by the names of the slices, the tensors of each, the dense weight) of a layer in slices."""
    made = [quantized_layer(*((n, one) if inner else (one, k)), 2 + i, "mul1", seed=i) for i, one in enumerate(widths)]
    slices = [tensors for tensors, _ in made]
    dense = torch.cat([weight for _, weight in made], 1 if inner else 0)
    return {f"{name}.slice.{i}": tensors for i, tensors in enumerate(slices)}, slices, dense


RANKS = [(0, 1), (0, 2), (1, 2), (3, 4)]


@pytest.mark.parametrize(("rank", "ranks"), RANKS)
def test_slices_of_outputs_join(set_rank, rank, ranks):
    """Beside a part that is whole; a rank's share begins and ends within slices."""
    set_rank(rank, ranks)
    names, slices, gate = in_slices("m.gate_proj", 512, 256, (384, 128), inner=False)
    tensors, up = quantized_layer(512, 256, 3, "mul1", seed=7)
    config = config_of({**names, "m.up_proj": tensors})
    layer = build(MergedColumnParallelLinear, config, 256, [512, 512], prefix="m.gate_up_proj")
    put(layer, tensors, up, 1)
    put(layer, slices, gate, 0)
    own = torch.cat([one.chunk(ranks)[rank] for one in (gate, up)])
    x, bias = torch.randn(3, 256), torch.randn(len(own))
    assert relative(apply(finish(layer), x, bias), x.double() @ own.double().T + bias) < FLOAT32_LINEAR
    held = sum(tensor.nbytes for tensor in layer.parameters())
    assert held < len(own) * 256 // 2 + 20 * (256 + len(own))  # no rank has the slices of others


@pytest.mark.parametrize(("rank", "ranks"), RANKS)
def test_slices_of_inputs_are_summed(set_rank, rank, ranks):
    set_rank(rank, ranks)
    names, slices, dense = in_slices("m.down_proj", 128, 512, (384, 128), inner=True)
    layer = build(RowParallelLinear, config_of(names), 512, 128, prefix="m.down_proj")
    put(layer, slices, dense)
    own = dense.chunk(ranks, 1)[rank]
    x, bias = torch.randn(3, own.shape[1]), torch.randn(128)
    assert relative(apply(finish(layer), x, bias), x.double() @ own.double().T + bias) < FLOAT32_LINEAR


def test_the_last_slice_is_padded_and_weights_are_loaded_again():
    layer = None
    for seed in range(2):
        names, slices, dense = in_slices("m.down_proj", 100, 300, (128, 128, 44), inner=True)
        for tensors in slices:
            tensors["svh"] = tensors["svh"] * (1 + seed)
        dense = dense * (1 + seed)
        config = config_of(names)
        shapes = {f"m.down_proj.slice.{i}": (100, width) for i, width in enumerate((128, 128, 44))}
        config.checkpoint = replace(config.checkpoint, shapes=shapes)
        if layer is None:
            layer = build(RowParallelLinear, config, 300, 100, prefix="m.down_proj")
            record_metadata_for_reloading(layer)
            put(layer, slices, dense)
            finish(layer)
        else:
            initialize_layerwise_reload(layer)
            put(layer, slices, dense)
            finalize_layerwise_reload(layer, None)
        x = torch.randn(3, 300)
        assert relative(apply(layer, x), x.double() @ dense.double().T) < FLOAT32_LINEAR


def test_slices_that_do_not_make_up_the_layer_are_refused():
    names, _, _ = in_slices("m.down_proj", 128, 512, (384, 128), inner=True)
    config = config_of(names)
    with pytest.raises(ValueError, match=r"m.down_proj is stored in slices of \[.*\] .* make up \(128, 640\)"):
        build(RowParallelLinear, config, 640, 128, prefix="m.down_proj")
    config.checkpoint = replace(config.checkpoint, shapes={})
    with pytest.raises(ValueError, match=r"m.down_proj is stored in slices of \[\(0, 0\), "):
        build(RowParallelLinear, config, 512, 128, prefix="m.down_proj")


def test_slices_are_numbered_together(monkeypatch):
    """vLLM's code gets one weight, under the name of the whole layer."""
    names, slices, dense = in_slices("m.up_proj", 512, 256, (384, 128), inner=False)
    config = config_of(names)
    served = SimpleNamespace(quant_config=config, load_config=SimpleNamespace(load_format="auto"))
    monkeypatch.setattr(arrival, "get_current_vllm_config_or_none", lambda: served)
    files = [(f"{name}.{leaf}", tensor) for name, tensors in names.items() for leaf, tensor in tensors.items()]
    sent = []
    ((name, numbers),) = arrival._numbered(reversed(files), sent)
    assert name == "m.up_proj.weight" and numbers.shape == dense.shape
    assert [one.keys() for one in sent[0].slices] == [one.keys() for one in slices]
    assert torch.equal(sent[0].slices[1]["trellis"], slices[1]["trellis"])


def test_a_missing_tensor_is_named():
    tensors, dense = quantized_layer(128, 128, 2, "mul1")
    layer = build(ReplicatedLinear, config_of({"m.layer": tensors}), 128, 128)
    put(layer, {name: tensor for name, tensor in tensors.items() if name != "svh"}, dense)
    with pytest.raises(ValueError, match="tensor sv of m.layer is not in the checkpoint"):
        finish(layer)


def test_headers_of_the_hub(monkeypatch):
    """The files of a model on the hub are not here yet when vLLM asks for its layers."""
    tensors, _ = quantized_layer(128, 128, 3, "mul1")
    names = {torch.int16: "I16", torch.float16: "F16", torch.int32: "I32"}
    found = {f"m.layer.{leaf}": {"dtype": names[t.dtype], "shape": list(t.shape)} for leaf, t in tensors.items()}
    module = "vllm.transformers_utils.config.get_safetensors_params_metadata"
    monkeypatch.setattr(
        module, lambda model, revision=None: dict(found) if (model, revision) == ("a/b", "3.0bpw") else {}
    )
    config, model = Exl3QuipConfig.from_config({"quant_method": "exl3"}), SimpleNamespace(to_dict=dict)
    config.maybe_update_config("a/b", hf_config=model, revision="3.0bpw")
    assert config.checkpoint.layers == {"m.layer": exl3.stored_format("mul1", 3)} and config.get_name() == plugin.METHOD
    with pytest.raises(ValueError, match="headers of c/d's safetensors files cannot be read"):
        config.maybe_update_config("c/d", hf_config=model)


def test_a_revision_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    """Published models have a branch per bit rate."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, model = tmp_path / "models--a--b", SimpleNamespace(to_dict=dict)
    for i, (branch, bits) in enumerate({"main": 2, "3.0bpw": 3}.items()):
        tensors, _ = quantized_layer(128, 128, bits, "mul1")
        snapshot = repository / "snapshots" / (f"{i}" * 40)
        snapshot.mkdir(parents=True)
        save_file({f"m.layer.{leaf}": one for leaf, one in tensors.items()}, snapshot / "model.safetensors")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(snapshot.name)
    for revision, bits in ((None, 2), ("main", 2), ("3.0bpw", 3), ("1" * 40, 3)):
        config = Exl3QuipConfig.from_config({"quant_method": "exl3"})
        config.maybe_update_config("a/b", hf_config=model, revision=revision)
        assert config.checkpoint.layers == {"m.layer": exl3.stored_format("mul1", bits)}


def test_padded_biases_are_cut(monkeypatch):
    tensors, _ = quantized_layer(100, 128, 2, "mul1")
    config = config_of({"model.layers.0.self_attn.q_proj": tensors}, model_type="llama", **LLAMA)
    served = SimpleNamespace(quant_config=config, load_config=SimpleNamespace(load_format="auto"))
    monkeypatch.setattr(arrival, "get_current_vllm_config_or_none", lambda: served)
    on_disk = {f"model.layers.0.self_attn.q_proj.{leaf}": tensor for leaf, tensor in tensors.items()}
    on_disk["model.layers.0.self_attn.q_proj.bias"] = torch.arange(128.0)
    (_, bias), (name, numbers) = arrival._numbered(on_disk.items(), [])
    assert torch.equal(bias, torch.arange(100.0))
    assert name == "model.layers.0.self_attn.q_proj.weight" and numbers.shape == (100, 128)


SIZES = {"intermediate_size": 320, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
SERVED = [("Qwen3", "mcg"), ("Llama", "mul1")]
SERVED += [pytest.param("Gemma3Text", "3inst", marks=pytest.mark.exhaustive)]
SERVED += [pytest.param("Qwen2", "mul1", marks=pytest.mark.exhaustive)]  # with biases


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize(("architecture", "code"), SERVED)
def test_served_log_probabilities_are_those_of_the_dequantized_model(engine, tiny_model, tmp_path, architecture, code):
    """Padded sizes, mixed bits, and a quantized head beside the embedding to which it was tied.

    Qwen 3 has slices, and Llama half rates.
    """
    rates = {"q": 2, "k": 5, "v": 8} | ({"o": 1.5, "up": 2.5, "down": 3.5} if architecture == "Llama" else {})
    exl3_files.write(
        tiny_model(architecture, **SIZES, hidden_size=128 if architecture == "Qwen2" else 192),
        tmp_path / "out",
        code,
        lambda name: rates.get(name.rpartition(".")[2].removesuffix("_proj"), 3),
        widths=(128, 128, 64) if architecture == "Qwen3" else (),
    )
    assert served_difference(engine, tmp_path / "out") < SERVED_LOG_PROBABILITY
