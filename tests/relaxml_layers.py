# SPDX-License-Identifier: Apache-2.0
"""QuIP# and QTIP layers as their specification says them, in numpy, for tests to compare with, which import no package.

Every function takes what a file holds and walks it word by word, weight by weight.
"""

import itertools

import numpy

HALVES = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 "
    "167 157 147 156 146 045 067 057 047 056 046 014 237"
)


def absolute_rows():
    """float [256, 8]: the table of E8P, component 7 negated where a row's sum would be odd."""
    rows = [v for v in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(c * c for c in v) <= 10]
    rows += [[0.5 if str(i) in halves else 1.5 for i in range(8)] for halves in HALVES.split()]
    table = numpy.array(rows)
    table[table.sum(1) % 2 == 1, 7] *= -1
    return table


ABSOLUTE = absolute_rows()


def e8p(row, signs):
    """The vector of a row of the table and eight bits of signs."""
    odd = bin(signs).count("1") % 2
    flips = signs ^ odd
    sign = [-1.0 if flips >> j & 1 else 1.0 for j in (0, 4, 1, 5, 2, 6, 3, 7)]
    return ABSOLUTE[row] * sign + (-0.25 if odd else 0.25)


def e81b():
    """float [256, 8]."""
    rows = [v for v in itertools.product((-1.0, 0.0, 1.0), repeat=8) if sum(c * c for c in v) <= 2 and sum(v) % 2 == 0]
    rows += [v for v in itertools.product((-0.5, 0.5), repeat=8) if sum(c < 0 for c in v) % 2 == 0]
    unit = 2 * numpy.eye(8)
    return numpy.array([*rows, *unit, *-unit[:7]]) + 0.0


