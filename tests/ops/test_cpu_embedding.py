# SPDX-License-Identifier: Apache-2.0
"""Weights without an output rotation: rows by number, and the product, against the dequantized weight."""

import pytest
import torch
from numerics import FLOAT32_LINEAR, relative
from random_layers import crossed, random_layer

from quip_vllm.formats.decode import decode
from quip_vllm.ops import LinearSpec, dequantize
from quip_vllm.ops.cpu import CpuBackend
from quip_vllm.ops.reference import ReferenceBackend
from quip_vllm.transforms.hadamard import hadamard

CPU = CpuBackend()
OPS = torch.ops.quip_vllm
SHAPES = [(16, 1, None), (272, 50, 16), (576, 333, None), (1536, 64, None), (640, 47, 64)]  # k, n, block


def table(code, bits, k=64, n=40, block=None):
    spec = LinearSpec(code, bits, k, (n,), block, rotate_output=False)
    assert CPU.refusal(spec) is None
    return spec, random_layer(spec)


@pytest.mark.parametrize(("k", "n", "block", "code", "bits"), crossed(SHAPES, odd=1))
def test_rows_and_products_are_those_of_the_dequantized_weight(code, bits, k, n, block):
    spec, tensors = table(code, bits, k, n, block)
    dense = dequantize(spec, tensors)
    assert dense.shape == (n, k)
    ids = torch.randint(0, n, (7,), generator=torch.Generator().manual_seed(0))
    ids[-1] = n - 1
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(1))
    for backend in (CPU, ReferenceBackend()):
        prepared = backend.prepare(spec, tensors)
        assert relative(prepared.embedding(ids, torch.float32), dense[ids]) < FLOAT32_LINEAR
        product = prepared.linear(x)
        assert product.shape == (3, n)
        assert relative(product, x.double() @ dense.double().T) < FLOAT32_LINEAR


@pytest.mark.parametrize("k", [48, 96])  # 12 x 4 and 12 x 8: H_12 is not symmetric
def test_a_row_is_that_of_its_definition(k):
    spec, tensors = table("e8p", 3, k, 5)
    units = torch.eye(k)
    u = hadamard(units).T  # hadamard turns rows, x U^T
    expected = tensors["sv"].float()[:, None] * (decode(spec, tensors) @ u.T) * tensors["su"].float()
    assert not torch.allclose(u, u.T)
    assert relative(dequantize(spec, tensors), expected) < FLOAT32_LINEAR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("code", ["e8p", "hyb"])
def test_half_precision_is_rounded_once(code, dtype):
    spec, tensors = table(code, 4)
    prepared = CPU.prepare(spec, tensors)
    ids = torch.arange(40).view(2, 20)
    exact = prepared.embedding(ids, torch.float32)
    assert exact.shape == (2, 20, 64)
    assert torch.equal(prepared.embedding(ids, dtype), exact.to(dtype))


@pytest.mark.parametrize("shape", [(0,), (), (2, 0, 3)])
def test_no_ids_and_one(shape):
    spec, tensors = table("1mad", 2)
    rows = CPU.prepare(spec, tensors).embedding(torch.zeros(shape, dtype=torch.int64), torch.float32)
    assert rows.shape == (*shape, 64)


@pytest.mark.parametrize("bad", [-1, 40, 47, 1 << 40])
@pytest.mark.parametrize("code", ["e8p", "1mad"])
def test_an_id_outside_the_table_is_an_error(code, bad):
    spec, tensors = table(code, 2)
    for backend in (CPU, ReferenceBackend()):
        prepared = backend.prepare(spec, tensors)
        with pytest.raises((RuntimeError, IndexError), match="id -?[0-9]+ is not in the table|out of range"):
            prepared.embedding(torch.tensor([3, bad]), torch.float32)


def trellis_arguments():
    spec, tensors = table("hyb", 2)
    t = CPU.prepare(spec, tensors).tensors
    ids = torch.tensor([5, 0, 39])
    return [ids, t["packed"], t["table"], t["su"], t["sv"], t["inverse_base"], 64, "hyb", 2, torch.bfloat16]


def lattice_arguments():
    spec, tensors = table("e8p", 4)
    t = CPU.prepare(spec, tensors).tensors
    ids = torch.tensor([5, 0, 39])
    return [ids, t["packed"], None, t["su"], t["sv"], t["inverse_base"], 64, "e8p", 4, torch.float32]


@pytest.mark.parametrize("arguments", [trellis_arguments, lattice_arguments])
def test_opcheck(arguments):
    torch.library.opcheck(OPS.cpu_embedding.default, arguments())


@pytest.mark.parametrize("code", ["e8p", "1mad"])
def test_compiles_as_one_graph(code):
    spec, tensors = table(code, 2)
    prepared = CPU.prepare(spec, tensors)

    def both(ids):
        return prepared.linear(prepared.embedding(ids, torch.float32) * 2)

    ids = torch.tensor([1, 2, 30])
    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(ids), both(ids))


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.zeros(3), "ids"),
        (0, torch.zeros(3, 1, dtype=torch.int64), "ids"),
        (1, torch.zeros(7, dtype=torch.int16), "packed"),
        (2, None, "table"),
        (3, torch.zeros(64, dtype=torch.float16), "su"),
        (5, torch.ones(2, 3), "base"),
        (6, 48, "rotation"),
        (6, 128, "rotation"),
        (7, "4mad", "4mad"),
        (8, 5, "bits"),
        (9, torch.float64, "dtype"),
    ],
)
def test_bad_arguments_are_refused_and_named(position, value, words):
    arguments = trellis_arguments()
    arguments[position] = value
    with pytest.raises(RuntimeError, match=words):
        OPS.cpu_embedding(*arguments)


@pytest.mark.parametrize(
    ("position", "value", "words"), [(1, torch.zeros(7, dtype=torch.uint8), "blocks"), (8, 5, "bits")]
)
def test_bad_blocks_are_refused_and_named(position, value, words):
    arguments = lattice_arguments()
    arguments[position] = value
    with pytest.raises(RuntimeError, match=words):
        OPS.cpu_embedding(*arguments)


def test_unrotated_outputs_are_not_fused():
    spec = LinearSpec("e8p", 2, 64, (16, 16), rotate_output=False)
    assert "not fused" in CPU.refusal(spec)


def test_a_damaged_table_is_named():
    spec, tensors = table("1mad", 2)
    tensors["packed"] = tensors["packed"][:-1]
    with pytest.raises(ValueError, match="packed"):
        CPU.prepare(spec, tensors)
