# SPDX-License-Identifier: Apache-2.0
"""What Triton compiles the kernels to: machine code as it should be, and PTX for sm_80, run by the PTX interpreter.

The PTX of every code and bit rate runs, on a tile and an odd tail. scripts/triton_static.py looks at the machine code
of all of them, for every target; here are a few.
"""

import numpy as np
import pytest
import torch
from numerics import HALF_ACTIVATIONS, SAME_DTYPE_FACTOR, relative
from random_layers import RATE_IDS, RATES, random_layer

pytest.importorskip("triton")

import triton_static
from ptx.interpreter import Pointer, Program
from ptx.memory import Buffers

from quip_vllm.ops import LinearSpec, dequantize
from quip_vllm.ops.triton import launch, rotation, shapes
from quip_vllm.ops.triton.backend import TritonBackend

TABLE_BYTES = {"hyb": 1 << 12, "lut": 1 << 17}
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint32: "*u32",
    torch.int64: "*i64",
}
BY_VALUE = {int: ("i32", np.int32), float: ("fp32", np.float32)}


class Emulated:
    """A Triton kernel whose launches run in the PTX interpreter. ran: opcodes of all launches.

    compiled: PTX of the session's launches, by kernel, types and constants.
    """

    compiled: dict = {}

    def __init__(self, kernel, ran):
        self.kernel, self.ran = kernel, ran

    def __getitem__(self, grid):
        return lambda *values, **named: self.launch(grid, values, named)

    def launch(self, grid, values, named):
        constants = {name: value for name, value in named.items() if name in self.kernel.arg_names}
        options = {name: value for name, value in named.items() if name not in constants}
        signature = {
            name: TYPES[value.dtype] if isinstance(value, torch.Tensor) else BY_VALUE[type(value)][0]
            for name, value in zip(self.kernel.arg_names, values, strict=False)
        }
        key = self.kernel.__name__, *signature.values(), *constants.values()
        if key not in self.compiled:
            built = triton_static.compile_kernel(self.kernel, signature, constants, 80, options)
            self.compiled[key] = Program(built.asm["ptx"]), built.metadata.shared
        program, shared = self.compiled[key]
        arrays, buffers, arguments = {}, Buffers(), []
        for name, value in zip(signature, values, strict=True):
            if not isinstance(value, torch.Tensor):
                arguments.append(BY_VALUE[type(value)][1](value))
                continue
            assert value.is_contiguous()
            # Buffers that are not used are others over again.
            array = arrays.setdefault(value.data_ptr(), value.view(torch.uint8).numpy())
            if name == "table" and constants["CODE"] in TABLE_BYTES:
                array = padded(array, TABLE_BYTES[constants["CODE"]], buffers)
            else:
                buffers.add(array)
            arguments.append(array)
        threads = 32 * named["num_warps"]
        # Behind the arguments Triton passes two pointers to scratch memory.
        report = program.run(program.kernels[0], grid, threads, [*arguments, None, None], shared, measure=True)
        self.ran.update(report.counts())


def padded(table, size, buffers):
    """The table in a larger array, at an address that is a multiple of `size`."""
    room = np.full(table.nbytes + size, 0xA5, np.uint8)
    start = -buffers.add(room) % size
    room[start : start + table.nbytes] = table
    return Pointer(room, start)


@pytest.fixture
def ran(monkeypatch):
    """Launches in the PTX interpreter; the opcodes that ran."""
    from collections import Counter

    counts = Counter()
    for module in (launch, rotation):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Emulated(getattr(module, name), counts))
    return counts


