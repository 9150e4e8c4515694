# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter, against the dequantized weight: every format, odd sizes, every dtype.

The interpreter is chosen when triton is imported, so this file runs itself once more, in a process of its own. There,
guards are around every buffer. By hand:  TRITON_INTERPRET=1 pytest tests/ops/test_triton_interpreted.py
"""

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from numerics import FLOAT32_LINEAR, FLOAT32_TRANSFORM, HALF_ACTIVATIONS, SAME_DTYPE_FACTOR, relative
from random_layers import CHUNKED, EXL3_RATES, crossed, random_layer
from torch.utils._python_dispatch import TorchDispatchMode

from quip_vllm.formats.spec import FORMATS, TileOrder
from quip_vllm.ops import LinearSpec, dequantize, select_backend
from quip_vllm.ops.dispatch import backends
from quip_vllm.ops.rotations import kernels_problem
from quip_vllm.ops.triton import backend as module
from quip_vllm.ops.triton import shapes
from quip_vllm.ops.triton.backend import TritonBackend
from quip_vllm.transforms.hadamard import hadamard

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ONLY_INTERPRETED = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
GUARD = 512
"""Bytes before and behind every buffer: all ones, which is no number in any floating type."""

ONE_MAD = LinearSpec("1mad", 2, 48, (32,))
CODES = [name for name, one in FORMATS.items() if TileOrder.MMA in one.kernel_orders]


class Guarded:
    """torch for the launches: what is allocated lies between guards, and holds no number until it is written."""

    def __init__(self) -> None:
        self.rooms: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *shape, dtype=torch.float32, device="cpu"):
        shape = shape[0] if shape and isinstance(shape[0], (tuple, torch.Size)) else shape
        count = math.prod(shape) * dtype.itemsize
        room = torch.full((2 * GUARD + count,), 0xFF, dtype=torch.uint8)
        inside = room[GUARD : GUARD + count]
        self.rooms.append((room, inside))
        return inside.view(dtype).view(shape)

    def zeros(self, *shape, **options):
        return self.empty(*shape, **options).zero_()

    def copy(self, tensor, shift=0):
        """A guarded copy; shift: bytes by which its address is odd."""
        room = torch.full((2 * GUARD + tensor.nbytes,), 0xFF, dtype=torch.uint8)
        inside = room[GUARD + shift : GUARD + shift + tensor.nbytes]
        self.rooms.append((room, inside))
        return inside.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def check(self):
        for room, inside in self.rooms:
            before = inside.storage_offset()
            assert (room[:before] == 0xFF).all(), "written before a buffer"
            assert (room[before + len(inside) :] == 0xFF).all(), "written behind a buffer"


@pytest.fixture
def guarded(monkeypatch):
    from quip_vllm.ops.triton import launch

    guarded = Guarded()
    monkeypatch.setattr(launch, "torch", guarded)
    yield guarded
    guarded.check()


def rows(m, k, dtype=torch.float32):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


def run(spec, tensors, x, guarded, split_chunks=None):
    """Of the linear layer; split_chunks: chunks of a part of k, other than those that were chosen."""
    backend = TritonBackend()
    assert backend.refusal(spec) is None
    layer = backend.prepare(spec, tensors)
    layer = replace(layer, tensors={name: guarded.copy(tensor) for name, tensor in layer.tensors.items()})
    if split_chunks:
        layer = replace(layer, split_chunks=split_chunks)
    return layer.linear(guarded.copy(x, shift=x.element_size()))


@pytest.mark.long
@NEEDS_TRITON
@pytest.mark.skipif(INTERPRETED, reason="is the interpreter's process")
def test_in_the_interpreter(request):
    chosen = request.config.getoption("markexpr")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", chosen, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@ONLY_INTERPRETED
@pytest.mark.parametrize(
    ("k", "sizes", "block", "m", "code", "bits"),
    crossed([(48, (16,), 16, 3), (80, (48, 16), None, 1)], odd=1),  # 12 * 4, 20 * 4
)
def test_linear_is_the_dequantized_weight(code, bits, k, sizes, block, m, guarded):
    spec = LinearSpec(code, bits, k, sizes, block)
    tensors = random_layer(spec)
    x = rows(m, k)
    y = run(spec, tensors, x, guarded)
    assert relative(y, x.double() @ dequantize(spec, tensors).double().T) < HALF_ACTIVATIONS


@ONLY_INTERPRETED
@pytest.mark.parametrize(("code", "bits"), [(code, bits) for code, bits in EXL3_RATES if bits in (1, 2, 3, 8)])
def test_layers_of_exl3(code, bits, guarded):
    """Tiles in EXL3's order, blocks of 128, and sizes that are stored as the next multiples of 128."""
    k, n = 100, 130
    spec = LinearSpec(code, bits, k, (n,), 128, tile_order=TileOrder.MMA_SWAPPED, padded_to=128)
    tensors, x = random_layer(spec), rows(2, k)
    y = run(spec, tensors, x, guarded)
    assert relative(y, x.double() @ dequantize(spec, tensors).double().T) < HALF_ACTIVATIONS


