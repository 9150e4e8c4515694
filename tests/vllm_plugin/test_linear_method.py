# SPDX-License-Identifier: Apache-2.0
"""A layer of vLLM, loaded and repacked, multiplies by the weight that its checkpoint tensors stand for."""

import itertools

import pytest
import torch
from numerics import FLOAT32_LINEAR
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from quip_vllm.formats.spec import LinearSpec
from quip_vllm.ops.cpu import CpuBackend
from quip_vllm.ops.reference import dequantize

FORMATS = [("e8p", 2), ("e8p", 3), ("e8p", 4), ("1mad", 2), ("3inst", 3), ("hyb", 4), ("lut", 1)]
K, N = 64, 128
needs_cpu_library = pytest.mark.skipif(
    CpuBackend().refusal(LinearSpec("1mad", 2, K, (N,))) is not None,
    reason="the compiled CPU library is not built: make build",
)


def build(kind, config, *sizes, prefix="m.layer", **kwargs):
    return kind(*sizes, quant_config=config, prefix=prefix, params_dtype=torch.float32, **{"bias": False, **kwargs})


def dense(tensors, code, bits, block=None):
    """The weight, float32 [n, k], of one projection on disk."""
    spec = LinearSpec(code, bits, len(tensors["su"]), (len(tensors["sv"]),), block)
    return dequantize(spec, tensors)


def finish(layer):
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def apply(layer, x):
    return layer.quant_method.apply(layer, x)


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert torch.linalg.norm(found - expected) <= FLOAT32_LINEAR * torch.linalg.norm(expected)


