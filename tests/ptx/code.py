# SPDX-License-Identifier: Apache-2.0
"""Turns instructions into functions of the machine: how operands are read and written, and the table of opcodes.

A builder takes (code, instruction) and returns a function that runs the instruction for the machine's active lanes.
"""

from collections.abc import Callable

import numpy as np
from ptx.parser import TYPE_BITS, Address, Immediate, Instruction, PtxError, Register, Special, Symbol
from ptx.values import DTYPES, FLOATS, PATTERN, decode

OPCODES: dict[str, Callable] = {}


def opcode(*names: str):
    """Registers a builder for opcodes, by their part before the first dot."""

    def register(builder):
        OPCODES.update(dict.fromkeys(names, builder))
        return builder

    return register


def kind_of(instruction: Instruction, allowed: str = "") -> str:
    """The type an opcode ends with; every part between must be among the allowed ones.

    Raises:
        PtxError: There is another part: running it as if it were not there would be wrong.
    """
    parts = instruction.parts
    known = {*allowed.split(), ""}
    for part in parts[1:-1]:
        if part not in known:
            raise PtxError(f"unknown opcode (.{part})")
    if len(parts) < 2 or parts[-1] not in TYPE_BITS:
        raise PtxError("unknown opcode (its type)")
    return parts[-1]


def immediate(operand: Immediate, kind: str):
    """A constant as a NumPy scalar of a type."""
    bits = TYPE_BITS[kind]
    value = operand.value
    if operand.bits and operand.bits != bits:
        source = np.array(value, PATTERN[operand.bits]).view(f"f{operand.bits // 8}")
        value = int(source.astype(f"f{bits // 8}").view(PATTERN[bits]))
    elif kind in FLOATS and not operand.bits and bits != 16 and "x2" not in kind:
        return DTYPES[kind].type(value)
    if bits == 1:
        return np.bool_(value)
    return np.array(value & ((1 << bits) - 1), PATTERN[bits]).view(DTYPES[kind])[()]


class Code:
    """Reads and writes operands."""

    def reader(self, operand, kind: str) -> Callable:
        """A function from the machine to an operand's values: an array over the lanes, or a scalar."""
        if isinstance(operand, Register):
            return self._register(operand, kind)
        dtype = DTYPES[kind]
        if isinstance(operand, Immediate):
            value = immediate(operand, kind)
            return lambda m: value
        if isinstance(operand, Special):
            name = operand.name
            return lambda m: m.special(name).astype(dtype, copy=False)
        if isinstance(operand, Symbol):
            name = operand.name
            return lambda m: dtype.type(m.symbol(name))
        if isinstance(operand, Address):
            base, offset = self.reader(operand.base, kind), dtype.type(operand.offset)
            return lambda m: base(m) + offset
        raise PtxError("unknown operand")

    def _register(self, register: Register, kind: str) -> Callable:
        slot, bits, dtype = register.slot, TYPE_BITS[kind], DTYPES[kind]
        if register.bits < bits:
            raise PtxError(f"{register.name} is too narrow")

        def whole(m):
            if not m.whole[slot]:
                m.require_known(register)
            return m.registers[slot]

        if register.negated:
            return lambda m: ~whole(m)
        if register.bits > bits:
            pattern = PATTERN[bits]
            return lambda m: whole(m).astype(pattern).view(dtype)
        if dtype == PATTERN[bits]:
            return whole
        return lambda m: whole(m).view(dtype)

    def floats(self, operand, kind: str) -> Callable:
        """The same as numbers: bf16 widened to float32, pairs as two numbers a lane."""
        read = self.reader(operand, kind)
        if kind in ("f32", "f64", "f16"):
            return read
        return lambda m: decode(kind, np.broadcast_to(read(m), m.shape))

    def writer(self, operand, kind: str) -> Callable:
        """A function (machine, values) that sets a register where lanes are active; wider ones are extended."""
        if operand is None:
            return lambda m, value: None
        if not isinstance(operand, Register) or operand.negated:
            raise PtxError("unknown destination")
        slot, bits, dtype = operand.slot, TYPE_BITS[kind], DTYPES[kind]
        if operand.bits < bits:
            raise PtxError(f"{operand.name} is too narrow")
        pattern = PATTERN[operand.bits]
        wide = np.dtype(f"{dtype.kind}{operand.bits // 8}") if operand.bits > bits and dtype.kind in "ui" else None

        def write(m, value):
            if value.shape != m.shape:
                value = np.full(m.shape, value, dtype)
            if wide is not None:
                value = value.astype(wide)
            m.write(slot, value if value.dtype == pattern else value.view(pattern))

        return write

    def address(self, operand: Address) -> Callable:
        """The addresses of [base + offset] as int64."""
        if not isinstance(operand, Address):
            raise PtxError("an address was expected")
        base, offset = operand.base, operand.offset
        kind = f"u{base.bits}" if isinstance(base, Register) else "u64"
        read = self.reader(base, kind)
        # Addresses of 32 bits wrap around.
        wrap = np.int64(0xFFFFFFFF if kind == "u32" else -1)
        return lambda m: np.broadcast_to(np.asarray(read(m)).astype(np.int64) + offset & wrap, m.shape)

    def elementwise(self, instruction: Instruction, kind: str, function: Callable, result: str = "") -> Callable:
        """An instruction that is one function of its sources, all of one type."""
        write = self.writer(instruction.operands[0], result or kind)
        reads = [self.reader(o, kind) for o in instruction.operands[1:]]
        return apply(write, reads, function)


def apply(write: Callable, reads: list[Callable], function: Callable) -> Callable:
    """A function that reads, computes and writes."""
    if len(reads) == 1:
        (a,) = reads
        return lambda m: write(m, function(a(m)))
    if len(reads) == 2:
        a, b = reads
        return lambda m: write(m, function(a(m), b(m)))
    return lambda m: write(m, function(*[read(m) for read in reads]))


def build(instruction: Instruction) -> Callable:
    """Compiles one instruction that does not change the flow of control.

    Raises:
        PtxError: It is not known.
    """
    try:
        builder = OPCODES.get(instruction.parts[0])
        if builder is None:
            raise PtxError("unknown opcode")
        return builder(Code(), instruction)
    except (PtxError, KeyError, ValueError, IndexError) as error:
        raise PtxError(f"{error}; line {instruction.line}: {instruction.text}") from error
