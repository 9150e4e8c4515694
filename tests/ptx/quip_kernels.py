# SPDX-License-Identifier: Apache-2.0
"""The kernels of kernels/cuda as nvcc emits them, and launches of them in the interpreter as kernels.h describes them.

What the launches need is written here once more, in NumPy, from the comments of layout.h and decode_gemm.h: the order
of activations, shared memory, structs. So a kernel, its bindings and this file must agree.
"""

import gc
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx.compilers import KERNELS, NO_NVCC, NVCC
from ptx.interpreter import Pointer, Program, Report, Struct
from quip_vllm.formats.methods import Code, Method
from random_layers import random_layer

from quip_vllm.ops import LinearSpec, cuda_layout
from quip_vllm.ops.reference import decode

FLAGS = ("-ptx", "-std=c++20", "-O3", "--expt-relaxed-constexpr")
CACHE = KERNELS.parents[1] / "build" / "ptx"
CHUNK, TILE, LANES, WARPS_K, ROW_TILES, ROW_BLOCK, SPARE = 64, 16, 32, 2, 2, 64, 8
ONE_MAD_UNIT = 147.800537109375
Edits = Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Kind:
    """A code of the kernels.

    Attributes:
        file: The .cu file.
        template: The C++ template's name and the numbers behind bits.
        code: The checkpoint's code, None for the lattice.
        order: That of the activations.
        table: Bytes of a table and of all its copies.
    """

    file: str
    template: str
    numbers: tuple[int, ...]
    code: Code | None
    order: str = "trellis"
    table: int = 0

    @property
    def is_large(self) -> bool:
        """Whether each lane has a copy of the tables."""
        return 32 in self.numbers

    def table_bytes(self, bits: int) -> int:
        """Shared memory of the tables."""
        return self.table * (3 if bits == 3 else 2) if self.code is None else self.table

    def kernel(self, bits: int, column_tiles: int, depth: int) -> str:
        """A part of the mangled name that no other kernel has."""
        numbers = "".join(f"Li{number}E" for number in (bits, *self.numbers))
        return f"kernelINS_{len(self.template)}{self.template}I{numbers}EELi{column_tiles}ELi{depth}EE"


KINDS = {
    "1mad": Kind("gemm_1mad", "OneMad", (), Code.ONE_MAD),
    "1mad_int8": Kind("gemm_1mad_bytes", "OneMadBytes", (), Code.ONE_MAD, "bytes"),
    "3inst": Kind("gemm_3inst", "ThreeInst", (), Code.THREE_INST),
    "hyb": Kind("gemm_hyb", "HybTable", (512, 16), Code.HYB, table=512 * 16 * 4),
    "hyb_large": Kind("gemm_hyb", "HybTable", (1024, 32), Code.HYB, table=1024 * 32 * 4),
    "lut": Kind("gemm_lut", "Lut", (), Code.LUT),
    "e8p": Kind("gemm_e8p", "LatticeTables", (16,), None, "lattice", 256 * 16 * 4),
    "e8p_large": Kind("gemm_e8p", "LatticeTables", (32,), None, "lattice", 256 * 32 * 4),
}
BITS = {name: range(1, 9) for name in KINDS}
BITS |= {"hyb": range(1, 5), "hyb_large": range(1, 5), "e8p": range(2, 5), "e8p_large": range(2, 5)}
EVERY = [(name, bits) for name in KINDS for bits in BITS[name]]


# Compiling.


@lru_cache
def _files() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(KERNELS.iterdir())}


@lru_cache
def _version() -> str:
    return subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout


def _with_headers(name: str, text: str) -> dict[str, str]:
    """A file and what it includes of kernels/cuda."""
    found = {name: text}
    for header in re.findall(r'#include "(\w+\.h)"', text):
        found |= _with_headers(header, _files()[header])
    return found


