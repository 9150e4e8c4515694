# SPDX-License-Identifier: Apache-2.0
"""vLLM's layers on the CUDA backend, whose kernels an emulator runs: loaded, repacked, multiplied, compiled, split."""

from types import SimpleNamespace

import pytest
import served_layers
import torch
from numerics import SAME_DTYPE_FACTOR
from random_layers import RATE_IDS, RATES
from served_layers import apply, dense, finish, held, load, quant_config, random_tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.utils.torch_utils import set_default_torch_dtype

from quip_vllm.checkpoint.config import Head, LayerFormat
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.ops import cuda as cuda_module
from quip_vllm.ops import cuda_layout, dispatch, rotations

K = 576
HALVES = [torch.float16, torch.bfloat16]
SHARED = 4 * (32768 + 2 * 12 * 12 + 1)
"""Bytes that layers may share: the values of LUT, and Hadamard matrices of order 12 and 1."""

HEAD_FORMATS = [("e8p", 2), ("e8p", 4), ("1mad", 4), ("hyb", 2), ("lut", 3), ("grid", 4)]


@pytest.fixture(autouse=True)
def cuda_only(reference_backend, cuda, monkeypatch):
    """The CUDA backend is the only one there is, and takes CPU tensors."""
    monkeypatch.delenv("QUIP_VLLM_BACKEND")
    monkeypatch.setattr(dispatch, "backends", lambda device_type: (cuda,))


def build(kind, config, *sizes, dtype=torch.float16, **kwargs):
    return served_layers.build(kind, config, *sizes, dtype=dtype, **kwargs)


def rows(m, dtype=torch.float16, k=K):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


def assert_rounds_like_torch(y, x, weight, bias=0.0):
    """y has x's dtype and not much more error than torch with the dequantized weight in that dtype."""
    assert y.dtype is x.dtype
    assert_near(y, x.double() @ weight.double().T + bias, x @ weight.to(x.dtype).T + bias)


def assert_near(found, exact, torchs):
    def error(y):
        return float((y.double() - exact).norm() / exact.norm())

    assert found.shape == exact.shape
    assert error(found) < SAME_DTYPE_FACTOR * error(torchs)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "formats",
    [
        [("hyb", 2), ("hyb", 2), ("hyb", 2)],
        [("e8p", 3), ("e8p", 4), ("e8p", 4)],
        [("1mad", 6), ("lut", 3), ("3inst", 2)],
    ],
    ids=str,
)
def test_fused_parts_of_any_format(set_rank, formats, dtype):
    layers = {f"{s}_proj": stored for s, stored in zip("qkv", formats, strict=True)}
    config = quant_config(layers=layers)
    layer = build(QKVParallelLinear, config, K, 64, 9, 3, prefix="qkv_proj", dtype=dtype, bias=True)
    disk = [random_tensors(*stored, n, K, seed=n) for stored, n in zip(formats, (576, 192, 192), strict=True)]
    for part, found in zip("qkv", disk, strict=True):
        load(layer, found, part)
    layer.bias.data.copy_(torch.randn(960))
    weight = torch.cat([dense(found, *stored) for found, stored in zip(disk, formats, strict=True)])
    y, _ = finish(layer)(rows(6, dtype).view(2, 3, K))
    assert_rounds_like_torch(y.flatten(0, 1), rows(6, dtype), weight, layer.bias.data)
    assert len(layer.quip_calls) == len(set(formats))


@pytest.mark.parametrize(("code", "bits"), [("e8p", 4), ("hyb", 3)])
def test_row_parallel_outputs_add_up(set_rank, code, bits):
    found, y = random_tensors(code, bits, 192, K), 0
    for rank in range(3):  # 192 inputs each
        set_rank(rank, 3)
        layer = build(RowParallelLinear, quant_config(code, bits, hadamard_block=64), K, 192, dtype=torch.bfloat16)
        load(layer, found)
        y = y + apply(finish(layer), rows(4, torch.bfloat16).chunk(3, dim=1)[rank]).float()
    assert_rounds_like_torch(y.bfloat16(), rows(4, torch.bfloat16), dense(found, code, bits, block=64))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("code", "bits"), HEAD_FORMATS)