def e8p_weight(words, n, k):
    """float64 [n, k] of n k / 32 words in the order of memory: [n/16][k/64][8][4]."""
    weight = numpy.empty((n, k))
    places = itertools.product(range(n // 16), range(k // 64), range(8), range(4))
    for word, (i, j, r, c) in zip(words.reshape(-1).view(numpy.uint64).tolist(), places, strict=True):
        for vector in range(4):
            signs = sum((word >> (32 + 4 * bit + vector) & 1) << bit for bit in range(8))
            column = 64 * j + 16 * c + 8 * (vector >> 1)
            weight[16 * i + 2 * r + (vector & 1), column : column + 8] = e8p(word >> 8 * vector & 255, signs)
    return weight


def stages(words, bits):
    """The stages of a layer of int64 [n, k bits / 64], each float64 [n, k] in its own units."""
    n, columns = words.shape
    k = 64 * columns // bits
    first = numpy.ascontiguousarray(words[:, : k // 32])
    found = [e8p_weight(first, n, k)]
    rest = numpy.ascontiguousarray(words[:, k // 32 :])
    if bits == 4:
        found.append(e8p_weight(rest, n, k))
    elif bits == 3:
        found.append(e81b()[rest.view(numpy.uint8)].reshape(n, k))
    return found


def lattice(words, bits):
    """float64 [n, k]: the sum of the stages."""
    first, *rest = stages(words, bits)
    return first + rest[0] / {3: 2.04, 4: 3.45}[bits] if rest else first


def kernel_stream(trellis, i, j, k, bits):
    """The bits of tile (i, j) of a file in the order of a GPU kernel."""
    raw, stream = trellis.reshape(-1).view(numpy.uint8), []
    for lane in range(32):
        at = ((i >> 1) * (k // 32) + (j >> 1)) * 32 + lane
        at = at * 4 * bits + (2 * (j & 1) + (i & 1)) * bits
        stream.append(raw[at : at + bits][::-1])
    return numpy.unpackbits(numpy.concatenate(stream))


def word_stream(trellis, i, j, k, bits):
    """The bits of tile (i, j) of a file of words, most significant bit first."""
    return numpy.unpackbits(trellis[i * (k // 16) + j].astype(">i2").view(numpy.uint8))


def states(stream, step):
    """The 16 bits from each `step`-th bit on, the last of them wrapping round."""
    start = numpy.arange(len(stream) // step)[:, None] * step
    return stream[(start + numpy.arange(16)) % len(stream)].astype(numpy.int64) @ (1 << numpy.arange(15, -1, -1))


def values(mode, x, table=None):
    """float [steps, weights per step] of states of 16 bits, or for lut of as many as the table has rows for."""
    x = x.astype(numpy.uint64)
    if mode == "lut":
        return table.astype(numpy.float64)[(x >> numpy.uint64(16 - log2(len(table)))).astype(int)]
    if mode == "quantlut":
        bits = numpy.uint64(log2(len(table)))
        h = x * x + x
        return table.astype(numpy.float64)[(h >> (16 - bits) & ((1 << bits) - 1)).astype(int)]
    if mode == "quantlut_sym":
        h = x * x + x
        vector = table.astype(numpy.float64)[(h >> 6 & 511).astype(int)]
        vector[:, 0] *= numpy.where(h >> 15 & 1, -1.0, 1.0)
        return vector
    if mode == "2mad":
        y = (x * 264435761 + 1013904223) % 2**32
        y = (y + (y * 1664525 >> 32)) % 2**32
    else:
        y = (x * 34038481 + 76625530 if mode == "1mad" else x * 89226354 + 64248484) % 2**32
    if mode in ("1mad", "2mad"):
        total = sum(y >> 8 * i & 255 for i in range(4)).astype(numpy.int64)
        return ((total - 510).astype(numpy.float32) / numpy.float32(147.800537109375))[:, None]
    z = (y & 0x8FFF8FFF) ^ 0x3B603B60
    high, low = ((z >> shift & 0xFFFF).astype(numpy.uint16).view(numpy.float16) for shift in (16, 0))
    return (high + low)[:, None]


def log2(count):
    return int(count).bit_length() - 1


def trellis_weight(trellis, n, k, bits, mode, table=None):
    """float64 [n, k] of int16 [n k / 256, 16 bits] as a file holds it."""
    fused = mode == "quantlut_sym" and bits in (2, 3, 4)
    t = numpy.arange(256)
    row, column = (
        (8 * (t >> 1 & 1) + (t >> 5), 8 * (t >> 2 & 1) + 2 * (t >> 3 & 3) + (t & 1)) if fused else (t >> 4, t & 15)
    )
    weight = numpy.empty((n, k))
    for i, j in itertools.product(range(n // 16), range(k // 16)):
        stream = (kernel_stream if fused else word_stream)(trellis, i, j, k, bits)
        step = bits * (1 if table is None else table.shape[1])
        weight[16 * i + row, 16 * j + column] = values(mode, states(stream, step), table).reshape(-1)
    return weight


ORDERS = (172, 156, 140, 124, 116, 108, 60, 52, 36, 28, 20, 12)


def paley_one(order):
    """Of order q + 1 for a prime q = 3 mod 4: 12, 20, 60, 108, 140 of QuIP#'s."""
    q = order - 1
    squares = {i * i % q for i in range(1, q)}
    matrix = numpy.ones((order, order))
    matrix[0, 1:] = -1
    for i, j in itertools.product(range(q), repeat=2):
        matrix[i + 1, j + 1] = 1 if i == j or (i - j) % q in squares else -1
    return matrix


def rotation(size):
    """The orthonormal U of a size that is a power of two, or that times 12, 20 or 60: float64 [size, size]."""
    order = next((one for one in ORDERS if size % one == 0 and (size // one).bit_count() == 1), 1)
    matrix = numpy.ones((1, 1)) if order == 1 else paley_one(order)
    for _ in range((size // order).bit_length() - 1):
        matrix = numpy.kron(matrix, [[1, 1], [1, -1]])
    return matrix / size**0.5


def chunked(size, chunks):
    """U of equal chunks, one by one."""
    return numpy.kron(numpy.eye(chunks), rotation(size // chunks))


def effective(weight, su, sv, input_chunks=1, output_chunks=1):
    """float64 [n, k]: diag(sv) U_n What U_k^T diag(su)."""
    n, k = weight.shape
    turned = chunked(n, output_chunks) @ weight @ chunked(k, input_chunks).T
    return sv.astype(numpy.float64)[:, None] * turned * su.astype(numpy.float64)
