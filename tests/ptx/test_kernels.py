# SPDX-License-Identifier: Apache-2.0
"""The kernels of kernels/cuda as nvcc compiles them, run in the PTX interpreter against the reference.

Each kernel for each code and bit width multiplies a small layer; the rotations are compared with the transforms, and
the three launches together with the emulator. The last part plants mistakes, which the comparisons have to find.
"""

import itertools
import re

import numpy as np
import pytest
import torch
from numerics import FLOAT32_PRODUCTS, FLOAT32_STEP, FLOAT32_TRANSFORM, ROUNDED_ONCE
from ptx import quip_kernels as kernels
from ptx.interpreter import Program, PtxError
from ptx.quip_kernels import EVERY, KINDS, Layer, Output, Rotation, ThreadBlock
from quip_vllm.ops.tensors import rotation_base, rotations

from quip_vllm.transforms.hadamard import factor, hadamard

LONG, SPLIT = 1104, 16
"""Inputs of 18 chunks and chunks of a split: up to depth 2, a split has more stages than the pipeline has buffers."""


def small(name: str, bits: int, k: int = 176) -> Layer:
    """3 tiles and 3 chunks, so that some warps lack one; HYB has two tables, the lattice outputs to pad."""
    if name.startswith("hyb"):
        return kernels.layer(name, bits, (48, 16), k)
    return kernels.layer(name, bits, (44,) if name.startswith("e8p") else (48,), k)


def product(name, made, block, program=None, **how):
    """Runs a kernel and compares every split's sums with the reference. Returns the sums and the report."""
    kind, k = kernels.variant(name, block.m), made.spec.in_features
    x = kernels.activations(kind, block.m, k)
    arranged = kernels.spare(kernels.arrange(x, kind.order), block.m, kind.order)
    partial, report = kernels.multiply(name, made, arranged, block, program, **how)
    step = block.split_chunks * kernels.CHUNK or k
    assert len(partial) == -(-k // step)
    for start, got in zip(range(0, k, step), partial, strict=True):
        part = slice(start, start + step)
        compare(x[:, part].astype(np.float64), made.weight[:, part], got[:, : made.spec.out_features])
    return partial, report


def compare(x, weight, got):
    want = x @ weight.T
    if got.dtype == np.int32:
        assert np.array_equal(got, want.astype(np.int64).astype(np.int32))
    else:
        assert (np.abs(got - want) <= FLOAT32_PRODUCTS * (np.abs(x) @ np.abs(weight).T)).all()


# The matrix product.


def depths(name, bits, m):
    """The chunks that a warp takes at a time, of the kernels that there are for m rows."""
    return (1,) if m > 16 or bits > 4 or name == "lut" else (2, 4)


def compiled(name, bits):
    """The kernels of a code: rows and depth, and a second number of rows for the kernel of one."""
    rows = (1, 12) if name.endswith("_large") else (1, 12, 20)
    return [(m, depth) for m in rows for depth in depths(name, bits, m)] + [(5, depths(name, bits, 5)[-1])]


CASES = [(name, bits, m, depth) for name, bits in EVERY for m, depth in compiled(name, bits)]


@pytest.mark.parametrize(
    ("name", "bits", "m", "depth"), CASES, ids=[f"{n}-{b}bits-{m}rows-depth{d}" for n, b, m, d in CASES]
)
def test_product(name, bits, m, depth):
    product(name, small(name, bits), ThreadBlock(m, 2 if m in (5, 20) else 1, depth))


@pytest.mark.parametrize("m", [3, 12, 70])
@pytest.mark.parametrize(("name", "bits"), [(name, bits) for name, bits in EVERY if bits in (3, 7)])
def test_product_of_many_chunks_and_rows(name, bits, m):
    product(name, small(name, bits, LONG), ThreadBlock(m, 2, depths(name, bits, m)[0], SPLIT))


@pytest.mark.parametrize("name", [name for name in KINDS if depths(name, 4, 4)[-1] == 4])
def test_product_of_many_chunks_four_at_a_time(name):
    product(name, small(name, 4, 2 * LONG), ThreadBlock(4, 4, 4, 2 * SPLIT))


@pytest.mark.parametrize(
    ("name", "bits", "m"), [("1mad", 2, 20), ("1mad_int8", 5, 12), ("hyb_large", 3, 5), ("e8p", 4, 5), ("lut", 8, 5)]
)
def test_product_in_any_order(name, bits, m):
    made, block = small(name, bits, LONG), ThreadBlock(m, 2, depths(name, bits, m)[0], SPLIT)
    usual, _ = product(name, made, block)
    for order, eager in [("together", True), *itertools.product(("forward", "backward"), (False, True))]:
        got, _ = product(name, made, block, order=order, eager=eager)
        assert np.array_equal(got.view(np.int32), usual.view(np.int32))


# What it costs.


def passes(site):
    """Times as many passes through shared memory as without bank conflicts."""
    return site.wavefronts / (site.wavefronts - site.conflicts)


@pytest.mark.parametrize(("name", "bits", "m"), [*((n, b, 5) for n, b in EVERY), *((n, 2, 20) for n in KINDS)])
def test_costs_of_memory(name, bits, m):
    made = kernels.layer(name, bits, (64,), 512)
    _, report = product(name, made, ThreadBlock(m, 2, depths(name, bits, m)[-1]), measure=True)
    copies = report.select("cp.async.cg.shared.global")
    assert copies
    for site in copies:  # whole sectors, and no conflicts where they arrive; bytes are counted at both ends
        assert site.sectors * 32 * 2 == site.lane_bytes
        assert not site.conflicts
    table = kernels.variant(name, m).table_bytes(bits) and not kernels.variant(name, m).is_large
    for site in [*report.select("ld.shared"), *report.select("st.shared")]:
        look_up = bool(re.match(r"ld\.shared\.[ub]32", site.opcode))
        assert passes(site) <= (2 if table and look_up else 1) or is_half_a_load(site, bits), site


def is_half_a_load(site, bits):
    """16 bytes of x that nvcc loads in two halves, between which lanes leave gaps."""
    return bits not in (2, 6) and site.opcode == "ld.shared.v2.u32" and passes(site) <= 2


def test_look_ups_are_where_they_are_thought_to_be():
    """The 16-copy tables do have conflicts, and only there: so the test above tells look-ups from other loads."""
    for name in ("hyb", "e8p"):
        made = kernels.layer(name, 2, (64,), 512)
        _, report = product(name, made, ThreadBlock(5, 2, 4), measure=True)
        slow = [site for site in report.select("ld.shared") if site.conflicts]
        assert slow and all(re.match(r"ld\.shared\.[ub]32", site.opcode) for site in slow)


# The rotations.

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(64, None), (2048, None), (192, None), (280, None), (176, 16), (144, 8)]


