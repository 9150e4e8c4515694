# SPDX-License-Identifier: Apache-2.0
"""The decoders, one a code: from a lane's words of a chunk to fp16 weights (the formats: quip_vllm/formats).

A chunk is 16 rows x 64 columns, or four tiles of 16 x 16. Lane 4 g + t of the 32 that hold it has rows g and g + 8, as
tensor cores want operand A. Each weight of a lane is computed on its own, by [tiles, 32] tensors with shifts that the
compiler knows; joins, a permutation and a reshape then name their rows and columns. With a tile for each warp all of
that is bookkeeping: Triton finds that the result has the layout of the dot's operand, and moves nothing. (A tensor of
shifts, [tiles, 32, 8], reads better, but Triton then spreads its last axis over the threads, and every weight passes
through shared memory.)

The words are those of the CUDA kernels, for the same reason: each lane finds its windows in its own words and in those
of the next lane, which are loaded once more, for Triton has no shuffle. Tables are looked up in global memory, by way
of L1, for no kernel can fill shared memory before a loop and look up in it. A look-up with its 64-bit address costs
two to three instructions, and LUT has one per weight, HYB half of one, the lattice a quarter of one per stage.

`zero` is a uint32 of which the compiler does not know that it is 0. A mask combined with it stays in a register, and
what comes after the mask is the same instruction, which has room for one constant; a plain mask takes one of its own.

The sum of four bytes is one PTX instruction (dp4a); in Triton's interpreter it is plain arithmetic.
"""

import torch
import triton
import triton.language as tl

PTX = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)


@triton.jit
def join4(a, b, c, d):
    """[...] four times to [..., 2, 2]: index (i, j) is number 2 j + i."""
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def as_half(bits):
    """The fp16 number in the low 16 bits of each integer."""
    return bits.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def look_up(table, offset):
    """What lies `offset` bytes, a uint32, behind the beginning of a table that begins at a multiple of its size.

    So there is no carry, and where an index can be masked in place, its address takes an instruction less.
    """
    place = table.to(tl.int64) | offset.to(tl.int64)
    return tl.load(place.to(table.dtype))


# ---- the bit stream of a run of 16 positions (formats/trellis.py)
#
# Of each half of a chunk, lane 4 g + t has run 2 g + t % 2 of tile t / 2; of tiles by rows it has, in place of those of
# the halves, runs g and g + 8 of tile t of the chunk. A run is `bits` units of 16 bits, which begin one step
# before its first window; the first unit of the next run follows. Two neighbouring units are a word; with odd bits the
# first units of both halves share the last word (kernels/cuda/trellis_stream.h draws it). `code` tells a half rate, at
# which the run ends 8 bits before its units do.


@triton.jit
def is_half(code: tl.constexpr):
    return code == "mul1_half"


