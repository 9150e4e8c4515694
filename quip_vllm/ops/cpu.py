# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: one call of the compiled op per linear layer (sources in kernels/cpu)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quip_vllm import envs
from quip_vllm.formats.e8p_residual import CODES, RESIDUAL_CODES
from quip_vllm.formats.spec import LinearSpec, TileOrder
from quip_vllm.formats.tensors import SU, SV, check
from quip_vllm.formats.trellis import runs_of_half_rate, words_per_tile
from quip_vllm.formats.trellis_codes import HYB, LUT, PACKED, TABLE, TrellisCode
from quip_vllm.ops.extension import cpu_library_problem, require_cpu_library
from quip_vllm.ops.prepared import PreparedLayer
from quip_vllm.ops.rotations import bases, kernels_code, kernels_problem, rotation_base, rotations

logger = logging.getLogger(__name__)

LARGEST = 1023
"""Of int16 weights: a chunk of products with int8 then sums to 32 bits (kChunk8 in kernels/cpu/kernels.h)."""


TABLES = ("table", "table_integers", "table_units")
"""Names, in a CpuLayer, of the tables of a code that looks its values up."""


@cache
def _lut_values() -> tuple[Tensor, Tensor, Tensor]:
    """`_state_values` of LUT, for all its layers."""
    return _state_values(LUT.values()[None])


