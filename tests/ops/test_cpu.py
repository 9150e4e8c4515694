# SPDX-License-Identifier: Apache-2.0
"""The CPU op against the dequantized weight: every format, odd row counts, odd sizes, every dtype."""

import pytest
import torch
from numerics import FLOAT32_LINEAR, SAME_DTYPE_FACTOR, relative
from random_layers import CHUNKED, EVERY_RATE, EXL3_RATES, crossed, every_lattice_code, random_layer

from quip_vllm.formats.spec import TileOrder
from quip_vllm.ops import LinearSpec, dequantize
from quip_vllm.ops.cpu import CpuBackend, _lut_values, _takes_int8, int8_activations
from quip_vllm.ops.reference import ReferenceBackend
from quip_vllm.ops.rotations import rotation_base

CPU = CpuBackend()
SHAPES = [  # k, output sizes, block
    (16, (16,), None),
    (272, (48, 16), 16),
    (576, (576, 192, 192), None),
    (1536, (80,), None),
    (640, (352,), 64),
    (1136, (2160,), None),  # 284 * 4, 540 * 4
]


def run(spec, tensors, x):
    assert CPU.refusal(spec) is None
    return CPU.prepare(spec, tensors).linear(x)


@pytest.mark.parametrize(("k", "sizes", "block", "code", "bits"), crossed(SHAPES, odd=1))
def test_linear_is_the_dequantized_weight(code, bits, k, sizes, block):
    spec = LinearSpec(code, bits, k, sizes, block)
    tensors = random_layer(spec)
    x = torch.randn(7, k, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ dequantize(spec, tensors).double().T
    assert relative(run(spec, tensors, x), expected) < FLOAT32_LINEAR
    assert relative(ReferenceBackend().prepare(spec, tensors).linear(x), expected) < FLOAT32_LINEAR


@pytest.mark.parametrize("code", ["hyb", "1mad", "e8p"])
@pytest.mark.parametrize(("k", "sizes", "chunks"), CHUNKED)
def test_rotations_in_chunks(code, k, sizes, chunks):
    """Chunks of 12 p and 52 p, as published for eight tensor-parallel ranks, and of powers of two."""
    spec = LinearSpec(code, 2, k, sizes, input_chunks=chunks[0], output_chunks=chunks[1])
    tensors, x = random_layer(spec), torch.randn(3, k)
    expected = x.double() @ dequantize(spec, tensors).double().T
    assert relative(run(spec, tensors, x), expected) < FLOAT32_LINEAR


@pytest.mark.parametrize(("code", "bits"), EXL3_RATES)
@pytest.mark.parametrize(("k", "n"), [(256, 384), (200, 130)])
def test_layers_of_exl3(code, bits, k, n):
    """Tiles in EXL3's order, blocks of 128, and sizes that are stored as the next multiples of 128."""
    spec = LinearSpec(code, bits, k, (n,), 128, tile_order=TileOrder.MMA_SWAPPED, padded_to=128)
    tensors = random_layer(spec)
    x, bias = torch.randn(2, 5, k), torch.randn(n)
    expected = x.double() @ dequantize(spec, tensors).double().T + bias
    assert CPU.refusal(spec) is None
    y = CPU.prepare(spec, tensors).linear(x, bias)
    assert y.shape == (2, 5, n) and relative(y, expected) < FLOAT32_LINEAR


@pytest.mark.parametrize("code", ["3inst", "mcg", "mul1", "mul1_half"])
def test_rows_of_swapped_tiles(code):
    spec = LinearSpec(code, 3, 256, (100,), 128, False, tile_order=TileOrder.MMA_SWAPPED)
    tensors = random_layer(spec)
    ids = torch.tensor([0, 7, 8, 99, 41])
    found = CPU.prepare(spec, tensors).embedding(ids, torch.float32)
    assert relative(found, dequantize(spec, tensors)[ids]) < FLOAT32_LINEAR


ROW_MAJOR = [(code, bits) for code in ("1mad", "table", "pairs") for bits in range(1, 9)]
ROW_MAJOR += [("3inst", 2), ("3inst", 7), ("hyb", 1), ("hyb", 3)]


@pytest.mark.parametrize(("code", "bits"), ROW_MAJOR)
def test_row_major_tiles(monkeypatch, code, bits):
    """Of QTIP's other codes, in two parts."""
    spec = LinearSpec(code, bits, 192, (48, 96), tile_order=TileOrder.ROW_MAJOR)
    tensors, x, bias = random_layer(spec), torch.randn(5, 192), torch.randn(144)
    weight = dequantize(spec, tensors).double()
    assert CPU.refusal(spec) is None
    assert int8_activations(spec, torch.bfloat16) == (_takes_int8("e8p", 2) and bits <= 4 and code != "hyb")
    assert relative(CPU.prepare(spec, tensors).linear(x, bias), x.double() @ weight.T + bias) < FLOAT32_LINEAR
    monkeypatch.setenv("QUIP_VLLM_ACTIVATIONS", "exact")
    half = x.bfloat16()
    exact = half.double() @ weight.T
    torch_error = relative(half @ weight.bfloat16().T, exact)
    assert relative(CPU.prepare(spec, tensors).linear(half), exact) < SAME_DTYPE_FACTOR * torch_error


@pytest.mark.parametrize("code", ["1mad", "table", "pairs"])
def test_rows_of_row_major_tiles(code):
    spec = LinearSpec(code, 3, 256, (100,), None, False, tile_order=TileOrder.ROW_MAJOR)
    tensors, ids = random_layer(spec), torch.tensor([0, 1, 8, 99, 41])
    found = CPU.prepare(spec, tensors).embedding(ids, torch.float32)
    assert relative(found, dequantize(spec, tensors)[ids]) < FLOAT32_LINEAR


def test_int8_activations_for_row_major_tiles_of_hyb_are_refused(monkeypatch):
    monkeypatch.setenv("QUIP_VLLM_ACTIVATIONS", "int8")
    spec = LinearSpec("hyb", 1, 192, (48,), tile_order=TileOrder.ROW_MAJOR)
    assert "QUIP_VLLM_ACTIVATIONS is int8, which tier" in CPU.refusal(spec)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_linear_is_the_dequantized_weight_for_every_lattice_code(bits):
    spec, tensors = every_lattice_code(bits)
    x = torch.randn(2, spec.in_features, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ dequantize(spec, tensors).double().T
    for y, wanted in zip(run(spec, tensors, x).T, expected.T, strict=True):
        assert relative(y, wanted) < FLOAT32_LINEAR * expected.norm() / wanted.norm()


@pytest.mark.parametrize("k", [8, 24, 40])
@pytest.mark.parametrize("n", [1, 2, 12, 36])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_lattice_takes_sizes_that_are_no_multiple_of_16(n, k, bits):
    spec = LinearSpec("e8p", bits, k, (n,))
    tensors = random_layer(spec)
    x = torch.randn(5, k)
    assert relative(run(spec, tensors, x), x.double() @ dequantize(spec, tensors).double().T) < FLOAT32_LINEAR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("code", "bits"), EVERY_RATE)
def test_half_precision_rounds_like_torch(code, bits, dtype, monkeypatch):
    monkeypatch.setenv("QUIP_VLLM_ACTIVATIONS", "exact")
    spec = LinearSpec(code, bits, 576, (192, 64))
    tensors = random_layer(spec)
    x = torch.randn(3, 576).to(dtype)
    weight = dequantize(spec, tensors)
    exact = x.double() @ weight.double().T
    torch_error = relative(x @ weight.to(dtype).T, exact)
    y = run(spec, tensors, x)
    assert y.dtype is dtype
    assert relative(y, exact) < SAME_DTYPE_FACTOR * torch_error


@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (2, 3, 64), (64,)])
def test_leading_dimensions(shape):
    spec = LinearSpec("1mad", 2, 64, (32, 16))
    tensors = random_layer(spec)
    x = torch.randn(shape)
    y = run(spec, tensors, x)
    assert y.shape == (*shape[:-1], 48)
    if x.numel():
        assert relative(y, x.double() @ dequantize(spec, tensors).double().T) < FLOAT32_LINEAR