@triton.jit
def stream_word(words, following, half: tl.constexpr, part: tl.constexpr, code: tl.constexpr, bits: tl.constexpr):
    """32 bits of a run: with odd bits the first have 16 of no meaning in front; of the last, 16 bits are meant."""
    if is_half(code) and part == bits // 2 + bits % 2:
        return stream_word(words, following, half, part, "", bits) << 8
    elif bits % 2 == 0:
        return words[half * (bits // 2) + part] if part < bits // 2 else following[half]
    elif part == 0:
        return words[bits - 1] >> 16 if half else words[bits - 1]
    elif part <= bits // 2:
        return words[half * (bits // 2) + part - 1]
    else:
        return following[0] if half else following[0] << 16


@triton.jit
def window(words, following, half: tl.constexpr, start: tl.constexpr, code: tl.constexpr, bits: tl.constexpr):
    """16 bits of a run from bit `start` > 0, in the low half of the result; the upper half is not said."""
    at: tl.constexpr = start + bits % 2 * 16
    word = stream_word(words, following, half, at // 32, code, bits)
    if at % 32 <= 16:
        return word >> 16 - at % 32
    else:
        return word << at % 32 - 16 | stream_word(words, following, half, at // 32 + 1, code, bits) >> 48 - at % 32


@triton.jit
def state(words, following, half: tl.constexpr, position: tl.constexpr, code: tl.constexpr, bits: tl.constexpr):
    """The window of a position; at a half rate every other step is a bit shorter."""
    shorter: tl.constexpr = 1 + position // 2 if is_half(code) else 0
    return window(words, following, half, bits * (position + 1) - shorter, code, bits)


# ---- what a state stands for (formats/trellis_codes.py)


@triton.jit
def sum_bytes(y, base: tl.constexpr):
    """base + the four bytes of y, uint32."""
    y = y.to(tl.uint32)
    if PTX:
        if base == 1024:
            return tl.inline_asm_elementwise(
                "dp4a.u32.u32 $0, $1, 0x01010101, 1024;", "=r,r", [y], dtype=tl.uint32, is_pure=True, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                "dp4a.u32.u32 $0, $1, 0x01010101, 0x6400;", "=r,r", [y], dtype=tl.uint32, is_pure=True, pack=1
            )
    else:
        return base + (y & 0xFF) + (y >> 8 & 0xFF) + (y >> 16 & 0xFF) + (y >> 24)


@triton.jit
def one_mad(state, table):
    """1024 + the sum of the bytes, exact in fp16: added to the bit pattern of 1024. The offset comes off the result."""
    return as_half(sum_bytes((state & 0xFFFF) * 34038481 + 76625530, 0x6400))


@triton.jit
def two_halves(y, zero):
    halves = y.to(tl.uint32) & (0x8FFF8FFF ^ zero) ^ 0x3B603B60
    return as_half(halves) + as_half(halves >> 16)


@triton.jit
def mul1(state):
    """The product and the difference are exact in fp32."""
    total = sum_bytes((state & 0xFFFF) * 0x83DCD12D, 1024)
    return (total.to(tl.float32) * (1774 / 262144) - 10.3828125).to(tl.float16)


@triton.jit
def lut(state, table):
    """LUT and TABLE. table: fp16 [65536], aligned to 128 KB."""
    return look_up(table, state << 1 & 0x1FFFE)


@triton.jit
def pair(state, table):
    """PAIRS: two weights, the halves of a uint32. table: uint32 [65536], aligned to 256 KB."""
    return look_up(table, state << 2 & 0x3FFFC)


@triton.jit
def two_weights(state, table, CODE: tl.constexpr):
    return hyb(state, table) if CODE == "hyb" else pair(state, table)


@triton.jit
def hyb(state, table):
    """Two weights, the halves of a uint32. table: uint32 [1024], at 4 KB; the second half negates the first weight.

    Bits of `state` above its 16 do no harm.
    """
    h = state * state + state
    return look_up(table, h >> 4 & 0xFFC)


@triton.jit
def grid(state, bits: tl.constexpr):
    """2^(bits + 1) + 2 k, exact in fp16: the number k of a level at the top of the mantissa. An offset comes off."""
    return as_half((state & (1 << bits) - 1) << 10 - bits | (16 + bits) << 10)


@triton.jit
def state_value(state, table, zero, CODE: tl.constexpr, bits: tl.constexpr):
    if CODE == "1mad":
        return one_mad(state, table)
    elif CODE == "3inst":
        return two_halves((state & 0xFFFF) * 89226354 + 64248484, zero)
    elif CODE == "mcg":
        return two_halves((state & 0xFFFF) * 0xCBAC1FED, zero)
    elif CODE == "mul1" or CODE == "mul1_half":
        return mul1(state)
    elif CODE == "grid":
        return grid(state, bits)
    else:
        return lut(state, table)


# ---- chunks


@triton.jit
def trellis_eight(
    words, following, table, zero, half: tl.constexpr, first: tl.constexpr, CODE: tl.constexpr, bits: tl.constexpr
):
    """Eight weights of a run from position `first`: fp16 [tiles, 32, bit 0 of the position, bit 1, bit 2]."""
    if CODE == "hyb" or CODE == "pairs":
        w0 = two_weights(state(words, following, half, first + 1, CODE, bits), table, CODE)
        w1 = two_weights(state(words, following, half, first + 3, CODE, bits), table, CODE)
        w2 = two_weights(state(words, following, half, first + 5, CODE, bits), table, CODE)
        w3 = two_weights(state(words, following, half, first + 7, CODE, bits), table, CODE)
        p0, p1 = tl.join(as_half(w0), as_half(w0 >> 16)), tl.join(as_half(w1), as_half(w1 >> 16))
        p2, p3 = tl.join(as_half(w2), as_half(w2 >> 16)), tl.join(as_half(w3), as_half(w3 >> 16))
    else:
        v0 = state_value(state(words, following, half, first, CODE, bits), table, zero, CODE, bits)
        v1 = state_value(state(words, following, half, first + 1, CODE, bits), table, zero, CODE, bits)
        v2 = state_value(state(words, following, half, first + 2, CODE, bits), table, zero, CODE, bits)
        v3 = state_value(state(words, following, half, first + 3, CODE, bits), table, zero, CODE, bits)
        v4 = state_value(state(words, following, half, first + 4, CODE, bits), table, zero, CODE, bits)
        v5 = state_value(state(words, following, half, first + 5, CODE, bits), table, zero, CODE, bits)
        v6 = state_value(state(words, following, half, first + 6, CODE, bits), table, zero, CODE, bits)
        v7 = state_value(state(words, following, half, first + 7, CODE, bits), table, zero, CODE, bits)
        p0, p1, p2, p3 = tl.join(v0, v1), tl.join(v2, v3), tl.join(v4, v5), tl.join(v6, v7)
    return join4(p0, p1, p2, p3)


@triton.jit
def trellis_chunk(words, following, table, zero, CODE: tl.constexpr, ORDER: tl.constexpr, bits: tl.constexpr):
    """[tiles, 32] words to fp16 [16 tiles, 64]; columns are in the order of rotation.place.

    Lane 4 g + t has run 2 g + t % 2 of 16 positions, of tile t / 2 of each half. So the letters of formats/tile.py are
    here: g is rrr, and the axes behind t are c, R, C, the lower c of cc, and the half. Of tiles by rows it has rows g
    and g + 8 in place of the halves, and the axes behind t are the bits of the column in tile t.
    """
    e0 = trellis_eight(words, following, table, zero, 0, 0, CODE, bits)
    e1 = trellis_eight(words, following, table, zero, 0, 8, CODE, bits)
    e2 = trellis_eight(words, following, table, zero, 1, 0, CODE, bits)
    e3 = trellis_eight(words, following, table, zero, 1, 8, CODE, bits)
    v = join4(e0, e1, e2, e3)
    TILES: tl.constexpr = v.shape[0]
    v = tl.reshape(v, (TILES, 8, 4, 2, 2, 2, 2, 2))
    if ORDER == "by_rows":
        v = tl.permute(v, (0, 7, 1, 6, 5, 4, 2, 3))
    elif ORDER == "swapped":  # R and C change places
        v = tl.permute(v, (0, 5, 1, 7, 6, 4, 2, 3))
    else:
        v = tl.permute(v, (0, 4, 1, 7, 6, 5, 2, 3))
    return tl.reshape(v, (TILES * 16, 64))


@triton.jit
def e8p_nibbles(pair, table, row: tl.constexpr):
    """The eight nibbles of a code: byte 2 row + 1 of `pair` chooses the absolute values, byte 2 row the signs.

    Their exclusive or n gives v -+ 1/4 = n / 2 + 1/4 - 4 (kernels/cuda/code_e8p.h); table: uint32 [3 * 256].
    """
    if row == 0:
        return tl.load(table + (pair >> 8 & 255)) ^ tl.load(table + 256 + (pair & 255))
    return tl.load(table + (pair >> 24)) ^ tl.load(table + 256 + (pair >> 16 & 255))


@triton.jit
def e81b_nibbles(four, table, byte: tl.constexpr):
    """The eight nibbles of a residual code, 8 bits: 2 v + 8."""
    if byte == 0:
        return tl.load(table + 512 + (four & 255))
    return tl.load(table + 512 + (four >> 8 * byte & 255))


@triton.jit
def nibble_pair(nibbles, zero):
    """Nibbles 1 and 5, put above the lowest four bits of the mantissa of 32 1/4: fp16 [..., 2], 32 1/4 + n / 2."""
    both = nibbles & (0x00F000F0 ^ zero) | 0x50085008
    return tl.join(as_half(both), as_half(both >> 16))


@triton.jit
def lattice_row(nibbles, zero):
    """Eight nibbles to fp16 [..., i, j, k]: column 4 k + 2 j + i of the code's eight."""
    p0, p1 = nibble_pair(nibbles << 4, zero), nibble_pair(nibbles, zero)
    p2, p3 = nibble_pair(nibbles >> 4, zero), nibble_pair(nibbles >> 8, zero)
    return join4(p0, p1, p2, p3)


@triton.jit
def lattice_matrix(r0, r1, r2, r3, zero):
    """Nibbles of rows g and g + 8 of the first half, and of the second: [tiles, 32] to fp16 [16 tiles, 64].

    Columns are in the order of rotation.place, for a code's eight belong to one lane.
    """
    v = join4(lattice_row(r0, zero), lattice_row(r1, zero), lattice_row(r2, zero), lattice_row(r3, zero))
    TILES: tl.constexpr = v.shape[0]
    v = tl.reshape(v, (TILES, 8, 4, 2, 2, 2, 2, 2))  # tile, g, t, i, j, k, row, half
    v = tl.permute(v, (0, 6, 1, 7, 5, 4, 2, 3))
    return tl.reshape(v, (TILES * 16, 64))


@triton.jit
def e8p_chunk(first, second, table, zero):
    """Words of the two halves, [row g + 8: absolute, signs | row g: absolute, signs], to [16 tiles, 64]."""
    return lattice_matrix(
        e8p_nibbles(first, table, 0),
        e8p_nibbles(first, table, 1),
        e8p_nibbles(second, table, 0),
        e8p_nibbles(second, table, 1),
        zero,
    )


@triton.jit
def e81b_chunk(four, table, zero):
    """The second stage at 3 bits: [half 1, row g + 8 | half 1, row g | half 0, row g + 8 | half 0, row g]."""
    return lattice_matrix(
        e81b_nibbles(four, table, 0),
        e81b_nibbles(four, table, 1),
        e81b_nibbles(four, table, 2),
        e81b_nibbles(four, table, 3),
        zero,
    )
