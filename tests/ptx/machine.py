# SPDX-License-Identifier: Apache-2.0
"""The threads of some blocks as lanes of NumPy vectors: registers, flow of control, access to memory.

The lanes with the lowest position in the code run until they meet others, wait or part: so lanes that parted come
together again where the compiler put the code behind both ways. Every block has whole warps; lanes without a thread
count as ended.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from ptx.memory import GLOBAL_START, WINDOW_BYTES, WINDOWS, Buffers, Scratch
from ptx.parser import Instruction, PtxError, Register
from ptx.specials import special_value
from ptx.values import PATTERN

WARP = 32


@dataclass
class Step:
    """A compiled instruction. `flow` is "", "bra", "exit", "bar" or "warp"; `run` then gives the target or mask."""

    instruction: Instruction
    run: Callable | int | None
    flow: str = ""


@dataclass
class Launch:
    """What all blocks of a launch share."""

    steps: list[Step]
    registers: int
    buffers: Buffers
    symbols: dict[str, int]
    parameters: bytes
    shared_bytes: int
    local_bytes: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    report: object
    limit: int
    order: str
    eager: bool


class Machine:
    """Runs some blocks of a launch together.

    Attributes:
        shape: The shape of a register's values.
        mask: The lanes that run the current instruction.
        registers: The bit patterns of each register, None before the first write.
        whole: For each register, whether every lane wrote it.
    """

    def __init__(self, launch: Launch, first: int, blocks: int) -> None:
        self.launch = launch
        self.threads = int(np.prod(launch.block))
        self.width = -(-self.threads // WARP) * WARP
        count = blocks * self.width
        self.shape = (count,)
        self.everyone = np.arange(count)
        self.first, self.blocks = first, blocks
        self.block_of = self.everyone // self.width
        self.thread_of = self.everyone % self.width
        self.warp_of = self.thread_of // WARP
        self.alive = self.thread_of < self.threads
        self.pcs = np.zeros(count, np.int64)
        self.waiting = np.zeros(count, np.int8)
        self.members = np.zeros(count, np.uint32)
        self.registers: list = [None] * launch.registers
        self.whole = [False] * launch.registers
        self._known: dict[int, np.ndarray] = {}
        parameters = Scratch(1, len(launch.parameters))
        parameters.views[1][: len(launch.parameters)] = np.frombuffer(launch.parameters, np.uint8)
        parameters.written[1][:] = 1
        local = Scratch(count, launch.local_bytes)
        local.written[1][:] = 1
        self.scratch = {"shared": Scratch(blocks, launch.shared_bytes), "local": local, "param": parameters}
        self._owner = {"shared": self.block_of, "local": self.everyone, "param": np.zeros(count, np.int64)}
        self._specials: dict[str, np.ndarray] = {}
        self.copies: list = []
        self.committed = np.zeros(count, np.int64)
        self.at = 0
        self._steps_run = 0

    # Errors.

    def fail(self, problem: str, lane: int | None = None) -> None:
        """Raises a PtxError that names the current instruction and a thread (else the first active one)."""
        lane = int(np.argmax(self.mask)) if lane is None else int(lane)
        x, y, _ = self.launch.block
        thread = int(self.thread_of[lane])
        where = (thread % x, thread // x % y, thread // (x * y))
        ins = self.launch.steps[self.at].instruction
        raise PtxError(
            f"{problem}; thread {where} of block {self._block_index(lane)}; line {ins.line}: {ins.text}"
        ) from None

    def _block_index(self, lane: int) -> tuple[int, int, int]:
        x, y, _ = self.launch.grid
        block = self.first + int(self.block_of[lane])
        return block % x, block // x % y, block // (x * y)

    # Registers.

    def require_known(self, register: Register) -> None:
        """Fails where an active lane never wrote a register."""
        known = self._known.get(register.slot)
        missing = self.mask if known is None else self.mask & ~known
        if missing.any():
            self.fail(f"register {register.name} is read but was never written", np.argmax(missing))

    def write(self, slot: int, value: np.ndarray) -> None:
        """Sets a register where lanes are active; values are never changed in place, so they may be shared."""
        if self.full:
            self.registers[slot] = value
            self.whole[slot] = True
            return
        old = self.registers[slot]
        self.registers[slot] = np.where(self.mask, value, np.zeros_like(value) if old is None else old)
        if not self.whole[slot]:
            known = self._known.get(slot)
            known = self._known[slot] = self.mask.copy() if known is None else known | self.mask
            self.whole[slot] = bool((known | ~self.alive).all())

    def undefine(self, register: Register) -> None:
        """Gives a register a value nobody should rely on, where LLVM says that it is left undefined."""
        self.write(
            register.slot, np.full(self.shape, 0xCBCBCBCBCBCBCBCB & (1 << register.bits) - 1, PATTERN[register.bits])
        )

    def symbol(self, name: str) -> int:
        """The address of a variable or parameter in its own space."""
        if name not in self.launch.symbols:
            self.fail(f"unknown name {name}")
        return self.launch.symbols[name]

    def special(self, name: str) -> np.ndarray:
        """A special register as uint32."""
        if name not in self._specials:
            value = special_value(self, name.lstrip("%"))
            if value is None:
                self.fail(f"unknown special register {name}")
            self._specials[name] = np.broadcast_to(np.asarray(value), self.shape).astype(np.uint32)
        return self._specials[name]

    def require_warps(self) -> None:
        """Fails unless all lanes of each warp here are active."""
        if self.lanes.size != self.everyone.size:
            warps = self.mask.reshape(-1, WARP)
            some = warps.any(1) & ~warps.all(1)
            if some.any():
                self.fail("inactive lanes in a warp-wide instruction", np.argmax(some) * WARP)

    # Flow of control.

    def run(self) -> None:
        """Runs until every thread has ended."""
        while True:
            runnable = self.alive & (self.waiting == 0)
            if not runnable.any():
                if not self.alive.any():
                    return
                self._release()
                continue
            if self.launch.order != "together":
                warps = self.warp_of[runnable]
                runnable &= self.warp_of == (warps.min() if self.launch.order == "forward" else warps.max())
            pc = int(self.pcs[runnable].min())
            active = runnable & (self.pcs == pc)
            others = self.pcs[runnable & ~active]
            self._advance(pc, active, int(others.min()) if others.size else sys.maxsize)

    def activate(self, mask: np.ndarray) -> None:
        """Sets the lanes that run the next instruction."""
        self.mask = mask
        self.full = bool((mask == self.alive).all())
        self.lanes = self.everyone if mask.all() else np.flatnonzero(mask)

    def _advance(self, pc: int, active: np.ndarray, stop: int) -> None:
        """Runs some lanes at one place until they reach `stop`, where others are, wait or part."""
        steps, report = self.launch.steps, self.launch.report
        self.activate(active)
        while pc < stop:
            step = steps[pc]
            self.at = pc
            self._steps_run += 1
            if self._steps_run > self.launch.limit:
                self.fail(f"still running after {self.launch.limit} steps")
            guard = step.instruction.guard
            taken = active
            if guard is not None:
                if not self.whole[guard.slot]:
                    self.require_known(guard)
                value = self.registers[guard.slot]
                taken = active & (~value if guard.negated else value)
            if report:
                report.count(pc, active)
            if step.flow:
                pc = self._flow(step, pc, active, taken)
                if pc < 0:
                    return
            else:
                self._run_plain(step.run, active, taken)
                pc += 1
        self.pcs[active] = pc

    def _run_plain(self, run: Callable, active: np.ndarray, taken: np.ndarray) -> None:
        if taken is active or (taken == active).all():
            run(self)
        elif taken.any():
            self.activate(taken)
            run(self)
            self.activate(active)

    def _flow(self, step: Step, pc: int, active: np.ndarray, taken: np.ndarray) -> int:
        """Returns where the active lanes go on, or -1 where they parted or wait."""
        every = taken is active or bool((taken == active).all())
        if not every and not taken.any():
            return pc + 1
        if step.flow == "bra":
            if every:
                return step.run
            self.pcs[active] = pc + 1
            self.pcs[taken] = step.run
            return -1
        if step.flow == "exit":
            self.pcs[active] = pc + 1
            self.alive = self.alive & ~taken
            return -1
        if every and self.full and step.flow == "bar":
            return pc + 1
        if step.flow == "warp":
            members = np.broadcast_to(step.run(self), self.shape)
            if every and not (members & lanes_as_bits(self.alive & ~active))[active].any():
                return pc + 1
            self.members[taken] = members[taken]
        self.waiting[taken] = 1 if step.flow == "bar" else 2
        self.pcs[active] = pc + 1
        return -1

    def _release(self) -> None:
        """Lets go the barriers that all have reached, when no lane can run."""
        if (self.waiting == 2).any():
            self._release_warps()
            return
        for block in range(self.blocks):
            part = slice(block * self.width, (block + 1) * self.width)
            live = self.alive[part]
            places = np.unique(self.pcs[part][live])
            if places.size > 1:
                # The barrier of the lane that is furthest behind is the one that was not reached by all.
                self.at, self.mask = int(places[0]) - 1, self.alive
                self.fail(
                    "barrier in divergent code: other threads of the block wait at another one",
                    self._at(places[0], part),
                )
        self.waiting[:] = 0

    def _at(self, place: int, part: slice) -> int:
        return part.start + int(np.argmax(self.alive[part] & (self.pcs[part] == place)))

    def _release_warps(self) -> None:
        waits = self.alive & (self.waiting == 2)
        for lane in np.flatnonzero(waits):
            warp = slice(lane // WARP * WARP, lane // WARP * WARP + WARP)
            wanted = self.alive[warp] & bits_to_lanes(int(self.members[lane]))
            together = waits[warp] & (self.pcs[warp] == self.pcs[lane])
            if (wanted & ~together).any():
                self.at, self.mask = int(self.pcs[lane]) - 1, waits
                self.fail("bar.warp.sync is not reached by all lanes of its mask", lane)
        self.waiting[waits] = 0

    # Memory.

    def places(
        self, space: str, addresses: np.ndarray, lanes: np.ndarray
    ) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Splits addresses by the memory they are in: (its name, offsets in it, positions among `lanes`)."""
        if space == "global":
            yield space, addresses - GLOBAL_START, slice(None)
        elif space:
            yield space, addresses, slice(None)
        else:
            rest = np.ones(lanes.size, bool)
            for name, start in WINDOWS.items():
                inside = (addresses >= start) & (addresses < start + WINDOW_BYTES)
                rest &= ~inside
                if inside.any():
                    yield name, addresses[inside] - start, inside
            if rest.any():
                yield "global", addresses[rest] - GLOBAL_START, rest

    def check(self, name: str, offsets: np.ndarray, lanes: np.ndarray, width: int, write: bool = False) -> np.ndarray:
        """Fails on a bad access of `width` bytes; returns byte offsets into the memory's image."""
        if width > 1 and (offsets & (width - 1)).any():
            self.fail(f"unaligned {name} access of {width} bytes", lanes[np.argmax(offsets & (width - 1) != 0)])
        if self.launch.report:
            self.launch.report.access(self.at, name, offsets, lanes, width)
        if name == "global":
            problem = self.launch.buffers.check(offsets, width, write)
            if problem:
                self.fail(problem[0], lanes[problem[1]])
            return offsets
        memory = self.scratch[name]
        bad = (offsets < 0) | (offsets + width > memory.size)
        if bad.any():
            worst = int(np.argmax(bad))
            self.fail(f"{name} access out of bounds (byte {int(offsets[worst])} of {memory.size})", lanes[worst])
        return offsets + self._owner[name][lanes] * memory.stride

    def load(self, space: str, addresses: np.ndarray, size: int, count: int = 1, lanes=None) -> list[np.ndarray]:
        """Loads `count` elements of `size` bytes a lane; each as a vector over all lanes, 0 where none is active."""
        lanes = self.lanes if lanes is None else lanes
        results = [np.zeros(self.shape, f"u{size}") for _ in range(count)]
        for name, offsets, part in self.places(space, addresses[lanes], lanes):
            where = lanes[part]
            first = self.check(name, offsets, where, size * count) // size
            memory = self.launch.buffers if name == "global" else self.scratch[name]
            for i, result in enumerate(results):
                if name == "shared" and not (known := memory.known(first + i, size)).all():
                    self.fail("read of shared memory that was never written", where[np.argmin(known)])
                result[where] = memory.views[size][first + i]
        return results

    def store(self, space: str, addresses: np.ndarray, values: list[np.ndarray], size: int) -> None:
        """Stores elements of `size` bytes for the active lanes; of lanes at one address the last one stays."""
        for name, offsets, part in self.places(space, addresses[self.lanes], self.lanes):
            where = self.lanes[part]
            if name == "param":
                self.fail("store into a parameter")
            first = self.check(name, offsets, where, size * len(values), True) // size
            memory = self.launch.buffers if name == "global" else self.scratch[name]
            for i, value in enumerate(values):
                memory.views[size][first + i] = value[where] if value.shape else value
                if name != "global":
                    memory.written[size][first + i] = int.from_bytes(b"\1" * size, "little")


def lanes_as_bits(mask: np.ndarray) -> np.ndarray:
    """Each warp's lanes as a mask, given to each of them."""
    bits = np.packbits(mask.reshape(-1, WARP), axis=1, bitorder="little").view(np.uint32)
    return np.repeat(bits[:, 0], WARP)


def bits_to_lanes(members: int) -> np.ndarray:
    """A warp's mask as booleans."""
    return (members >> np.arange(WARP)) & 1 == 1