@pytest.mark.parametrize("code", ["e8p", "hyb"])
def test_bits_do_not_depend_on_threads_or_batch(code):
    spec = LinearSpec(code, 3, 576, (192, 64))
    prepared = CPU.prepare(spec, random_layer(spec))
    x = torch.randn(23, 576)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = prepared.linear(x)
        torch.set_num_threads(4)
        assert torch.equal(prepared.linear(x), one)
    finally:
        torch.set_num_threads(threads)
    for m in (1, 2, 3, 5, 22):
        assert torch.equal(prepared.linear(x[:m]), one[:m])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_spoils_only_itself(bad):
    spec = LinearSpec("1mad", 2, 64, (32,))
    prepared = CPU.prepare(spec, random_layer(spec))
    x = torch.randn(5, 64)
    clean = prepared.linear(x)
    x[2, 3] = bad
    y = prepared.linear(x)
    assert not y[2].isfinite().any()
    assert torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("code", ["e8p", "1mad"])
def test_only_the_packed_weight_is_kept(code):
    spec = LinearSpec(code, 2, 2048, (2048,))
    tensors = random_layer(spec)
    held = sum(tensor.numel() * tensor.element_size() for tensor in CPU.prepare(spec, tensors).tensors.values())
    assert held < 1.1 * spec.in_features * spec.out_features * spec.bits / 8


