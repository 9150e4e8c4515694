# SPDX-License-Identifier: Apache-2.0
"""The rotations around decode_gemm: S_p within runs of p elements, H_q across q such runs (transforms/hadamard.py).

A program does S_p on a block of a row, up to MAX_P elements, and writes fp32; another does H_q, by dot products over
blocks of runs, and what follows. Where q is 1 and a block is a row, one program does both. A power of two above MAX_P
is split, H_q kron S_p = (H_q kron S_(p / MAX_P)) kron S_MAX_P, so a larger base stands for its first part.

Rotated activations are fp16 times a power of two for each row, small enough for any rotation of the row's largest
number: the rotated row need not be known before it is rounded.
"""

import triton
import triton.language as tl

MAX_P = 4096
BLOCK = 1024  # elements of a row for a program, where p is smaller
LIMIT = tl.constexpr(15)  # log2 of what a rotated activation may be


@triton.jit
def walsh(v, COUNT: tl.constexpr, P: tl.constexpr):
    """S_P within each run of P of COUNT elements, not normalised: fp32 [COUNT]."""
    for step in tl.static_range(0, 12):
        if 2 << step <= P:
            pairs = tl.reshape(v, (COUNT // (2 << step), 2, 1 << step))
            total = tl.sum(pairs, axis=1, keep_dims=True)
            second = tl.arange(0, 2)[None, :, None] == 1
            v = tl.reshape(tl.where(second, total - 2 * pairs, total), (COUNT,))
    return v


@triton.jit
def mix(base, v_at, a, b, q, p, K: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """H_q across runs: elements (a, b) of base @ v, for v fp32 [q, p] at v_at, a [A] and b [B]: fp32 [A, B]."""
    total = tl.zeros((A, B), tl.float32)
    for first in tl.range(0, q, K, num_stages=1):
        run = first + tl.arange(0, K)
        row = tl.load(base + a[:, None] * q + run[None, :], mask=(a < q)[:, None] & (run < q)[None, :], other=0.0)
        column = tl.load(v_at + run[:, None] * p + b[None, :], mask=(run < q)[:, None] & (b < p)[None, :], other=0.0)
        total = tl.dot(row, column, total, input_precision="ieee")
    return total


@triton.jit
def magnitude(v):
    """The bits of |v|: as integers they are in order, with NaN above infinity."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def exponent(largest, GROWTH: tl.constexpr):
    """e of a row's scale 2^e. largest: the bits of its largest magnitude, which may become 2^GROWTH times as large."""
    e = (largest >> 23) - 126 + GROWTH - LIMIT
    return tl.minimum(tl.maximum(e, -100), 126)


@triton.jit
def power_of_two(e):
    return (e + 127 << 23).to(tl.float32, bitcast=True)


@triton.jit
def place(column, COLUMNS: tl.constexpr):
    """Where decode_gemm wants a column.

    Of 32 columns lane t decodes 8 t + 4 s + 2 i + c of a lattice and 16 (t / 2) + 8 i + 4 (t % 2) + 2 s + c of a
    trellis, and multiplies 16 s + 8 i + 2 t + c. Of 64 columns of a trellis with tiles by rows it decodes 16 t + 4 s +
    2 i + c.
    """
    if COLUMNS == "by_rows":
        t, s, i, c = column >> 4 & 3, column >> 2 & 3, column >> 1 & 1, column & 1
        return (column & -64) | s << 4 | i << 3 | t << 1 | c
    elif COLUMNS == "lattice":
        t, s, i, c = column >> 3 & 3, column >> 2 & 1, column >> 1 & 1, column & 1
        return (column & -32) | s << 4 | i << 3 | t << 1 | c
    else:
        t, u, s = column >> 4 & 1, column >> 2 & 1, column >> 1 & 1
        return (column & -23) | s << 4 | t << 2 | u << 1


@triton.jit
def rounded(v, like: tl.constexpr):
    """fp32 to the element type of a pointer; bfloat16 by hand, for the interpreter's is wrong."""
    if like == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + (bits >> 16 & 1) >> 16
        return tl.where(v == v, nearest, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return v.to(like)


@triton.jit
def store_activations(v, column, used, out, top, total_at, scale_at, GROWTH: tl.constexpr, COLUMNS: tl.constexpr):
    """v, a row or a part, unnormalised, to fp16 at `out`; the sum of what was stored, and the scale, NaN for a bad row.

    top: the bits of the row's largest magnitude. A row that is not finite is stored as zeros.
    """
    finite = top < 0x7F800000
    e = exponent(top, GROWTH)
    half = tl.where(finite, v * power_of_two(-e), 0.0).to(tl.float16)
    tl.store(out + place(column, COLUMNS), half, mask=used)
    tl.store(total_at, tl.sum(tl.ravel(tl.where(used, half.to(tl.float32), 0.0))))
    tl.store(scale_at, tl.where(finite, power_of_two(e), float("nan")))


@triton.jit
def expert_of(ids, row, experts):
    """The expert that a result is of, and the number that it names; the first where there is none of that number."""
    named = tl.load(ids + row)
    return tl.where((named >= 0) & (named < experts), named, 0), named


@triton.jit(do_not_specialize=["results"], do_not_specialize_on_alignment=["x", "ids"])
def walsh_in_kernel(
    x,
    ids,
    experts,
    results,
    su,
    out,
    stride,
    scratch,
    largest,
    totals,
    scales,
    k,
    COUNT: tl.constexpr,
    P: tl.constexpr,
    GROWTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    ROUTED: tl.constexpr,
):
    """x [m][k] times su, S_P, to scratch fp32 [m][k], and the largest magnitude before S_P to largest [m][blocks].

    With WHOLE, a block is a row and nothing is left to mix: what mix_in_kernel writes. With ROUTED, a row of x has
    `results` in turn, each with the su [experts][k] of the expert that ids [m] names.
    """
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    i = block * COUNT + tl.arange(0, COUNT)
    if ROUTED:
        expert, named = expert_of(ids, row, experts)
        x, su = x + row // results * k, su + expert * k
    else:
        x += row * k
    v = tl.load(x + i, mask=i < k, other=0.0).to(tl.float32)
    v *= tl.load(su + i, mask=i < k, other=0.0)
    top = tl.max(magnitude(v))
    if ROUTED:
        top = tl.where(named < experts, top, 0x7FC00000)
    v = walsh(v, COUNT, P)
    if WHOLE:
        store_activations(v, i, i < k, out + row * stride, top, totals + row, scales + row, GROWTH, COLUMNS)
    else:
        tl.store(largest + row * blocks + block, top)
        tl.store(scratch + row * k + i, v, mask=i < k)


@triton.jit
def part_of_run(q, p, A: tl.constexpr, B: tl.constexpr):
    """What program (row, run, part) has of H_q: a [A], b [B], which of them there are, and their columns in the run."""
    parts_b = tl.cdiv(p, B)
    a = tl.program_id(2) // parts_b * A + tl.arange(0, A)
    b = tl.program_id(2) % parts_b * B + tl.arange(0, B)
    return a, b, (a < q)[:, None] & (b < p)[None, :], a[:, None] * p + b[None, :]


@triton.jit
def mix_in_kernel(
    scratch,
    base,
    out,
    stride,
    largest,
    blocks,
    totals,
    scales,
    k,
    q,
    p,
    BLOCKS: tl.constexpr,
    GROWTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MIX: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    """H_q of scratch [m][k] to fp16 out [m][stride]; sums to totals [m][programs of a row], scales [m]."""
    row, run, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    block = tl.arange(0, BLOCKS)
    top = tl.max(tl.load(largest + row * blocks + block, mask=block < blocks, other=0))
    a, b, used, column = part_of_run(q, p, A, B)
    first = run * q * p
    if MIX:
        v = mix(base, scratch + row * k + first, a, b, q, p, 32, A, B)
    else:
        v = tl.load(scratch + row * k + first + column, mask=used, other=0.0)
    total_at = totals + (row * tl.num_programs(1) + run) * tl.num_programs(2) + part
    store_activations(v, first + column, used, out + row * stride, top, total_at, scales + row, GROWTH, COLUMNS)


@triton.jit(do_not_specialize=["m", "start", "unit", "offset"], do_not_specialize_on_alignment=["y", "ids"])
def walsh_out_kernel(
    partial,
    y,
    scratch,
    ids,
    experts,
    signs,
    scales,
    totals,
    sums,
    m,
    splits,
    stride,
    start,
    size,
    n,
    unit,
    offset,
    COUNT: tl.constexpr,
    P: tl.constexpr,
    SUMS: tl.constexpr,
    MIX: tl.constexpr,
    ROUTED: tl.constexpr,
):
    """S_P of outputs start .. start + size - 1 of the sum of the splits [splits][m][stride], less offset * total.

    To y [m][n], scaled by unit, signs [n] and scales [m]; with MIX to scratch fp32 [m][n], as it is. With ROUTED signs
    are [experts][n].
    """
    row = tl.program_id(0).to(tl.int64)
    if ROUTED:
        expert, named = expert_of(ids, row, experts)
        signs += expert * n
    i = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    v = tl.zeros((COUNT,), tl.float32)
    for split in tl.range(0, splits, num_stages=1):
        v += tl.load(partial + (split * m + row) * stride + start + i, mask=i < size, other=0.0)
    each = tl.arange(0, SUMS)
    v -= offset * tl.sum(tl.load(totals + row * sums + each, mask=each < sums, other=0.0))
    v = walsh(tl.where(i < size, v, 0.0), COUNT, P)
    if MIX:
        tl.store(scratch + row * n + start + i, v, mask=i < size)
    else:
        v *= unit * tl.load(scales + row) * tl.load(signs + start + i, mask=i < size, other=0.0)
        if ROUTED:
            v = tl.where(named < 0, 0.0, v)
        tl.store(y + row * n + start + i, rounded(v, y.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["start", "unit"], do_not_specialize_on_alignment=["y", "ids"])
def mix_out_kernel(
    scratch,
    base,
    y,
    ids,
    experts,
    signs,
    scales,
    start,
    q,
    p,
    n,
    unit,
    A: tl.constexpr,
    B: tl.constexpr,
    ROUTED: tl.constexpr,
):
    """H_q of outputs start .. of scratch [m][n] to y [m][n], scaled as by walsh_out_kernel."""
    row = tl.program_id(0).to(tl.int64)
    if ROUTED:
        expert, named = expert_of(ids, row, experts)
        signs += expert * n
    a, b, used, column = part_of_run(q, p, A, B)
    first = start + tl.program_id(1) * q * p
    v = mix(base, scratch + row * n + first, a, b, q, p, 32, A, B)
    v *= unit * tl.load(scales + row) * tl.load(signs + first + column, mask=used, other=0.0)
    if ROUTED:
        v = tl.where(named < 0, 0.0, v)
    tl.store(y + row * n + first + column, rounded(v, y.dtype.element_ty), mask=used)