def check_linear(spec, m, dtype, ran, split_chunks):
    """Against the dequantized weight; and that a row does not depend on how many there are."""
    tensors, backend = random_layer(spec), TritonBackend()
    prepared = backend.prepare(spec, tensors)
    backend.split_chunks[spec] = split_chunks
    x = torch.randn(m, spec.in_features, generator=torch.Generator().manual_seed(m)).to(dtype)
    weight = dequantize(spec, tensors)
    exact = x.double() @ weight.double().T
    y = prepared.linear(x)
    assert y.dtype is dtype
    assert relative(y, exact) < max(HALF_ACTIVATIONS, SAME_DTYPE_FACTOR * relative(x @ weight.to(dtype).T, exact))
    assert any(name.startswith("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") for name in ran)
    if m <= 16:
        assert any(name.startswith("dp4a") for name in ran) == (spec.code == "1mad")
    if m > 1:
        assert torch.equal(prepared.linear(x[:1]), y[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("code", "bits"), RATES, ids=RATE_IDS)
def test_ptx_of_every_format(code, bits, dtype, ran):
    """Three tiles of a program's four, two rows of its eight, a chunk and a quarter, in two parts of k."""
    check_linear(LinearSpec(code, bits, 80, (48,)), 2, dtype, ran, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("code", "bits"), RATES, ids=RATE_IDS)
def test_ptx_of_the_rows_of_every_embedding(code, bits, dtype, ran):
    spec = LinearSpec(code, bits, 80, (17,), rotate_output=False)
    tensors, backend = random_layer(spec), TritonBackend()
    ids = torch.tensor([0, 16, 9])
    wanted = dequantize(spec, tensors)[ids]
    found = backend.prepare(spec, tensors).embedding(ids, dtype)
    assert found.dtype is dtype
    assert relative(found, wanted) < HALF_ACTIVATIONS + SAME_DTYPE_FACTOR * relative(wanted.to(dtype), wanted)


CASES = [  # code, bits, k, outputs, block, rows, dtype
    ("e8p", 2, 80, (17,), None, 3, torch.float32),
    ("e8p", 4, 72, (80,), 8, 17, torch.float16),
    ("1mad", 2, 144, (80,), 16, 9, torch.bfloat16),
    ("1mad", 7, 80, (48, 16), None, 65, torch.float32),
    ("3inst", 5, 80, (48,), None, 17, torch.bfloat16),
    ("hyb", 2, 144, (80, 16), 16, 3, torch.bfloat16),
    ("hyb", 3, 80, (48,), None, 9, torch.float16),
    ("lut", 6, 80, (48,), None, 33, torch.bfloat16),
]


@pytest.mark.parametrize(("method", "code", "bits", "k", "sizes", "block", "m", "dtype"), CASES, ids=str)
def test_ptx_of_more_rows_and_tiles(code, bits, k, sizes, block, m, dtype, ran):
    check_linear(LinearSpec(code, bits, k, sizes, block, rotate_output=sizes != (17,)), m, dtype, ran, 2)


def test_every_shape_gives_the_same_bits(ran, monkeypatch):
    """So a clock may choose between them."""
    spec = LinearSpec("1mad", 2, 144, (80, 16))
    backend, x = TritonBackend(), torch.randn(9, 144, generator=torch.Generator().manual_seed(0))
    prepared = backend.prepare(spec, random_layer(spec))
    y = prepared.linear(x)
    for shape in {shape for rows in shapes.ROWS for shape in shapes.candidates(rows, (1, *shapes.WARPS[8]))}:
        monkeypatch.setattr(shapes, "shape", lambda layer, m, shape=shape: shape)
        assert torch.equal(prepared.linear(x), y), shape


@pytest.mark.parametrize("target", triton_static.TARGETS)
def test_machine_code(target):
    """Tensor cores, no spills, shared memory, instructions a weight."""
    row = triton_static.figures("hyb", 2, 8, target)
    assert not list(triton_static.wrong(row))
    assert row["mma"] == pytest.approx(1 / 8, rel=1e-3)


@pytest.mark.parametrize(("code", "bits", "rows"), [("1mad", 2, 64), ("e8p", 4, 64), ("3inst", 3, 8), ("lut", 8, 8)])
def test_machine_code_of_other_codes(code, bits, rows):
    for target in (80, 90):
        assert not list(triton_static.wrong(triton_static.figures(code, bits, rows, target)))


def test_mistakes_are_named():
    good = {"code": "lut", "bits": 2, "rows": 8, "target": 80, "instructions": 6.0, "spill_bytes": 0, "shared_bytes": 0}
    assert not list(triton_static.wrong(good))
    bad = {**good, "instructions": 0, "spill_bytes": 8, "shared_bytes": 1 << 20, "ratio": 1.7}
    assert len(list(triton_static.wrong(bad))) == 4
    assert "| lut | 2 | 6.00 (1.25) |" in triton_static.table([{**good, "ratio": 1.25}])