def kernel_ptx(name: str, source: str | None = None, edits: Edits | None = None, arch: str = "sm_80") -> str:
    """The PTX of kernels/cuda/`name`.cu, kept in build/ptx while no source changes; skips the test without nvcc.

    Args:
        name: The file; with `source`, any name.
        source: The C++ text to compile in its place.
        edits: File of kernels/cuda -> (text that stands there once, another one), for planted mistakes.
        arch: The GPU that it is for; the interpreter knows sm_80.
    """
    if NVCC is None:
        pytest.skip(NO_NVCC)
    files = _with_headers(f"{name}.cu", _files()[f"{name}.cu"] if source is None else source)
    for file, (old, new) in (edits or {}).items():
        assert files[file].count(old) == 1, f"{old} stands {files[file].count(old)} times in {file}"
        files[file] = files[file].replace(old, new)
    key = hashlib.sha256(repr((_version(), FLAGS, arch, sorted(files.items()))).encode()).hexdigest()[:16]
    kept = CACHE / f"{name}.{arch}.{key}.ptx"
    if not kept.exists():
        _compile(name, files, arch, kept)
    return kept.read_text(encoding="utf-8")


def _compile(name: str, files: Mapping[str, str], arch: str, kept: Path) -> None:
    """Compiles a copy of the files, and forgets what was made of earlier ones."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        for file, text in files.items():
            Path(folder, file).write_text(text, encoding="utf-8")
        command = [NVCC, *FLAGS, f"-arch={arch}", f"{name}.cu", "-o", "out"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        for old in CACHE.glob(f"{name}.{arch}.*.ptx"):
            old.unlink(missing_ok=True)
        Path(folder, "out").replace(kept)


@lru_cache
def kernel_program(name: str) -> Program:
    """The interpreter's program of kernels/cuda/`name`.cu."""
    text = kernel_ptx(name)
    gc.disable()
    program = Program(text)
    gc.freeze()  # a million objects that stay: looking through them again and again takes longer than all launches
    gc.enable()
    return program


def one_kernel(text: str, kernel: str) -> str:
    """The PTX with one kernel only."""
    head, *entries = re.split(r"(?=^\.visible \.entry)", text, flags=re.M)
    (found,) = [entry for entry in entries if kernel in entry.split("(")[0]]
    return head + found


# Activations.


def _columns(order: str) -> np.ndarray:
    """The column in its chunk of what lies at [block of a row, t, place]: two bytes a place, or four copies of one."""
    if order == "trellis":  # 16 bytes = multiplication, register, column c + 2 mul + 8 reg + 0, 1
        half, u, v, mul, reg, one = np.ogrid[:2, :2, :2, :2, :2, :2]  # t = 2 u + v, c = 16 u + 4 v
        return (32 * half + 16 * u + 4 * v + 2 * mul + 8 * reg + one).reshape(2, 4, 8)
    if order == "lattice":  # 16 bytes = columns 8 t .. 8 t + 7
        half, t, i = np.ogrid[:2, :4, :8]
        return 32 * half + 8 * t + i
    half, pair, u, v, one, reg = np.ogrid[:2, :2, :2, :2, :2, :2]  # 16 bytes = one, register, the column four times
    return (32 * half + 16 * u + 4 * v + 2 * pair + 8 * reg + one).reshape(4, 4, 4)


def row_bytes(order: str) -> int:
    """Bytes of a row of a chunk."""
    return 256 if order == "bytes" else 128


def arrange(x: np.ndarray, order: str) -> np.ndarray:
    """float16 or int8 [m, k] to the bytes that the kernels read (layout.h), without spare chunks."""
    m, k = x.shape
    chunks = np.pad(x, ((0, 0), (0, -k % CHUNK))).reshape(m, -1, CHUNK)
    if order == "rows":
        return chunks.ravel().view(np.uint8)
    units = chunks[:, :, _columns(order)]  # row, chunk, block, t, place
    if order == "bytes":
        units = np.repeat(units, 4, axis=-1)
    block = np.arange(units.shape[2])
    for row in range(m):
        units[row] = units[row][:, block ^ (row & 1)].copy()
    parts = [units[start : start + ROW_BLOCK].swapaxes(0, 1).ravel() for start in range(0, m, ROW_BLOCK)]
    return np.concatenate(parts).view(np.uint8)


