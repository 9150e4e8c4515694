# SPDX-License-Identifier: Apache-2.0
"""Opcodes that shift, pick and count bits and bytes."""

import numpy as np
from ptx.code import Code, apply, kind_of, opcode
from ptx.parser import TYPE_BITS, Immediate, Instruction, PtxError
from ptx.values import DTYPES


@opcode("shl", "shr")
def _shift(code: Code, ins: Instruction):
    kind = kind_of(ins)
    bits, dtype = TYPE_BITS[kind], DTYPES[kind]
    function = np.left_shift if ins.parts[0] == "shl" else np.right_shift
    write = code.writer(ins.operands[0], kind)
    reads = [code.reader(ins.operands[1], kind), code.reader(ins.operands[2], "u32")]
    # NumPy agrees on what a shift by all bits gives; more than that is the same.
    return apply(write, reads, lambda a, n: function(a, np.minimum(n, np.uint32(bits)).astype(dtype)))


@opcode("shf")
def _funnel(code: Code, ins: Instruction):
    if ins.parts[1:] not in ([d, m, "b32"] for d in "lr" for m in ("wrap", "clamp")):
        raise PtxError("unknown opcode")
    left, wrap = ins.parts[1] == "l", ins.parts[2] == "wrap"
    half = np.uint64(32)

    def compute(low, high, n):
        both = (high.astype(np.uint64) << half) | low
        n = (n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))).astype(np.uint64)
        return ((both << n) >> half if left else both >> n).astype(np.uint32)

    return code.elementwise(ins, "b32", compute)


def _table_of_two(table: int, a, b, ones):
    """A function of two bits from its truth table, bit 2 a + b."""
    terms = {
        **{0: lambda: ones ^ ones, 1: lambda: ~(a | b), 2: lambda: ~a & b, 3: lambda: ~a, 4: lambda: a & ~b},
        **{5: lambda: ~b, 6: lambda: a ^ b, 7: lambda: ~(a & b), 8: lambda: a & b, 9: lambda: ~(a ^ b)},
        **{10: lambda: b, 11: lambda: ~a | b, 12: lambda: a, 13: lambda: a | ~b, 14: lambda: a | b, 15: lambda: ones},
    }
    return terms[table]()


@opcode("lop3")
def _logic_of_three(code: Code, ins: Instruction):
    if ins.parts[1:] != ["b32"] or not isinstance(ins.operands[4], Immediate):
        raise PtxError("unknown opcode")
    table = ins.operands[4].value
    unset = sum((table >> (2 * i) & 1) << i for i in range(4))
    set_ = sum((table >> (2 * i + 1) & 1) << i for i in range(4))
    ones = np.uint32(0xFFFFFFFF)

    def compute(a, b, c):
        if unset == set_:
            return _table_of_two(set_, a, b, ones)
        return (_table_of_two(set_, a, b, ones) & c) | (_table_of_two(unset, a, b, ones) & ~c)

    write = code.writer(ins.operands[0], "b32")
    return apply(write, [code.reader(o, "b32") for o in ins.operands[1:4]], compute)


@opcode("prmt")
def _permute(code: Code, ins: Instruction):
    if ins.parts[1:] != ["b32"]:
        raise PtxError("unknown opcode")

    def compute(a, b, selector):
        lanes = np.broadcast_shapes(a.shape, b.shape, selector.shape)
        pair = np.broadcast_to(a, lanes).astype(np.uint64) | (
            np.broadcast_to(b, lanes).astype(np.uint64) << np.uint64(32)
        )
        result = np.zeros(lanes, np.uint32)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = (pair >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint8)
            if np.any(nibble & 8):
                sign = (byte.view(np.int8) >> np.int8(7)).view(np.uint8)
                byte = np.where(nibble & 8, sign, byte)
            result |= byte.astype(np.uint32) << np.uint32(8 * i)
        return result

    return code.elementwise(ins, "b32", compute)


