# SPDX-License-Identifier: Apache-2.0
"""partial = rotated x times the packed weight: decoded in registers, multiplied by tensor cores.

    program     WARPS tiles of 16 rows of the weight, one a warp; a part of k; up to BM rows of x
    iteration   a chunk of 64 columns; the next chunk's words and x are loaded before this one's are used

Loads are prefetched by hand, in registers: Triton's own pipeline would also copy what the tables give to shared memory.
The order of summation of an output depends on chunks and parts alone, neither on the rows of x nor on their number.
With 32 rows and more, Triton cuts a program's sums in two along x, and what one warp decoded passes to the other by way
of shared memory; it is still decoded once.

    packed   [tile][chunk][part of the words][lane][words of the part]    uint32; parts of 4, 2, 1 words (load_words)
    x        [row][chunk][64]    fp16, columns of a chunk in the order of rotation.place
    partial  [split][row][16 tiles]    fp32

With experts, which rows choose, program (.., .., z) has rows of one expert: ROUTED, see routing.py.
"""

import triton
import triton.language as tl

from quip_vllm.ops.triton import codes


@triton.jit
def load_part(at, WIDTH: tl.constexpr):
    """WIDTH neighbouring words of each lane: at [tiles, 32] to uint32 [tiles, 32, WIDTH], one wide load a thread."""
    return tl.load(at[:, :, None] + tl.arange(0, WIDTH)[None, None, :])