def rotation(size, block, transpose):
    q, p = factor(size) if block is None else (1, min(block, size & -size))
    return Rotation(q, p, rotation_base(q, transpose=not transpose))  # the kernels take the transpose


def read_back(out, m, k, order):
    """Elements [m, k] of activations, once it is checked that padding is 0 and spare chunks are untouched."""
    dtype = np.int8 if order == "bytes" else np.float16
    used = kernels.arranged_bytes(m, k, order)
    values = out.view(dtype)[kernels.arranged_index(m, k, order) // np.dtype(dtype).itemsize]
    assert np.array_equal(kernels.arrange(values, order), out[:used])
    assert (out[used:] == 0x7F).all()
    return values.astype(np.float64)


def slices_of(order, *runs):
    """The slices that a row of these rotations can be cut in."""
    return (1, kernels.SLICES) if order != "bytes" and all(run.p % kernels.SLICES == 0 for run in runs) else (1,)


def totals_of(values, order, slices):
    """The exact sums [m, slices] of activations."""
    exact = (values.astype(np.float64) * (1 if order == "bytes" else 2**24)).astype(np.int64)
    return exact.reshape(len(values), -1, slices).sum(1)


def norm_of(run):
    """What makes a rotation of sums of q p numbers one of length 1."""
    return np.float32(1) / np.sqrt(np.float32(run.q * run.p))


def check_rotated(out, scales, totals, want, order, run, products):
    """Activations, scales and sums against the rotated rows, float64, of x times su, float32."""
    values = read_back(out, *want.shape, order)
    exact = FLOAT32_TRANSFORM * np.sqrt((want**2).mean(1, keepdims=True))
    assert np.array_equal(totals, totals_of(values, order, totals.shape[1]))
    largest = np.abs(values).max(1)
    if order == "bytes":
        assert (largest == 127).all()
        assert (np.abs(values * scales[:, None] - want) <= scales[:, None] / 2 + exact).all()
        return
    # A row's largest product is below 2^exponent, so that a sum of q p of them is below 512 times the scale. One sum at
    # least is as large as that product.
    _, exponent = np.frexp(np.abs(products).max(1))
    assert np.array_equal(scales, np.ldexp(norm_of(run), exponent + run.growth - 9))
    assert ((largest >= 256 / 2**run.growth) & (largest < 512)).all()
    rounding = ROUNDED_ONCE["torch.float16"] * np.abs(want)
    assert (np.abs(values * scales[:, None] - want) <= rounding + exact).all()


def rotate_in_and_check(x, su, k, block, order, **how):
    """Checks every cut of rows, all of which give the same. Returns the activations."""
    run = rotation(k, block, transpose=True)
    want = hadamard(x.double() * su.double(), block, transpose=True).numpy()
    products = (x.float() * su.float()).numpy()
    found = []
    for slices in slices_of(order, run):
        out, scales, totals, _ = kernels.rotate_in(x, su, run, order, slices, **how)
        check_rotated(out, scales, totals, want, order, run, products)
        found.append((out, scales, totals.sum(1)))
    assert all(np.array_equal(one, other) for again in found for one, other in zip(found[0], again, strict=True))
    return found[0][0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", kernels.ORDERS)
@pytest.mark.parametrize(("k", "block"), SIZES, ids=str)
def test_rotate_in(k, block, order, dtype):
    generator = torch.Generator().manual_seed(k)
    x, su = torch.randn(3, k, generator=generator).to(dtype), torch.randn(k, generator=generator).half()
    usual = rotate_in_and_check(x, su, k, block, order)
    again = rotate_in_and_check(x, su, k, block, order, in_memory=True)
    assert np.array_equal(usual, again)


@pytest.mark.parametrize("order", kernels.ORDERS)
def test_rotate_in_of_more_rows_than_a_block(order):
    generator = torch.Generator().manual_seed(1)
    rotate_in_and_check(torch.randn(67, 144, generator=generator), torch.ones(144), 144, 16, order)


@pytest.mark.parametrize("order", kernels.ORDERS)
def test_rotate_in_of_rows_without_a_scale(order):
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(2))
    x[1], x[2, 5], x[3, 7] = 0, float("nan"), float("-inf")
    x[4:], x[4, 3], x[5, 9] = 0, 9e-31, 2.0**121  # too small, and where a sum of 2^7 may be too large
    if order == "bytes":
        x = x[:5]
    run = rotation(128, None, transpose=True)
    for slices in slices_of(order, run):
        out, scales, totals, _ = kernels.rotate_in(x, torch.ones(128), run, order, slices)
        values = read_back(out, *x.shape, order)
        assert values[0].any() and not values[1:].any()
        assert not totals[1:].any()
        assert (scales[[1, 4]] == 0).all() and np.isnan(scales[[2, 3, *range(5, len(x))]]).all()


@pytest.mark.parametrize("slices", [1, kernels.SLICES])
def test_rotate_in_of_the_largest_and_the_smallest_sums(slices):
    """Where the limits of fp16 activations are: a sum of 2^7 numbers just below a power of two, and of one number."""
    run, x = rotation(128, None, transpose=True), torch.zeros(4, 128)
    x[0], x[1, 77], x[2, 5], x[3, 64] = 2 - 2.0**-10, 1, 2.0**120, 2.0**-99
    out, scales, _, _ = kernels.rotate_in(x, torch.ones(128), run, "trellis", slices)
    values = read_back(out, 4, 128, "trellis")
    assert values[0, 0] == 511.75 and not values[0, 1:].any()
    assert (np.abs(values[1:]) == 256 / 2**run.growth).all()
    assert np.array_equal(scales, norm_of(run) * np.float32([0.5, 0.5, 2.0**119, 2.0**-100]))


def sums_of(m, size, integers, generator):
    """Partial sums of 3 splits, what they are without offset, totals of 8 slices: integers pass 2^32 on their way."""
    if not integers:
        partial = generator.standard_normal((3, m, size)).astype(np.float32) * 100
        totals = generator.integers(-(2**26), 2**26, (m, kernels.SLICES))
        return partial, partial.astype(np.float64).sum(0), totals
    partial = generator.integers(-(2**31), 2**31, (3, m, size)).astype(np.int32)
    exact = generator.integers(-(2**28), 2**28, (m, size))
    totals = generator.integers(-500, 500, (m, kernels.SLICES))
    partial[2] = (exact + 510 * totals.sum(1, keepdims=True) - partial[:2].astype(np.int64).sum(0)).astype(np.int32)
    return partial, exact.astype(np.float64), totals


OUTPUTS = [((64,), None), ((96, 48, 64), None), ((80, 48), 16), ((44, 20), None), ((192, 96), None)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("integers", [False, True], ids=["floats", "integers"])
@pytest.mark.parametrize(("sizes", "block"), OUTPUTS, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("in_memory", [False, True], ids=["shared", "memory"])
def test_rotate_out(sizes, block, integers, dtype, in_memory, biased):
    random, m, n = np.random.default_rng(sum(sizes)), 3, sum(sizes)
    partial, exact, totals = sums_of(m, -(-n // 16) * 16, integers, random)
    sv, scales = torch.from_numpy(random.standard_normal(n)), random.random(m).astype(np.float32)
    unit, offset = (2.0**-20, 510.0) if integers else (0.5, 36.0)
    runs = tuple(rotation(size, block, transpose=False) for size in sizes)
    bias = torch.from_numpy(random.standard_normal(n)).to(dtype) if biased else None
    out = Output(runs, sizes, sv, dtype, unit, offset, bias)
    y, *others = [
        kernels.rotate_out(partial, scales, of_rows, out, slices, in_memory)[0]
        for slices in slices_of("", *runs)
        for of_rows in (totals, totals.sum(1, keepdims=True))
    ]
    assert all(torch.equal(y, other) for other in others)
    sums = torch.from_numpy(exact if integers else exact - offset * 2.0**-24 * totals.sum(1, keepdims=True))[:, :n]
    rotated = torch.cat([hadamard(part.contiguous(), block) for part in sums.split(sizes, dim=1)], dim=1)
    want = rotated * sv.float().double() * unit * torch.from_numpy(scales)[:, None].double()
    rms = (rotated**2).mean(1, keepdim=True).sqrt() * want.abs() / rotated.abs()
    if biased:
        want += bias.double()
    rounding = ROUNDED_ONCE[str(dtype)] * want.abs()
    assert ((y.double() - want).abs() <= rounding + FLOAT32_TRANSFORM * rms).all()


# Rows of an embedding.

ROWS_OF = [(name, bits) for name, bits in EVERY if name != "1mad_int8" and not name.endswith("_large")]


@pytest.mark.parametrize("k", [80, 1104])
@pytest.mark.parametrize(("name", "bits"), ROWS_OF)
def test_decode_rows(name, bits, k):
    made = kernels.layer(name, bits, (44 if name == "e8p" else 48,), k)
    n = made.spec.out_features
    ids = np.array([0, n - 1, 7, 8, 31, -1, n, 2**40, 15], np.int64)
    known = (ids >= 0) & (ids < n)
    out, scales, report = kernels.decode_rows(name, made, ids, measure=True)
    want = made.weight[ids[known]] - kernels.offset_of(name, bits)
    # A number is of 11 bits, its offset too; the lattice's second stage is scaled, which rounds.
    assert (np.abs(out[known] - want) <= FLOAT32_STEP * np.abs(made.weight).max()).all()
    assert np.array_equal(scales[known], made.tensors["sv"].float().numpy()[ids[known]])
    assert np.isnan(scales[~known]).all()
    for site in report.select("ld.global"):  # a lane's words lie together, but for 3 bits and more are read one by one
        assert site.sectors <= site.requests * max(4 * bits, 32), site


@pytest.mark.parametrize(("name", "bits"), ROWS_OF)
def test_decode_dense(name, bits):
    """All of a layer with two tables, or outputs to pad; columns behind the last meet zeros, and must be numbers."""
    made = small(name, bits, 1104)
    (n, k), want = (made.spec.out_features, 1104), made.weight - kernels.offset_of(name, bits)
    out, report = kernels.decode_dense(name, made, measure=True)
    assert np.isfinite(out).all()
    if name == "e8p" and bits > 2:  # the second stage is scaled
        rounding = ROUNDED_ONCE["torch.float16"] * np.abs(want) + FLOAT32_STEP * np.abs(made.weight).max()
        assert (np.abs(out[:n, :k] - want) <= rounding).all()
    else:
        assert np.array_equal(out[:n, :k], want)
    for site in report.select("st.global"):  # two sectors in each of eight rows; in parts where nvcc cuts a store
        assert site.sectors == 2 * 8 * site.requests


# The rotation in the product's epilogue.

EPILOGUES = [(16, (48, 16), 1), (64, (128, 64), 2), (128, (128,), 4), (256, (256,), 8)]


def finished(name, made, block, dtype=torch.float32, program=None, **how):
    """Outputs [m, n] by the epilogue, by rotate_out, and what the first costs."""
    spec, kind, random = made.spec, kernels.variant(name, block.m), np.random.default_rng(block.m)
    x = kernels.activations(kind, block.m, spec.in_features)
    arranged = kernels.spare(kernels.arrange(x, kind.order), block.m, kind.order)
    scales = random.random(block.m).astype(np.float32)
    totals = totals_of(x, kind.order, 1 if kind.order == "bytes" else kernels.SLICES)
    runs = tuple(Rotation(q, p, rotation_base(q, False)) for q, p in rotations(spec)[1:])
    sv, bias = (torch.from_numpy(random.standard_normal(spec.out_features)) for _ in range(2))
    offset = kernels.offset_of(name, made.bits)
    out = Output(runs, spec.output_sizes, sv, dtype, 2.0**-8, offset, bias.to(dtype))
    partial, _ = kernels.multiply(name, made, arranged, block)
    want, _ = kernels.rotate_out(partial, scales, totals, out)
    bits, report = kernels.multiply(name, made, arranged, block, program, (out, scales, totals), **how)
    return torch.from_numpy(bits).view(dtype), want, report


@pytest.mark.parametrize("m", [1, 12, 20])
@pytest.mark.parametrize(("width", "sizes", "warps"), EPILOGUES, ids=str)
@pytest.mark.parametrize(("name", "bits"), [(name, bits) for name, bits in EVERY if bits in (2, 3, 7)])
def test_the_epilogue_gives_the_bits_of_rotate_out(name, bits, width, sizes, warps, m):
    if warps == 8 and (m > 16 or name == "lut") or (m > 16 and name.endswith("_large")):
        return  # not compiled
    made = kernels.layer(name, bits, sizes, 176, width)
    dtype = DTYPES[(bits + m) % 3]
    got, want, _ = finished(name, made, ThreadBlock(m, warps, depths(name, bits, m)[-1]), dtype)
    assert torch.equal(got, want)


def test_the_epilogue_takes_many_rows_in_any_order():
    made, block = kernels.layer("1mad", 2, (96, 32), 176, 32), ThreadBlock(67, 2, 1)
    for order, eager in itertools.product(("forward", "backward", "together"), (False, True)):
        if order == "together" and not eager:
            continue
        got, want, _ = finished("1mad", made, block, order=order, eager=eager)
        assert torch.equal(got, want)


def test_costs_of_the_epilogue():
    """Whole sectors of y; the exchange has no conflicts, and the butterflies at most four lanes a bank."""
    made = kernels.layer("1mad", 2, (256,), 512, 128)
    _, _, report = finished("1mad", made, ThreadBlock(5, 4, 4), measure=True)
    for site in report.select("st.global"):
        assert site.sectors * 32 == site.lane_bytes
    assert all(passes(site) <= 4 for site in [*report.select("ld.shared"), *report.select("st.shared")])


# Launches that overlap.


@pytest.mark.parametrize("file", ["rotation", "gemm_hyb"])
def test_kernels_wait_once_for_the_one_before_and_then_write(file):
    """Only a GPU from 9.0 on overlaps launches, so nothing that runs here would miss the instruction."""
    _, *entries = re.split(r"^(?:\.visible )?\.entry ", kernels.kernel_ptx(file, arch="sm_90"), flags=re.M)
    assert len(entries) > 1
    for entry in entries:
        assert entry.count("griddepcontrol.wait") == 1, entry.split("(")[0]
        before, after = entry.split("griddepcontrol.wait")
        assert "st.global" not in before and "st.global" in after, entry.split("(")[0]


# The three launches, and the op that the emulator runs.


def chain(name, made, x, block):
    """The layer's output by the three kernels."""
    spec = made.spec
    first, *others = [
        Rotation(q, p, rotation_base(q, transpose=i > 0)) for i, (q, p) in enumerate(rotations(made.spec))
    ]
    order = KINDS[name].order
    arranged, scales, totals, _ = kernels.rotate_in(x, made.tensors["su"], first, order, slices_of(order, first)[-1])
    partial, _ = kernels.multiply(name, made, arranged, block)
    unit = 1 / kernels.ONE_MAD_UNIT if name.startswith("1mad") else 1.0
    sv, offset = made.tensors["sv"], kernels.offset_of(name, made.bits)
    out = Output(tuple(others), spec.output_sizes, sv, x.dtype, unit, offset)
    y, _ = kernels.rotate_out(partial, scales, totals, out, slices_of("", *others)[-1])
    return y


def emulated(name, made, x, block):
    """The same by the op of the emulated library."""
    table = None if made.table is None else torch.from_numpy(made.table)
    given = rotations(made.spec)
    bases = [rotation_base(q, transpose=i > 0) for i, (q, _) in enumerate(given)]
    shape = [block.split_chunks, *[block.warps_n, block.depth] * 3, block.warps_n]
    signs = [made.tensors[sign].float() for sign in ("su", "sv")]
    widths, sizes = [p for _, p in given], list(made.spec.output_sizes)
    packed = torch.from_numpy(made.packed)
    how = (name, made.bits, shape, 0)
    return torch.ops.quip_vllm.cuda_linear(x, packed, table, *signs, bases, widths, sizes, None, *how)


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize(("name", "bits"), [(name, bits) for name, bits in EVERY if bits in (2, 3)])
def test_the_emulator_gives_the_same_output(cuda, name, bits, block):
    made, x = kernels.layer(name, bits, (48, 16), 192, block), torch.randn(5, 192)
    for split in (1, 4):  # parts of k; and k whole, where the emulator's epilogue applies a block's rotation
        cut = ThreadBlock(5, 1, depths(name, bits, 5)[0], split)
        assert torch.equal(chain(name, made, x, cut), emulated(name, made, x, cut))


@pytest.mark.parametrize(("name", "bits"), EVERY)
def test_shared_memory_is_what_the_host_code_computes(cuda, name, bits):
    for m, depth in compiled(name, bits):
        for warps in (1, 2, 4):
            ours = kernels.shared_bytes(kernels.variant(name, m), bits, m, warps, depth)
            assert torch.ops.quip_vllm.cuda_shared_bytes(name, bits, m, warps, depth) == ours


# Planted mistakes.

ONE = "namespace quip {{ template __global__ void decode_gemm_kernel<{}<{}>, 1, {}>(const Gemm); }}"


def mutant(slug, name, bits, edits):
    """One kernel of a code from an edited copy of the sources."""
    template = {"1mad": "OneMad", "e8p": "Lattice", "hyb": "Hyb", "1mad_int8": "OneMadBytes"}[name]
    header = {"1mad_int8": "1mad"}.get(name, name)
    source = f'#include "code_{header}.h"\n#include "decode_gemm.h"\n' + ONE.format(
        template, bits, depths(name, bits, 5)[0]
    )
    return Program(kernels.kernel_ptx(slug, source, edits))


MISTAKES = {
    "a fragment's registers swapped": (
        ("1mad", 2),
        "ptx.h",
        "f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}",
        "f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %6, %5, %7}",
    ),
    "b fragment's registers swapped": (("1mad", 2), "decode_gemm.h", "[2 * v], b.x, b.y", "[2 * v], b.y, b.x"),
    "packed words copied from one unit further": (
        ("1mad", 2),
        "decode_gemm.h",
        "+ unit % kTileUnits * 4;",
        "+ unit % kTileUnits * 4 + 4;",
    ),
    "packed words read from one lane further": (
        ("1mad", 2),
        "decode_gemm.h",
        "chunk_bytes<Code>(), lane, words[r]);",
        "chunk_bytes<Code>(), lane + 1, words[r]);",
    ),
    "x read without the exclusive or": (("1mad", 2), "decode_gemm.h", "+ row % 2 * kBlock + lane", "+ lane"),
    "one copy too many left under way": (("1mad", 2), "decode_gemm.h", "wait<kStages - 2>", "wait<kStages - 1>"),
    "the last stage taken for a whole one": (
        ("1mad", 2),
        "decode_gemm.h",
        "(left > warp_k + kWarpsK * (kDepth - 1))",
        "(true)",
    ),
    "the two runs swapped": (
        ("1mad", 2),
        "trellis_stream.h",
        "words[half * (bits / 2) + i];",
        "words[(1 - half) * (bits / 2) + i];",
    ),
    "a window from a byte too low": (("1mad", 2), "trellis_stream.h", "0x4421 : 0x4410", "0x4410 : 0x4410"),
    "the first unit of the other run": (
        ("1mad", 3),
        "trellis_stream.h",
        "half ? words[bits - 1]",
        "!half ? words[bits - 1]",
    ),
    "the last unit of the other run": (
        ("1mad", 1),
        "trellis_stream.h",
        "half ? words[bits] :",
        "!half ? words[bits] :",
    ),
    "the run of another tile follows": (("1mad", 2), "trellis_stream.h", "+ (lane & 1) * 2;", ";"),
    "x copied to a warp's part too far": (
        ("1mad", 2),
        "decode_gemm.h",
        "first = warp * each;",
        "first = (warp + 1) * each;",
    ),
    "rows of the lattice swapped": (("e8p", 2), "code_e8p.h", "a[0][row + 2] = two(nibbles);", "a[0][row ^ 1] = 0;"),
    "the sign of HYB on the second weight": (("hyb", 2), "code_hyb.h", "row ^ (h & 0x8000u)", "row ^ (h << 16 >> 31)"),
    "bytes of int8 in the other order": (("1mad_int8", 2), "code_1mad.h", "i / 8 * 2 + i % 2][", "i / 8 * 2]["),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_source_is_found(mistake):
    (name, bits), file, old, new = MISTAKES[mistake]
    program = mutant("mutant_" + mistake.replace(" ", "_").replace("'", ""), name, bits, {file: (old, new)})
    with pytest.raises((AssertionError, PtxError)):
        product(name, small(name, bits, LONG), ThreadBlock(5, 1, depths(name, bits, 5)[0], SPLIT), program)


@pytest.mark.parametrize("which", range(8))
def test_each_barrier_is_needed(which):
    kind = KINDS["1mad"]
    text = kernels.one_kernel(kernels.kernel_ptx(kind.file), kind.kernel(2, 1, 2))
    barriers = list(re.finditer(r"\bbar\.sync\s+0;", text))
    assert len(barriers) == 8  # of the pipeline, before, in and behind the exchange, before the butterflies, of 8, 4, 2
    program = Program(text[: barriers[which].start()] + text[barriers[which].end() :])
    whole = [kernels.layer("1mad", 2, (width,), 176, width) for width in (128, 256)]

    def epilogue(made, order):
        got, want, _ = finished("1mad", made, ThreadBlock(5, 8, 2), program=program, order=order)
        assert torch.equal(got, want)

    runs = [lambda order: product("1mad", small("1mad", 2, LONG), ThreadBlock(5, 1, 2, SPLIT), program, order=order)]
    runs += [lambda order, made=made: epilogue(made, order) for made in whole]
    every = itertools.product(runs, ("forward", "backward"))
    assert any(fails(lambda run=run, order=order: run(order)) for run, order in every)


def fails(run):
    """Whether a comparison fails, or the interpreter."""
    try:
        run()
    except (AssertionError, PtxError):
        return True
    return False