@opcode("dp4a")
def _dot_of_bytes(code: Code, ins: Instruction):
    kinds = ins.parts[1:]
    if len(kinds) != 2 or not {*kinds} <= {"u32", "s32"}:
        raise PtxError("unknown opcode")
    result = "s32" if "s32" in kinds else "u32"
    bytes_of = [np.dtype("i1") if kind == "s32" else np.dtype("u1") for kind in kinds]

    def compute(a, b, c):
        a, b = (np.atleast_1d(x).view(t).reshape(-1, 4).astype(np.int32) for x, t in zip((a, b), bytes_of, strict=True))
        return (a * b).sum(1, dtype=np.int32).astype(c.dtype) + c

    return code.elementwise(ins, result, compute)


def _below(n):
    """The lowest n bits of a 64-bit word, n up to 64."""
    return np.where(n >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(n, np.uint64(63))) - np.uint64(1))


@opcode("bfe")
def _extract(code: Code, ins: Instruction):
    kind = kind_of(ins)
    bits, dtype = np.uint64(TYPE_BITS[kind]), DTYPES[kind]

    def compute(a, position, length):
        position, length = ((x & np.uint32(255)).astype(np.uint64) for x in (position, length))
        wide = a.astype(np.int64).view(np.uint64) & _below(bits)
        field = np.right_shift(wide, position) & _below(length)
        if dtype.kind == "i":
            last = np.minimum(position + length - np.uint64(1), bits - np.uint64(1))
            negative = (length > 0) & ((wide >> last) & np.uint64(1) == 1)
            kept = np.minimum(length, np.maximum(bits, position) - position)
            field = np.where(negative, field | ~_below(kept), field)
        return field.astype(dtype)

    write = code.writer(ins.operands[0], kind)
    return apply(
        write, [code.reader(o, k) for o, k in zip(ins.operands[1:], (kind, "u32", "u32"), strict=True)], compute
    )


@opcode("bfi")
def _insert(code: Code, ins: Instruction):
    kind = kind_of(ins)
    bits, dtype = np.uint64(TYPE_BITS[kind]), DTYPES[kind]

    def compute(a, base, position, length):
        position, length = ((x & np.uint32(255)).astype(np.uint64) for x in (position, length))
        field = np.left_shift(_below(length), position) & _below(bits)
        inserted = np.left_shift(a.astype(np.uint64), position)
        return ((base.astype(np.uint64) & ~field) | (inserted & field)).astype(dtype)

    write = code.writer(ins.operands[0], kind)
    kinds = (kind, kind, "u32", "u32")
    return apply(write, [code.reader(o, k) for o, k in zip(ins.operands[1:], kinds, strict=True)], compute)


def _reverse(a):
    bits = np.unpackbits(np.atleast_1d(a).view(np.uint8).reshape(-1, a.itemsize), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(a.dtype)[:, 0]


def _leading_zeros(a):
    left = np.full(np.shape(a), a.itemsize * 8, np.uint32)
    while np.any(a):
        left -= (a != 0).astype(np.uint32)
        a = a >> a.dtype.type(1)
    return left


@opcode("bfind")
def _find_bit(code: Code, ins: Instruction):
    kind = kind_of(ins, "shiftamt")
    bits, unsigned = TYPE_BITS[kind], DTYPES[f"u{TYPE_BITS[kind]}"]

    def compute(a):
        zeros = _leading_zeros(np.where(a < 0, ~a, a).astype(unsigned))
        found = zeros if "shiftamt" in ins.parts else np.uint32(bits - 1) - zeros
        return np.where(zeros == bits, np.uint32(0xFFFFFFFF), found)

    return code.elementwise(ins, kind, compute, "u32")


_COUNTS = {"popc": lambda a: np.bitwise_count(a).astype(np.uint32), "clz": _leading_zeros, "brev": _reverse}


@opcode("popc", "clz", "brev")
def _count(code: Code, ins: Instruction):
    kind = kind_of(ins)
    return code.elementwise(ins, kind, _COUNTS[ins.parts[0]], kind if ins.parts[0] == "brev" else "u32")
