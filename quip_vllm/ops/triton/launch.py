# SPDX-License-Identifier: Apache-2.0
"""The host's side: how tensors are laid out for the kernels, and the launches of a layer or of rows of an embedding."""

import math
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from quip_vllm.formats.e8p_residual import RESIDUAL_SCALE, Lattice
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import SV
from quip_vllm.formats.tile import TILE
from quip_vllm.formats.trellis_codes import HYB, LUT, PAIRS, STORED, TABLE
from quip_vllm.ops import cuda_layout
from quip_vllm.ops.triton import rotation, shapes
from quip_vllm.ops.triton.decode_gemm import decode_gemm_kernel, decode_rows_kernel
from quip_vllm.ops.triton.routing import Routing

CHUNK, LANES = cuda_layout.CHUNK, cuda_layout.LANES
MAX_ROWS = 1024
"""Rows of x at a time, which bounds the memory of the partial sums."""

MIX_A, MIX_B, MIX_WHOLE = 32, 32, 1024
"""Runs and elements of a program of H_q, and elements where there is nothing to mix."""

_TABLE_BYTES = {"hyb": 1 << 12, "lut": 1 << 17, "table": 1 << 17, "pairs": 1 << 18}
"""Of the table of a part, which begins at a multiple of it."""

OPTIONS: dict[str, Any] = {"num_stages": 1, "enable_fp_fusion": True}