@ONLY_INTERPRETED
@pytest.mark.parametrize(
    ("code", "bits"), [("1mad", 5), ("3inst", 2), ("hyb", 1), ("table", 3), ("table", 4), ("pairs", 2), ("pairs", 7)]
)
def test_row_major_tiles(code, bits, guarded):
    """Of QTIP's other codes, in two parts; and of a head, whose rows are looked up."""
    spec = LinearSpec(code, bits, 80, (48, 16), tile_order=TileOrder.ROW_MAJOR)
    tensors, x = random_layer(spec), rows(2, 80)
    assert not kernels_problem(spec, (TileOrder.ROW_MAJOR,))
    y = run(spec, tensors, x, guarded)
    assert relative(y, x.double() @ dequantize(spec, tensors).double().T) < HALF_ACTIVATIONS
    head = LinearSpec(code, bits, 80, (48,), None, rotate_output=False, tile_order=TileOrder.ROW_MAJOR)
    tensors, ids = random_layer(head), torch.tensor([0, 47, 9, 24])
    found = TritonBackend().prepare(head, tensors).embedding(ids, torch.float32)
    assert relative(found, dequantize(head, tensors)[ids]) < FLOAT32_LINEAR


@ONLY_INTERPRETED
@pytest.mark.parametrize("code", ["e8p", "hyb", "lut", "table", "1mad"])
@pytest.mark.parametrize(("count", "each", "block"), [(3, 2, 16), (2, 1, None), (9, 1, 16)])
def test_experts(code, count, each, block, monkeypatch, guarded):
    """Blocks of 8, 16 and 64 rows, in pieces of one row; an expert that no row names, a number too large, and none."""
    from quip_vllm.ops import dispatch
    from quip_vllm.ops.triton import launch

    monkeypatch.setattr(dispatch, "select_backend", lambda *_: TritonBackend())
    spec, m = LinearSpec(code, 3, 80, (48, 16), block), {3: 8, 2: 19, 9: 5}[count]
    tensors = [random_layer(spec, seed) for seed in range(count)]
    experts = dispatch.prepare_experts(spec, tensors)
    experts = replace(experts, tensors={name: guarded.copy(tensor) for name, tensor in experts.tensors.items()})
    if count == 9:
        monkeypatch.setattr(launch, "MAX_ROWS", 1)
        monkeypatch.setattr(shapes, "ROWS", (8, 8, 8, 0))
    ids = torch.randint(0, count - 1, (m, each), generator=torch.Generator().manual_seed(0))
    ids[m - 1, 0], ids[m - 2, 0] = count, -1
    x = rows(m, 80)
    y = experts.linear(guarded.copy(x, shift=4), guarded.copy(ids))
    assert not y[m - 1, 0].isfinite().any() and not y[m - 2, 0].count_nonzero()
    weights = torch.stack([dequantize(spec, one) for one in tensors]).double()
    wanted = torch.einsum("mk,mtnk->mtn", x.double(), weights[ids.clamp(0, count - 1)])
    wanted[m - 1, 0] = wanted[m - 2, 0] = y[m - 1, 0] = 0
    assert relative(y, wanted) < HALF_ACTIVATIONS


