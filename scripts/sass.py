# SPDX-License-Identifier: Apache-2.0
"""Machine code of NVIDIA GPUs as nvdisasm prints it: instructions, blocks, loops, and what a turn of a loop issues."""

import heapq
import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

FUNCTION = re.compile(r"^\.text\.(\S+):")
LABEL = re.compile(r"^(\.L\w+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
TARGET = re.compile(r"`\((\.L\w+)\)")
JUMPS, ENDS = ("BRA", "CALL", "JMP"), ("EXIT", "RET")
NEVER = ("!PT", "!UPT")
"""Guards that are never true: the instruction takes its turn and does nothing."""

CLASSES = {
    "imad": ("IMAD",),
    "idp": ("IDP",),
    "lop3": ("LOP3",),
    "shf": ("SHF",),
    "prmt": ("PRMT",),
    "iadd3": ("IADD3", "IADD", "VIADD"),
    "hadd2": ("HADD2", "HFMA2", "HMUL2"),
    "mma": ("HMMA", "IMMA"),
    "lds": ("LDS",),
    "shfl": ("SHFL",),
    "ldg": ("LDG",),
}
"""Class of instructions -> opcodes. Whatever is in none is "other"."""
COPY, OTHER = "LDGSTS", "other"
FORBIDDEN = ("LDL", "STL", "VABSDIFF", "VABSDIFF4")
"""Memory of a thread, which registers did not suffice for, and what newer GPUs emulate."""


class ShapeError(ValueError):
    """The code does not have the loops that the source has."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: its opcode without and with modifiers, its guard, and the label it jumps to."""

    opcode: str
    name: str
    guard: str | None = None
    operands: str = ""

    @property
    def target(self) -> str | None:
        found = TARGET.search(self.operands)
        return found.group(1) if found and self.opcode in JUMPS else None

    @property
    def conditional(self) -> bool:
        """Whether what follows may run, too: a guard, or a condition before the label."""
        return self.guard is not None or not self.operands.startswith("`") or self.opcode == "CALL"

    @property
    def kind(self) -> str:
        """Its class, see CLASSES."""
        if self.guard in NEVER:
            return OTHER
        return next((name for name, opcodes in CLASSES.items() if self.opcode in opcodes), OTHER)


@dataclass
class Block:
    """Instructions that run one after the other, and the numbers of the blocks that may follow."""

    instructions: list[Instruction]
    following: list[int] = field(default_factory=list)

    def count(self, opcode: str, guarded: bool | None = None) -> int:
        """How many instructions of an opcode it has, of all or of those with or without a guard."""
        found = [i for i in self.instructions if i.opcode == opcode and i.guard not in NEVER]
        return sum(guarded is None or (i.guard is not None) == guarded for i in found)

    @property
    def multiplications(self) -> int:
        return sum(i.kind == "mma" for i in self.instructions)


@dataclass(frozen=True)
class Loop:
    """Numbers of its blocks; the head is where it is entered."""

    head: int
    blocks: frozenset[int]


def functions(text: str) -> dict[str, list[Block]]:
    """The blocks of every function of a listing (nvdisasm -c), by its mangled name."""
    lines: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if found := FUNCTION.match(line):
            current = lines.setdefault(found.group(1), [])
        else:
            current.append(line)
    return {name: blocks(body) for name, body in lines.items()}


def blocks(lines: Iterable[str]) -> list[Block]:
    """Cuts a function at its labels and after its jumps."""
    parts, labels = [Block([])], {}
    for line in lines:
        if found := LABEL.match(line):
            if parts[-1].instructions:
                parts.append(Block([]))
            labels[found.group(1)] = len(parts) - 1
        elif found := INSTRUCTION.match(line):
            guard, name, operands = found.groups()
            parts[-1].instructions.append(Instruction(name.split(".")[0], name, guard, operands.strip()))
            if parts[-1].instructions[-1].opcode in JUMPS + ENDS:
                parts.append(Block([]))
    for number, part in enumerate(parts):
        last = part.instructions[-1] if part.instructions else None
        if last and last.target in labels:
            part.following.append(labels[last.target])
        ends = last is not None and last.opcode in JUMPS + ENDS
        if number + 1 < len(parts) and (not ends or last.conditional and (last.guard or last.opcode not in ENDS)):
            part.following.append(number + 1)
    return parts


def loops(parts: list[Block]) -> list[Loop]:
    """Every loop of a function, smallest first. A jump back that leads into the middle of others' code is none."""
    before: dict[int, list[int]] = {}
    for number, part in enumerate(parts):
        for following in part.following:
            before.setdefault(following, []).append(number)
    found: dict[int, set[int]] = {}
    for number, part in enumerate(parts):
        for head in (following for following in part.following if following <= number):
            body, left = {head}, [number]
            while left:
                block = left.pop()
                if block not in body:
                    body.add(block)
                    left += before.get(block, [])
            if 0 not in body or head == 0:  # else it can be entered without passing the head
                found.setdefault(head, set()).update(body)
    return sorted((Loop(head, frozenset(body)) for head, body in found.items()), key=lambda loop: len(loop.blocks))


def nest(parts: list[Block]) -> tuple[Loop | None, Loop]:
    """The loop over the chunks of a last stage that is not whole, if there is one, and the loop over stages around it.

    Raises:
        ShapeError: no loop multiplies, or more than two.
    """
    found = [loop for loop in loops(parts) if any(parts[block].multiplications for block in loop.blocks)]
    if not 1 <= len(found) <= 2 or not found[0].blocks <= found[-1].blocks:
        raise ShapeError(f"{len(found)} loops multiply, where one or one within another should")
    return (found[0] if len(found) == 2 else None), found[-1]


def turn(parts: list[Block], loop: Loop, without: Loop | None = None, copies: int | None = None) -> list[Instruction]:
    """The instructions of one turn of a loop: the shortest way from its head to its head with all multiplications.

    Args:
        parts: the function's blocks.
        loop: the loop.
        without: a loop within it that the way avoids.
        copies: how many asynchronous copies the way has; a guarded one may be one or none. None: any number.

    Raises:
        ShapeError: there is no such way.
    """
    allowed = loop.blocks - (without.blocks if without else frozenset())
    order = itertools.count()
    # length, tie-break, block, copies and multiplications before it, the way
    heap, done, best = [(0, next(order), loop.head, 0, 0, ())], set(), None
    while heap:
        length, _, number, copied, multiplied, way = heapq.heappop(heap)
        state = number, copied, multiplied
        if way and number == loop.head:
            if copies in (None, copied) and (best is None or multiplied > best[0]):
                best = multiplied, way
            continue
        if state in done or (copies is not None and copied > copies):
            continue
        done.add(state)
        part = parts[number]
        fixed, free = part.count(COPY, guarded=False), part.count(COPY, guarded=True)
        counts = range(fixed, fixed + free + 1) if copies is not None else [0]
        for after in part.following:
            if after not in allowed:
                continue
            for count in counts:
                further = copied + count, multiplied + part.multiplications, (*way, number)
                heapq.heappush(heap, (length + len(part.instructions), next(order), after, *further))
    if best is None:
        raise ShapeError(f"no turn of the loop has {copies} copies")
    return [instruction for number in best[1] for instruction in parts[number].instructions]


def by_class(instructions: Iterable[Instruction]) -> Counter[str]:
    """How many of each class."""
    return Counter(instruction.kind for instruction in instructions)


def wavefronts(instructions: Iterable[Instruction]) -> int:
    """Passes through shared memory without conflicts: 128 bytes each, and one a shuffle."""
    return sum(_passes(i) for i in instructions if i.guard not in NEVER)


def _passes(instruction: Instruction) -> int:
    if instruction.opcode in ("LDS", COPY):
        return next((int(size) // 32 for size in ("128", "64") if size in instruction.name.split(".")), 1)
    return int(instruction.opcode in ("SHFL", "LDG"))


def forbidden(parts: Iterable[Block]) -> list[str]:
    """The opcodes among FORBIDDEN that a function has."""
    opcodes = {instruction.opcode for part in parts for instruction in part.instructions}
    return [opcode for opcode in FORBIDDEN if opcode in opcodes]


def has(parts: Iterable[Block], *opcodes: str) -> bool:
    """Whether a function has an instruction of one of these."""
    return any(instruction.opcode in opcodes for part in parts for instruction in part.instructions)