def arranged_bytes(m: int, k: int, order: str) -> int:
    """The length of `arrange`'s result."""
    return m * -(-k // CHUNK) * row_bytes(order)


def arranged_index(m: int, k: int, order: str) -> np.ndarray:
    """The byte at which each element of [m, k] begins."""
    row, column = np.indices((m, k))
    chunks = -(-k // CHUNK)
    if order == "rows":
        return 2 * (row * chunks * CHUNK + column)
    per = 1 if order == "bytes" else 2
    blocks = row_bytes(order) // 64
    where = np.empty((blocks, 4, 16 // (4 if order == "bytes" else 2)), np.int64)
    inside = np.empty((2, CHUNK), np.int64)  # row parity, column
    for parity in range(2):
        b, t, place = np.indices(where.shape)
        inside[parity, _columns(order)] = (b ^ parity) * 64 + t * 16 + place * (4 * per if order == "bytes" else per)
    rows = np.minimum(ROW_BLOCK, m - row // ROW_BLOCK * ROW_BLOCK)
    at = row // ROW_BLOCK * ROW_BLOCK * chunks + column // CHUNK * rows + row % ROW_BLOCK
    return at * row_bytes(order) + inside[row & 1, column % CHUNK]


# The matrix product.


@dataclass(frozen=True)
class Layer:
    """A random layer as the kernels take it; weight is float64 [n, k] in the numbers that the tensor cores sum."""

    kind: Kind
    bits: int
    spec: LinearSpec
    tensors: dict
    packed: np.ndarray
    table: np.ndarray | None
    weight: np.ndarray


def offset_of(name: str, bits: int) -> float:
    """What the kernel's weights are too large by."""
    if name in ("1mad", "1mad_int8"):
        return 510.0 + (1024 if name == "1mad" else 0)
    if KINDS[name].code is not None:
        return 0.0
    return 36 + {2: 0, 3: 36.25 / 2.04, 4: 36 / 3.45}[bits]


@lru_cache
def layer(name: str, bits: int, sizes: tuple[int, ...], k: int, block: int | None = None) -> Layer:
    """A layer of `sizes` outputs and `k` inputs."""
    kind = KINDS[name]
    spec = LinearSpec(Method.QUIP_SHARP if kind.code is None else Method.QTIP, kind.code, bits, k, sizes, block)
    tensors = random_layer(spec, seed=bits)
    table = cuda_layout.table(spec, tensors)
    weight = decode(spec, tensors).double().numpy()
    if kind.code is Code.ONE_MAD:
        weight = np.rint(weight * ONE_MAD_UNIT)
    return Layer(
        kind,
        bits,
        spec,
        tensors,
        cuda_layout.packed_words(spec, tensors).numpy(),
        None if table is None else table.numpy(),
        weight + offset_of(name, bits),
    )


@dataclass(frozen=True)
class ThreadBlock:
    """Rows of x, and the numbers of struct Gemm by which a product is cut; without split_chunks k stays whole."""

    m: int
    warps_n: int
    depth: int
    split_chunks: int = 0


def column_tiles_of(m: int) -> int:
    """The compiled number of column tiles for m rows."""
    return 1 if m <= 8 else 2 if m <= 16 else 8


def variant(name: str, m: int) -> Kind:
    """The kernels that multiply m rows: more than 16 leave no room for large tables."""
    return KINDS[name.removesuffix("_large")] if m > 16 else KINDS[name]


def shared_bytes(kind: Kind, bits: int, m: int, warps_n: int, depth: int) -> int:
    """Shared memory of a thread block of decode_gemm."""
    rows, column_tiles, table = min(m, ROW_BLOCK), column_tiles_of(m), kind.table_bytes(bits)
    words = warps_n * ROW_TILES * bits * LANES * 4  # of a chunk
    stage = WARPS_K * depth * (words + rows * row_bytes(kind.order))
    stages = 2 if column_tiles == 8 or table > 100 * 1024 else 3
    exchange = 8 * column_tiles * (warps_n * ROW_TILES * TILE + 4) * 4
    return table + max(stages * stage, exchange)


def activations(kind: Kind, m: int, k: int, seed: int = 0) -> np.ndarray:
    """Random x [m, k], float16 or int8."""
    random = np.random.default_rng(seed + m)
    if kind.order == "bytes":
        return random.integers(-127, 128, (m, k), np.int8)
    return random.standard_normal((m, k)).astype(np.float16)


def spare(arranged: np.ndarray, m: int, order: str) -> np.ndarray:
    """Arranged activations and the chunks behind them, which are copied but must not be used: NaNs, or 127s."""
    return np.concatenate([arranged, np.full(SPARE * min(m, ROW_BLOCK) * row_bytes(order), 0x7F, np.uint8)])


def segments(made: Layer, warps_n: int) -> tuple[np.ndarray, int]:
    """Struct Gemm's segments and the blocks of outputs: HYB's projections have tables of their own."""
    sizes = made.spec.output_sizes if made.kind.code is Code.HYB else (sum(made.spec.output_sizes),)
    found, block, tile = [], 0, 0
    for size in sizes:
        end = tile + -(-size // TILE)
        found.append((block, tile, end))
        block += -(-(end - tile) // (ROW_TILES * warps_n))
        tile = end
    return np.array(found, np.int32), block


# What sums become.


@dataclass(frozen=True)
class Rotation:
    """H_q kron S_p within runs of q * p; base is H_q, or its transpose on the input side."""

    q: int
    p: int
    base: torch.Tensor

    @property
    def growth(self) -> int:
        """log2 of q p, rounded up: by how much sums may be larger than what is summed."""
        return (self.q * self.p - 1).bit_length()

    def struct(self) -> Struct:
        """struct Rotation; base is not read for q = 1."""
        base = None if self.q == 1 else Pointer(self.base.numpy().copy())
        return Struct(base, np.int32(self.q), np.int32(self.p))


TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ORDERS = {"trellis": 0, "lattice": 1, "bytes": 2, "rows": 3}


def numpy_bits(x: torch.Tensor) -> np.ndarray:
    """A tensor's memory, for dtypes that NumPy lacks."""
    return x.contiguous().view(torch.int32 if x.dtype is torch.float32 else torch.int16).numpy().copy()


@dataclass(frozen=True)
class Output:
    """What sums become outputs by: see struct Output; unit is the code's, without the norm of a rotation."""

    rotations: tuple[Rotation, ...]
    sizes: tuple[int, ...]
    sv: torch.Tensor
    dtype: torch.dtype
    unit: float
    offset: float
    bias: torch.Tensor | None = None

    def units(self) -> list[np.float32]:
        """The unit of each projection, with its rotation's norm."""
        return [np.float32(self.unit) / np.sqrt(np.float32(one.q * one.p)) for one in self.rotations]

    def struct(self, y: np.ndarray, scales: np.ndarray, totals: np.ndarray) -> Struct:
        bias = None if self.bias is None else Pointer(numpy_bits(self.bias))
        types = [TYPES[self.dtype if self.bias is None else self.bias.dtype], TYPES[self.dtype], sum(self.sizes)]
        of_rows = Pointer(scales), Pointer(totals), np.int32(totals.shape[1])
        sv = Pointer(self.sv.float().numpy().copy())
        return Struct(np.float32(self.offset), *of_rows, sv, bias, Pointer(y), np.array(types, np.int32))

    def empty(self, m: int) -> np.ndarray:
        """y [m, n] before it is written."""
        return np.full((m, sum(self.sizes)), -1, np.int32 if self.dtype is torch.float32 else np.int16)


def multiply(
    name: str,
    made: Layer,
    arranged: np.ndarray,
    block: ThreadBlock,
    program: Program | None = None,
    finish: tuple[Output, np.ndarray, np.ndarray] | None = None,
    **how,
) -> tuple[np.ndarray, Report]:
    """Runs decode_gemm_kernel.

    Args:
        name: Of the code.
        made: The layer.
        arranged: x in the order of layout.h with its spare chunks.
        block: How it is cut.
        program: Other PTX with the kernel in it.
        finish: What the epilogue applies, and the scales and totals of rows. Without it, there is no rotation in it.
        how: Options of Program.run.

    Returns:
        partial, [splits, m, 16 * tiles] of float32, or of int32 for int8 activations, and what was counted; with
        `finish` y's bits [m, n] in place of partial.
    """
    m, warps_n, depth = block.m, block.warps_n, block.depth
    kind, tiles, chunks = variant(name, m), -(-made.spec.out_features // TILE), -(-made.spec.in_features // CHUNK)
    split_chunks = block.split_chunks or chunks
    splits = -(-chunks // split_chunks)
    partial = np.full((splits, m, TILE * tiles), np.nan, np.float32)
    width, unit = 0, np.float32(0)
    rest = Struct(np.float32(0), *[None] * 2, np.int32(0), *[None] * 3, np.zeros(3, np.int32))
    if finish:
        out, *of_rows = finish
        partial = out.empty(m)
        width, unit, rest = out.rotations[0].p, out.units()[0], out.struct(partial, *of_rows)
    parts, blocks = segments(made, warps_n)
    filled = np.zeros((16, 3), np.int32)
    filled[: len(parts)] = parts
    numbers = np.array([m, tiles, chunks, splits, split_chunks, warps_n, depth, len(parts)], np.int32)
    stride = np.int64(2048 if kind.code is Code.HYB else 0)
    table = None if made.table is None else Pointer(made.table)
    sums = None if finish else Pointer(partial)
    gemm = Struct(
        *(Pointer(made.packed), Pointer(arranged), table, stride, sums, numbers, filled, np.int32(width), unit, rest)
    )
    report = (program or kernel_program(kind.file)).run(
        kind.kernel(made.bits, column_tiles_of(m), depth),
        (blocks, splits, -(-m // ROW_BLOCK)),
        warps_n * WARPS_K * LANES,
        [gemm],
        shared_bytes=shared_bytes(kind, made.bits, m, warps_n, depth),
        **how,
    )
    return partial.view(np.int32) if kind.order == "bytes" and not finish else partial, report


def decode_rows(name: str, made: Layer, ids: np.ndarray, **how) -> tuple[np.ndarray, np.ndarray, Report]:
    """Runs decode_rows_kernel: rows ids of the weight, float32 [m, k], their scales, and what was counted."""
    n, k = made.spec.out_features, made.spec.in_features
    out, scales = np.full((len(ids), k), np.nan, np.float32), np.full(len(ids), 7, np.float32)
    table = None if made.table is None else Pointer(made.table)
    sv = made.tensors["sv"].float().numpy().copy()
    argument = Struct(
        *(Pointer(ids), Pointer(made.packed), table, Pointer(sv), np.int64(n)),
        *(np.array([len(ids), k, -(-k // CHUNK)], np.int32), np.float32(offset_of(name, made.bits))),
        *(Pointer(out), Pointer(scales)),
    )
    return out, scales, _decode("rows", made, len(ids), argument, **how)


def decode_dense(name: str, made: Layer, **how) -> tuple[np.ndarray, Report]:
    """Runs decode_dense_kernel: the weight, float16 [16 * tiles, 64 * chunks], and what was counted."""
    kind, tiles, chunks = KINDS[name], -(-made.spec.out_features // TILE), -(-made.spec.in_features // CHUNK)
    out = np.full((tiles * TILE, chunks * CHUNK), np.nan, np.float16)
    table = None if made.table is None else Pointer(made.table)
    parts, _ = segments(made, 1)
    filled = np.zeros((16, 3), np.int32)
    filled[: len(parts)] = parts
    argument = Struct(
        *(Pointer(made.packed), table, np.int64(2048 if kind.code is Code.HYB else 0)),
        *(np.array([tiles, chunks], np.int32), np.float32(offset_of(name, made.bits)), Pointer(out)),
        *(np.int32(len(parts)), filled),
    )
    return out, _decode("dense", made, tiles, argument, **how)


def _decode(what: str, made: Layer, blocks: int, argument: Struct, **how) -> Report:
    """Runs a kernel of decode_rows.h."""
    kind = made.kind
    numbers = "".join(f"Li{number}E" for number in (made.bits, *kind.numbers))
    kernel = f"decode_{what}_kernelINS_{len(kind.template)}{kind.template}I{numbers}EEE"
    shared = kind.table_bytes(made.bits) + 16
    return kernel_program(kind.file).run(kernel, blocks, 8 * LANES, [argument], shared_bytes=shared, **how)


# The rotations.


SLICES = 8
"""kSlices: thread blocks that a row may be cut in, where it divides p."""


def threads_of(count: int) -> int:
    """Threads of a block whose row has `count` elements: eight for each."""
    return min(max(-(-(count // 8) // LANES) * LANES, 64), 512)


def rotate_in(
    x: torch.Tensor,
    su: torch.Tensor,
    rotation: Rotation,
    order: str,
    slices: int = 1,
    in_memory: bool = False,
    **how,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Report]:
    """Runs rotate_in_kernel.

    Args:
        x, su: [m, k] and [k].
        rotation: That of k.
        order: Of the activations.
        slices: Blocks that a row is cut in.
        in_memory: Whether rows are worked on in global memory.
        how: Options of Program.run.

    Returns:
        Activations with spare chunks, their scales, their sums [m, slices], and what was counted.
    """
    (m, k), chunks = x.shape, -(-x.shape[1] // CHUNK)
    work = (2 * k if rotation.q > 1 else k) // slices
    out = np.full((m * chunks + SPARE * min(m, ROW_BLOCK)) * row_bytes(order), 0x7F, np.uint8)
    scales, totals = np.full(m, np.nan, np.float32), np.full((m, slices), -1, np.int64)
    scratch = Pointer(np.full((m, slices, work), np.nan, np.float32)) if in_memory else None
    argument = Struct(
        *(Pointer(numpy_bits(x)), np.int32(TYPES[x.dtype]), Pointer(su.float().numpy().copy()), rotation.struct()),
        *(np.array([m, k, chunks, ORDERS[order], slices], np.int32), np.bool_(False), np.int32(rotation.growth)),
        *(Pointer(out), Pointer(scales), Pointer(totals), scratch, np.int32(work)),
    )
    shared = 4 * (2 * LANES + (0 if in_memory else work))
    program = kernel_program("rotation")
    report = program.run("rotate_in_kernel", (m, slices), threads_of(k), [argument], shared_bytes=shared, **how)
    return out, scales, totals, report


def rotate_out(
    partial: np.ndarray,
    scales: np.ndarray,
    totals: np.ndarray,
    out: Output,
    slices: int = 1,
    in_memory: bool = False,
    **how,
) -> tuple[torch.Tensor, Report]:
    """Runs rotate_out_kernel.

    Args:
        partial: [splits, m, stride], float32 or int32.
        scales: [m].
        totals: int64 [m, slices of rotate_in], in units of 2^-24 where partial is float32.
        out: The rest.
        slices: Blocks that a row is cut in.
        in_memory: Whether rows are worked on in global memory.
        how: Options of Program.run.

    Returns:
        y [m, n], and what was counted.
    """
    (splits, m, stride), count, work = partial.shape, len(out.sizes), max(out.sizes) // slices
    y = out.empty(m)
    scratch = Pointer(np.full((m, count, slices, work), np.nan, np.float32)) if in_memory else None
    starts = np.cumsum([0, *out.sizes])[:-1]
    parts = [
        Struct(rotation.struct(), np.array([start, size], np.int32), unit)
        for rotation, start, size, unit in zip(out.rotations, starts, out.sizes, out.units(), strict=True)
    ]
    parts += [Struct(None, np.zeros(5, np.int32))] * (16 - count)
    argument = Struct(
        *(Pointer(partial), np.array([splits, m, stride], np.int32), np.int64(m * stride)),
        *(np.bool_(partial.dtype == np.int32), out.struct(y, scales, totals), np.array([slices, count], np.int32)),
        *(*parts, scratch, np.int32(work)),
    )
    program, threads = kernel_program("rotation"), threads_of(max(out.sizes))
    shared = 16 if in_memory else 4 * work
    report = program.run("rotate_out_kernel", (count, m, slices), threads, [argument], shared_bytes=shared, **how)
    return torch.from_numpy(y).view(out.dtype), report
