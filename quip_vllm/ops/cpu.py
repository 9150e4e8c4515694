# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: one call of the compiled op per linear layer (sources in kernels/cpu)."""

from functools import cache

import torch
from torch import Tensor

from quip_vllm import envs
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.formats.tensors import check
from quip_vllm.formats.tile import TILE
from quip_vllm.formats.trellis_codes import LUT, TABLE
from quip_vllm.ops.extension import cpu_library_problem, require_cpu_library
from quip_vllm.ops.rotations import bases, kernels_problem, rotation_base, rotations

LARGEST = 1023
"""Of int16 weights: a chunk of products with int8 then sums to 32 bits (kChunk8 in kernels/cpu/kernels.h)."""


@cache
def _lut_values() -> tuple[Tensor, Tensor, Tensor]:
    """LUT's table as float32 [65536], as int16 [65537] (value / unit; the kernels read pairs), and the unit [1]."""
    values = LUT.values().flatten().contiguous()
    unit = values.abs().amax() / LARGEST
    numbers = torch.nn.functional.pad((values / unit).round(), (0, 1))
    return values, numbers.to(torch.int16), unit[None]


def _lut_bytes(lut: Tensor) -> tuple[Tensor, Tensor]:
    """HYB's tables [projections, 512, 2] as uint8 [projections, 2, 512], value / unit + 128, and units [projections].

    Units are 126ths of the largest number: the quantizer's tables are made of 63rds, so they stay as they are, and
    even.
    """
    units = lut.abs().amax((1, 2)) / 126
    units = torch.where(units > 0, units, torch.ones_like(units))
    numbers = (lut / units[:, None, None]).round() + 128
    return numbers.to(torch.uint8).transpose(1, 2).contiguous(), units


@cache
def _takes_int8(code: str, bits: int) -> bool:
    require_cpu_library()
    return torch.ops.quip_vllm.cpu_takes_int8("" if code == "e8p" else code, bits)


def int8_activations(spec: LinearSpec, dtype: torch.dtype) -> bool:
    """Whether a layer's activations of this dtype are rounded to int8 (`run` in kernels/cpu/bindings.cpp decides so).

    QUIP_VLLM_ACTIVATIONS, else where the kernels have it, but for float32: who serves that wants its digits.
    """
    wanted = envs.activations()
    if wanted is not None:
        return wanted == "int8"
    return dtype != torch.float32 and _takes_int8(spec.code, spec.bits)


class CpuBackend:
    """Portable, AVX2 and AVX-512 kernels behind one op a method; the library chooses the tier at its first call.

    Activations are exact (float32 arithmetic) or int8 with one scale a row; which, says `int8_activations`.
    """

    name = "cpu"

    def __init__(self) -> None:
        self.activations = ""  # QUIP_VLLM_ACTIVATIONS when a layer was last prepared: a constant to torch.compile

    def refusal(self, spec: LinearSpec) -> str | None:
        problem = cpu_library_problem()
        if problem is not None:
            return problem
        problem = kernels_problem(spec)
        if problem is not None:
            return problem
        if envs.activations() == "int8" and not _takes_int8(spec.code, spec.bits):
            return (
                f"QUIP_VLLM_ACTIVATIONS is int8, which tier {torch.ops.quip_vllm.cpu_tier()} does not have for this "
                "format: unset it"
            )
        return None

    def prepare(self, spec: LinearSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        check(spec, tensors)
        self.activations = envs.activations() or ""
        prepared = {
            name: (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
            for name, tensor in tensors.items()
        }
        if spec.code == "e8p":
            require_cpu_library()
            codes, rest = prepared.pop("codes"), prepared.pop("residual_codes", None)
            sizes = list(spec.output_sizes)
            prepared["blocks"] = torch.ops.quip_vllm.quip_sharp_blocks(codes, rest, sizes, spec.bits)
        if spec.code == "hyb":
            prepared["lut"] = prepared.pop(TABLE).unflatten(0, (len(spec.output_sizes), -1))
            prepared["lut_integers"], prepared["lut_units"] = _lut_bytes(prepared["lut"])
        if spec.code == "lut":
            prepared["lut"], prepared["lut_integers"], prepared["lut_units"] = _lut_values()
        return prepared | {name: rotation_base(order, transpose) for name, order, _, transpose in bases(spec)}

    def linear(self, spec: LinearSpec, x: Tensor, tensors: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
        widths = [width for _, width in rotations(spec)]
        matrices = [tensors[f"base{i}"] for i in range(len(widths))]
        rows = x.reshape(-1, spec.in_features).contiguous()
        sv, sizes = tensors["sv"], list(spec.output_sizes)
        unused = 0 if spec.rotate_output or spec.code == "e8p" else -spec.out_features % TILE
        if unused:
            sv, sizes = torch.nn.functional.pad(sv, (0, unused)), [spec.out_features + unused]
        if spec.code != "e8p":
            y = torch.ops.quip_vllm.qtip_linear(
                rows,
                tensors["packed"],
                tensors["su"],
                sv,
                tensors.get("lut"),
                tensors.get("lut_integers"),
                tensors.get("lut_units"),
                matrices,
                widths,
                sizes,
                spec.code,
                spec.bits,
                self.activations,
            )
        else:
            y = torch.ops.quip_vllm.quip_sharp_linear(
                rows,
                tensors["blocks"],
                tensors["su"],
                sv,
                matrices,
                widths,
                sizes,
                spec.bits,
                self.activations,
            )
        y = y[:, : spec.out_features].reshape(*x.shape[:-1], spec.out_features)
        return y if bias is None else y + bias

    def embedding(self, spec: LinearSpec, ids: Tensor, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        flat = ids.reshape(-1).contiguous()
        rotation = (tensors["inverse_base"], rotations(spec)[0][1])
        signs = (tensors["su"], tensors["sv"])
        if spec.code != "e8p":
            rows = torch.ops.quip_vllm.qtip_embedding(
                flat, tensors["packed"], *signs, tensors.get("lut"), *rotation, spec.code, spec.bits, dtype
            )
        else:
            rows = torch.ops.quip_vllm.quip_sharp_embedding(
                flat, tensors["blocks"], *signs, *rotation, spec.bits, dtype
            )
        return rows.reshape(*ids.shape, spec.in_features)