def _state_values(tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values of all states, float32 [parts, 65536, v]; value / unit; and the units [parts].

    The second is int16 [parts, 65537] where v is 1, for kernels read pairs, and [parts, 131072] where it is 2.
    """
    units = tables.abs().amax((1, 2)) / LARGEST
    units = torch.where(units > 0, units, torch.ones_like(units))
    numbers = (tables / units[:, None, None]).round().flatten(1)
    numbers = torch.nn.functional.pad(numbers, (0, 2 - tables.shape[2]))
    return tables.contiguous(), numbers.to(torch.int16), units


def _table_bytes(tables: Tensor) -> tuple[Tensor, Tensor]:
    """HYB's tables [parts, 512, 2] as uint8 [parts, 2, 512], value / unit + 128, and units [parts].

    Units are 126ths of the largest number: the quantizer's tables are made of 63rds, so they stay as they are, and
    even.
    """
    units = tables.abs().amax((1, 2)) / 126
    units = torch.where(units > 0, units, torch.ones_like(units))
    numbers = (tables / units[:, None, None]).round() + 128
    return numbers.to(torch.uint8).transpose(1, 2).contiguous(), units


def _is_grid(integers: Tensor) -> bool:
    """Whether all of HYB's tables, from `_table_bytes`, are grids of even numbers (formats/trellis_codes.py)."""
    first, second = (integers.int() - 128).unflatten(2, (2, 2, 8, 16)).unbind(1)
    points, lines = first[:, :1, :, :1], second[:, :1, ..., :1]
    same = (first == points).all() and (second == torch.cat([lines, -lines], 1)).all()
    return bool(same and (points >= 0).all() and (lines >= 0).all() and (integers % 2 == 0).all())


@cache
def _takes_int8(code: str, bits: int) -> bool:
    require_cpu_library()
    return torch.ops.quip_vllm.cpu_takes_int8(code, bits)


def int8_activations(spec: LinearSpec, dtype: torch.dtype) -> bool:
    """Whether a layer's activations of this dtype are rounded to int8 (kernels/cpu/bindings_linear.cpp decides).

    QUIP_VLLM_ACTIVATIONS, else where the kernels have it, but for float32: who serves that wants its digits.
    """
    wanted = envs.activations()
    if wanted is not None:
        return wanted == "int8"
    return dtype != torch.float32 and _takes_int8(kernels_code(spec), spec.bits)


@dataclass(frozen=True)
class CpuLayer(PreparedLayer):
    """A layer for the CPU kernels.

    Attributes:
        widths: p of each rotation, in the order of `rotations`.
        output_sizes: of the op: an output head of a trellis code has whole tiles.
        activations: exact or int8 where the user asked for one of them, else empty: the op then decides by dtype.
        grid: whether HYB's tables are grids, which the kernels look up in fewer instructions.
    """

    backend = "cpu"
    widths: list[int]
    output_sizes: list[int]
    activations: str
    grid: bool

    def _rows(self, x: Tensor, bias: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
        y = torch.ops.quip_vllm.cpu_linear(x, *self._weight(tensors))
        return y if bias is None else y[:, : self.spec.out_features] + bias

    def _rows_of_experts(
        self, x: Tensor, ids: Tensor, shares: Tensor | None, tensors: Mapping[str, Tensor], own: frozenset[str]
    ) -> Tensor:
        return torch.ops.quip_vllm.cpu_experts(x, ids, shares, *self._weight(tensors))

    def for_all(self, layers: Sequence[PreparedLayer]) -> "CpuLayer":
        """See PreparedLayer."""
        return replace(self, tensors={}, grid=all(isinstance(one, CpuLayer) and one.grid for one in layers))

    def _weight(self, tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """What the ops want of the layer."""
        return (
            tensors["packed"],
            *(tensors.get(name) for name in TABLES),
            tensors["su"],
            tensors["sv"],
            [tensors[f"base{i}"] for i in range(len(self.widths))],
            self.widths,
            self.output_sizes,
            kernels_code(self.spec),
            self.spec.bits,
            self.activations,
            self.grid,
        )

    def _looked_up(self, ids: Tensor, dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> Tensor:
        # Without the unused outputs of the last row of tiles: an id of theirs is an error.
        return torch.ops.quip_vllm.cpu_embedding(
            ids,
            tensors["packed"],
            tensors.get("table"),
            tensors["su"],
            tensors["sv"][: self.spec.out_features],
            tensors["inverse_base"],
            self.widths[0],
            kernels_code(self.spec),
            self.spec.bits,
            dtype,
        )


class CpuBackend:
    """Portable, AVX2 and AVX-512 kernels behind one op; the library chooses the tier at its first call.

    Activations are exact (float32 arithmetic) or int8 with one scale per row; which, says `int8_activations`.
    """

    name = "cpu"
    routes = True

    def refusal(self, spec: LinearSpec) -> str | None:
        """See Backend."""
        problem = cpu_library_problem() or kernels_problem(spec, (TileOrder.ROW_MAJOR,))
        if problem is not None:
            return problem
        if envs.activations() == "int8" and not _takes_int8(kernels_code(spec), spec.bits):
            return (
                f"QUIP_VLLM_ACTIVATIONS is int8, which tier {torch.ops.quip_vllm.cpu_tier()} does not have for this "
                "format: unset it"
            )
        return None

    def prepare(self, spec: LinearSpec, tensors: dict[str, Tensor]) -> CpuLayer:
        """See Backend."""
        check(spec, tensors)
        require_cpu_library()
        unused = 0 if spec.rotate_output else -spec.out_features % spec.format.outputs_per_row
        sizes = [*spec.stored_outputs[:-1], spec.stored_outputs[-1] + unused]
        prepared = {
            "packed": _packed(spec, tensors),
            "su": tensors[SU.name].float().contiguous(),
            "sv": torch.nn.functional.pad(tensors[SV.name].float(), (0, unused)),
            **_tables(spec, tensors),
        }
        prepared |= {name: rotation_base(order, transpose) for name, order, _, transpose in bases(spec)}
        widths = [width for _, width in rotations(spec)]
        grid = spec.code == "hyb" and _is_grid(prepared["table_integers"])
        layer = CpuLayer(spec, prepared, widths, sizes, envs.activations() or "", grid)
        if isinstance(spec.format, TrellisCode) and int8_activations(spec, torch.bfloat16):
            _log_tiers(kernels_code(spec), spec.bits, fastest_tiers(layer))
        return layer


def fastest_tiers(layer: CpuLayer) -> str:
    """The tiers that multiply 1, 16 and many rows with int8 activations, for instance "avx512, avx512_vnni, amx".

    The first layer of a code and bit rate is measured for some milliseconds (kernels/cpu/fastest.h). The sums of all
    tiers are the same integers, so the choice moves no result.
    """
    tables = (layer.tensors.get(name) for name in TABLES)
    code = kernels_code(layer.spec)
    return torch.ops.quip_vllm.cpu_fastest(
        layer.tensors["packed"], *tables, layer.output_sizes, layer.spec.stored_in, code, layer.spec.bits, layer.grid
    )


@cache
def _log_tiers(code: str, bits: int, tiers: str) -> None:
    logger.info("quip_vllm: code %s at %d bits: the tiers for 1, 16 and many rows are %s", code, bits, tiers)


def _packed(spec: LinearSpec, tensors: dict[str, Tensor]) -> Tensor:
    """The weight's codes in the kernels' order: the lattice's in blocks of rows, a trellis code's as stored.

    A half rate's runs of 32 positions each get the word that follows them (kernels/cpu/float/decode_trellis.h).
    """
    if isinstance(spec.format, TrellisCode):
        packed = tensors[PACKED]
        if spec.format.half:
            tiles = packed.unflatten(1, (-1, words_per_tile(spec.bits, half=True)))
            packed = runs_of_half_rate(tiles, spec.bits).flatten(1)
        return packed.contiguous()
    codes, rest = tensors[CODES].contiguous(), tensors.get(RESIDUAL_CODES)
    rest = None if rest is None else rest.contiguous()
    return torch.ops.quip_vllm.cpu_lattice_blocks(codes, rest, list(spec.stored_outputs), spec.bits)


def _tables(spec: LinearSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the code looks values up in: as floats, as integers, and the integers' units; empty for computed codes."""
    if spec.format is LUT:
        return dict(zip(TABLES, _lut_values(), strict=True))
    if TABLE not in tensors:
        return {}
    tables = tensors[TABLE].float().unflatten(0, (len(spec.output_sizes), -1)).contiguous()
    values = (tables, *_table_bytes(tables)) if spec.format is HYB else _state_values(tables)
    return dict(zip(TABLES, values, strict=True))
