# SPDX-License-Identifier: Apache-2.0
"""Int8 activations: the integer kernels against the same rounding in float64, for every format that has them."""

from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch
from numerics import FLOAT32_LINEAR, INT8_ROUNDING, relative
from random_layers import EXL3_RATES, RATES, every_lattice_code, random_layer

from quip_vllm.formats.decode import decode
from quip_vllm.formats.spec import TileOrder
from quip_vllm.formats.trellis_codes import HYB, LUT, MCG, MUL1, MUL1_HALF, THREE_INST, TrellisCode
from quip_vllm.ops import LinearSpec, cpu_tier
from quip_vllm.ops.cpu import CpuBackend, _takes_int8
from quip_vllm.ops.rotations import kernels_code
from quip_vllm.transforms.hadamard import hadamard

CPU = CpuBackend()
SHAPES = [  # k, output sizes, block
    (16, (16,), None),
    (272, (48, 16), 16),
    (576, (576, 192, 192), None),
    (16384 + 512, (32,), 512),  # two chunks of columns
]
ROWS = (1, 2, 3, 4, 5, 12, 13, 29, 200)


@pytest.fixture(autouse=True)
def int8(monkeypatch):
    if not _takes_int8("e8p", 2):
        pytest.skip(f"tier {cpu_tier()} has no int8 activations")
    monkeypatch.setenv("QUIP_VLLM_ACTIVATIONS", "int8")


def rounded(x):
    """Rows to int8 and back, float64."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return torch.where(scale > 0, (x * (127 / x.abs().amax(1, keepdim=True))).round() * scale.double(), 0.0)


exact_values = TrellisCode._default_values


@cache
def integer_values(code, bits):
    """What the kernels make of the states: LUT in 1023rds of its largest, the others before rounding to fp16."""
    if code in (MUL1, MUL1_HALF):
        y = torch.arange(65536) * 0x83DCD12D
        total = sum(y >> shift & 0xFF for shift in (0, 8, 16, 24))
        return ((1024 + total) * (1774 / 2**18) - 10.3828125)[:, None].float()
    if code in (THREE_INST, MCG):
        y = torch.arange(65536) * (0xCBAC1FED if code is MCG else 89226354) + (0 if code is MCG else 64248484)
        y = y & 0xFFFFFFFF
        z = y & 0x8FFF8FFF ^ 0x3B603B60
        halves = [half.to(torch.int16).view(torch.float16).float() for half in (z >> 16, z & 0xFFFF)]
        return (sum(halves) * 256).round()[:, None] / 256
    values = exact_values(code, bits)
    if code is LUT:
        unit = values.abs().amax() / 1023
        return (values / unit).round() * unit
    return values


def expected(spec, tensors, x):
    tensors = dict(tensors)
    if "table" in tensors:
        table = tensors["table"].float().view(len(spec.output_sizes), -1)
        unit = table.abs().amax(1, keepdim=True) / (126 if spec.code == "hyb" else 1023)
        tensors["table"] = ((table / unit).round() * unit).view(tensors["table"].shape)
    with patch.object(TrellisCode, "_default_values", integer_values):
        weight = decode(spec, tensors).double()
    if spec.code == "e8p" and spec.bits > 2:
        first = decode(replace(spec, bits=2), tensors).double()
        weight = first + (weight - first) * (2.04 / 2 if spec.bits == 3 else 3.45 / 3.5)
    rotated = hadamard(x.float() * tensors["su"].float(), spec.hadamard_block, transpose=True)
    parts = (rounded(rotated) @ weight.T).split(spec.output_sizes, dim=-1)
    y = torch.cat([hadamard(part.contiguous(), spec.hadamard_block) for part in parts], dim=-1)
    return y * tensors["sv"].double()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("m", [1, 3, 40])
def test_the_quantizers_own_table_takes_the_short_way_to_the_same_integers(bits, m):
    spec = LinearSpec("hyb", bits, 272, (48, 16), 16)
    tensors = random_layer(spec)
    tensors["table"] = HYB.table(bits).repeat(2, 1)
    x = torch.randn(m, 272)
    assert relative(CPU.prepare(spec, tensors).linear(x), expected(spec, tensors, x)) < INT8_ROUNDING


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("m", [1, 2, 4, 9])
def test_integers_of_every_lattice_code(bits, m):
    spec, tensors = every_lattice_code(bits)
    x = torch.randn(m, spec.in_features, generator=torch.Generator().manual_seed(m))
    assert relative(CPU.prepare(spec, tensors).linear(x), expected(spec, tensors, x)) < INT8_ROUNDING


SPECS = [
    LinearSpec(code, bits, *shape)
    for code, bits in RATES
    for shape in (SHAPES if bits == 2 else SHAPES[:-1] if bits <= 4 else SHAPES[1:2])
]
SPECS += [LinearSpec(code, bits, 384, (256,), 128, tile_order=TileOrder.MMA_SWAPPED) for code, bits in EXL3_RATES]
SPECS += [
    LinearSpec(code, bits, *shape, tile_order=TileOrder.ROW_MAJOR)
    for code in ("1mad", "3inst", "table", "pairs")
    for bits in (1, 2, 3, 4)
    for shape in SHAPES[1::2]
]


@pytest.mark.parametrize(
    "spec", SPECS, ids=lambda spec: f"{spec.code}-{spec.bits}-{spec.in_features}-{spec.tile_order.value}"
)
def test_integers_are_those_of_the_rounded_activations(spec):
    k = spec.in_features
    assert _takes_int8(kernels_code(spec), spec.bits)
    tensors = random_layer(spec)
    prepared = CPU.prepare(spec, tensors)
    x = torch.randn(max(ROWS), k, generator=torch.Generator().manual_seed(1))
    wanted = expected(spec, tensors, x)
    everything = prepared.linear(x)
    # A rotated value within float32 rounding of a half may round the other way: one unit of one activation.
    assert relative(everything, wanted) < INT8_ROUNDING
    close = [relative(a, b) < FLOAT32_LINEAR for a, b in zip(everything, wanted, strict=True)]
    assert sum(close) > 0.5 * len(close)
    for m in ROWS:
        assert torch.equal(prepared.linear(x[:m].contiguous()), everything[:m])
        assert torch.equal(prepared.linear(x[-m:].contiguous()), everything[-m:])
