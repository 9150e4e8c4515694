# SPDX-License-Identifier: Apache-2.0
"""On a GPU, for the scripts/release/gpu_check.sh of who has one: results, determinism, streams, CUDA graphs, tuning."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from numerics import FLOAT32_LINEAR, HALF_ACTIVATIONS, INT8_ROUNDING, SAME_DTYPE_FACTOR, relative
from random_layers import RATE_IDS, RATES, random_layer

from quip_vllm.formats import spec as specs
from quip_vllm.ops import LinearSpec, dequantize, dispatch, encode_lattice, encode_trellis
from quip_vllm.ops.cuda import gpu_of, wide_of
from quip_vllm.ops.dispatch import backends
from quip_vllm.ops.extension import require_cuda_library
from quip_vllm.ops.triton import shapes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch sees")
BACKENDS = [backend for backend in backends("cuda") if backend.name != "reference"]
SHAPES = [(272, (48, 16), 16), (1152, (96, 32, 32), None), (4096, (4096,), None), (14336, (1024,), None)]
ROWS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 130)


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request):
    problem = request.param.refusal(LinearSpec("e8p", 2, 64, (64,)))
    if problem is not None:
        pytest.skip(problem)
    return request.param


def layer(backend, code, bits, k, sizes, block=None):
    spec = LinearSpec(code, bits, k, sizes, block)
    tensors = {name: tensor.cuda() for name, tensor in random_layer(spec).items()}
    assert backend.refusal(spec) is None
    return spec, tensors, backend.prepare(spec, tensors)


def rows(m, k):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).cuda()


@pytest.mark.parametrize(("code", "bits"), RATES, ids=RATE_IDS)
@pytest.mark.parametrize(("k", "sizes", "block"), SHAPES, ids=str)
def test_linear_is_the_dequantized_weight_whatever_the_batch(backend, code, bits, k, sizes, block):
    spec, tensors, prepared = layer(backend, code, bits, k, sizes, block)
    x = rows(max(ROWS), k)
    weight = dequantize(spec, tensors).double()
    y = prepared.linear(x)
    assert relative(y, x.double() @ weight.T) < HALF_ACTIVATIONS
    for m in ROWS:
        assert torch.equal(prepared.linear(x[:m].contiguous()), y[:m])


@pytest.mark.parametrize(("code", "bits"), RATES, ids=RATE_IDS)
def test_many_rows(backend, code, bits):
    spec, tensors, prepared = layer(backend, code, bits, 1152, (96, 32, 32))
    x, bias = rows(300, 1152), rows(1, 160)[0]
    want = x.double() @ dequantize(spec, tensors).double().T + bias.double()
    assert relative(prepared.linear(x, bias), want) < HALF_ACTIVATIONS


@pytest.mark.parametrize(("code", "bits"), RATES, ids=RATE_IDS)
def test_experts_whatever_the_batch_and_in_a_graph(backend, code, bits, monkeypatch):
    monkeypatch.setattr(dispatch, "select_backend", lambda *_: backend)
    spec = LinearSpec(code, bits, 1152, (96, 32, 32))
    tensors = [{name: one.cuda() for name, one in random_layer(spec, seed).items()} for seed in range(8)]
    experts = dispatch.prepare_experts(spec, tensors)
    generator = torch.Generator().manual_seed(0)
    x, ids = rows(400, 1152).half(), torch.rand(400, 8, generator=generator).topk(3).indices.cuda()
    weights = torch.stack([dequantize(spec, one) for one in tensors]).double()
    y = experts.linear(x, ids)
    wanted = torch.stack([x.double() @ one.T for one in weights], dim=1)
    wanted = wanted.gather(1, ids[..., None].expand(-1, -1, 160))
    assert relative(y, wanted) < HALF_ACTIVATIONS + 2**-11
    for m in (1, 5, 16, 40):
        assert torch.equal(experts.linear(x[:m].contiguous(), ids[:m].contiguous()), y[:m])
    few, of_few = x[:4].contiguous(), ids[:4].contiguous()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = experts.linear(few, of_few)
    for i in range(4, 396):
        few.copy_(x[i : i + 4]), of_few.copy_(ids[i : i + 4])
        graph.replay()
        assert torch.equal(captured, y[i : i + 4])


@pytest.mark.parametrize("block", [None, 32, 128])  # narrow ones are rotated in the CUDA product's epilogue
@pytest.mark.parametrize(("code", "bits"), RATES, ids=RATE_IDS)
def test_a_bias_is_added_whatever_the_batch(backend, code, bits, block):
    spec, tensors, prepared = layer(backend, code, bits, 272, (384, 128), block)
    x, bias = rows(max(ROWS), 272), rows(1, 512)[0]
    y = prepared.linear(x, bias)
    assert relative(y, x.double() @ dequantize(spec, tensors).double().T + bias.double()) < HALF_ACTIVATIONS
    for m in ROWS:
        assert torch.equal(prepared.linear(x[:m].contiguous(), bias), y[:m])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("code", "bits"), RATES, ids=RATE_IDS)
def test_half_precision_rounds_like_torch(backend, code, bits, dtype):
    spec, tensors, prepared = layer(backend, code, bits, 576, (192, 64))
    x = rows(3, 576).to(dtype)
    weight = dequantize(spec, tensors)
    exact = x.double() @ weight.double().T
    assert relative(prepared.linear(x), exact) < SAME_DTYPE_FACTOR * relative(x @ weight.to(dtype).T, exact)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_int8_activations_are_near_the_exact_ones(backend, monkeypatch, bits):
    if backend.name != "cuda":
        pytest.skip("int8 activations are of the CUDA backend")
    monkeypatch.setenv("QUIP_VLLM_ACTIVATIONS", "int8")
    spec, tensors, prepared = layer(backend, "1mad", bits, 1152, (96, 32))
    x = rows(20, 1152)
    y = prepared.linear(x)
    assert relative(y, x.double() @ dequantize(spec, tensors).double().T) < 10 * INT8_ROUNDING
    assert torch.equal(prepared.linear(x[:1]), y[:1])


@pytest.mark.parametrize("code", [name for name, one in specs.FORMATS.items() if one.quantized])
def test_a_thousand_runs_give_the_same_bits_on_any_stream(backend, code):
    spec, _, prepared = layer(backend, code, 2, 4096, (4096,))
    x = rows(5, 4096).half()
    y = prepared.linear(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        others = [prepared.linear(x) for _ in range(500)]
    torch.cuda.synchronize()
    others += [prepared.linear(x) for _ in range(500)]
    assert all(torch.equal(other, y) for other in others)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants a second GPU")
@pytest.mark.parametrize("code", ["hyb", "e8p"])
def test_a_layer_on_another_gpu_than_the_current_one(backend, code):
    spec, tensors, here = layer(backend, code, 2, 576, (192, 64))
    with torch.cuda.device(1):  # as `ops.dispatch.prepare` does
        there = backend.prepare(spec, {name: tensor.to("cuda:1") for name, tensor in tensors.items()})
    x = rows(5, 576)
    assert torch.equal(there.linear(x.to("cuda:1")).cpu(), here.linear(x).cpu())


@pytest.mark.parametrize(("code", "bits"), RATES, ids=RATE_IDS)
def test_one_launch_gives_the_bits_of_three(backend, code, bits):
    """A thousand times, for the order in which thread blocks come differs."""
    if backend.name != "cuda":
        pytest.skip("one launch is of the CUDA backend")
    _, _, prepared = layer(backend, code, bits, 4096, (4096, 1024, 1024), 128)
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    for split, m in product((8, 24, 64), (1, 8, 16)):
        if not 0 < torch.ops.quip_vllm.cuda_shared_bytes(prepared.kernels, bits, m, 4, 2, split) <= limit:
            continue
        together = replace(prepared, thread_blocks=[split, *[4, 2] * 3, 4], one_launch_rows=16)
        x = rows(m, 4096).half()
        y = replace(together, one_launch_rows=0).linear(x)
        assert all(torch.equal(together.linear(x), y) for _ in range(1000 if bits == 2 else 10))


@pytest.mark.parametrize(("code", "bits"), RATES, ids=RATE_IDS)
def test_many_rows_in_a_thread_block(backend, code, bits):
    """Of either kernel: the same bits whatever the rows, up to those of a thread block, and then of more."""
    spec, tensors, prepared = layer(backend, code, bits, 4096, (4096, 1040), 16)
    if backend.name != "cuda":
        pytest.skip("such thread blocks are of the CUDA backend")
    gpu, x, bias = gpu_of(torch.device("cuda")), rows(600, 4096), rows(1, 5136)[0]
    ways = [wide_of(spec, prepared.kernels, one, 9) for one in (gpu, replace(gpu, wgmma=False))]
    if not any(ways):
        pytest.skip("no kernel for many rows has this code and rate")
    wanted = x.double() @ dequantize(spec, tensors).double().T + bias.double()
    for wide in ways:
        many, most = replace(prepared, wide=wide), wide[1]
        y = many.linear(x, bias)
        assert relative(y, wanted) < HALF_ACTIVATIONS
        assert torch.equal(many.linear(x[: most + 1].contiguous(), bias), y[: most + 1])
        y = many.linear(x[:most].contiguous(), bias)
        assert relative(y, wanted[:most]) < HALF_ACTIVATIONS
        for m in (9, 17, 64, 65, 100, most) * 20:
            assert torch.equal(many.linear(x[: min(m, most)].contiguous(), bias), y[:m])


@pytest.mark.parametrize("m", [1, 12, 100])
@pytest.mark.parametrize("code", [name for name, one in specs.FORMATS.items() if one.quantized])
def test_a_cuda_graph_repeats_it(backend, code, m):
    spec, _, prepared = layer(backend, code, 2, 1152, (96, 32))
    x, given = rows(m, 1152).half(), rows(m + 1000, 1152)[:m].half()
    prepared.linear(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = prepared.linear(x)
    x.copy_(given)
    graph.replay()
    assert torch.equal(y, prepared.linear(given))


@pytest.mark.parametrize("code", ["e8p", "hyb"])
def test_tuning_changes_no_bit(backend, code, monkeypatch):
    """Of the shape that the clock chose, and of every other that it could."""
    if backend.name != "triton":
        pytest.skip("the Triton backend is tuned")
    spec, tensors, prepared = layer(backend, code, 2, 1152, (96, 32))
    x = rows(33, 1152).half()
    y = prepared.linear(x)
    monkeypatch.setenv("QUIP_VLLM_TRITON_TUNE", "1")
    monkeypatch.setattr(shapes, "_timed", {})
    prepared = backend.prepare(spec, tensors)
    assert all(torch.equal(prepared.linear(x[:m]), y[:m]) for m in (1, 9, 17, 33))
    warps, _ = shapes.gpu(x.device)
    for shape in {shape for rows in shapes.ROWS for shape in shapes.candidates(rows, warps)}:
        monkeypatch.setattr(shapes, "shape", lambda chosen, m, shape=shape: shape)
        assert torch.equal(prepared.linear(x), y), shape


@pytest.mark.parametrize("code", ["e8p", "hyb"])
def test_compiles_as_one_graph(backend, code):
    spec, _, prepared = layer(backend, code, 2, 576, (192, 64))
    compiled = torch.compile(lambda x: prepared.linear(x * 2) + 1, fullgraph=True)
    x = rows(3, 576).bfloat16()
    assert relative(compiled(x), prepared.linear(x * 2) + 1) < 1e-2


@pytest.mark.parametrize(("code", "bits"), RATES, ids=RATE_IDS)
def test_rows_of_an_embedding(backend, code, bits):
    spec = LinearSpec(code, bits, 576, (45,), rotate_output=False)
    tensors = {name: tensor.cuda() for name, tensor in random_layer(spec).items()}
    prepared = backend.prepare(spec, tensors)
    found = prepared.embedding(torch.tensor([0, 44, 7], device="cuda"), torch.float32)
    assert relative(found, dequantize(spec, tensors)[[0, 44, 7]]) < FLOAT32_LINEAR


def test_searches_are_the_cpus():
    """The lattice's, and the trellis's at 8 bits, where every tier of the CPU has float costs."""
    require_cuda_library()
    x, targets = (torch.randn(n, m, generator=torch.Generator().manual_seed(0)) for n, m in ((4099, 8), (5, 256)))
    values = specs.FORMATS["1mad"].values()
    assert torch.equal(encode_lattice(x.cuda()).cpu(), encode_lattice(x))
    assert torch.equal(encode_trellis(targets.cuda(), values.cuda(), 8).cpu(), encode_trellis(targets, values, 8))


def test_a_bad_value_spoils_its_row_only(backend):
    spec, _, prepared = layer(backend, "e8p", 2, 576, (192,))
    x = rows(9, 576).half()
    clean = prepared.linear(x)
    x[4, 7] = float("nan")
    y = prepared.linear(x)
    assert y[4].isnan().all() and torch.equal(y[5:], clean[5:]) and torch.equal(y[:4], clean[:4])
