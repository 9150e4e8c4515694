# SPDX-License-Identifier: Apache-2.0
"""A layer of vLLM, loaded and prepared, multiplies by the weight that its checkpoint tensors stand for."""

import itertools

import pytest
import torch
from served_layers import apply, assert_close, build, dense, finish, load, quant_config, random_tensors
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
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

from quip_vllm.formats.spec import LinearSpec
from quip_vllm.ops.cpu import CpuBackend
from quip_vllm.ops.reference import dequantize

FORMATS = [("e8p", 2), ("e8p", 3), ("e8p", 4), ("1mad", 2), ("3inst", 3), ("hyb", 4), ("lut", 1), ("grid", 8)]
SPLIT = [("e8p", 3), ("1mad", 3), ("hyb", 2)]
K, N = 64, 128
QKV = (64, 32, 32)
needs_cpu_library = pytest.mark.skipif(
    CpuBackend().refusal(LinearSpec("1mad", 2, K, (N,))) is not None,
    reason="the compiled CPU library is not built: make build",
)
pytestmark = pytest.mark.usefixtures("set_rank")


@pytest.fixture
def x():
    return torch.randn(3, K, generator=torch.Generator().manual_seed(7))


def build_qkv(config, **kwargs):
    return build(QKVParallelLinear, config, K, 16, 4, 2, prefix="qkv_proj", **kwargs)


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize(("code", "bits"), FORMATS)
def test_every_format(x, code, bits, block):
    tensors = random_tensors(code, bits, N, K)
    layer = build(ReplicatedLinear, quant_config(code, bits, hadamard_block=block), K, N, bias=True)
    load(layer, tensors)
    layer.bias.data.copy_(torch.randn(N))
    y, _ = finish(layer)(x)
    assert_close(y, x @ dense(tensors, code, bits, block).T + layer.bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_and_leading_dimensions_are_those_of_the_input(dtype):
    layer = build(ColumnParallelLinear, quant_config(), K, N)
    load(layer, random_tensors("1mad", 2, N, K))
    y = apply(finish(layer), torch.ones(2, 5, K, dtype=dtype))
    assert y.dtype == dtype and y.shape == (2, 5, N)


@pytest.mark.parametrize(
    "formats",
    [
        [("hyb", 2), ("hyb", 2), ("hyb", 2)],
        [("hyb", 2), ("hyb", 4), ("hyb", 4)],
        [("e8p", 3), ("e8p", 4), ("e8p", 2)],
        [("hyb", 2), ("1mad", 4), ("e8p", 3)],
    ],
    ids=str,
)
def test_fused_parts_of_any_format(x, formats):
    layers = {f"{s}_proj": stored for s, stored in zip("qkv", formats, strict=True)}
    layer = build_qkv(quant_config("1mad", 3, layers=layers))
    disk = [random_tensors(*stored, n, K, seed=i) for i, (stored, n) in enumerate(zip(formats, QKV, strict=True))]
    for part in (2, 0, 1):
        load(layer, disk[part], "qkv"[part])
    expected = torch.cat([dense(tensors, *stored) for tensors, stored in zip(disk, formats, strict=True)])
    assert_close(apply(finish(layer), x, torch.ones(N)), x @ expected.T + 1)
    runs = [(*stored, len(list(run))) for stored, run in itertools.groupby(formats)]
    specs = [call.prepared.spec for call in layer.quip_calls]
    assert [(spec.code, spec.bits, len(spec.output_sizes)) for spec in specs] == runs


def test_parts_with_input_vectors_of_their_own_are_calls_of_their_own(x):
    layer = build_qkv(quant_config())
    disk = [random_tensors("1mad", 2, n, K, seed=i) for i, n in enumerate(QKV)]
    disk[2]["su"] = torch.linspace(-1, 1, K)  # float32
    for part, tensors in enumerate(disk):
        load(layer, tensors, part)
    assert_close(apply(finish(layer), x), x @ torch.cat([dense(tensors, "1mad", 2) for tensors in disk]).T)
    assert [call.prepared.spec.output_sizes for call in layer.quip_calls] == [QKV[:2], QKV[2:]]
    assert [call.prepared.spec.vector_dtype for call in layer.quip_calls] == [torch.float16, torch.float32]


@pytest.mark.parametrize("ordinary", ["q", "k", "v", "qv"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_with_an_ordinary_weight(set_rank, x, ordinary, size):
    """Beside quantized ones; with four ranks two of them hold the same keys and values."""
    disk = {s: random_tensors("1mad", 2, n, K, seed=i) for i, (s, n) in enumerate(zip("qkv", QKV, strict=True))}
    weights = {s: dense(tensors, "1mad", 2, block=16) for s, tensors in disk.items()}
    heads = min(size, 2)
    for rank in range(size):
        set_rank(rank, size)
        kept = tuple(f"{s}_proj" for s in ordinary)
        layer = build_qkv(quant_config(hadamard_block=16, modules_to_not_convert=kept), dtype=torch.float32)
        for s in "vqk":
            if s in ordinary:
                layer.weight.weight_loader(layer.weight, weights[s], s)
            else:
                load(layer, disk[s], s)
        k, v = (weights[s].chunk(heads)[rank * heads // size] for s in "kv")
        own = torch.cat([weights["q"].chunk(size)[rank], k, v])
        assert_close(apply(finish(layer), x, torch.ones(len(own))), x @ own.T + 1)


def test_an_ordinary_weight_of_one_part_is_loaded_again_in_the_dtype_of_the_model(x):
    layer = build_qkv(quant_config(modules_to_not_convert=("k_proj",)), dtype=torch.bfloat16)
    record_metadata_for_reloading(layer)
    for seed in (0, 10):
        disk = [random_tensors("1mad", 2, n, K, seed + i) for i, n in enumerate(QKV)]
        own = dense(disk[1], "1mad", 2)
        if seed:
            addresses = {name: param.data_ptr() for name, param in layer.named_parameters()}
            initialize_layerwise_reload(layer)
        for shard, tensors in zip("qkv", disk, strict=True):
            if shard == "k":
                layer.weight.weight_loader(layer.weight, own, shard)
            else:
                load(layer, tensors, shard)
        if seed:
            finalize_layerwise_reload(layer, None)
        else:
            finish(layer)
        found = apply(layer, x.bfloat16())[:, QKV[0] : QKV[0] + QKV[1]]
        assert torch.equal(found, torch.nn.functional.linear(x.bfloat16(), own.bfloat16()))
    assert {name: param.data_ptr() for name, param in layer.named_parameters()} == addresses
    assert sum(param.nbytes for name, param in layer.named_parameters() if "weight" in name) == 2 * QKV[1] * K


def test_an_ordinary_weight_that_is_missing_or_another_is_refused():
    layer = build_qkv(quant_config(modules_to_not_convert=("k_proj",)))
    tensors = random_tensors("1mad", 2, QKV[1], K)
    with pytest.raises(ValueError, match=r"k_proj: .* of torch.float32 \[32, 63\], .* of \[32, 64\] is wanted"):
        layer.weight.weight_loader(layer.weight, torch.zeros(QKV[1], K - 1), "k")
    with pytest.raises(ValueError, match="k_proj: .* of torch.int32 "):
        load(layer, tensors, "k")
    with pytest.raises(ValueError, match=r"q_proj, k_proj, v_proj: .* \[128, 64\]"):
        layer.weight.weight_loader(layer.weight, torch.zeros(N, K))
    for shard, n in (("q", QKV[0]), ("v", QKV[2])):
        load(layer, random_tensors("1mad", 2, n, K), shard)
    with pytest.raises(ValueError, match="qkv_proj: the weight of k_proj is not in the checkpoint"):
        finish(layer)


def test_only_the_stored_bits_stay_in_memory_and_twice_is_once(x):
    config = quant_config("1mad", 2, layers={"gate_proj": ("1mad", 6)})
    layer = build(MergedColumnParallelLinear, config, K, [32, N], prefix="gate_up_proj")
    load(layer, random_tensors("1mad", 6, 32, K), 0)
    load(layer, random_tensors("1mad", 2, N, K), 1)
    before = apply(finish(layer), x)
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in layer.parameters()}
    assert sum(held.values()) == (32 * 6 + N * 2) * K // 8 + 2 * (32 + N) + 2 * 2 * K
    assert not any(hasattr(layer, name) for name in ("packed", "su", "sv"))
    assert not any(p.requires_grad for p in layer.parameters())
    assert torch.equal(apply(finish(layer), x), before)


@pytest.mark.parametrize(("code", "bits"), SPLIT)
def test_column_parallel_outputs_join(set_rank, x, code, bits):
    disk = [random_tensors(code, bits, n, K, seed=n) for n in (64, N)]
    weights = [dense(tensors, code, bits, block=32) for tensors in disk]
    for rank in range(2):
        set_rank(rank, 2)
        config = quant_config(code, bits, hadamard_block=32)
        layer = build(MergedColumnParallelLinear, config, K, [64, N], prefix="gate_up_proj")
        for part in (1, 0):
            load(layer, disk[part], part)
        assert_close(apply(finish(layer), x), x @ torch.cat([w.chunk(2)[rank] for w in weights]).T)


@pytest.mark.parametrize(("code", "bits"), SPLIT)
def test_row_parallel_outputs_add_up(set_rank, x, code, bits):
    tensors, y = random_tensors(code, bits, 96, K), 0
    for rank in range(2):
        set_rank(rank, 2)
        layer = build(RowParallelLinear, quant_config(code, bits, hadamard_block=32), K, 96)
        load(layer, tensors)
        y = y + apply(finish(layer), x.chunk(2, dim=1)[rank])
    assert_close(y, x @ dense(tensors, code, bits, block=32).T)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_key_value_heads_are_split_or_replicated(set_rank, x, size):
    disk = {s: random_tensors("hyb", 2, n, K, seed=n) for s, n in (("q", 128), ("k", 32), ("v", 32))}
    weights = {s: dense(tensors, "hyb", 2, block=16) for s, tensors in disk.items()}
    heads = min(size, 2)  # of keys and of values
    for rank in range(size):
        set_rank(rank, size)
        config = quant_config("hyb", 2, hadamard_block=16)
        layer = build(QKVParallelLinear, config, K, 16, 8, 2, prefix="qkv_proj", bias=True)
        for shard, tensors in disk.items():
            load(layer, tensors, shard)
            layer.bias.weight_loader(layer.bias, torch.ones(len(tensors["sv"])), shard)  # vLLM's own
        k, v = (weights[s].chunk(heads)[rank * heads // size] for s in "kv")
        expected = x @ torch.cat([weights["q"].chunk(size)[rank], k, v]).T + 1
        assert_close(finish(layer)(x)[0], expected)


def test_layers_without_tensor_parallelism_are_whole_on_every_rank(set_rank, x):
    set_rank(1, 2)
    tensors = random_tensors("1mad", 2, N, K)
    for kind, sizes, more in (
        (ReplicatedLinear, N, {}),
        (MergedColumnParallelLinear, [N], {"disable_tp": True}),
    ):
        layer = build(kind, quant_config(), K, sizes, **more)
        load(layer, tensors)
        assert_close(apply(finish(layer), x), x @ dense(tensors, "1mad", 2).T)


@pytest.mark.parametrize(("size", "block"), [(1, None), (1, 64), (2, 16)])
def test_parts_fused_on_disk_have_one_rotation(set_rank, x, size, block):
    tensors = random_tensors("hyb", 2, N, K)
    parts = dense(tensors, "hyb", 2, block).split(QKV)
    for rank in range(size):
        set_rank(rank, size)
        layer = build_qkv(quant_config("hyb", 2, hadamard_block=block))
        load(layer, tensors, None)
        assert_close(apply(finish(layer), x), x @ torch.cat([w.chunk(size)[rank] for w in parts]).T)
        assert [call.prepared.spec.output_sizes for call in layer.quip_calls] == [(N // size,)]


def test_several_parts_in_one_tensor(x):
    config = quant_config("hyb", 2)
    config.packed_modules_mapping["in_proj_qkvz"] = ["in_proj_qkv", "in_proj_z"]
    layer = build(MergedColumnParallelLinear, config, K, [32, 32, 64, 64], prefix="in_proj_qkvz")
    qkv, z = (random_tensors("hyb", 2, n, K, seed=n) for n in (128, 64))
    load(layer, z, 3)
    load(layer, qkv, (0, 1, 2))
    assert_close(apply(finish(layer), x), x @ torch.cat([dense(t, "hyb", 2) for t in (qkv, z)]).T)
    assert [call.prepared.spec.output_sizes for call in layer.quip_calls] == [(128, 64)]


@pytest.mark.parametrize("sizes", [(328, 248), (328, 256), (256, 328)])
def test_outputs_without_a_transform_in_one_tensor(x, sizes):
    """328 have none: as a part of 576, which have one, and of 584, which are filled up as a whole."""
    filled = {576: 576, 584: 592}[sum(sizes)]
    tensors = random_tensors("e8p", 2, filled, K)
    layer = build(MergedColumnParallelLinear, quant_config("e8p"), K, list(sizes))
    load(layer, tensors, size=(sum(sizes), K))
    spec = LinearSpec("e8p", 2, K, (sum(sizes),))
    assert_close(apply(finish(layer), x), x @ dequantize(spec, tensors).T)


def test_dummy_weights_need_no_checkpoint():
    with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format="dummy"))):
        layer = build_qkv(quant_config(layers={"k_proj": ("e8p", 3)}, modules_to_not_convert=("v_proj",)))
        finish(layer)
    assert torch.equal(apply(layer, torch.ones(1, K)), torch.zeros(1, N))


@pytest.mark.parametrize("formats", [(("1mad", 2),) * 3, (("hyb", 2), ("e8p", 3), ("e8p", 4))], ids=str)
def test_reloaded_weights_take_the_place_of_the_first(x, formats):
    """As `reload_weights` of vLLM does it: into the same memory, which compiled code and CUDA graphs read."""
    layer = build_qkv(quant_config(layers={f"{s}_proj": stored for s, stored in zip("qkv", formats, strict=True)}))
    record_metadata_for_reloading(layer)
    for seed in (0, 10):
        disk = [random_tensors(*stored, n, K, seed + i) for i, (stored, n) in enumerate(zip(formats, QKV, strict=True))]
        if seed:
            addresses = {name: param.data_ptr() for name, param in layer.named_parameters()}
            initialize_layerwise_reload(layer)
        for shard, tensors in zip("qkv", disk, strict=True):
            load(layer, tensors, shard)
        if seed:
            finalize_layerwise_reload(layer, None)
        else:
            finish(layer)
        weight = torch.cat([dense(tensors, *stored) for tensors, stored in zip(disk, formats, strict=True)])
        assert_close(apply(layer, x), x @ weight.T)
    assert {name: param.data_ptr() for name, param in layer.named_parameters()} == addresses


@needs_cpu_library
@pytest.mark.parametrize(
    "formats", [(("hyb", 2), ("1mad", 4)), (("lut", 2), ("lut", 2)), (("e8p", 3), ("e8p", 3))], ids=str
)
def test_cpu_backend_compiles_to_one_graph(x, monkeypatch, formats):
    monkeypatch.setenv("QUIP_VLLM_BACKEND", "cpu")
    config = quant_config(layers=dict(zip(("gate_proj", "up_proj"), formats, strict=True)))
    layer = build(MergedColumnParallelLinear, config, K, [N, N], prefix="gate_up_proj", bias=True)
    disk = [random_tensors(*stored, N, K, seed=i) for i, stored in enumerate(formats)]
    for part, tensors in enumerate(disk):
        load(layer, tensors, part)
    layer.bias.data.copy_(torch.randn(2 * N))
    compiled = torch.compile(finish(layer), fullgraph=True, backend="aot_eager")
    expected = torch.cat([dense(tensors, *stored) for tensors, stored in zip(disk, formats, strict=True)])
    with torch.inference_mode():
        assert_close(compiled(x)[0], x @ expected.T + layer.bias)