@pytest.fixture
def x():
    return torch.randn(3, K, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize(("code", "bits"), FORMATS)
def test_every_format(set_rank, quant_config, random_tensors, load, x, code, bits, block):
    tensors = random_tensors(code, bits, N, K)
    layer = build(ReplicatedLinear, quant_config(code, bits, hadamard_block=block), K, N, bias=True)
    load(layer, tensors)
    layer.bias.data.copy_(torch.randn(N))
    y, _ = finish(layer)(x)
    assert_close(y, x @ dense(tensors, code, bits, block).T + layer.bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_and_leading_dimensions_are_those_of_the_input(set_rank, quant_config, random_tensors, load, dtype):
    layer = build(ColumnParallelLinear, quant_config(), K, N)
    load(layer, random_tensors("1mad", 2, N, K))
    y = apply(finish(layer), torch.ones(2, 5, K, dtype=dtype))
    assert y.dtype == dtype and y.shape == (2, 5, N)


@pytest.mark.parametrize(("code", "rates"), [("hyb", (2, 2, 2)), ("hyb", (2, 4, 4)), ("e8p", (3, 4, 2))])
def test_fused_projections_of_any_rate(set_rank, quant_config, random_tensors, load, x, code, rates):
    layers = {f"{s}_proj": (code, bits) for s, bits in zip("qkv", rates, strict=True)}
    config = quant_config(code, 2, layers=layers)
    layer = build(QKVParallelLinear, config, K, 16, 4, 2, prefix="qkv_proj")
    disk = [
        random_tensors(code, bits, n, K, seed=i) for i, (bits, n) in enumerate(zip(rates, (64, 32, 32), strict=True))
    ]
    for shard, tensors in zip("qkv", disk, strict=True):
        load(layer, tensors, shard)
    expected = torch.cat([dense(tensors, code, bits) for tensors, bits in zip(disk, rates, strict=True)])
    assert_close(apply(finish(layer), x), x @ expected.T)
    runs = [[bits, len(list(run))] for bits, run in itertools.groupby(rates)]
    assert [[s.prepared.spec.bits, len(s.prepared.spec.output_sizes)] for s in layer.quip_segments] == runs


def test_only_the_stored_bits_stay_in_memory_and_twice_is_once(set_rank, quant_config, random_tensors, load, x):
    config = quant_config("1mad", 2, layers={"gate_proj": ("1mad", 6)})
    layer = build(MergedColumnParallelLinear, config, K, [32, N], prefix="gate_up_proj")
    load(layer, random_tensors("1mad", 6, 32, K), 0)
    load(layer, random_tensors("1mad", 2, N, K), 1)
    before = apply(finish(layer), x)
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in layer.parameters()}
    assert sum(held.values()) == (32 * 6 + N * 2) * K // 8 + 2 * (32 + N) + 2 * K
    assert not any(hasattr(layer, name) for name in ("packed", "su", "sv"))
    assert not any(p.requires_grad for p in layer.parameters())
    assert torch.equal(apply(finish(layer), x), before)


def test_column_parallel_outputs_join(set_rank, quant_config, random_tensors, load, x):
    disk = [random_tensors("hyb", 2, n, K, seed=n) for n in (64, N)]
    weights = [dense(tensors, "hyb", 2, block=32) for tensors in disk]
    for rank in range(2):
        set_rank(rank, 2)
        config = quant_config("hyb", 2, hadamard_block=32)
        layer = build(MergedColumnParallelLinear, config, K, [64, N], prefix="gate_up_proj")
        for shard, tensors in enumerate(disk):
            load(layer, tensors, shard)
        assert_close(apply(finish(layer), x), x @ torch.cat([w.chunk(2)[rank] for w in weights]).T)


def test_row_parallel_outputs_add_up(set_rank, quant_config, random_tensors, load, x):
    tensors, y = random_tensors("e8p", 3, 96, K), 0
    for rank in range(2):
        set_rank(rank, 2)
        layer = build(RowParallelLinear, quant_config("e8p", 3, hadamard_block=32), K, 96)
        load(layer, tensors)
        y = y + apply(finish(layer), x.chunk(2, dim=1)[rank])
    assert_close(y, x @ dense(tensors, "e8p", 3, block=32).T)


def test_replicated_key_value_heads(set_rank, quant_config, random_tensors, load, x):
    disk = {s: random_tensors("1mad", 2, n, K, seed=n) for s, n in (("q", 128), ("k", 32), ("v", 32))}
    weights = {s: dense(tensors, "1mad", 2, block=16) for s, tensors in disk.items()}
    for rank in range(4):
        set_rank(rank, 4)
        layer = build(QKVParallelLinear, quant_config(hadamard_block=16), K, 16, 8, 2, prefix="qkv_proj")
        for shard, tensors in disk.items():
            load(layer, tensors, shard)
        k, v = weights["k"].chunk(2)[rank // 2], weights["v"].chunk(2)[rank // 2]
        assert_close(apply(finish(layer), x), x @ torch.cat([weights["q"].chunk(4)[rank], k, v]).T)


@pytest.mark.parametrize(("size", "block"), [(1, None), (1, 64), (2, 16)])
def test_projection_fused_on_disk_has_one_rotation(set_rank, quant_config, random_tensors, load, x, size, block):
    tensors = random_tensors("hyb", 2, N, K)
    shards = dense(tensors, "hyb", 2, block).split([64, 32, 32])
    for rank in range(size):
        set_rank(rank, size)
        config = quant_config("hyb", 2, hadamard_block=block)
        layer = build(QKVParallelLinear, config, K, 16, 4, 2, prefix="qkv_proj")
        load(layer, tensors, None)
        assert_close(apply(finish(layer), x), x @ torch.cat([w.chunk(size)[rank] for w in shards]).T)
        assert [s.prepared.spec.output_sizes for s in layer.quip_segments] == [(N // size,)]


def test_several_shards_in_one_tensor(set_rank, quant_config, random_tensors, load, x):
    config = quant_config("hyb", 2)
    config.packed_modules_mapping["in_proj_qkvz"] = ["in_proj_qkv", "in_proj_z"]
    layer = build(MergedColumnParallelLinear, config, K, [32, 32, 64, 64], prefix="in_proj_qkvz")
    qkv, z = (random_tensors("hyb", 2, n, K, seed=n) for n in (128, 64))
    load(layer, z, 3)
    load(layer, qkv, (0, 1, 2))
    assert_close(apply(finish(layer), x), x @ torch.cat([dense(t, "hyb", 2) for t in (qkv, z)]).T)


@pytest.mark.parametrize("name", ["residual_codes", "codes", "su", "sv"])
def test_missing_tensor_is_named(set_rank, quant_config, random_tensors, load, name):
    layer = build(MergedColumnParallelLinear, quant_config("e8p", 3), K, [N, N], prefix="gate_up_proj")
    tensors = random_tensors("e8p", 3, N, K)
    load(layer, tensors, 0)
    load(layer, {other: tensor for other, tensor in tensors.items() if other != name}, 1)
    with pytest.raises(ValueError, match=f"gate_up_proj: tensor {name} of up_proj is not in the checkpoint"):
        finish(layer)


def test_projection_stored_twice_is_refused(set_rank, quant_config, random_tensors, load):
    layer = build(MergedColumnParallelLinear, quant_config(), K, [N, N], prefix="gate_up_proj")
    load(layer, random_tensors("1mad", 2, 2 * N, K), None)
    load(layer, random_tensors("1mad", 2, N, K), 0)
    with pytest.raises(ValueError, match="both fused and by projection"):
        finish(layer)


def test_dummy_weights_need_no_checkpoint(set_rank, quant_config):
    with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format="dummy"))):
        layer = build(QKVParallelLinear, quant_config(), K, 16, 4, 2, prefix="qkv_proj")
    for param in layer.parameters():
        param.data.zero_()
    assert torch.equal(apply(finish(layer), torch.ones(1, K)), torch.zeros(1, N))


@needs_cpu_library
@pytest.mark.parametrize(("code", "rates"), [("hyb", (2, 4)), ("lut", (2, 2)), ("e8p", (3, 3))])
def test_cpu_backend_compiles_to_one_graph(set_rank, quant_config, random_tensors, load, x, monkeypatch, code, rates):
    monkeypatch.setenv("QUIP_VLLM_BACKEND", "cpu")
    config = quant_config(code, 2, layers={"gate_proj": (code, rates[0]), "up_proj": (code, rates[1])})
    layer = build(MergedColumnParallelLinear, config, K, [N, N], prefix="gate_up_proj", bias=True)
    disk = [random_tensors(code, bits, N, K, seed=i) for i, bits in enumerate(rates)]
    for shard, tensors in enumerate(disk):
        load(layer, tensors, shard)
    layer.bias.data.copy_(torch.randn(2 * N))
    compiled = torch.compile(finish(layer), fullgraph=True, backend="aot_eager")
    expected = torch.cat([dense(tensors, code, bits) for tensors, bits in zip(disk, rates, strict=True)])
    with torch.inference_mode():
        assert_close(compiled(x)[0], x @ expected.T + layer.bias)
