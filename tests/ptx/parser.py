# SPDX-License-Identifier: Apache-2.0
"""Reads the text of a PTX module: variables, kernels, instructions. Knows the grammar, not what an opcode does."""

import bisect
import math
import re
import struct
from dataclasses import dataclass, field

# Bits of each type. Packed pairs count as one register.
TYPE_BITS = {
    **{f"{sign}{bits}": bits for sign in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32, "tf32": 32, "f32": 32, "f64": 64, "pred": 1, "b128": 128},
}


class PtxError(RuntimeError):
    """The PTX cannot be run, or what it does is wrong; the message names instruction, line and thread."""


@dataclass(frozen=True)
class Register:
    """A register of a kernel: its number, its bits (1: a predicate), whether a `!` stands before it."""

    slot: int
    bits: int
    name: str
    negated: bool = False


@dataclass(frozen=True)
class Special:
    """A read-only register of the machine, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant; `bits` is 0 for an integer, else the size of the float whose pattern `value` is."""

    value: int
    bits: int = 0


@dataclass(frozen=True)
class Symbol:
    """A variable, parameter or label."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: object
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}; None stands for the sink `_`."""

    items: tuple


@dataclass(frozen=True)
class Pair:
    """a|b, two destinations."""

    first: object
    second: object


@dataclass(frozen=True)
class Instruction:
    """One instruction; `guard` is its predicate or None, `text` its source for messages."""

    opcode: str
    operands: tuple
    guard: Register | None
    line: int
    text: str

    @property
    def parts(self) -> list[str]:
        """The opcode without the qualifiers that are only hints to the caches, split at its dots."""
        return re.sub(r"\.(?:L[12]|level)::\w+", "", self.opcode).replace("::cta", "").replace("::entry", "").split(".")


@dataclass
class Variable:
    """A variable of the module or of a kernel; size 0 is dynamic shared memory."""

    name: str
    space: str
    align: int
    size: int
    data: bytes = b""


@dataclass
class Parameter:
    """A parameter of a kernel and its offset among the bytes of all."""

    name: str
    align: int
    size: int
    offset: int


@dataclass
class Kernel:
    """A kernel; `labels` gives the instruction a label stands before, max_threads is 0 where none is declared."""

    name: str
    parameters: list[Parameter]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    registers: int = 0
    max_threads: int = 0


@dataclass
class Module:
    """All of a .ptx file."""

    variables: list[Variable]
    kernels: dict[str, Kernel]


_ENTRY = re.compile(r"\.(entry|func)\s+(?:\([^)]*\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?[^{;]*([{;])")
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_VARIABLE = re.compile(r"(.*?)([\w$]+)\s*((?:\[\s*\d*\s*\]\s*)*)(?:=\s*(.*))?$", re.S)


def _strip(text: str) -> str:
    """Blanks comments and the directives that end with their line, without moving any line."""
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)
    # LLVM names a register that it leaves undefined on purpose in a comment.
    text = re.sub(r"//\s*implicit-def:\s*(%[\w$]+).*", r"undefined \1;", text)
    text = re.sub(r"//.*", "", text)
    text = re.sub(r"^\s*\.(?:loc|file|version|target|address_size)\b.*", "", text, flags=re.M)
    return re.sub(r"\.section[^{]*\{[^}]*\}", lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def _declared_type(declaration: str) -> str:
    return next(t for t in re.findall(r"\.(\w+)", declaration) if t in TYPE_BITS)


def _variable(statement: str) -> Variable:
    match = _VARIABLE.match(statement)
    bits = TYPE_BITS[_declared_type(match[1])]
    align = re.search(r"\.align\s+(\d+)", match[1])
    count = 1
    for dimension in re.findall(r"\[\s*(\d*)\s*\]", match[3]):
        count *= int(dimension or 0)
    size = bits // 8
    data = b""
    if match[4]:
        mask = (1 << bits) - 1
        numbers = [_number(t) for t in re.findall(r"[^\s{},]+", match[4])]
        data = b"".join((n.value & mask).to_bytes(size, "little") for n in numbers).ljust(count * size, b"\0")
    space = re.search(r"\.(shared|global|const|local)\b", match[1])[1]
    return Variable(match[2], space, int(align[1]) if align else size, count * size, data)


def _number(text: str) -> Immediate:
    sign = -1 if text.startswith("-") else 1
    body = text.lstrip("+-")
    if body[:2].lower() in ("0f", "0d") and len(body) in (10, 18):
        bits = 4 * (len(body) - 2)
        value = int(body[2:], 16)
        return Immediate(value ^ (1 << (bits - 1)) if sign < 0 else value, bits)
    if "." in body:
        return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 64)
    body = body.rstrip("U")
    octal = re.fullmatch(r"0[0-7]+", body)
    try:
        return Immediate(sign * int(body, 8 if octal else 0))
    except ValueError:
        raise PtxError(f"cannot read the number {text!r}") from None