def test_tied_embedding_and_head(set_rank, code, bits, dtype):
    found, ids = random_tensors(code, bits, 201, K), torch.tensor([[0, 63], [128, 200]])
    weight, embedded, logits = dense(found, code, bits, rotate_output=False), 0, []
    for rank in range(2):
        set_rank(rank, 2)
        config = quant_config("1mad", 2, head=Head("embed_tokens", LayerFormat(code, bits), tied=True))
        layer = VocabParallelEmbedding(201, K, params_dtype=dtype, quant_config=config, prefix="embed_tokens")
        load(layer, found)
        embedded = embedded + finish(layer)(ids)
        logits.append(apply(layer, rows(3, dtype)))
    logits = torch.cat(logits, dim=1)
    assert embedded.dtype is dtype and not logits[:, 201:].any()
    assert_near(embedded, weight[ids].double(), weight[ids].to(dtype))
    assert_rounds_like_torch(logits[:, :201], rows(3, dtype), weight)


@pytest.mark.parametrize("formats", [[("hyb", 2), ("1mad", 4)], [("lut", 2)] * 2, [("e8p", 3)] * 2], ids=str)
def test_compiles_to_one_graph_for_any_number_of_rows(set_rank, formats):
    config = quant_config(layers=dict(zip(("gate_proj", "up_proj"), formats, strict=True)))
    layer = build(MergedColumnParallelLinear, config, K, [192, 192], prefix="gate_up_proj", bias=True)
    for part, stored in enumerate(formats):
        load(layer, random_tensors(*stored, 192, K, seed=part), part)
    layer.bias.data.copy_(torch.randn(384))
    compiled = torch.compile(finish(layer), fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        first = rows(3)
        torch._dynamo.mark_dynamic(first, 0)
        assert torch.equal(compiled(first)[0], layer(rows(3))[0])
        with torch.compiler.set_stance("fail_on_recompile"):
            for m in (2, 17, 70):
                assert torch.equal(compiled(rows(m))[0], layer(rows(m))[0])


def test_head_compiles_to_one_graph(set_rank):
    config = quant_config("1mad", 2, head=Head("lm_head", LayerFormat("1mad", 4), tied=False))
    layer = build(ParallelLMHead, config, 201, K, prefix="lm_head")
    load(layer, random_tensors("1mad", 4, 201, K))
    finish(layer)
    compiled = torch.compile(lambda x: apply(layer, x * 2)[:, :201], fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(rows(3)), apply(layer, rows(3) * 2)[:, :201])


@pytest.mark.parametrize(("code", "bits"), RATES, ids=RATE_IDS)
def test_a_loaded_layer_holds_its_packed_weight(set_rank, code, bits):
    k, sizes = 1536, [1536, 256, 256]  # q, k and v of Qwen2.5 1.5B: a small layer, where padding weighs most
    packed, layers = sum(sizes) * k * bits // 8, []
    for seed in range(2):  # both alive, so that no address is used twice
        layer = build(MergedColumnParallelLinear, quant_config(code, bits), k, sizes, prefix=f"m.{seed}")
        for part, n in enumerate(sizes):
            load(layer, random_tensors(code, bits, n, k, seed=10 * seed + part), part)
        layers.append(finish(layer))
    first, second = map(held, layers)
    own = sum(size for address, size in second.items() if address not in first)
    assert packed <= own <= 1.1 * packed
    assert sum(second.values()) - own <= SHARED


class Indexing(TorchFunctionMode):
    """t[...] by operators: Python's own asks a CPU build of torch for a GPU, even of a fake tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        found, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
        if ... in index:
            at, count = index.index(...), found.ndim - sum(i is not None for i in index) + 1
            index = (*index[:at], *[slice(None)] * count, *index[at + 1 :])
        dim = 0
        for item in index:
            if isinstance(item, int):
                found = found.select(dim, item)
                continue
            if item is None:
                found = found.unsqueeze(dim)
            elif item != slice(None):
                found = torch.ops.aten.slice(found, dim, item.start, item.stop, item.step or 1)
            dim += 1
        return found


def on_gpu(found):
    return torch.empty(found.shape, dtype=found.dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fake_tensors_on_a_gpu_stay_there(set_rank, dtype):
    config = quant_config("e8p", 2, layers={"up_proj": ("e8p", 3)})
    layer = build(MergedColumnParallelLinear, config, K, [192, 64], prefix="gate_up_proj", dtype=dtype)
    for part, (bits, n) in enumerate(((2, 192), (3, 64))):
        load(layer, random_tensors("e8p", bits, n, K), part)
    finish(layer)
    with FakeTensorMode(), Indexing():
        parameters = {name: on_gpu(p) for name, p in layer.named_parameters()}
        gpu_layer = SimpleNamespace(quip_calls=layer.quip_calls, quip_order=None, **parameters)
        x = torch.empty(2, 5, K, dtype=dtype, device="cuda")
        y = layer.quant_method.apply(gpu_layer, x, torch.empty(256, dtype=dtype, device="cuda"))
    assert y.device.type == "cuda" and y.dtype is dtype and y.shape == (2, 5, 256)


def test_fake_head_on_a_gpu_stays_there(set_rank):
    dtype = torch.bfloat16
    config = quant_config("hyb", 2, head=Head("embed_tokens", LayerFormat("hyb", 3), tied=True))
    layer = VocabParallelEmbedding(201, K, params_dtype=dtype, quant_config=config, prefix="embed_tokens")
    load(layer, random_tensors("hyb", 3, 201, K))
    finish(layer)
    with FakeTensorMode(), Indexing():
        parameters = {name: on_gpu(p) for name, p in layer.named_parameters()}
        gpu_layer = SimpleNamespace(quip_calls=layer.quip_calls, quip_dtype=dtype, **parameters)
        embedded = layer.quant_method.embedding(gpu_layer, torch.empty(2, 5, dtype=torch.int64, device="cuda"))
        logits = layer.quant_method.apply(gpu_layer, embedded)
    assert embedded.device.type == logits.device.type == "cuda" and embedded.dtype is logits.dtype is dtype
    assert embedded.shape == (2, 5, K) and logits.shape == (2, 5, 256)


@pytest.mark.parametrize(("code", "bits"), [*HEAD_FORMATS, ("e8p", 3)])
def test_every_prepared_tensor_is_on_the_gpu(cuda, monkeypatch, code, bits):
    spec = LinearSpec(code, bits, K, (192,))
    found = random_tensors(code, bits, 192, K)
    rotations.rotation_base.cache_clear()  # so that the matrix below it is made here, whatever ran before
    real = cuda.prepare(spec, found).tensors
    gpu = cuda_module.gpu_of(torch.device("cpu"))
    monkeypatch.setattr(cuda_module, "check", lambda spec, tensors: None)  # it reads values
    monkeypatch.setattr(cuda_module, "gpu_of", lambda device: gpu)
    # Constants are made on the CPU, outside of the fake world, and moved.
    table = cuda_layout.table(spec, found)
    monkeypatch.setattr(cuda_layout, "table", lambda spec, found: None if table is None else on_gpu(table))
    rotations.rotation_base.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True), Indexing():
        fake = cuda.prepare(spec, {name: on_gpu(tensor) for name, tensor in found.items()}).tensors
    rotations.rotation_base.cache_clear()
    assert {n: (t.shape, t.dtype) for n, t in fake.items()} == {n: (t.shape, t.dtype) for n, t in real.items()}
    assert {t.device.type for t in fake.values()} == {"cuda"}


@pytest.mark.parametrize(("code", "bits"), [("e8p", 3), ("hyb", 2), ("lut", 2)])
def test_constants_do_not_depend_on_defaults(cuda, code, bits):
    """A model may be loaded under its own dtype, and another device than the CPU may be the default."""
    spec = LinearSpec(code, bits, K, (192,))
    found = random_tensors(code, bits, 192, K)
    usual = cuda.prepare(spec, found).tensors
    caches = (rotations.rotation_base, cuda_layout.lattice_tables, cuda_layout._lattice_tables, cuda_layout._lut_table)
    for function in caches:
        function.cache_clear()
    with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
        other = cuda.prepare(spec, found).tensors
    for function in caches:
        function.cache_clear()
    for name, tensor in usual.items():
        assert other[name].dtype is tensor.dtype and torch.equal(other[name], tensor), name
