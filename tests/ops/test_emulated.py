# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, run by the emulator, against the dequantized weight: every format, odd sizes, every dtype."""

import itertools

import pytest
import torch
from cuda_layers import OPS, arguments, rows
from numerics import FLOAT32_LINEAR, HALF_ACTIVATIONS, INT8_ROUNDING, ROUNDED_ONCE, SAME_DTYPE_FACTOR, relative
from random_layers import CHUNKED, EVERY_RATE, EXL3_RATES, crossed, random_layer

from quip_vllm.formats.decode import decode
from quip_vllm.formats.spec import TileOrder
from quip_vllm.ops import LinearSpec, dequantize
from quip_vllm.transforms.hadamard import hadamard

SHAPES = [  # k, output sizes, block
    (16, (16,), None),
    (272, (48, 16), 16),
    (640, (352,), 64),
    (1152, (96, 32, 32), None),  # 36 * 32
]
ROWS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 130)
MORE = {"hyb": "hyb_large", "e8p": "e8p_large"}


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


@pytest.mark.parametrize(("code", "bits"), EXL3_RATES)
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
    ("mul1_half", 3, True),
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
        for wgmma in kinds(code + "_swapped" * swapped, bits, most):
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
