# SPDX-License-Identifier: Apache-2.0
"""Every property of a LinearSpec in the reference backend, against dense matrices in float64; the kernels refuse it."""

from dataclasses import replace

import pytest
import torch
from numerics import FLOAT32_LINEAR, relative
from random_layers import random_layer

from quip_vllm.formats.spec import LinearSpec, TileOrder
from quip_vllm.formats.tensors import split, stack
from quip_vllm.ops import dequantize
from quip_vllm.ops.cpu import CpuBackend
from quip_vllm.ops.cuda import CudaBackend
from quip_vllm.ops.reference import ReferenceBackend
from quip_vllm.ops.triton.backend import TritonBackend
from quip_vllm.transforms.hadamard import hadamard

REFERENCE = ReferenceBackend()
PLAIN = LinearSpec("hyb", 2, 96, (48, 32))
BEYOND = {
    "tile order mma_swapped": replace(PLAIN, tile_order=TileOrder.MMA_SWAPPED),
    "tile order row_major": replace(PLAIN, tile_order=TileOrder.ROW_MAJOR),
    "parts, or rows to look up, whose sizes are padded": replace(
        PLAIN, in_features=90, output_sizes=(40, 31), padded_to=32, hadamard_block=32
    ),
    "all": LinearSpec(
        *("1mad", 3, 80, (24, 40), None, True),
        tile_order=TileOrder.ROW_MAJOR,
        input_chunks=3,
        output_chunks=2,
        vector_dtype=torch.float32,
        padded_to=48,
    ),
}


def rotation(size, chunks, block):
    """The orthonormal matrix U of a whole side: equal blocks on the diagonal, one per chunk."""
    one = hadamard(torch.eye(size // chunks, dtype=torch.float64), block).T
    return torch.block_diag(*[one] * chunks)


def weight_of_part(spec, tensors, n):
    """The rotated weight of one part, float64 [stored n, stored k], tile by tile from the decoded sequences."""
    words = 16 * spec.bits
    weight = torch.empty(n, spec.stored_in, dtype=torch.float64)
    for i in range(n // 16):
        for j in range(spec.stored_in // 16):
            packed = tensors["packed"][i, words * j : words * (j + 1)]
            sequence = spec.format.decode_sequences(packed, spec.bits, tensors.get("table"))
            for t, value in enumerate(sequence.tolist()):
                first, second = (t >> 1 & 1, t >> 2 & 1)  # R and C of formats/tile.py
                if spec.tile_order is TileOrder.MMA_SWAPPED:
                    first, second = second, first
                row, col = 8 * first + (t >> 5), 8 * second + 2 * (t >> 3 & 3) + (t & 1)
                if spec.tile_order is TileOrder.ROW_MAJOR:
                    row, col = t // 16, t % 16
                weight[16 * i + row, 16 * j + col] = value
    return weight


def dense(spec, tensors):
    """The served weight, float64 [n, k], from its definition."""
    parts, sizes = split(spec, tensors), spec.stored_outputs
    u_in = rotation(spec.stored_in, spec.input_chunks, spec.hadamard_block)
    rows = torch.cat(
        [
            weight_of_part(spec, part, n) @ u_in.T @ torch.diag(part["su"].double())
            for part, n in zip(parts, sizes, strict=True)
        ]
    )
    u_out = torch.block_diag(*[rotation(n, spec.output_chunks, spec.hadamard_block) for n in sizes])
    scaled = tensors["sv"].double()[:, None] * (u_out @ rows)
    cut = [part[:n, : spec.in_features] for part, n in zip(scaled.split(sizes), spec.output_sizes, strict=True)]
    return torch.cat(cut)


TABLES = [replace(PLAIN, code=code, tile_order=TileOrder.ROW_MAJOR) for code in ("table", "pairs")]
CHUNKS = [replace(PLAIN, input_chunks=2, output_chunks=4), replace(PLAIN, in_features=192, input_chunks=4, code="1mad")]


@pytest.mark.parametrize("spec", [PLAIN, *CHUNKS, *TABLES, *BEYOND.values()])
def test_every_property_is_what_its_definition_says(spec):
    tensors = random_layer(spec)
    wanted = dense(spec, tensors)
    assert wanted.shape == (spec.out_features, spec.in_features)
    assert relative(dequantize(spec, tensors), wanted) < FLOAT32_LINEAR
    x, bias = torch.randn(3, spec.in_features), torch.randn(spec.out_features)
    assert relative(REFERENCE.prepare(spec, tensors).linear(x, bias), x.double() @ wanted.T + bias) < FLOAT32_LINEAR
    again = stack(spec, split(spec, tensors))
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("clause", [clause for clause in BEYOND if clause != "all"])
def test_kernels_refuse_what_they_do_not_have(clause, cuda):
    others = [] if clause == "tile order row_major" else [CpuBackend(), TritonBackend()]
    for backend in (cuda, *others):
        assert f"a layer with {clause}" in backend.refusal(BEYOND[clause])
    assert CudaBackend().name == "cuda" and REFERENCE.refusal(BEYOND[clause]) is None


def test_chunks_that_do_not_divide_a_size_are_refused():
    assert "96 cannot be rotated in 5 equal chunks" in REFERENCE.refusal(replace(PLAIN, input_chunks=5))


def test_parts_that_do_not_share_su_are_refused():
    one, other = split(PLAIN, random_layer(PLAIN))
    with pytest.raises(ValueError, match="su differs between parts"):
        stack(PLAIN, [one, other | {"su": -other["su"]}])
