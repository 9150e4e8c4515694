# SPDX-License-Identifier: Apache-2.0
"""EXL3 as its specification says it, in numpy, for tests to compare the package with, which it does not import."""

import numpy

MCG, MUL1 = 0xCBAC1FED, 0x83DCD12D


def lcg(count):
    """Bytes x_1 >> 24, x_2 >> 24 .. of x <- 1664525 x + 1013904223 mod 2^32 from x_0 = 1."""
    out, x = bytearray(), 1
    for _ in range(count):
        x = (1664525 * x + 1013904223) % 2**32
        out.append(x >> 24)
    return bytes(out)


def ramp(count):
    """Byte t is 37 t + 11 mod 256."""
    return bytes((37 * t + 11) % 256 for t in range(count))


def values(code):
    """fp16 [65536]: what every state stands for."""
    x = numpy.arange(65536, dtype=numpy.uint64)
    if code == "mul1":
        y = x * MUL1 % 2**32
        total = sum(y >> 8 * i & 255 for i in range(4)).astype(numpy.float64)
        factor, term = numpy.array([0x1EEE, 0xC931], numpy.uint16).view(numpy.float16).astype(numpy.float64)
        return ((1024 + total) * factor + term).astype(numpy.float16)
    y = x * MCG % 2**32 if code == "mcg" else (x * 89226354 + 64248484) % 2**32
    z = (y & 0x8FFF8FFF) ^ 0x3B603B60
    high, low = ((z >> shift & 0xFFFF).astype(numpy.uint16).view(numpy.float16) for shift in (16, 0))
    return high + low


def states(tile):
    """int [256]: the 16 bits that end with symbol t, of little-endian words of 32 bits, most significant first."""
    stream = numpy.unpackbits(numpy.frombuffer(tile, "<u4").astype(">u4").view(numpy.uint8))
    whole, half = divmod(len(stream) // 128, 2)  # half a bit more: every other symbol has one more
    end = numpy.cumsum([whole + half * (t % 2) for t in range(256)])[:, None]
    window = stream[(end - 16 + numpy.arange(16)) % len(stream)].astype(numpy.int64)
    return window @ (1 << numpy.arange(15, -1, -1))


def decode(trellis, code):
    """fp16 [k, n] of int16 [k/16, n/16, 16 K]; K is whole, or a half more."""
    rows, columns, _ = trellis.shape
    table = values(code)
    t = numpy.arange(256)
    lane, j = t // 8, t % 8
    row, column = 2 * (lane & 3) + (j & 1) + 8 * (j >> 1 & 1), (lane >> 2) + 8 * (j >> 2)
    out = numpy.empty((16 * rows, 16 * columns), numpy.float16)
    for a in range(rows):
        for b in range(columns):
            out[16 * a + row, 16 * b + column] = table[states(trellis[a, b].tobytes())]
    return out


def hadamard(x):
    """Rows in blocks of 128, orthonormal, in Sylvester's order."""
    matrix = numpy.array([[1.0]])
    for _ in range(7):
        matrix = numpy.block([[matrix, matrix], [matrix, -matrix]])
    return (x.reshape(-1, x.shape[-1] // 128, 128) @ (matrix / 128**0.5)).reshape(x.shape)


def effective(trellis, code, suh, svh):
    """float64 [k, n]: diag(suh) H_k What H_n diag(svh)."""
    weight = hadamard(hadamard(decode(trellis, code).astype(numpy.float64).T).T)
    return suh.astype(numpy.float64)[:, None] * weight * svh.astype(numpy.float64)
