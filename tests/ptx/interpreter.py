# SPDX-License-Identifier: Apache-2.0
"""Runs PTX in NumPy, to prove on a machine without a GPU what nvcc and Triton made of a kernel.

It is not a model of time, nor of what ptxas or the hardware do below PTX: tensor-core sums are exact and rounded once,
approximations are better than the hardware's, and threads of a block run in step, which hides most races. It does
check each access to memory, each read of a register, barriers and warp-wide instructions. Threads that have ended do
not count at barriers, as on the hardware.

    program = Program(ptx_text)
    report = program.run("kernel", grid=4, block=128, arguments=[x, out, np.int32(7)], shared_bytes=4096)
"""

import math
from functools import lru_cache

import numpy as np
from ptx import arithmetic, bits, moves, warps  # noqa: F401  (they fill the table of opcodes)
from ptx.code import Code, build
from ptx.machine import Launch, Machine, Step
from ptx.memory import Buffers, Pointer, Struct, pack
from ptx.parser import Instruction, Kernel, Module, PtxError, Symbol, parse
from ptx.report import Report, Site

__all__ = ["Pointer", "Program", "PtxError", "Report", "Site", "Struct"]

# Blocks that run together: longer vectors cost less a lane.
_LANES = 4096


class Program:
    """A parsed PTX module; kernels are compiled on their first run and kept.

    Args:
        text: The text of a .ptx file.
    """

    def __init__(self, text: str) -> None:
        self._module: Module = _parse_cached(text)
        self._compiled: dict[str, list[Step]] = {}

    @property
    def kernels(self) -> list[str]:
        """The names of the kernels."""
        return list(self._module.kernels)

    def run(
        self,
        kernel: str,
        grid,
        block,
        arguments,
        shared_bytes: int = 0,
        measure: bool = False,
        order: str = "together",
        eager: bool = False,
        limit: int = 10_000_000,
    ) -> Report:
        """Runs a kernel over its grid.

        Args:
            kernel: Its (mangled) name, or a part of it that only one has.
            grid: Blocks, as an int or up to three.
            block: Threads of a block, likewise.
            arguments: One for each parameter: a NumPy array (a buffer, written in place; read-only ones must not be
                stored to), a NumPy scalar, an int, None for a null pointer, Pointer, Struct or bytes.
            shared_bytes: Dynamic shared memory.
            measure: Whether to count instructions, sectors and wavefronts; it takes longer.
            order: How the warps of a block go: "together" is fastest; "forward" and "backward" run one warp after the
                other, each from barrier to barrier, which shows many missing barriers.
            eager: Whether cp.async copies at once, not when it is waited for: with an order other than "together" it
                shows copies into what other warps still read.
            limit: Steps after which the kernel counts as hanging.

        Returns:
            What was counted.

        Raises:
            PtxError: The kernel did something wrong or something unknown. Buffers then hold what was stored so far.
        """
        if order not in ("together", "forward", "backward"):
            raise ValueError(f"order {order!r}")
        found = self._find(kernel)
        report = Report(found.instructions if measure else ())
        buffers, symbols = Buffers(), {}
        parameters = _parameters(found, arguments, buffers, symbols)
        shared = self._place_variables(found, buffers, symbols, shared_bytes)
        local = _place([v for v in found.variables if v.space == "local"], symbols)
        if found.name not in self._compiled:
            self._compiled[found.name] = _compile(found)
        grid, block = _three(grid), _three(block)
        if math.prod(block) > (found.max_threads or 1024):
            raise PtxError(f"a block of {math.prod(block)} threads: {found.name} takes {found.max_threads or 1024}")
        launch = Launch(
            steps=self._compiled[found.name],
            registers=found.registers,
            buffers=buffers,
            symbols=symbols,
            parameters=parameters,
            shared_bytes=shared,
            local_bytes=local,
            grid=grid,
            block=block,
            report=report if measure else None,
            limit=limit,
            order=order,
            eager=eager,
        )
        buffers.load()
        try:
            with np.errstate(all="ignore"):
                _run_blocks(launch)
        finally:
            buffers.store()
        return report

    def _find(self, name: str) -> Kernel:
        if name in self._module.kernels:
            return self._module.kernels[name]
        found = [k for k in self._module.kernels if name in k]
        if len(found) != 1:
            raise PtxError(f"{len(found)} kernels are named like {name}: {self.kernels}")
        return self._module.kernels[found[0]]

    def _place_variables(self, kernel: Kernel, buffers: Buffers, symbols: dict, dynamic: int) -> int:
        """Gives variables their addresses; returns the bytes of shared memory."""
        variables = self._module.variables + kernel.variables
        for each in variables:
            if each.space in ("global", "const"):
                data = np.frombuffer(each.data or bytes(each.size), np.uint8)
                symbols[each.name] = buffers.add(data.copy() if each.space == "global" else data)
        used = [v for v in variables if v.space == "shared"]
        static = _place([v for v in used if v.size], symbols)
        for each in used:
            if not each.size:
                symbols[each.name] = -(-static // 16) * 16
        return -(-static // 16) * 16 + dynamic if dynamic else static


@lru_cache(maxsize=64)
def _parse_cached(text: str) -> Module:
    return parse(text)


def _three(size) -> tuple[int, int, int]:
    size = (size,) if isinstance(size, (int, np.integer)) else tuple(size)
    return (*map(int, size), 1, 1, 1)[:3]


def _place(variables: list, symbols: dict[str, int]) -> int:
    end = 0
    for each in variables:
        end = -(-end // each.align) * each.align
        symbols[each.name] = end
        end += each.size
    return end


def _parameters(kernel: Kernel, arguments, buffers: Buffers, symbols: dict[str, int]) -> bytes:
    if len(arguments) != len(kernel.parameters):
        raise PtxError(f"{kernel.name} takes {len(kernel.parameters)} arguments, {len(arguments)} were given")
    data = b""
    for parameter, argument in zip(kernel.parameters, arguments, strict=True):
        part = pack(argument, parameter.size, buffers)
        if len(part) != parameter.size:
            raise PtxError(f"{parameter.name} has {parameter.size} bytes, the argument {len(part)}")
        symbols[parameter.name] = parameter.offset
        data = data.ljust(parameter.offset, b"\0") + part
    return data


def _compile(kernel: Kernel) -> list[Step]:
    steps = [_step(instruction, kernel) for instruction in kernel.instructions]
    # A label may stand behind the last instruction.
    return [*steps, Step(Instruction("exit", (), None, 0, "end of the kernel"), None, "exit")]


def _step(instruction: Instruction, kernel: Kernel) -> Step:
    name, rest = instruction.parts[0], instruction.parts[1:]
    if name == "bra":
        (target,) = instruction.operands
        if not isinstance(target, Symbol) or target.name not in kernel.labels:
            raise PtxError(f"unknown label; line {instruction.line}: {instruction.text}")
        return Step(instruction, kernel.labels[target.name], "bra")
    if name in ("ret", "exit"):
        return Step(instruction, None, "exit")
    if rest[:2] == ["warp", "sync"] and name == "bar":
        return Step(instruction, Code().reader(instruction.operands[0], "u32"), "warp")
    if name in ("bar", "barrier") and rest in (
        ["sync"],
        ["sync", "aligned"],
        ["cta", "sync"],
        ["cta", "sync", "aligned"],
    ):
        if len(instruction.operands) > 1:
            raise PtxError(f"barrier for a part of the block; line {instruction.line}: {instruction.text}")
        return Step(instruction, None, "bar")
    if name == "trap":
        return Step(instruction, lambda m: m.fail("trap"))
    return Step(instruction, build(instruction))


def _run_blocks(launch: Launch) -> None:
    x, y, z = launch.grid
    threads = int(np.prod(launch.block))
    together = max(1, _LANES // threads)
    for first in range(0, x * y * z, together):
        Machine(launch, first, min(together, x * y * z - first)).run()