def broken(name, change):
    spec = LinearSpec("hyb", 2, 64, (32,))
    tensors = random_layer(spec)
    tensors[name] = change(tensors[name])
    return spec, tensors


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("packed", lambda t: t[:, :-1]),
        ("packed", lambda t: t.int()),
        ("su", lambda t: t[:-1]),
        ("sv", lambda t: t * float("nan")),
        ("table", lambda t: t[:256]),
    ],
)
def test_a_damaged_tensor_is_named(name, change):
    spec, tensors = broken(name, change)
    for backend in (CPU, ReferenceBackend()):
        with pytest.raises(ValueError, match=name):
            backend.prepare(spec, tensors)


def test_missing_tensor_is_named():
    spec = LinearSpec("e8p", 3, 64, (32,))
    tensors = random_layer(spec)
    del tensors["residual_codes"]
    with pytest.raises(ValueError, match="residual_codes"):
        CPU.prepare(spec, tensors)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (LinearSpec("1mad", 2, 64, (24,)), "multiples of 16"),
        (LinearSpec("e8p", 2, 44, (16,)), "multiples of 8"),
        (LinearSpec("e8p", 2, 264, (32,)), "--hadamard-block 8"),
        (LinearSpec("e8p", 2, 64, (13,), 4), "13"),
    ],
)
def test_refusals_say_why(spec, words):
    assert words in CPU.refusal(spec)


@pytest.mark.parametrize("code", ["e8p", "lut"])
def test_prepare_does_not_depend_on_the_default_dtype(code):
    """vLLM builds its layers with the model's dtype as torch's default."""
    rotation_base.cache_clear()
    _lut_values.cache_clear()
    spec = LinearSpec(code, 2, 64, (32,))
    tensors = random_layer(spec)
    x = torch.randn(3, 64)
    assert CPU.refusal(spec) is None
    torch.set_default_dtype(torch.bfloat16)
    try:
        y = CPU.prepare(spec, tensors).linear(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert relative(y, x.double() @ dequantize(spec, tensors).double().T) < FLOAT32_LINEAR
