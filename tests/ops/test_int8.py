# SPDX-License-Identifier: Apache-2.0
"""Int8 activations: the integer kernels against the same rounding in float64, for every format that has them."""

from dataclasses import replace

import pytest
import torch
from numerics import FLOAT32_LINEAR, INT8_ROUNDING
from random_layers import random_layer

from quip_vllm.formats.methods import Code, Method
from quip_vllm.formats.trellis_codes import default_lut
from quip_vllm.ops import LinearSpec, cpu_tier
from quip_vllm.ops.cpu import CpuBackend, _takes_int8
from quip_vllm.ops.reference import decode
from quip_vllm.transforms.hadamard import hadamard

CPU = CpuBackend()
FORMATS = [(Method.QUIP_SHARP, None, bits) for bits in (2, 3, 4)]
FORMATS += [(Method.QTIP, code, bits) for code in (Code.ONE_MAD, Code.HYB) for bits in (1, 2, 3, 4)]
IDS = [f"{method.value}-{code.value if code else 'e8p'}-{bits}" for method, code, bits in FORMATS]
SHAPES = [  # k, output sizes, block
    (16, (16,), None),
    (272, (48, 16), 16),
    (576, (576, 192, 192), None),
    (16384 + 512, (32,), 512),  # two chunks of columns
]
ROWS = (1, 2, 3, 4, 5, 12, 13, 29, 200)


@pytest.fixture(autouse=True)
def int8(monkeypatch):
    if not _takes_int8(None, 2):
        pytest.skip(f"tier {cpu_tier()} has no int8 activations")
    monkeypatch.setenv("QUIP_VLLM_ACTIVATIONS", "int8")


def rounded(x):
    """Rows to int8 and back, float64."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return torch.where(scale > 0, (x * (127 / x.abs().amax(1, keepdim=True))).round() * scale.double(), 0.0)


def expected(spec, tensors, x):
    tensors = dict(tensors)
    if "lut" in tensors:
        lut = tensors["lut"].float()
        unit = lut.abs().amax((1, 2), keepdim=True) / 127
        tensors["lut"] = (lut / unit).round() * unit
    weight = decode(spec, tensors).double()
    if spec.method is Method.QUIP_SHARP and spec.bits > 2:
        first = decode(replace(spec, bits=2), {"codes": tensors["codes"]}).double()
        weight = first + (weight - first) * (2.04 / 2 if spec.bits == 3 else 3.45 / 3.5)
    rotated = hadamard(x.float() * tensors["su"].float(), spec.hadamard_block, transpose=True)
    parts = (rounded(rotated) @ weight.T).split(spec.output_sizes, dim=-1)
    y = torch.cat([hadamard(part.contiguous(), spec.hadamard_block) for part in parts], dim=-1)
    return y * tensors["sv"].double()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("m", [1, 3, 40])
def test_the_quantizers_own_table_takes_the_short_way_to_the_same_integers(bits, m):
    spec = LinearSpec(Method.QTIP, Code.HYB, bits, 272, (48, 16), 16)
    tensors = random_layer(spec)
    tensors["lut"] = default_lut(Code.HYB)[None].repeat(2, 1, 1)
    x = torch.randn(m, 272)
    assert relative(CPU.linear(spec, x, CPU.prepare(spec, tensors)), expected(spec, tensors, x)) < INT8_ROUNDING


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(("method", "code", "bits"), FORMATS, ids=IDS)
@pytest.mark.parametrize(("k", "sizes", "block"), SHAPES, ids=str)
def test_integers_are_those_of_the_rounded_activations(method, code, bits, k, sizes, block):
    spec = LinearSpec(method, code, bits, k, sizes, block)
    assert _takes_int8(code, bits)
    tensors = random_layer(spec)
    prepared = CPU.prepare(spec, tensors)
    x = torch.randn(max(ROWS), k, generator=torch.Generator().manual_seed(1))
    wanted = expected(spec, tensors, x)
    everything = CPU.linear(spec, x, prepared)
    # A rotated value within float32 rounding of a half may round the other way: one unit of one activation.
    assert relative(everything, wanted) < INT8_ROUNDING
    close = [relative(a, b) < FLOAT32_LINEAR for a, b in zip(everything, wanted, strict=True)]
    assert sum(close) > 0.5 * len(close)
    for m in ROWS:
        assert torch.equal(CPU.linear(spec, x[:m].contiguous(), prepared), everything[:m])
        assert torch.equal(CPU.linear(spec, x[-m:].contiguous(), prepared), everything[-m:])