def _split(text: str) -> list[str]:
    """Splits at the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{(") - (c in "]})")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    tail = text[start:].strip()
    return [*parts, tail] if tail else parts


class _Body:
    """Reads the statements of one kernel; braces open scopes for registers, as inline assembly uses them."""

    def __init__(self, kernel: Kernel, line_of) -> None:
        self.kernel = kernel
        self.line_of = line_of
        self.scopes: list[dict[str, Register]] = [{}]

    def read(self, text: str, position: int) -> int:
        """Reads from behind the opening brace; returns the position behind the closing one."""
        while True:
            while text[position].isspace() or text[position] == ";":
                position += 1
            if text[position] == "{":
                self.scopes.append({})
                position += 1
            elif text[position] == "}":
                self.scopes.pop()
                position += 1
                if not self.scopes:
                    return position
            elif label := _LABEL.match(text, position):
                self.kernel.labels[label[1]] = len(self.kernel.instructions)
                position = label.end()
            else:
                end = text.index(";", position)
                self._statement(" ".join(text[position:end].split()), self.line_of(position))
                position = end + 1

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._registers(text)
        elif re.match(r"(\.extern )?\.(shared|local|global|const)\b", text):
            self.kernel.variables.append(_variable(text))
        elif not text.startswith("."):
            try:
                self.kernel.instructions.append(self._instruction(text, line))
            except PtxError as error:
                raise PtxError(f"{error}; line {line}: {text}") from None

    def _registers(self, text: str) -> None:
        kind, names = re.match(r"\.reg\s*\.(\w+)\s+(.*)", text).groups()
        bits = TYPE_BITS[kind]
        for name in names.split(","):
            many = re.fullmatch(r"\s*([\w$%]+)<(\d+)>\s*", name)
            for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]:
                self.scopes[-1][each] = Register(self.kernel.registers, bits, each)
                self.kernel.registers += 1

    def _instruction(self, text: str, line: int) -> Instruction:
        guard, body = None, text
        if text.startswith("@"):
            name, body = text[1:].split(None, 1)
            guard = self._operand(name)
        opcode, _, operands = body.partition(" ")
        return Instruction(opcode, tuple(self._operand(o) for o in _split(operands)), guard, line, text)

    def _operand(self, text: str):
        if text.startswith("["):
            base, sign, offset = re.fullmatch(r"\[\s*(.+?)\s*(?:([+-])\s*(-?\w+))?\s*\]", text).groups()
            number = _number(offset).value if offset else 0
            return Address(self._operand(base), -number if sign == "-" else number)
        if text.startswith("{"):
            return Vector(tuple(self._operand(t) for t in _split(text[1:-1])))
        if "|" in text:
            return Pair(*(self._operand(t.strip()) for t in text.split("|")))
        if text == "_":
            return None
        return self._name(text)

    def _name(self, text: str):
        name = text.lstrip("!")
        for scope in reversed(self.scopes):
            if register := scope.get(name):
                return Register(register.slot, register.bits, name, True) if name != text else register
        if text.startswith("%"):
            return Special(text)
        if offset := re.fullmatch(r"([a-zA-Z_$][\w$]*)\s*\+\s*(\d+)", text):
            return Address(Symbol(offset[1]), int(offset[2]))
        return _number(text) if re.match(r"[+-]?\d", text) else Symbol(text)


def _parameters(text: str) -> list[Parameter]:
    parameters, offset = [], 0
    for declaration in _split(text or ""):
        match = _VARIABLE.match(declaration)
        # Behind .ptr stands the alignment of what the pointer points to.
        own = match[1].split(".ptr")[0]
        count = re.search(r"\d+", match[3])
        unit = TYPE_BITS[_declared_type(own)] // 8
        align = re.search(r"\.align\s+(\d+)", own)
        align_bytes = int(align[1]) if align else unit
        offset = -(-offset // align_bytes) * align_bytes
        size = unit * (int(count[0]) if count else 1)
        parameters.append(Parameter(match[2], align_bytes, size, offset))
        offset += size
    return parameters


def _skip_braces(text: str, position: int) -> int:
    depth = 1
    while depth:
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        position += 1
    return position


def parse(source: str) -> Module:
    """Reads a PTX module.

    Args:
        source: The text of a .ptx file.

    Returns:
        The module. Device functions are left out: a call of one is an unknown opcode when the kernel is run.

    Raises:
        PtxError: Something cannot be read.
    """
    text = _strip(source)
    breaks = [i for i, c in enumerate(text) if c == "\n"]
    module = Module([], {})
    position = 0
    start = re.compile(r"\s*(?:\.(?:visible|weak|common|extern)\s+)*(?=\.(entry|func|shared|global|const)\b)")
    while match := start.match(text, position):
        if match[1] in ("entry", "func"):
            entry = _ENTRY.match(text, match.end())
            position = entry.end()
            if entry[1] == "entry":
                kernel = module.kernels[entry[2]] = Kernel(entry[2], _parameters(entry[3]))
                bound = re.search(r"\.(?:max|req)ntid\s+([\d, ]+)", entry[0])
                kernel.max_threads = math.prod(map(int, bound[1].split(","))) if bound else 0
                position = _Body(kernel, lambda p: bisect.bisect_left(breaks, p) + 1).read(text, position)
            elif entry[4] == "{":
                position = _skip_braces(text, position)
        else:
            end = text.index(";", position)
            module.variables.append(_variable(text[match.end() : end].strip()))
            position = end + 1
    if text[position:].strip():
        line = bisect.bisect_left(breaks, position + len(text[position:]) - len(text[position:].lstrip())) + 1
        raise PtxError(f"cannot read the module from line {line} on: {text[position:].strip()[:80]!r}")
    return module