@ONLY_INTERPRETED
@pytest.mark.parametrize(("m", "count", "rows_of_block"), [(1, 4, 8), (40, 3, 8), (7, 50, 16), (65, 1, 64)])
def test_blocks_of_experts(m, count, rows_of_block):
    from quip_vllm.ops.triton.routing import Routing

    ids = torch.randint(-1, count, (m,), generator=torch.Generator().manual_seed(m))
    order, blocks = Routing(ids, count, 1).blocks(rows_of_block)
    used = [block for block in blocks.tolist() if block[0] >= 0]
    assert blocks[: len(used)].tolist() == used and sorted(order.tolist()) == list(range(m))
    assert [place for _, first, last in used for place in range(first, last)] == list(range(int((ids >= 0).sum())))
    assert all(0 < last - first <= rows_of_block for _, first, last in used)
    assert all((ids[order[first:last]] == expert).all() for expert, first, last in used)


@ONLY_INTERPRETED
@pytest.mark.parametrize(("k", "sizes", "chunks"), CHUNKED)
def test_rotations_in_chunks(k, sizes, chunks, guarded):
    """Chunks of 12 p and 52 p, as published for eight tensor-parallel ranks, and of powers of two."""
    spec = LinearSpec("hyb", 2, k, sizes, input_chunks=chunks[0], output_chunks=chunks[1])
    tensors, x = random_layer(spec), rows(2, k)
    y = run(spec, tensors, x, guarded)
    assert relative(y, x.double() @ dequantize(spec, tensors).double().T) < HALF_ACTIVATIONS


@ONLY_INTERPRETED
@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize(
    ("k", "sizes", "block", "m", "split_chunks"),
    [(144, (48, 16, 16), None, 1, 1), (272, (80, 48), 16, 17, 2), (16, (96,), None, 65, 1)],
    ids=str,
)
def test_more_tiles_rows_and_parts_of_k(code, k, sizes, block, m, split_chunks, guarded):
    spec = LinearSpec(code, 3, k, sizes, block)
    tensors = random_layer(spec)
    x = rows(m, k)
    y = run(spec, tensors, x, guarded, split_chunks)
    assert relative(y, x.double() @ dequantize(spec, tensors).double().T) < HALF_ACTIVATIONS


@ONLY_INTERPRETED
@pytest.mark.parametrize("warps", [1, 2, 8])
def test_projections_with_tables_of_their_own_are_cut_by_any_warps(warps, monkeypatch, guarded):
    spec = LinearSpec("hyb", 2, 48, (48, 16, 80))
    monkeypatch.setattr(shapes, "WARPS", {8: (warps,)})
    tensors, x = random_layer(spec), rows(2, 48)
    y = run(spec, tensors, x, guarded)
    assert relative(y, x.double() @ dequantize(spec, tensors).double().T) < HALF_ACTIVATIONS


@ONLY_INTERPRETED
@pytest.mark.parametrize("k", [8, 24, 40])
@pytest.mark.parametrize("n", [1, 2, 12, 36])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_lattice_takes_sizes_that_are_no_multiple_of_16(n, k, bits, guarded):
    spec = LinearSpec("e8p", bits, k, (n,))
    tensors = random_layer(spec)
    x = rows(3, k)
    y = run(spec, tensors, x, guarded)
    assert relative(y, x.double() @ dequantize(spec, tensors).double().T) < HALF_ACTIVATIONS


