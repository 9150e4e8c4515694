# SPDX-License-Identifier: Apache-2.0
"""What a GPU can hold and issue: occupancy of decode_gemm's thread blocks, and the share of DRAM bandwidth that its
instructions allow. The shapes are those of kernels/cuda/decode_gemm.h."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

KIB = 1024
LANES, WARPS_K, ROW_TILES, TILE, DEEP = 32, 2, 2, 16, 4
WEIGHTS = 64
"""Of a lane in a chunk: 64 columns of two row tiles of 16."""
ENOUGH_WARPS = 8
"""Resident warps of a multiprocessor, two a scheduler: fewer leave it idle; with as many, wide and deep is better."""


@dataclass(frozen=True)
class Target:
    """A compute capability: what a multiprocessor holds, and how much shared memory it and a block have, in bytes."""

    warps: int
    blocks: int
    shared: int
    shared_block: int

    @property
    def large_tables(self) -> bool:
        """Whether the kernels for up to 16 rows have tables with a copy a lane."""
        return self.shared_block >= 160 * KIB


TARGETS = {
    80: Target(64, 32, 164 * KIB, 163 * KIB),
    86: Target(48, 16, 100 * KIB, 99 * KIB),
    89: Target(48, 24, 100 * KIB, 99 * KIB),
    90: Target(64, 32, 228 * KIB, 227 * KIB),
    100: Target(64, 32, 228 * KIB, 227 * KIB),
    120: Target(48, 24, 100 * KIB, 99 * KIB),
}
REGISTERS, REGISTER_UNIT, SHARED_UNIT, SHARED_RESERVED = 65536, 256, 128, 1024


def occupancy(target: Target, threads: int, registers: int, shared: int) -> int:
    """Thread blocks that a multiprocessor holds; 0: it does not run."""
    warps = -(-threads // LANES)
    shared = -(-(shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    if shared > target.shared_block + SHARED_RESERVED:
        return 0
    # Registers belong to the four schedulers, each with a quarter of them.
    by_registers = REGISTERS // 4 // (-(-registers * LANES // REGISTER_UNIT) * REGISTER_UNIT) * 4 // warps
    return min(target.blocks, target.warps // warps, by_registers, target.shared // shared)


KERNEL = re.compile(r"decode_gemm_kernelINS_\d+(\w+?)I((?:Li\d+E)+)EELi(\d+)ELi(\d+)EEE")


@dataclass(frozen=True)
class Kernel:
    """A decode_gemm kernel: code, bits, copies of its table (0: none in shared memory), and how it is compiled."""

    code: str
    bits: int
    column_tiles: int
    depth: int
    table_bytes: int = 0

    @property
    def format(self) -> str:
        """The code without the size of its tables."""
        return self.code.removesuffix("_large")

    @property
    def rows(self) -> int:
        """Rows of x that it is counted with: one of the first tile, all of two and of eight."""
        return {1: 1, 2: 16, 8: 64}[self.column_tiles]

    @property
    def x_bytes(self) -> int:
        """Of a row of x in a chunk."""
        return 256 if self.code == "1mad_int8" else 128

    @property
    def weights_per_multiplication(self) -> float:
        """A lane's: m16n8k16 has 16 x 16 weights, m16n8k32 16 x 8 with four bytes each; 3 and 4 bits of the lattice two
        stages."""
        one = 4 if self.code == "1mad_int8" else 8
        return one / self.column_tiles / (2 if self.format == "e8p" and self.bits > 2 else 1)

    @property
    def conflicts(self) -> float:
        """Wavefronts a weight beyond the first of each look-up: with 16 copies of a table two lanes meet in a bank."""
        if self.code == "hyb":
            return 1 / 2
        return self.bits / 8 if self.code == "e8p" else 0

    def runs_on(self, target: Target) -> bool:
        """Whether the choice of tables can lead to it."""
        if self.format not in ("hyb", "e8p"):
            return True
        large = target.large_tables and self.column_tiles <= 2
        return large == self.code.endswith("_large")

    def warps_n(self) -> tuple[int, ...]:
        """Warps side by side that a block may have."""
        return (1, 2, 4) if self.column_tiles > 2 or self.code == "lut" else (1, 2, 4, 8)

    def stage_bytes(self, warps_n: int) -> int:
        words = warps_n * ROW_TILES * self.bits * LANES * 4
        return WARPS_K * self.depth * (words + self.rows * self.x_bytes)

    def shared_bytes(self, warps_n: int) -> int:
        """Of a block."""
        stages = 2 if self.column_tiles > 2 or self.table_bytes > 100 * KIB else 3
        exchange = 8 * self.column_tiles * (warps_n * ROW_TILES * TILE + 4) * 4
        return self.table_bytes + max(stages * self.stage_bytes(warps_n), exchange)

    def copies(self, warps_n: int) -> int:
        """Asynchronous copies of a thread in a stage: of its warp's words, and of x, which all threads share."""
        words = -(-self.depth * 16 * self.bits // LANES)
        units = WARPS_K * self.depth * self.rows * self.x_bytes // 16
        return words + -(-units // (warps_n * WARPS_K * LANES))


def kernel_of(name: str) -> Kernel | None:
    """The decode_gemm kernel of a mangled name; None: another kernel.

    Raises:
        ValueError: its code is not known here.
    """
    found = KERNEL.search(name)
    if found is None:
        return None
    code, column_tiles, depth = found.group(1), int(found.group(3)), int(found.group(4))
    bits, *sizes = map(int, re.findall(r"\d+", found.group(2)))
    names = {"OneMad": "1mad", "OneMadBytes": "1mad_int8", "ThreeInst": "3inst", "Lut": "lut"}
    names |= {"HybTable": "hyb", "LatticeTables": "e8p"}
    if code not in names:
        raise ValueError(f"{code} is not a code that scripts/gpu_model.py knows: add it to kernel_of")
    table = 0
    if names[code] == "hyb":
        table = sizes[0] * sizes[1] * 4
    elif names[code] == "e8p":
        table = (3 if bits == 3 else 2) * 256 * sizes[0] * 4
    large = "_large" if sizes and sizes[-1] == LANES else ""
    return Kernel(names[code] + large, bits, column_tiles, depth, table)


@dataclass(frozen=True)
class Block:
    """How a kernel would be launched: warps side by side, and the blocks of a multiprocessor."""

    warps_n: int
    blocks: int

    @property
    def warps(self) -> int:
        """Resident in a multiprocessor."""
        return self.blocks * self.warps_n * WARPS_K


def best_block(kernel: Kernel, target: Target, registers: int) -> Block | None:
    """Of the blocks with enough resident warps, else with the most, the widest; None where none fits."""
    blocks = [
        Block(warps_n, occupancy(target, warps_n * WARPS_K * LANES, registers, kernel.shared_bytes(warps_n)))
        for warps_n in kernel.warps_n()
    ]
    fitting = (block for block in blocks if block.blocks)
    return max(fitting, key=lambda block: (min(block.warps, ENOUGH_WARPS), block.warps_n), default=None)


@dataclass(frozen=True)
class Gpu:
    """A product: clock and bandwidth are the maker's, cycles those of a multiplication with fp32 and int32 sums."""

    target: int
    multiprocessors: int
    ghz: float
    gb_per_s: int
    hmma: float
    imma: float

    def slots(self, bits: int) -> float:
        """Cycles that a scheduler has for a lane's weight while DRAM delivers it."""
        return self.multiprocessors * 4 * LANES * self.ghz * bits / (8 * self.gb_per_s)


GPUS = {
    "A100": Gpu(80, 108, 1.41, 2039, 8, 8),
    "H100": Gpu(90, 132, 1.755, 3352, 6.5, 6.5),
    "RTX 3090": Gpu(86, 82, 1.695, 936, 32, 16),
    "RTX 4090": Gpu(89, 128, 2.52, 1008, 32, 16),
    "RTX 5090": Gpu(120, 170, 2.41, 1792, 32, 16),
    "L40S": Gpu(89, 142, 2.52, 864, 16, 16),
}
"""An L40S adds up in fp32 at full speed, a GeForce at half."""


def cycles(gpu: Gpu, code: str, row: Mapping[str, float]) -> dict[str, float]:
    """Cycles a weight that each part of a scheduler's quarter takes; the slowest is the bound.

    Args:
        gpu: the product.
        code: of the kernel: int8 has another multiplication.
        row: instructions a weight by class, "instructions" in all, "alu" on that pipe, "wavefronts".
    """
    return {
        "issue": row["instructions"],
        "ALU": 2 * row["alu"],
        "IMAD": 2 * (row["imad"] + row["idp"]),
        "shared memory": 4 * row["wavefronts"],
        "tensor cores": row["mma"] * (gpu.imma if code == "1mad_int8" else gpu.hmma),
    }