def packed_words(spec: LinearSpec, tensors: dict[str, Tensor]) -> Tensor:
    """The words of the CUDA kernels: int32 [tiles, chunks * 32 * bits]."""
    tiles, chunks = -(-sum(spec.stored_outputs) // TILE), -(-spec.stored_in // CHUNK)
    words = cuda_layout.packed_words(spec, tensors)[: tiles * chunks * LANES * spec.bits].view(tiles, -1)
    if isinstance(spec.format, Lattice):  # stored rotated left by 7 for the CUDA kernels
        words = (words << 25) | (words >> 7 & (1 << 25) - 1)
    return words.contiguous()


def table(spec: LinearSpec, tensors: dict[str, Tensor]) -> Tensor | None:
    """What the code's decoder looks up, or None; for each part, of HYB, the rows, and again with the sign."""
    device = tensors[SV.name].device
    if spec.format is HYB:
        rows = tensors[TABLE].half().contiguous().view(torch.int32).view(len(spec.output_sizes), -1)
        return aligned(torch.cat([rows, rows ^ 0x8000], dim=1), _TABLE_BYTES["hyb"])
    if spec.format is LUT:
        return _lut(device)
    if spec.format in (STORED, PAIRS):
        return aligned(tensors[TABLE].half().contiguous().flatten(), _TABLE_BYTES[spec.code])
    return cuda_layout.table(spec, tensors) if isinstance(spec.format, Lattice) else None


@cache
@torch.inference_mode(False)
def _lut(device: torch.device) -> Tensor:
    """One for all layers: it takes 256 KB."""
    return aligned(LUT.values().half().flatten().to(device), _TABLE_BYTES["lut"])


def aligned_table(code: str, table: Tensor) -> Tensor:
    """`aligned` for a code's tables."""
    size = _TABLE_BYTES.get(own_code(code))
    return table if size is None else aligned(table, size)


def aligned(table: Tensor, size: int) -> Tensor:
    """The table, or a copy, at a multiple of `size` bytes, a power of two (codes.look_up)."""
    if table.data_ptr() % size == 0:
        return table
    count, item = table.numel(), table.element_size()
    room = torch.empty(count + size // item, dtype=table.dtype, device=table.device)
    start = -room.data_ptr() % size // item
    return room[start : start + count].view(table.shape).copy_(table)


def base(matrix: Tensor, width: int) -> Tensor:
    """H_q kron S of what the kernels leave of p = `width`: float32, q p / MAX_P squared, or H_q itself up to MAX_P."""
    sylvester = torch.ones(1, 1, dtype=matrix.dtype, device=matrix.device)
    while sylvester.shape[0] * rotation.MAX_P < width:
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
    return torch.kron(matrix, sylvester).contiguous()


def padded(k: int) -> int:
    """The columns of rotated activations: whole chunks."""
    return triton.cdiv(k, CHUNK) * CHUNK


class _Rotation:
    """A rotation of `size` elements in runs of q * p: its launches' sizes.

    Attributes:
        q, p: of the kernels.
        growth, norm: log2 of how much larger than all its inputs an output may be, and what makes it orthonormal.
        count, blocks, warps: elements of a program of S_p, programs of a row, warps.
        whole: whether a program has a whole row, and q is 1.
        runs, mix_p, a, b, parts: of H_q: runs of q p elements, p, what a program has of them, programs of a run.
    """

    def __init__(self, size: int, matrix: Tensor, width: int) -> None:
        self.q, self.p = matrix.shape[0], min(width, rotation.MAX_P)
        self.growth = (self.q * self.p - 1).bit_length()
        self.norm = 1 / math.sqrt(self.q * self.p)
        self.count = max(self.p, min(rotation.BLOCK, triton.next_power_of_2(size)))
        self.blocks = triton.cdiv(size, self.count)
        self.warps = max(4, min(16, self.count // 512))
        self.whole = self.q == 1 and self.blocks == 1
        if self.q == 1:  # nothing is mixed: a row is one run
            self.runs, self.mix_p, self.a, self.b = 1, size, 1, MIX_WHOLE
        else:
            self.runs, self.mix_p, self.a, self.b = size // (self.q * self.p), self.p, MIX_A, MIX_B
        self.parts = triton.cdiv(self.q, self.a) * triton.cdiv(self.mix_p, self.b)


def linear(
    x: Tensor,
    packed: Tensor,
    table: Tensor | None,
    su: Tensor,
    sv: Tensor,
    bases: list[Tensor],
    widths: list[int],
    output_sizes: list[int],
    code: str,
    bits: int,
    split_chunks: int,
    chosen: list[int],
    ids: Tensor | None = None,
) -> Tensor:
    """x [m, k] -> y [m, n] in x's dtype; the other arguments are TritonBackend.prepare's.

    With ids [m, t] they are those of experts, and y [m * t, n] is of the experts that each row names.
    """
    experts, results = (su.shape[0], ids.shape[1]) if ids is not None else (1, 1)
    y = torch.empty(x.shape[0] * results, sum(output_sizes), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    turn = _Rotation(x.shape[1], bases[0], widths[0])
    piece = max(MAX_ROWS, shapes.ROWS[-1] * experts) // results or 1
    for i, (rows, to) in enumerate(zip(x.split(piece), y.split(piece * results), strict=True)):
        routing = None if ids is None else Routing(ids[i * piece :][: len(rows)].flatten(), experts, results)
        activations, scales, totals = _rotate_in(rows, su, turn, bases[0], columns(code), routing)
        shape = shapes.shape(chosen, shapes.rows_of_expert(len(to), experts) if routing else len(rows))
        partial = multiply(activations, packed, table, output_sizes, code, bits, split_chunks, shape, routing)
        unit, offset, _ = numbers(code, bits)
        rest = (bases[1:], widths[1:], output_sizes, scales, totals, turn.norm * unit, offset, routing)
        _rotate_out(partial, to, sv, *rest)
    return y


def embedding(
    ids: Tensor,
    packed: Tensor,
    table: Tensor | None,
    su: Tensor,
    sv: Tensor,
    base: Tensor,
    width: int,
    code: str,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """int64 ids [m] -> rows of the dequantized weight [m, k]; base is the inverse rotation's."""
    m, k = len(ids), su.shape[0]
    y = torch.empty(m, k, dtype=dtype, device=ids.device)
    scales = sv[ids]  # which refuses a number that is not in the table
    if m:
        tiles, chunks = packed.shape[0], triton.cdiv(k, CHUNK)
        rows = torch.empty(1, m, chunks * CHUNK, dtype=torch.float32, device=ids.device)
        unit, offset, second = numbers(code, bits)
        decode_rows_kernel[m, chunks](
            ids, *_unsigned(packed, table, code), rows, tiles, chunks, unit, offset,
            **code_and_order(code), BITS=bits, SECOND=second, num_warps=1, **OPTIONS,
        )  # fmt: skip
        _rotate_out(rows, y, su, [base], [width], [k], scales, scales[:, None], 1.0, 0.0, None)
    return y


def own_code(code: str) -> str:
    """A code's name without the order of its tiles (`kernels_code`)."""
    return code_and_order(code)["CODE"]


def numbers(code: str, bits: int) -> tuple[float, float, float]:
    """Of what a code's decoder gives: its unit, what to subtract from it before, and the second stage's scale."""
    if own_code(code) == "1mad":
        return 1 / 147.800537109375, 1024.0 + 510.0, 0.0
    if code == "grid":
        return 1.0, 3.0 * (1 << bits) - 1, 0.0
    if code != "e8p":
        return 1.0, 0.0, 0.0
    second = 1 / RESIDUAL_SCALE[bits] if bits > 2 else 0.0
    return 1.0, 36.0 + (36.25 if bits == 3 else 36.0) * second, second


def columns(code: str) -> str:
    """The order in which decode_gemm wants the columns of x (rotation.place)."""
    return "lattice" if code == "e8p" else "by_rows" if code_and_order(code)["ORDER"] == "by_rows" else "trellis"


def code_and_order(code: str) -> dict[str, str]:
    """The kernels' constants of a code's name."""
    order = next((one for one in ("swapped", "by_rows") if code.endswith(f"_{one}")), "")
    return {"CODE": code.removesuffix(f"_{order}"), "ORDER": order}


def gemm_options(code: str, shape: shapes.Shape) -> dict[str, Any]:
    """Triton's options for decode_gemm. Left alone, ptxas spills some of the registers that look-ups hold."""
    registers = 240 if shape.rows >= 32 else 168
    own = own_code(code)
    many = own in ("lut", "table", "pairs") or own == "hyb" and shape.rows >= 32
    return {"num_warps": shape.warps, **OPTIONS, **({"maxnreg": registers} if many else {})}


def _unsigned(packed: Tensor, table: Tensor | None, code: str) -> tuple[Tensor, Tensor]:
    """Words that Triton shifts without a sign; torch has few operations for them, so they are stored as int32."""
    words = packed.view(torch.uint32)
    if table is None:
        return words, words  # never read
    if code == "e8p":
        return words, table.view(torch.uint32)
    table = aligned_table(code, table)
    return words, table if own_code(code) in ("lut", "table") else table.view(torch.uint32)


def _of_experts(routing: Routing | None, x: Tensor) -> tuple[Tensor, int]:
    """The ids and the number of experts, for kernels that read both only if they are ROUTED."""
    return (x, 0) if routing is None else (routing.ids, routing.experts)


def _rotate_in(
    x: Tensor, su: Tensor, turn: _Rotation, base: Tensor, order: str, routing: Routing | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rotated activations fp16 [m, 64 chunks], scales [m], and their sums in parts [m, programs of a row].

    With experts m is of the results.
    """
    k = x.shape[1]
    m = len(x) if routing is None else len(routing.ids)
    stride = padded(k)
    out = (torch.zeros if k % CHUNK else torch.empty)(m, stride, dtype=torch.float16, device=x.device)
    floats: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    scales, totals = torch.empty(m, **floats), torch.empty(m, 1 if turn.whole else turn.runs * turn.parts, **floats)
    scratch, largest = scales, scales.view(torch.int32)  # never written
    if not turn.whole:
        scratch, largest = torch.empty(m, k, **floats), torch.empty(m, turn.blocks, dtype=torch.int32, device=x.device)
    options = {"GROWTH": turn.growth, "COLUMNS": order, **OPTIONS}
    rotation.walsh_in_kernel[m, turn.blocks](
        x, *_of_experts(routing, x), routing.results if routing else 1,
        su, out, stride, scratch, largest, totals, scales, k,
        COUNT=turn.count, P=turn.p, WHOLE=turn.whole, ROUTED=routing is not None, num_warps=turn.warps, **options,
    )  # fmt: skip
    if not turn.whole:
        rotation.mix_in_kernel[m, turn.runs, turn.parts](
            scratch, base, out, stride, largest, turn.blocks, totals, scales, k, turn.q, turn.mix_p,
            BLOCKS=triton.next_power_of_2(turn.blocks), MIX=turn.q > 1, A=turn.a, B=turn.b, num_warps=4, **options,
        )  # fmt: skip
    return out, scales, totals


def multiply(
    x: Tensor,
    packed: Tensor,
    table: Tensor | None,
    output_sizes: list[int],
    code: str,
    bits: int,
    split_chunks: int,
    shape: shapes.Shape,
    routing: Routing | None = None,
) -> Tensor:
    """Rotated activations [m, 64 chunks] times the weight: fp32 [splits, m, 16 tiles].

    With experts packed is [experts, tiles, words], as is the table if each has its own.
    """
    m, tiles, chunks = x.shape[0], packed.shape[-2], x.shape[1] // CHUNK
    splits = triton.cdiv(chunks, split_chunks)
    partial = torch.empty(splits, m, tiles * TILE, dtype=torch.float32, device=x.device)
    own_tables = own_code(code) in ("hyb", "table", "pairs") and len(output_sizes) > 1
    parts = tuple(size // TILE for size in output_sizes) if own_tables else ()
    programs = sum(triton.cdiv(count, shape.warps) for count in parts or (tiles,))
    order, blocks = (x, x) if routing is None else routing.blocks(shape.rows)
    words, values = _unsigned(packed, table, code)
    size = len(output_sizes) * _TABLE_BYTES.get(own_code(code), 0) // values.element_size()
    expert_words, expert_table = packed[0].numel() if packed.dim() > 2 else 0, size if values.numel() > size else 0
    decode_gemm_kernel[programs, splits, len(blocks) if routing else triton.cdiv(m, shape.rows)](
        words, values, x, partial, order, blocks, expert_words, expert_table, m, tiles, chunks, split_chunks,
        **code_and_order(code), BITS=bits, SECOND=numbers(code, bits)[2], PROJECTIONS=parts,
        WARPS=shape.warps, BM=shape.rows, UNROLL=shape.unroll, ROUTED=routing is not None, **gemm_options(code, shape),
    )  # fmt: skip
    return partial


def _rotate_out(
    partial: Tensor,
    y: Tensor,
    signs: Tensor,
    bases: list[Tensor],
    widths: list[int],
    output_sizes: list[int],
    scales: Tensor,
    totals: Tensor,
    unit: float,
    offset: float,
    routing: Routing | None,
) -> None:
    """Sums the splits, rotates, scales: one or two launches for neighbouring parts with the same rotation."""
    (splits, m, stride), n, sums = partial.shape, y.shape[1], totals.shape[1]
    scratch = y  # never written
    if any(base.shape[0] > 1 for base in bases):
        scratch = torch.empty(m, n, dtype=torch.float32, device=y.device)
    start = first = 0
    for i, size in enumerate(output_sizes):
        if i + 1 < len(output_sizes) and (widths[i], bases[i].shape) == (widths[i + 1], bases[i + 1].shape):
            continue
        size = sum(output_sizes[first : i + 1])
        back = _Rotation(size, bases[i], widths[i])
        scale = unit * back.norm
        rotation.walsh_out_kernel[m, back.blocks](
            partial, y, scratch, *_of_experts(routing, y), signs, scales, totals, sums,
            m, splits, stride, start, size, n, scale, offset,
            COUNT=back.count, P=back.p, SUMS=triton.next_power_of_2(sums), MIX=back.q > 1, ROUTED=routing is not None,
            num_warps=back.warps, **OPTIONS,
        )  # fmt: skip
        if back.q > 1:
            rotation.mix_out_kernel[m, back.runs, back.parts](
                scratch, bases[i], y, *_of_experts(routing, y), signs, scales, start, back.q, back.mix_p, n, scale,
                A=back.a, B=back.b, ROUTED=routing is not None, num_warps=4, **OPTIONS,
            )  # fmt: skip
        start, first = start + size, i + 1