@ONLY_INTERPRETED
@pytest.mark.parametrize("code", CODES, ids=str)
def test_an_output_head_of_any_size_and_its_rows(code, guarded):
    spec = LinearSpec(code, 2, 80, (17,), None, rotate_output=False)
    tensors = random_layer(spec)
    x = rows(2, 80)
    weight = dequantize(spec, tensors)
    assert relative(run(spec, tensors, x, guarded), x.double() @ weight.double().T) < HALF_ACTIVATIONS
    backend = TritonBackend()
    prepared = backend.prepare(spec, tensors)
    prepared = replace(prepared, tensors={name: guarded.copy(tensor) for name, tensor in prepared.tensors.items()})
    ids = torch.tensor([[0, 16, 9]])
    for dtype in (torch.float32, torch.bfloat16):
        found = prepared.embedding(guarded.copy(ids), dtype)
        assert found.dtype is dtype and found.shape == (1, 3, 80)
        limit = FLOAT32_LINEAR if dtype is torch.float32 else 2 * relative(weight[ids].to(dtype), weight[ids])
        assert relative(found, weight[ids]) < limit
    with pytest.raises(IndexError):
        prepared.embedding(torch.tensor([17]), torch.float32)


@ONLY_INTERPRETED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("code", CODES, ids=str)
def test_half_precision_rounds_like_torch(code, dtype, guarded):
    spec = LinearSpec(code, 2, 576, (48,))
    tensors = random_layer(spec)
    x = rows(3, 576, dtype)
    weight = dequantize(spec, tensors)
    exact = x.double() @ weight.double().T
    y = run(spec, tensors, x, guarded)
    assert y.dtype is dtype
    assert relative(y, exact) < SAME_DTYPE_FACTOR * relative(x @ weight.to(dtype).T, exact)


@ONLY_INTERPRETED
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_large_and_small_rows(scale, guarded):
    tensors = random_layer(ONE_MAD)
    x = rows(2, 48) * scale
    y = run(ONE_MAD, tensors, x, guarded)
    assert relative(y, x.double() @ dequantize(ONE_MAD, tensors).double().T) < HALF_ACTIVATIONS


@ONLY_INTERPRETED
@pytest.mark.parametrize("bad", [float("nan"), float("-nan"), float("inf")])
def test_a_bad_row_spoils_only_itself(bad, guarded):
    tensors = random_layer(ONE_MAD)
    x = rows(5, 48)
    clean = run(ONE_MAD, tensors, x, guarded)
    x[2, 3], x[4] = bad, 0
    y = run(ONE_MAD, tensors, x, guarded)
    assert not y[2].isfinite().any()
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]]) and (y[4] == 0).all()


@ONLY_INTERPRETED
@pytest.mark.parametrize("shape", [(0, 48), (2, 2, 48), (48,)])
def test_leading_dimensions(shape):
    tensors, backend = random_layer(ONE_MAD), TritonBackend()
    x = torch.randn(shape)
    y = backend.prepare(ONE_MAD, tensors).linear(x)
    assert y.shape == (*shape[:-1], 32)
    if x.numel():
        assert relative(y, x.double() @ dequantize(ONE_MAD, tensors).double().T) < HALF_ACTIVATIONS


@ONLY_INTERPRETED
@pytest.mark.parametrize(
    ("size", "block"),
    [(1, None), (8, None), (4096, None), (16384, None), (28 * 512, None), (924 * 2, None), (172 * 64, None)]
    + [(8192, 4096), (16384, 8192), (1200, 16), (40, 2)],
)
def test_rotations_of_every_kind(size, block, guarded):
    """In and out of one row, without a layer between, which an interpreter takes long for."""
    from quip_vllm.ops.rotations import rotation_base
    from quip_vllm.ops.rotations import rotations as rotations_of
    from quip_vllm.ops.triton import launch

    order, width = rotations_of(LinearSpec("e8p", 2, size, (size,), block))[0]
    x, signs = rows(1, size), guarded.copy(rows(2, size)[1])
    base = guarded.copy(launch.base(rotation_base(order, transpose=True), width))
    turn = launch._Rotation(size, base, width)
    out, scales, totals = launch._rotate_in(guarded.copy(x), signs, turn, base, "trellis", None)
    columns = torch.arange(out.shape[1])  # where a trellis has them (rotation.py)
    out = out[:, columns & ~22 | (columns >> 1 & 1) << 4 | (columns >> 4 & 1) << 2 | (columns >> 2 & 1) << 1]
    expected = hadamard(x.double() * signs, block, transpose=True)
    assert relative(out[:, :size].double() * scales * turn.norm, expected) < HALF_ACTIVATIONS
    assert (out[:, size:] == 0).all()
    assert relative(totals.sum(), out.double().sum()) < FLOAT32_LINEAR or size > 4096  # a small sum of large numbers

    y, base = guarded.empty(1, size), guarded.copy(launch.base(rotation_base(order, transpose=False), width))
    ones = guarded.copy(torch.ones(1))
    launch._rotate_out(guarded.copy(x[None]), y, signs, [base], [width], [size], ones, ones[None], 1.0, 0.0, None)
    assert relative(y, hadamard(x.double(), block) * signs) < FLOAT32_TRANSFORM


