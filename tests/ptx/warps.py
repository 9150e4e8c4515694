# SPDX-License-Identifier: Apache-2.0
"""Opcodes by which the lanes of a warp work together: shuffles, votes, matrix products."""

from functools import lru_cache

import numpy as np
from ptx.code import Code, opcode
from ptx.machine import WARP, Machine, lanes_as_bits
from ptx.parser import Instruction, Pair, PtxError
from ptx.values import from_bfloat


def _require_members(m: Machine, members: np.ndarray) -> np.ndarray:
    """Fails unless exactly the lanes of the mask run the instruction; returns who does, as bits."""
    active = lanes_as_bits(m.mask)
    own = np.uint32(1) << (m.everyone % WARP).astype(np.uint32)
    wrong = m.mask & ((members & ~active != 0) | (members & own == 0))
    if wrong.any():
        lane = int(np.argmax(wrong))
        members = int(np.broadcast_to(members, m.shape)[lane])
        m.fail(f"inactive lanes in the mask: {members:08x} is asked for, {int(active[lane]):08x} is here", lane)
    return active


@opcode("shfl")
def _shuffle(code: Code, ins: Instruction):
    mode = ins.parts[2]
    if ins.parts[1] != "sync" or ins.parts[3:] != ["b32"] or mode not in ("idx", "bfly", "up", "down"):
        raise PtxError("unknown opcode")
    to = ins.operands[0]
    write = code.writer(to.first if isinstance(to, Pair) else to, "b32")
    write_in = code.writer(to.second if isinstance(to, Pair) else None, "pred")
    reads = [code.reader(o, "b32") for o in ins.operands[1:]]

    def run(m):
        value, b, c, members = (np.broadcast_to(read(m), m.shape) for read in reads)
        _require_members(m, members)
        lane = m.everyone % WARP
        source, inside = _source(mode, lane, b.astype(np.int64) & 31, c.astype(np.int64))
        source = m.everyone - lane + np.where(inside, source, lane)
        absent = m.mask & ~m.mask[source]
        if absent.any():
            m.fail("shuffle from an inactive lane", np.argmax(absent))
        write(m, value[source])
        write_in(m, inside)

    return run


def _source(mode: str, lane: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lane each reads from and whether it is within its segment (PTX ISA, shfl.sync)."""
    clamp, segment = c & 31, (c >> 8) & 31
    last = (lane & segment) | (clamp & ~segment)
    if mode == "up":
        return lane - b, lane - b >= last
    source = {"down": lane + b, "bfly": lane ^ b, "idx": (lane & segment) | (b & ~segment)}[mode]
    return source, source <= last


@opcode("vote")
def _vote(code: Code, ins: Instruction):
    mode = ins.parts[2]
    if ins.parts[1] != "sync" or mode not in ("ballot", "any", "all"):
        raise PtxError("unknown opcode")
    write = code.writer(ins.operands[0], ins.parts[3])
    read, read_members = code.reader(ins.operands[1], "pred"), code.reader(ins.operands[2], "b32")

    def run(m):
        members = np.broadcast_to(read_members(m), m.shape)
        _require_members(m, members)
        bits = lanes_as_bits(np.broadcast_to(read(m), m.shape) & m.mask) & members
        write(m, {"ballot": bits, "any": bits != 0, "all": bits == members}[mode])

    return run


@opcode("activemask")
def _active(code: Code, ins: Instruction):
    write = code.writer(ins.operands[0], "b32")
    return lambda m: write(m, lanes_as_bits(m.mask))


# The bytes of an element of A and B, and how 32-bit registers are seen.
_ELEMENTS = {
    "f16": (2, lambda x: x.view(np.float16).astype(np.float64)),
    "bf16": (2, lambda x: from_bfloat(x.view(np.uint16)).astype(np.float64)),
    "tf32": (4, lambda x: (x & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)),
    "u8": (1, lambda x: x.view(np.uint8).astype(np.float64)),
    "s8": (1, lambda x: x.view(np.int8).astype(np.float64)),
}


@lru_cache
def _fragment(rows: int, columns: int, per_register: int, row_blocks: int) -> np.ndarray:
    """Where the elements of a matrix lie among a warp's: lane, then register, then element in it.

    Registers go down the blocks of eight rows first, then along the columns; a lane's row in a block is its number
    over four, and four lanes share the columns of a register.
    """
    row, column = np.divmod(np.arange(rows * columns), columns)
    wide = 4 * per_register
    register = column // wide * row_blocks + row // 8
    registers = row_blocks * (columns // wide)
    lane = row % 8 * 4 + column % wide // per_register
    return ((lane * registers + register) * per_register + column % per_register).reshape(rows, columns)


@opcode("redux")
def _reduce(code: Code, ins: Instruction):
    """Of whole warps: how Triton finds a largest integer."""
    function = {"max": np.max, "min": np.min}[ins.parts[2]]
    kind = ins.parts[3]
    write, read = code.writer(ins.operands[0], kind), code.reader(ins.operands[1], kind)

    def run(m):
        m.require_warps()
        values = np.broadcast_to(read(m), m.shape).reshape(-1, WARP)
        write(m, np.repeat(function(values, axis=1), WARP))

    return run


@opcode("mma")
def _multiply_matrices(code: Code, ins: Instruction):
    parts = [p for p in ins.parts if p != "satfinite"]
    shape, kinds = parts[3], parts[-4:]
    known = shape in ("m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32")
    if parts[1:3] != ["sync", "aligned"] or parts[4:6] != ["row", "col"] or not known or len(parts) != 10:
        raise PtxError("unknown opcode")
    to_kind, a_kind, b_kind, c_kind = kinds
    (size, see_a), (_, see_b) = _ELEMENTS[a_kind], _ELEMENTS[b_kind]
    if to_kind != c_kind or to_kind not in ("f32", "f16", "s32") or "satfinite" in ins.parts:
        raise PtxError("unknown opcode")
    depth, each = int(shape[6:]), 4 // size
    sums = 2 if to_kind == "f16" else 1
    at_a, at_b, at_c = _fragment(16, depth, each, 2), _fragment(8, depth, each, 1), _fragment(16, 8, 2, 2)
    see = {"f32": lambda x: x.view(np.float32), "s32": lambda x: x.view(np.int32), "f16": lambda x: x.view(np.float16)}
    reads = [[code.reader(o, "b32") for o in operand.items] for operand in ins.operands[1:]]
    writes = [code.writer(o, "b32") for o in ins.operands[0].items]
    if [len(r) for r in reads] != [at_a.size // 32 // each, at_b.size // 32 // each, 4 // sums] or len(
        writes
    ) != 4 // sums:
        raise PtxError("the fragments' registers are not those of the shape")

    def gather(m, readers, seen):
        values = np.stack([np.broadcast_to(read(m), m.shape) for read in readers], axis=1)
        return seen(values).reshape(m.shape[0] // WARP, -1)

    def run(m):
        m.require_warps()
        a, b = gather(m, reads[0], see_a)[:, at_a], gather(m, reads[1], see_b)[:, at_b]
        c = gather(m, reads[2], see[to_kind])
        # Products and sums are exact or nearly so in float64, integers always, and the sum is rounded once.
        total = (a @ b.swapaxes(1, 2) + c[:, at_c]).reshape(-1, at_c.size)
        result = np.empty_like(c)
        result[:, at_c.reshape(-1)] = total.astype(np.int64).astype(np.int32) if to_kind == "s32" else total
        result = result.view(np.uint32).reshape(m.shape[0], -1)
        for i, write in enumerate(writes):
            write(m, np.ascontiguousarray(result[:, i]))

    return run
