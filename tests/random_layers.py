# SPDX-License-Identifier: Apache-2.0
"""Random quantized layers, for every format."""

import pytest
import torch

from quip_vllm.formats.spec import FORMATS, LinearSpec, TileOrder
from quip_vllm.formats.tensors import Follows, layout, tensor_specs

RATES = [
    (code, bits) for code, format in FORMATS.items() if TileOrder.MMA in format.kernel_orders for bits in format.bits
]
EXL3_RATES = [
    (code, bits)
    for code, format in FORMATS.items()
    if TileOrder.MMA_SWAPPED in format.kernel_orders
    for bits in format.bits
]
"""Those of tiles in EXL3's order, half rates among them."""
RATE_IDS = [f"{code}-{bits}" for code, bits in RATES]


def is_boundary(code: str, bits: int) -> bool:
    """Whether `make test` takes a rate: 2 bits, 3 bits, which divide no word, and a code's lowest and highest."""
    rates = FORMATS[code].bits
    return bits in (min(rates), 2, 3, max(rates))


def case(*values, code: str, bits: int, usual: bool = True):
    """Parameters (*values, code, bits) of a test; only `make test-all` runs them unless `usual`."""
    name = "-".join([f"{code}-{bits}", *map(str, values)])
    return pytest.param(*values, code, bits, id=name, marks=[] if usual else pytest.mark.exhaustive)


EVERY_RATE = [case(code=code, bits=bits, usual=is_boundary(code, bits)) for code, bits in RATES]
"""For (code, bits): the rates of `is_boundary` in `make test`, every rate in `make test-all`."""


def crossed(shapes: list[tuple], odd: int) -> list:
    """Shapes with rates, for (*shape, code, bits): all shapes at 2 and 3 bits, the one with index `odd` at every rate.

    `make test` takes all shapes at 2 bits, and the odd one at the rates of `is_boundary`. The grid has all shapes at 2
    bits alone: what depends on sizes is the trellis codes'.
    """
    return [
        case(*shape, code=code, bits=bits, usual=bits == 2 or (i == odd and is_boundary(code, bits)))
        for code, bits in RATES
        for i, shape in enumerate(shapes)
        if i == odd or bits == 2 or (bits == 3 and code != "grid")
    ]


CHUNKED = [(192, (96, 64), (8, 2)), (416, (32,), (2, 1)), (128, (416, 192), (1, 2))]
"""Inputs, outputs, and into how many chunks of each side its rotation is cut."""


def every_lattice_code(bits: int) -> tuple[LinearSpec, dict[str, torch.Tensor]]:
    """A layer of quip_sharp with each of the 65,536 codes once, in the second stage, too."""
    spec = LinearSpec("e8p", bits, 8192, (64,))
    order = torch.stack([torch.randperm(65536, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    first, second = order.view(2, 64, 1024)
    tensors = random_layer(spec) | {"codes": first.to(torch.int16)}
    if bits > 2:
        tensors["residual_codes"] = second.to(torch.uint8 if bits == 3 else torch.int16)
    return spec, tensors


def random_layer(spec: LinearSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    """A layer's tensors with random codes, magnitudes in su and sv, and a noisy table."""
    generator = torch.Generator().manual_seed(seed)
    types, tensors = layout(spec), {}
    for one in sorted(tensor_specs(spec), key=lambda one: one.follows not in (Follows.INPUTS, Follows.OUTPUTS)):
        shape, dtype = types[one.name].shape, one.dtypes[0]
        if one.follows is Follows.PART:
            usual = spec.format.table(2) if spec.format.quantized else torch.randn(one.part_shape, generator=generator)
            table = usual.float().repeat(len(spec.output_sizes), 1)
            tensors[one.name] = (table + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
        elif dtype.is_floating_point:
            tensors[one.name] = torch.randn(shape, generator=generator).to(dtype)
        else:
            kind = torch.iinfo(dtype)
            tensors[one.name] = torch.randint(kind.min, kind.max + 1, shape, generator=generator).to(dtype)
    return tensors