@triton.jit
def take4(v):
    even, odd = tl.split(tl.reshape(v, (v.shape[0], 32, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def load_words(at, lane, bits: tl.constexpr):
    """The `bits` words of each lane: at [tiles, 1] (a chunk), lane [1, 32] to a tuple of uint32 [tiles, 32]."""
    if bits == 1:
        a = tl.load(at + lane)
        return a, a  # a tuple of one would arrive as its element
    elif bits == 2:
        a, b = tl.split(load_part(at + lane * 2, 2))
        return a, b
    elif bits == 3:
        a, b = tl.split(load_part(at + lane * 2, 2))
        return a, b, tl.load(at + 64 + lane)
    else:
        a, b, c, d = take4(load_part(at + lane * 4, 4))
        if bits == 4:
            return a, b, c, d
        elif bits == 5:
            return a, b, c, d, tl.load(at + 128 + lane)
        elif bits == 8:
            e, f, g, h = take4(load_part(at + 128 + lane * 4, 4))
            return a, b, c, d, e, f, g, h
        else:
            e, f = tl.split(load_part(at + 128 + lane * 2, 2))
            if bits == 6:
                return a, b, c, d, e, f
            else:  # without it Triton 3.6 takes both returns to be of one function
                return a, b, c, d, e, f, tl.load(at + 192 + lane)


@triton.jit
def load_following(at, lane, CODE: tl.constexpr, ORDER: tl.constexpr, bits: tl.constexpr):
    """What a lane's two runs go on with, of the lane of the next runs: the first word of each, or one for both.

    In a tile by rows, rows 7 and 15 go on with those of the other half.
    """
    if CODE == "e8p":
        none = tl.zeros((at.shape[0], 32), tl.uint32)
        return none, none
    next_lane = lane + 4 & 31 if ORDER == "by_rows" else lane + 1 + (lane & 1) * 2 & 31
    if bits % 2:
        both = tl.load(at + (bits - 1) * 32 + next_lane)
        if ORDER == "by_rows":
            both = tl.where(lane >= 28, both << 16 | both >> 16, both)
        return both, both
    if bits == 2:
        a, b = tl.split(load_part(at + next_lane * 2, 2))
    else:
        second: tl.constexpr = 128 if bits == 8 else bits // 2
        a, b = tl.load(at + next_lane * 4), tl.load(at + next_lane * 4 + second)
    if ORDER == "by_rows":
        return tl.where(lane >= 28, b, a), tl.where(lane >= 28, a, b)
    else:
        return a, b


@triton.jit
def decode(words, following, table, zero, CODE: tl.constexpr, ORDER: tl.constexpr, bits: tl.constexpr):
    """A chunk's first stage: fp16 [16 tiles, 64]."""
    if CODE == "e8p":
        return codes.e8p_chunk(words[0], words[1], table, zero)
    else:
        return codes.trellis_chunk(words, following, table, zero, CODE, ORDER, bits)


@triton.jit
def decode_second(words, table, zero, bits: tl.constexpr):
    """A chunk's second stage, of the lattice above 2 bits: fp16 [16 tiles, 64]."""
    if bits == 3:
        return codes.e81b_chunk(words[2], table, zero)
    else:
        return codes.e8p_chunk(words[2], words[3], table, zero)


@triton.jit(do_not_specialize=["m"])
def decode_gemm_kernel(
    packed,
    table,
    x,
    partial,
    order,
    blocks,
    expert_words,
    expert_table,
    m,
    tiles,
    chunks,
    split_chunks,
    CODE: tl.constexpr,
    ORDER: tl.constexpr,
    BITS: tl.constexpr,
    SECOND: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    WARPS: tl.constexpr,
    BM: tl.constexpr,
    UNROLL: tl.constexpr,
    ROUTED: tl.constexpr,
):
    z = tl.program_id(2)
    row, used = z * BM + tl.arange(0, BM), z * BM + tl.arange(0, BM) < m
    if ROUTED:
        expert, first, end_row = tl.load(blocks + 3 * z), tl.load(blocks + 3 * z + 1), tl.load(blocks + 3 * z + 2)
        if expert < 0:
            return
        place = first + tl.arange(0, BM)
        row, used = tl.load(order + tl.minimum(place, end_row - 1)), place < end_row
        packed += expert.to(tl.int64) * expert_words
        table += expert.to(tl.int64) * expert_table
    tile0, end_tile = tl.program_id(0) * WARPS, tiles
    first_tile, program = 0, tl.program_id(0)
    for i in tl.static_range(len(PROJECTIONS)):  # tiles of each, where each has a table of its own
        here = program >= 0  # in this projection, or in a later one
        tile0 = tl.where(here, first_tile + program * WARPS, tile0)
        first_tile += PROJECTIONS[i]
        end_tile = tl.where(here, first_tile, end_tile)
        if i > 0:
            table += tl.where(here, 1024 if CODE == "hyb" else 65536, 0)
        program -= tl.cdiv(PROJECTIONS[i], WARPS)
    tile = tile0 + tl.arange(0, WARPS)
    lane = tl.arange(0, 32)[None, :]
    begin = tl.program_id(1) * split_chunks
    end = tl.minimum(begin + split_chunks, chunks)
    # Rows and tiles beyond the last read the last again.
    at = packed + (tl.minimum(tile, end_tile - 1).to(tl.int64) * chunks)[:, None] * (32 * BITS)
    x_at = x + tl.minimum(row, m - 1).to(tl.int64)[None, :] * (chunks * 64) + tl.arange(0, 64)[:, None]

    zero = (m >> 31).to(tl.uint32)  # codes.py says what for
    total = tl.zeros((16 * WARPS, BM), tl.float32)
    fine = tl.zeros((16 * WARPS, BM), tl.float32)
    words = load_words(at + begin * (32 * BITS), lane, BITS)
    following = load_following(at + begin * (32 * BITS), lane, CODE, ORDER, BITS)
    columns = tl.load(x_at + begin * 64)
    for chunk in tl.range(begin, end, num_stages=1, loop_unroll_factor=UNROLL):
        ahead = tl.minimum(chunk + 1, end - 1)
        next_words = load_words(at + ahead * (32 * BITS), lane, BITS)
        next_following = load_following(at + ahead * (32 * BITS), lane, CODE, ORDER, BITS)
        next_columns = tl.load(x_at + ahead * 64)
        total = tl.dot(decode(words, following, table, zero, CODE, ORDER, BITS), columns, total)
        if SECOND != 0:
            fine = tl.dot(decode_second(words, table, zero, BITS), columns, fine)
        words, following, columns = next_words, next_following, next_columns
    if SECOND != 0:
        total += fine * SECOND
    n = tile0 * 16 + tl.arange(0, 16 * WARPS)
    to = partial + (tl.program_id(1) * m + row).to(tl.int64)[None, :] * (tiles * 16) + n[:, None]
    tl.store(to, total, mask=used[None, :] & (n < end_tile * 16)[:, None])


@triton.jit
def decode_rows_kernel(
    ids,
    packed,
    table,
    out,
    tiles,
    chunks,
    unit,
    offset,
    CODE: tl.constexpr,
    ORDER: tl.constexpr,
    BITS: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Row ids[i] of the rotated weight to out [i][64 chunks], fp32. Program (i, chunk) decodes the row's whole tile."""
    number, chunk = tl.load(ids + tl.program_id(0)), tl.program_id(1)
    tile = tl.minimum(tl.maximum(number >> 4, 0), tiles - 1) + tl.arange(0, 1)
    lane = tl.arange(0, 32)[None, :]
    at = packed + (tile.to(tl.int64) * chunks + chunk)[:, None] * (32 * BITS)
    words = load_words(at, lane, BITS)
    weights = decode(words, load_following(at, lane, CODE, ORDER, BITS), table, 0, CODE, ORDER, BITS).to(tl.float32)
    if SECOND != 0:
        weights += SECOND * decode_second(words, table, 0, BITS).to(tl.float32)
    chosen = (tl.arange(0, 16) == (number & 15).to(tl.int32))[:, None]
    row = tl.sum(tl.where(chosen, weights, 0.0), axis=0)
    column = tl.arange(0, 64)
    if CODE == "e8p":  # where rotation.place has put the columns
        t, s, i, c = column >> 1 & 3, column >> 4 & 1, column >> 3 & 1, column & 1
        column = (column & 32) | t << 3 | s << 2 | i << 1 | c
    elif ORDER == "by_rows":
        t, s, i, c = column >> 1 & 3, column >> 4 & 3, column >> 3 & 1, column & 1
        column = t << 4 | s << 2 | i << 1 | c
    else:
        t, u, e = column >> 2 & 1, column >> 1 & 1, column >> 4 & 1
        column = (column & -23) | t << 4 | u << 2 | e << 1
    tl.store(out + tl.program_id(0).to(tl.int64) * (chunks * 64) + chunk * 64 + column, (row - offset) * unit)