@ONLY_INTERPRETED
@pytest.mark.parametrize(
    "spec",
    [LinearSpec("hyb", 1, 32, (16, 16)), LinearSpec("e8p", 2, 8, (4,), None, False)],
    ids=["hyb", "e8p"],
)
def test_fakes_and_schemas(spec):
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if "triton" in str(op):
                calls.append((op, args))
            return op(*args, **(kwargs or {}))

    backend = TritonBackend()
    prepared, x = backend.prepare(spec, random_layer(spec)), rows(2, spec.in_features)
    with Record():
        y = prepared.linear(x)
        if not spec.rotate_output:
            prepared.embedding(torch.tensor([3, 0]), torch.bfloat16)
    assert len(calls) == 1 + (not spec.rotate_output)
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda x: prepared.linear(x) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), y * 2)


@ONLY_INTERPRETED
def test_tables_are_aligned():
    from quip_vllm.ops.triton.launch import aligned

    for start in range(0, 4096, 512):
        table = torch.arange(8192, dtype=torch.int32)[start : start + 1024]
        found = aligned(table, 4096)
        assert found.data_ptr() % 4096 == 0 and torch.equal(found, table)


def test_order_of_backends(monkeypatch):
    assert [backend.name for backend in backends("cuda")] == ["cuda", "triton", "reference"]
    if NEEDS_TRITON.args[0]:
        return
    from quip_vllm.ops import cuda

    monkeypatch.setattr(cuda, "cuda_library_problem", lambda: "no library for this GPU")
    assert select_backend(ONE_MAD, "cuda").name == "triton"


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)], ids=str)
def test_an_older_gpu_is_refused_in_a_sentence(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    major, minor = capability
    why = f"this GPU has compute capability {major}.{minor}: the kernels need 8.0 or above; take a newer one, or a CPU"
    assert backends("cuda")[0].refusal(ONE_MAD) == why
    if not NEEDS_TRITON.args[0]:
        assert TritonBackend().refusal(ONE_MAD) == why
        with pytest.raises(ValueError, match=f"cuda: {why}; triton: {why}; reference: slow"):
            select_backend(ONE_MAD, "cuda")


def test_an_amd_gpu_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    why = "this torch is for AMD GPUs (ROCm 7.0): the kernels are for NVIDIA's; take one, or a CPU"
    assert backends("cuda")[0].refusal(ONE_MAD) == why
    if not NEEDS_TRITON.args[0]:
        assert TritonBackend().refusal(ONE_MAD) == why


def test_refusals_say_why(monkeypatch):
    backend = TritonBackend()
    if not NEEDS_TRITON.args[0]:
        assert "multiples of 16" in backend.refusal(LinearSpec("1mad", 2, 64, (24,)))
        assert "--hadamard-block 8" in backend.refusal(LinearSpec("e8p", 2, 264, (32,)))
        monkeypatch.setenv("QUIP_VLLM_ACTIVATIONS", "int8")
        assert "unset it" in backend.refusal(ONE_MAD)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert backend.refusal(ONE_MAD) == "triton is not installed: run `pip install triton`"


def test_triton_is_imported_late():
    program = (
        "import sys; from quip_vllm.ops.dispatch import backends; backends('cuda'); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
