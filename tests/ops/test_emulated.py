# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, run by the emulator, against the dequantized weight: every format, odd sizes, every dtype."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import FLOAT32_LINEAR, HALF_ACTIVATIONS, INT8_ROUNDING, ROUNDED_ONCE, SAME_DTYPE_FACTOR, relative
from random_layers import CHUNKED, EVERY_RATE, crossed, random_layer
from torch.utils._python_dispatch import TorchDispatchMode

from quip_vllm.formats.decode import decode
from quip_vllm.formats.spec import FORMATS, TileOrder
from quip_vllm.ops import LinearSpec, cuda_layout, cuda_shapes, dequantize, encode_lattice, encode_trellis
from quip_vllm.ops.extension import require_cpu_library
from quip_vllm.quantizer.rounding.encoders import code_rms
from quip_vllm.transforms.hadamard import hadamard

OPS = torch.ops.quip_vllm
SHAPES = [  # k, output sizes, block
    (16, (16,), None),
    (272, (48, 16), 16),
    (640, (352,), 64),
    (1152, (96, 32, 32), None),  # 36 * 32
]
ROWS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 130)
MORE = {"hyb": "hyb_large", "e8p": "e8p_large"}


def rows(m, k):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m))


def arguments(cuda, spec, tensors, x, shape=None, code=None, bias=None, one_launch_rows=0):
    """Those of the op, with other thread blocks, another variant of the code, a bias, or few rows in one launch."""
    layer = cuda.prepare(spec, tensors)
    prepared, sizes = layer.tensors, list(spec.output_sizes)
    bases = [prepared[f"base{i}"] for i in range(len(sizes) + 1)]
    packed, table, signs = prepared["packed"], prepared.get("table"), (prepared["su"], prepared["sv"])
    chosen = (code or layer.kernels, spec.bits, shape or layer.thread_blocks, one_launch_rows, 0)
    return [x, packed, table, *signs, bases, layer.widths, sizes, bias, *chosen]


@pytest.mark.parametrize(("k", "sizes", "block", "code", "bits"), crossed(SHAPES, odd=1))
def test_many_rows_by_the_dense_weight(cuda, code, bits, k, sizes, block):
    spec = LinearSpec(code, bits, k, sizes, block)
    tensors, x, bias = random_layer(spec), rows(7, k), rows(1, sum(sizes))[0]
    given = arguments(cuda, spec, tensors, x, bias=bias)
    want = x.double() @ dequantize(spec, tensors).double().T + bias.double()
    y, dense = (OPS.cuda_linear(*given[:-1], least) for least in (8, 7))
    assert not torch.equal(y, dense)  # sums have another order
    assert relative(dense, want) < HALF_ACTIVATIONS and relative(y, want) < HALF_ACTIVATIONS


@pytest.mark.parametrize(("k", "sizes", "block", "code", "bits"), crossed(SHAPES, odd=1))
def test_linear_is_the_dequantized_weight(cuda, code, bits, k, sizes, block):
    spec = LinearSpec(code, bits, k, sizes, block)
    tensors = random_layer(spec)
    prepared = cuda.prepare(spec, tensors)
    everything = rows(max(ROWS), k)
    weight = dequantize(spec, tensors).double()
    y = prepared.linear(everything)
    assert relative(y, everything.double() @ weight.T) < HALF_ACTIVATIONS
    for m in ROWS:  # the bits of a row depend neither on how many there are nor on which
        assert torch.equal(prepared.linear(everything[:m].contiguous()), y[:m])
    assert torch.equal(prepared.linear(everything[-3:].contiguous()), y[-3:])


@pytest.mark.parametrize("code", ["3inst", "mcg", "mul1"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_layers_of_exl3(cuda, code, bits):
    """Tiles in EXL3's order, blocks of 128, and sizes that are stored as the next multiples of 128."""
    k, n = 200, 130
    spec = LinearSpec(code, bits, k, (n,), 128, tile_order=TileOrder.MMA_SWAPPED, padded_to=128)
    assert cuda.refusal(spec) is None
    tensors, x, bias = random_layer(spec), rows(9, k), rows(1, n)[0]
    y = cuda.prepare(spec, tensors).linear(x, bias)
    assert relative(y, x.double() @ dequantize(spec, tensors).double().T + bias.double()) < HALF_ACTIVATIONS


@pytest.mark.parametrize("code", ["1mad", "3inst", "table", "pairs"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_row_major_tiles(cuda, monkeypatch, code, bits):
    """Of QTIP's codes that are not hyb, in two parts: few rows and many, the dense weight, and rows to look up."""
    spec = LinearSpec(code, bits, 272, (48, 16), tile_order=TileOrder.ROW_MAJOR)
    assert cuda.refusal(spec) is None
    tensors, x = random_layer(spec), rows(66, 272)
    prepared, wanted = cuda.prepare(spec, tensors), x.double() @ dequantize(spec, tensors).double().T
    y = prepared.linear(x)
    assert relative(y, wanted) < HALF_ACTIVATIONS
    assert relative(OPS.cuda_linear(*arguments(cuda, spec, tensors, x)[:-1], 7), wanted) < HALF_ACTIVATIONS
    monkeypatch.setenv("QUIP_VLLM_EMULATOR", "eager,random:2")
    for m in (1, 9, 66):
        assert torch.equal(prepared.linear(x[:m].contiguous()), y[:m])
    head = LinearSpec(code, bits, 80, (48,), rotate_output=False, tile_order=TileOrder.ROW_MAJOR)
    tensors, ids = random_layer(head), torch.tensor([0, 47, 9, 24])
    assert (
        relative(cuda.prepare(head, tensors).embedding(ids, torch.float32), dequantize(head, tensors)[ids])
        < FLOAT32_LINEAR
    )
    monkeypatch.setenv("QUIP_VLLM_ACTIVATIONS", "int8")
    assert "only code 1mad with tiles in our order" in cuda.refusal(spec)


@pytest.mark.parametrize("code", ["hyb", "1mad", "e8p"])
@pytest.mark.parametrize(("k", "sizes", "chunks"), CHUNKED)
def test_rotations_in_chunks(cuda, code, k, sizes, chunks):
    """Chunks of 12 p and 52 p, as published for eight tensor-parallel ranks, and of powers of two."""
    spec = LinearSpec(code, 2, k, sizes, input_chunks=chunks[0], output_chunks=chunks[1])
    assert cuda.refusal(spec) is None
    tensors, x = random_layer(spec), rows(3, k)
    y = cuda.prepare(spec, tensors).linear(x)
    assert relative(y, x.double() @ dequantize(spec, tensors).double().T) < HALF_ACTIVATIONS


@pytest.mark.parametrize("k", [8, 24, 40, 104])
@pytest.mark.parametrize("n", [1, 12, 36])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_lattice_takes_sizes_that_are_no_multiple_of_16(cuda, n, k, bits):
    spec = LinearSpec("e8p", bits, k, (n, 4))
    tensors = random_layer(spec)
    x = rows(5, k)
    y = cuda.prepare(spec, tensors).linear(x)
    assert relative(y, x.double() @ dequantize(spec, tensors).double().T) < HALF_ACTIVATIONS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("code", "bits"), EVERY_RATE)
def test_half_precision_rounds_like_torch(cuda, code, bits, dtype):
    spec = LinearSpec(code, bits, 576, (192, 64))
    tensors = random_layer(spec)
    x = rows(3, 576).to(dtype)
    weight = dequantize(spec, tensors)
    exact = x.double() @ weight.double().T
    torch_error = relative(x @ weight.to(dtype).T, exact)
    y = cuda.prepare(spec, tensors).linear(x)
    assert y.dtype is dtype
    assert relative(y, exact) < SAME_DTYPE_FACTOR * torch_error


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("k", "sizes", "block"), SHAPES, ids=str)
def test_int8_activations_are_the_rounded_ones(cuda, monkeypatch, bits, k, sizes, block):
    monkeypatch.setenv("QUIP_VLLM_ACTIVATIONS", "int8")
    spec = LinearSpec("1mad", bits, k, sizes, block)
    tensors = random_layer(spec)
    prepared = cuda.prepare(spec, tensors)
    x = rows(20, k)
    rotated = hadamard(x * tensors["su"].float(), block, transpose=True)
    unit = rotated.abs().amax(1, keepdim=True).double() / 127
    products = (rotated / unit.float()).round().double() * unit @ decode(spec, tensors).double().T
    parts = [hadamard(part.contiguous(), block) for part in products.split(sizes, dim=-1)]
    y = prepared.linear(x)
    assert relative(y, torch.cat(parts, dim=-1) * tensors["sv"].double()) < INT8_ROUNDING
    for m in (1, 9, 17):
        assert torch.equal(prepared.linear(x[:m].contiguous()), y[:m])


@pytest.mark.parametrize(("code", "bits"), EVERY_RATE[::2])
def test_every_thread_block_gives_the_same_result(cuda, code, bits):
    spec = LinearSpec(code, bits, 1216, (112, 48))  # 19 chunks: odd in every split
    tensors = random_layer(spec)
    wanted = {}
    depths = (2, 4) if bits <= 4 and code != "lut" else (1,)
    for name, warps, depth in itertools.product((code, MORE.get(code)), (1, 2, 4, 8), depths):
        if name is None or not 0 < OPS.cuda_shared_bytes(name, bits, 12, warps, depth, 0) <= 227 * 1024:
            continue
        for split, m in itertools.product((8, 16, 24), (1, 5, 12, 20)):
            shape = [split, *[warps, depth] * 3, min(warps, 4)]
            y = OPS.cuda_linear(*arguments(cuda, spec, tensors, rows(m, 1216), shape, name))
            assert torch.equal(y, wanted.setdefault((split, m), y))
    y = torch.cat([wanted[split, 20] for split in (8, 16, 24)])
    assert relative(y, (rows(20, 1216).double() @ dequantize(spec, tensors).double().T).repeat(3, 1)) < HALF_ACTIVATIONS


FUSED = [  # k, output sizes, block, warps whose outputs are a multiple of the block
    (272, (48, 16), 16, 1),
    (656, (96, 32, 64), 32, 2),
    (144, (192, 64), 64, 2),
    (208, (128, 256, 128), 128, 4),
    (80, (256, 256), 256, 8),
]


@pytest.mark.parametrize(("k", "sizes", "block", "warps", "code", "bits"), crossed(FUSED, odd=1))
def test_the_epilogue_gives_the_bits_of_a_launch_of_its_own(cuda, code, bits, k, sizes, block, warps):
    spec = LinearSpec(code, bits, k, sizes, block)
    tensors = random_layer(spec)
    x, bias = rows(66, k), torch.randn(sum(sizes), generator=torch.Generator().manual_seed(k))
    least = 2 if bits <= 4 and code != "lut" else 1
    few, many = min(warps, 4 if code == "lut" else 8), min(warps, 4)
    shape = [16, *[few, least] * 3, many]
    together = arguments(cuda, spec, tensors, x, shape, bias=bias)
    apart = list(together)
    apart[6] = [*together[6][:-1], block // 2]  # one width for all is what the epilogue needs
    for m in (1, 12, 66):
        y, other = (OPS.cuda_linear(x[:m].contiguous(), *given[1:]) for given in (together, apart))
        assert torch.equal(y[:, : -sizes[-1]], other[:, : -sizes[-1]])
        assert not torch.equal(y, other)
        wanted = x[:m].double() @ dequantize(spec, tensors).double().T + bias.double()
        assert relative(y, wanted) < HALF_ACTIVATIONS


WIDE = [  # code, bits, whether in EXL3's order
    ("1mad", 4, False),
    ("3inst", 3, True),
    ("e8p", 2, False),
    ("e8p", 3, False),
    ("e8p", 4, False),
    ("grid", 2, False),
    ("hyb", 2, False),
    ("mcg", 2, True),
    ("mul1", 3, False),
]


def many_rows(cuda, code, bits, swapped, m):
    """Arguments of a layer of whole blocks of outputs and odd ones, in two parts; every other chunk of x is 0."""
    order = TileOrder.MMA_SWAPPED if swapped else TileOrder.MMA
    spec = LinearSpec(code, bits, 448, (192, 80 if code != "e8p" else 76), 4 if code == "e8p" else 16, tile_order=order)
    x = rows(m, 448)
    x.view(m, 7, 64)[:, 1::2] = 0
    tensors = random_layer(spec)
    shape = [8, *[1, 2] * 3, 1]
    return arguments(cuda, spec, tensors, x, shape, bias=rows(1, sum(spec.output_sizes))[0]), dequantize(spec, tensors)


def kinds(code, bits, most):
    """The kernels for `most` rows in a thread block: 0 is wide_gemm's, 1 is wgmma_gemm's."""
    return [wgmma for wgmma in (0, 1) if OPS.cuda_wide_bytes(code, bits, most, wgmma)]


@pytest.mark.parametrize(("code", "bits", "swapped"), WIDE)
def test_many_rows_in_a_thread_block(cuda, code, bits, swapped):
    """Where every other chunk adds nothing, both products add in one order, so that they give the same bits."""
    given, _ = many_rows(cuda, code, bits, swapped, 300)
    x, wanted = given[0], OPS.cuda_linear(*given)
    for m, most in ((17, 256), (64, 64), (65, 128), (256, 256), (300, 256), (300, 40)):
        for wgmma in kinds(code, bits, most):
            assert torch.equal(OPS.cuda_linear(x[:m].contiguous(), *given[1:], [17, most, 7, wgmma]), wanted[:m])


@pytest.mark.parametrize(("code", "bits", "swapped"), [("hyb", 3, False), ("e8p", 3, False), ("mul1", 2, True)])
def test_the_order_of_sums_of_many_rows_is_one(cuda, monkeypatch, code, bits, swapped):
    """Of one part of k and of three, whatever the rows beside it, the threads' order, and how the rows are cut."""
    given, weight = many_rows(cuda, code, bits, swapped, 66)
    x = rows(66, 448)
    for part in (7, 3):
        y = OPS.cuda_linear(x, *given[1:], [9, 128, part, 0])
        assert relative(y, x.double() @ weight.double().T + given[8].double()) < HALF_ACTIVATIONS
        for wgmma in (0, 1):
            assert torch.equal(OPS.cuda_linear(x[:9].contiguous(), *given[1:], [9, 128, part, wgmma]), y[:9])
            for order in ("deferred", "eager", "depthfirst", "eager,reverse", "random:1"):
                monkeypatch.setenv("QUIP_VLLM_EMULATOR", order)
                assert torch.equal(OPS.cuda_linear(x, *given[1:], [9, 128, part, wgmma]), y)
            monkeypatch.delenv("QUIP_VLLM_EMULATOR")
    whole = OPS.cuda_linear(x, *given[1:], [9, 128, 7, 0])
    for wgmma in (0, 1):  # more rows than a thread block takes leave k whole
        assert torch.equal(OPS.cuda_linear(x, *given[1:], [9, 24, 3, wgmma]), whole)
    assert torch.equal(OPS.cuda_linear(x, *given[1:], [67, 128, 3, 0]), OPS.cuda_linear(x, *given[1:]))


ONE_LAUNCH = [  # code, bits, whether in EXL3's order
    ("1mad", 2, False),
    ("hyb", 3, False),
    ("e8p", 4, False),
    ("mul1", 1, True),
]


def one_launch(cuda, code, bits, swapped=False, split=8):
    """Arguments with one launch for up to 16 rows, k in parts of `split` chunks, and the same with launches apart."""
    order = TileOrder.MMA_SWAPPED if swapped else TileOrder.MMA
    spec = LinearSpec(code, bits, 1408, (128, 256), 128, tile_order=order)
    x, bias = rows(16, 1408), rows(1, 384)[0]
    x[2, 700], x[3], x[6, 5], x[9], x[12] = 1e4, 0, torch.inf, x[9] * 1e30, x[12] * 1e-30
    given = (cuda, spec, random_layer(spec), x, [split, *[4, 2] * 3, 4], None, bias)
    return arguments(*given, 16), arguments(*given)


@pytest.mark.parametrize("split", [8, 24])
@pytest.mark.parametrize(("code", "bits", "swapped"), ONE_LAUNCH)
def test_one_launch_gives_the_bits_of_three(cuda, code, bits, swapped, split):
    """k in parts of 8, 8 and 6 chunks, or whole; rows of zeros, of infinity, and of large and small numbers."""
    together, apart = one_launch(cuda, code, bits, swapped, split)
    x = together[0]
    for m, dtype in ((1, torch.bfloat16), (8, torch.float32), (9, torch.float16), (16, torch.float32)):
        few = x[:m].to(dtype)
        y, other = (OPS.cuda_linear(few, *given[1:]) for given in (together, apart))
        assert torch.equal(y.isnan(), other.isnan()) and torch.equal(y.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("order", ["eager", "depthfirst", "eager,reverse", "random:1"])
def test_the_order_of_threads_and_blocks_does_not_show_in_one_launch(cuda, monkeypatch, order):
    """`reverse` begins with the last block, so that the first part of k comes last."""
    together, _ = one_launch(cuda, "1mad", 2)
    usual = [OPS.cuda_linear(together[0][:m], *together[1:]) for m in (3, 12)]
    monkeypatch.setenv("QUIP_VLLM_EMULATOR", order)
    for y in usual:
        OPS.cuda_linear(torch.zeros_like(together[0]), *together[1:])  # leaves shared memory with another row's largest
        again = OPS.cuda_linear(together[0][: len(y)], *together[1:])
        assert torch.equal(again.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("block", [4, 8])
def test_the_epilogue_takes_blocks_within_a_tile(cuda, block):
    spec = LinearSpec("e8p", 3, 40, (12, 40, 4) if block == 4 else (24, 16), block)
    tensors, x = random_layer(spec), rows(5, 40)
    y = OPS.cuda_linear(*arguments(cuda, spec, tensors, x, [8, 2, 2, 2, 2, 2, 2, 2]))
    assert relative(y, x.double() @ dequantize(spec, tensors).double().T) < HALF_ACTIVATIONS


@pytest.mark.parametrize("sizes", [(96, 32), (37,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("code", ["e8p", "hyb"])
def test_a_bias_is_added_before_the_only_rounding(cuda, code, dtype, sizes):
    for block in (None, 32):
        spec = LinearSpec(code, 2, 272, sizes, block, rotate_output=len(sizes) > 1)
        prepared = cuda.prepare(spec, random_layer(spec))
        x, bias = rows(5, 272).to(dtype), torch.randn(sum(sizes), generator=torch.Generator().manual_seed(1)).to(dtype)
        exact = prepared.linear(x.float()).double() + bias.double()
        y = prepared.linear(x, bias)
        assert y.dtype is dtype
        assert ((y.double() - exact).abs() <= 2 * ROUNDED_ONCE[str(dtype)] * (exact.abs() + bias.double().abs())).all()
        assert torch.equal(prepared.linear(x[:1], bias), y[:1])


@pytest.mark.parametrize("order", ["eager", "depthfirst", "eager,reverse", "random:1", "eager,random:2"])
@pytest.mark.parametrize(("code", "bits"), EVERY_RATE[::3])
def test_the_order_of_threads_and_copies_does_not_show(cuda, monkeypatch, code, bits, order):
    spec = LinearSpec(code, bits, 656, (80, 48), 16)
    tensors = random_layer(spec)
    prepared = cuda.prepare(spec, tensors)
    usual = [prepared.linear(rows(m, 656)) for m in (3, 12, 70)]
    monkeypatch.setenv("QUIP_VLLM_EMULATOR", order)
    for y in usual:
        assert torch.equal(prepared.linear(rows(len(y), 656)), y)


@pytest.mark.parametrize("order", ["eager", "depthfirst", "eager,reverse", "random:1", "eager,random:2"])
@pytest.mark.parametrize("code", ["1mad", "hyb"])
def test_the_order_of_threads_does_not_show_in_the_epilogue(cuda, monkeypatch, code, order):
    spec = LinearSpec(code, 2, 272, (128, 256), 128)
    given = arguments(cuda, spec, random_layer(spec), rows(70, 272), [16, *[4, 2] * 3, 4])
    usual = [OPS.cuda_linear(given[0][:m].contiguous(), *given[1:]) for m in (3, 12, 70)]
    monkeypatch.setenv("QUIP_VLLM_EMULATOR", order)
    for y in usual:
        assert torch.equal(OPS.cuda_linear(given[0][: len(y)].contiguous(), *given[1:]), y)


def test_a_head_without_output_rotation(cuda):
    for code, n in (("e8p", 37), ("3inst", 37)):
        spec = LinearSpec(code, 4, 80, (n,), rotate_output=False)
        tensors = random_layer(spec)
        x = rows(3, 80)
        y = cuda.prepare(spec, tensors).linear(x)
        assert y.shape == (3, n)
        assert relative(y, x.double() @ dequantize(spec, tensors).double().T) < HALF_ACTIVATIONS


@pytest.mark.parametrize(("k", "code", "bits"), crossed([(80,), (576,)], odd=0))
def test_rows_of_an_embedding(cuda, code, bits, k):
    spec = LinearSpec(code, bits, k, (45,), rotate_output=False)
    tensors = random_layer(spec)
    prepared = cuda.prepare(spec, tensors)
    ids = torch.tensor([[0, 44, 7], [15, 16, 31]])
    found = prepared.embedding(ids, torch.float32)
    assert relative(found, dequantize(spec, tensors)[ids]) < FLOAT32_LINEAR
    assert torch.equal(prepared.embedding(ids, torch.bfloat16), found.bfloat16())
    assert prepared.embedding(ids[:0], torch.float16).shape == (0, 3, k)
    outside = prepared.embedding(torch.tensor([-1, 7, 48]), torch.float32)
    assert outside[::2].isnan().all() and torch.equal(outside[1], found[0, 2])


@pytest.mark.parametrize(("n", "k"), [(16, 28 * 512), (52 * 512, 64)])
def test_rows_too_long_for_shared_memory(cuda, n, k):
    spec = LinearSpec("e8p", 2, k, (n,))
    tensors = random_layer(spec)
    x = rows(2, k)
    y = cuda.prepare(spec, tensors).linear(x)
    assert relative(y, x.double() @ dequantize(spec, tensors).double().T) < HALF_ACTIVATIONS


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_a_bad_value_spoils_its_row_only(cuda, monkeypatch, bad, activations):
    monkeypatch.setenv("QUIP_VLLM_ACTIVATIONS", activations)
    spec = LinearSpec("1mad", 2, 80, (48, 16))
    prepared = cuda.prepare(spec, random_layer(spec))
    x = rows(9, 80)
    clean = prepared.linear(x)
    x[4, 7] = bad
    y = prepared.linear(x)
    assert not y[4].isfinite().any()
    keep = [i for i in range(9) if i != 4]
    assert torch.equal(y[keep], clean[keep])


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e30])
def test_activations_of_any_size(cuda, scale):
    spec = LinearSpec("e8p", 2, 80, (48,))
    tensors = random_layer(spec)
    x = rows(2, 80) * scale
    y = cuda.prepare(spec, tensors).linear(x)
    if scale < 1e-35:
        assert not y.any()
    else:
        assert relative(y, x.double() @ dequantize(spec, tensors).double().T) < HALF_ACTIVATIONS


@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (2, 3, 64), (64,)])
def test_leading_dimensions(cuda, shape):
    spec = LinearSpec("1mad", 2, 64, (32, 16))
    tensors = random_layer(spec)
    x = torch.randn(shape)
    y = cuda.prepare(spec, tensors).linear(x)
    assert y.shape == (*shape[:-1], 48)


SEARCHED = [("hyb", 1), ("hyb", 2), *[("1mad", bits) for bits in (1, 2, 3, 4, 8)]]


def searched(code, bits):
    """Arguments of a search of three sequences, more than the emulated GPU has thread blocks at up to 4 bits per step.

    With hyb all numbers are multiples of a half, so that many walks cost the same.
    """
    values = FORMATS[code].values(bits=bits).T.contiguous()
    targets = code_rms(FORMATS[code], values) * torch.randn(3, 256, generator=torch.Generator().manual_seed(bits))
    return (*((2 * one).round() / 2 if code == "hyb" else one for one in (targets, values)), bits)


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """What the CPU's search with float costs finds: up to 4 bits only the portable tier has no other."""
    file = tmp_path_factory.mktemp("walks") / "walks.pt"
    program = (
        "import sys, torch; from test_emulated import OPS, SEARCHED, searched; from quip_vllm.ops import cpu_tier\n"
        "assert cpu_tier() == 'portable'\n"
        "torch.save({one: OPS.encode_trellis(*searched(*one)) for one in SEARCHED}, sys.argv[1])"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "QUIP_VLLM_CPU_TIER": "portable", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", program, str(file)], env=environment, check=True)
    return torch.load(file)


@pytest.mark.parametrize(("code", "bits"), SEARCHED)
def test_walks_are_those_of_float_costs(cuda, walks, code, bits):
    assert torch.equal(OPS.cuda_encode_trellis(*searched(code, bits)), walks[code, bits])


def test_float_costs_are_the_same_at_every_tier(walks):
    require_cpu_library()
    assert torch.equal(OPS.encode_trellis(*searched("1mad", 8)), walks["1mad", 8])


@pytest.mark.parametrize("order", ["depthfirst", "reverse", "random:1"])
def test_the_order_of_threads_does_not_show_in_a_walk(cuda, walks, monkeypatch, order):
    monkeypatch.setenv("QUIP_VLLM_EMULATOR", order)
    targets, *given = searched("hyb", 2)
    assert torch.equal(OPS.cuda_encode_trellis(targets[:1], *given), walks["hyb", 2][:1])


def test_nearest_points_are_the_cpus(cuda):
    """The second half has equally near points: multiples of a quarter."""
    require_cpu_library()
    x = torch.randn(2001, 8, generator=torch.Generator().manual_seed(0))
    x[1000:] = (4 * x[1000:]).round() / 4
    assert torch.equal(OPS.cuda_encode_lattice(x), OPS.encode_lattice(x))


def test_what_lies_on_a_gpu_is_searched_there(cuda):
    class OnGpu(torch.Tensor):
        is_cuda = True

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for kind, prefix in ((torch.Tensor, ""), (OnGpu, "cuda_")):
        seen = set()
        targets, values, bits = searched("1mad", 8)
        with Calls():
            encode_trellis(targets[:1].as_subclass(kind), values.T, bits)
            encode_lattice(torch.zeros(3, 8).as_subclass(kind))
        assert {name for name in seen if "encode" in name} == {f"{prefix}encode_trellis", f"{prefix}encode_lattice"}


def test_searches_of_nothing_and_of_what_is_refused(cuda):
    targets, values, _ = searched("1mad", 2)
    assert OPS.cuda_encode_trellis(targets[:0], values, 2).shape == (0, 256)
    assert OPS.cuda_encode_lattice(torch.zeros(0, 8)).shape == (0,)
    with pytest.raises(RuntimeError, match="components"):
        OPS.cuda_encode_trellis(targets, values, 9)
    with pytest.raises(RuntimeError, match="targets"):
        OPS.cuda_encode_trellis(targets[:, 1:].contiguous(), values, 2)


def hyb_arguments(cuda):
    spec = LinearSpec("hyb", 2, 64, (32, 16))
    return arguments(cuda, spec, random_layer(spec), torch.randn(3, 64))


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.randn(3, 65), "contiguous"),
        (0, torch.randn(3, 64, dtype=torch.float64), "dtype"),
        (1, torch.zeros(7, dtype=torch.int32), "packed"),
        (2, None, "table"),
        (2, torch.zeros(3, dtype=torch.int32), "table"),
        (3, torch.zeros(64, dtype=torch.float16), "su"),
        (4, torch.zeros(47), "sv"),
        (5, [torch.ones(1, 1)], "bases"),
        (6, [64, 32, 12], "rotation"),
        (6, [64, 64, 16], "rotation"),
        (7, [32, 8], "multiple of 16"),
        (8, torch.zeros(47), "bias"),
        (8, torch.zeros(96)[::2], "bias"),
        (8, torch.zeros(48, dtype=torch.float64), "dtype"),
        (9, "4mad", "4mad"),
        (10, 5, "bits"),
        (10, 0, "bits"),
        (11, [8, 3, 2, 3, 2, 3, 2, 1], "warps"),
        (11, [8, 1, 1, 1, 1, 1, 1, 1], "depth"),
        (11, [8], "thread_blocks"),
        (14, [1, 256], "wide has 2 entries"),
        (14, [1, 257, 8, 0], "choose_wide"),
    ],
)
def test_bad_arguments_are_refused_and_named(cuda, position, value, words):
    given = [*hyb_arguments(cuda), []]
    given[position] = value
    with pytest.raises(RuntimeError, match=words):
        OPS.cuda_linear(*given)


def test_opcheck(cuda):
    torch.library.opcheck(OPS.cuda_linear.default, hyb_arguments(cuda))
    spec = LinearSpec("e8p", 2, 64, (40,), rotate_output=False)
    t = cuda.prepare(spec, random_layer(spec)).tensors
    signs = (t["su"], t["sv"], t["inverse_base"])
    given = (torch.tensor([3, 39]), t["packed"], t["table"], *signs, 64, "e8p", 2, torch.bfloat16)
    torch.library.opcheck(OPS.cuda_embedding.default, given)
    targets, *more = searched("hyb", 4)
    forwards = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.cuda_encode_trellis.default, (targets[:1], *more), test_utils=forwards)
    torch.library.opcheck(OPS.cuda_encode_lattice.default, (torch.zeros(3, 8),), test_utils=forwards)


def test_fake_cuda_tensors_and_tracing(cuda):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    given = hyb_arguments(cuda)
    with FakeTensorMode(allow_non_fake_inputs=True):

        def on_gpu(t):
            return torch.empty(t.shape, dtype=t.dtype, device="cuda")

        fake = [on_gpu(a) if isinstance(a, torch.Tensor) else a for a in given]
        fake[5] = [on_gpu(t) for t in given[5]]
        fake[0] = fake[0].to(torch.bfloat16)
        y = OPS.cuda_linear(*fake)
    assert y.device.type == "cuda" and y.dtype is torch.bfloat16 and y.shape == (3, 48)
    graph = make_fx(lambda x: OPS.cuda_linear(x, *given[1:]) + 1, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        given[0]
    )
    assert "cuda_linear" in graph.code


@pytest.mark.parametrize("code", ["e8p", "hyb"])
def test_compiles_as_one_graph(cuda, code):
    spec = LinearSpec(code, 2, 64, (32, 16))
    prepared = cuda.prepare(spec, random_layer(spec))
    compiled = torch.compile(lambda x: prepared.linear(x * 2) + 1, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    assert torch.equal(compiled(x), prepared.linear(x * 2) + 1)


GPUS = {
    "A100": cuda_shapes.Gpu(108, 163 * 1024, 164 * 1024),
    "RTX 4090": cuda_shapes.Gpu(128, 99 * 1024, 100 * 1024),
    "H200": cuda_shapes.Gpu(132, 227 * 1024, 228 * 1024, wgmma=True),
}


@pytest.mark.parametrize("gpu", ["A100", "RTX 4090"])
@pytest.mark.parametrize(("code", "bits"), EVERY_RATE)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 8192), (16, 64), (28672, 8192), (5120, 13824)])
def test_thread_blocks_fit_the_gpu_and_cover_the_layer(cuda, gpu, code, bits, n, k):
    from quip_vllm.ops.cuda import _kernels, _problem

    spec = LinearSpec(code, bits, k, (n,))
    name = _kernels(spec, GPUS[gpu])
    if bits == 2:
        assert name.endswith("_large") == (gpu == "A100" and (code in ("hyb", "e8p")))
    problem = _problem(spec, name)
    split, *blocks = cuda_shapes.choose(problem, GPUS[gpu])
    assert split % cuda_layout.SPARE_CHUNKS == 0
    for m, warps, depth in zip(cuda_shapes.ROWS, blocks[::2], [*blocks[1::2], 1], strict=True):
        assert problem.shared(m, warps, depth, 0) <= GPUS[gpu].shared_block
    if n * k >= 1 << 24:  # enough work for every multiprocessor
        count = -(-n // (32 * blocks[0])) * -(-k // (64 * split))
        assert count >= 0.7 * GPUS[gpu].multiprocessors


@pytest.mark.parametrize("gpu", ["A100", "RTX 4090"])
def test_the_model_weighs_a_launch_against_parts_of_k(cuda, gpu):
    """Many outputs occupy a GPU without parts of k, few do not; an output rotation of full width has no choice.

    Blocks of 32 are within any thread block; wider ones restrict it, which an A100 minds.
    """
    from quip_vllm.ops.cuda import _problem

    for n, block, together in ((28672, 32, True), (4096, 128, False), (28672, None, False), (128, None, False)):
        problem = _problem(LinearSpec("hyb", 2, 4096, (n,), block), "hyb")
        split, warps, depth, *_ = cuda_shapes.choose(problem, GPUS[gpu])
        assert cuda_shapes.fuses(cuda_shapes.Candidate(warps, depth, split), problem) is together
    assert problem.width == 128  # one projection of a power of two: its full width is a block


@pytest.mark.parametrize("gpu", ["A100", "RTX 4090"])
def test_the_model_weighs_three_launches_against_rotating_in_each_thread_block(cuda, gpu):
    """Few rows take one launch, if both sides are rotated in blocks of 128; the setting takes it away."""
    from quip_vllm.ops.cuda import _shape

    found = {}
    for block, most in ((128, 16), (128, 1), (128, 0), (64, 16), (None, 16)):
        shape, found[block, most] = _shape(LinearSpec("hyb", 2, 4096, (4096,), block), "hyb", GPUS[gpu], most)
        if found[block, most]:
            assert shape[1] % 4 == 0 and shape[2] == 2  # blocks of 128 outputs, of a depth that is compiled
    assert found[128, 16] >= found[128, 1] == 1 and not (found[128, 0] or found[64, 16] or found[None, 16])


def test_many_rows_take_what_shared_memory_holds(cuda):
    """And parts of k where the outputs are few; a code without such a kernel has no choice."""
    from quip_vllm.ops.cuda import _problem

    def choice(code, bits, n, gpu="A100"):
        return cuda_shapes.choose_wide(_problem(LinearSpec(code, bits, 4096, (n,), 256), code), GPUS[gpu])

    assert choice("1mad", 2, 27648) == choice("hyb", 2, 27648) == [256, 64, 0]  # two waves
    assert choice("1mad", 2, 16896, "H200") == choice("hyb", 2, 16896, "H200") == [256, 64, 1]
    assert choice("e8p", 3, 4096, "H200")[::2] == [128, 1] and choice("3inst", 3, 4096, "H200")[::2] == [256, 0]
    assert choice("1mad", 4, 4096, "RTX 4090")[0] == 256 and choice("hyb", 4, 4096, "RTX 4090")[0] == 128
    assert choice("e8p", 3, 4096, "RTX 4090")[0] == 128
    assert choice("hyb", 2, 1024)[1] < 16
    assert choice("lut", 2, 4096) == choice("1mad", 5, 4096) == []
    problem = _problem(LinearSpec("hyb", 2, 4096, (4096,)), "hyb")
    assert "a block has 101376" in cuda_shapes.wide_refusal(problem, GPUS["RTX 4090"], 256, False)
    assert "9.0" in cuda_shapes.wide_refusal(problem, GPUS["RTX 4090"], 64, True)


def test_a_candidate_is_refused_with_a_reason():
    def shared(rows, warps, depth, chunks):
        return 0 if rows > 16 and depth > 1 else 1000 * rows * warps * depth

    problem = cuda_shapes.Problem(4096, 4096, 2, 4.0, 0, shared)
    gpu = GPUS["A100"]
    deep = cuda_shapes.Candidate(4, 4, 8)
    assert "no kernel for 64 rows has" in cuda_shapes.refusal(deep, problem, gpu, 64)
    assert "shared memory" in cuda_shapes.refusal(deep, problem, gpu, 16)
    assert cuda_shapes.refusal(deep, problem, gpu, 8) is None
    with pytest.raises(ValueError, match="shared memory"):
        cuda_shapes.choose(problem, cuda_shapes.Gpu(108, 100, 100))
