# SPDX-License-Identifier: Apache-2.0
"""Bad values, odd memory, wrong sizes, threads and processes: an error or the right result, for every format."""

import hashlib
import subprocess
import sys

import pytest
import torch
from random_layers import RATES, is_boundary, random_layer

from quip_vllm.ops import LinearSpec, cpu_tier, extension
from quip_vllm.ops.cpu import CpuBackend, _takes_int8, int8_activations

CPU = CpuBackend()
CASES = [(code, bits, how) for code, bits in RATES if is_boundary(code, bits) for how in ("exact", "int8")]
K, SIZES = 80, (48, 16)
ROWS = (2, 21)  # fewer and more than are multiplied while decoding


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def layer(request, monkeypatch):
    """A prepared layer of a format, with its activations chosen."""
    code, bits, activations = request.param
    if activations == "int8" and not _takes_int8(code, bits):
        pytest.skip(f"tier {cpu_tier()} has no int8 activations for this format")
    monkeypatch.setenv("QUIP_VLLM_ACTIVATIONS", activations)
    spec = LinearSpec(code, bits, K, SIZES)
    assert CPU.refusal(spec) is None
    return CPU.prepare(spec, random_layer(spec))


def rows(m, k=K):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m))


def shifted(tensor):
    """The same values one item into a larger buffer."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].copy_(tensor.flatten()).view(tensor.shape)


def between_items(tensor):
    """The same values one byte into a larger buffer."""
    buffer = bytearray(1) + tensor.numpy().tobytes()
    return torch.frombuffer(buffer, dtype=tensor.dtype, offset=1).view(tensor.shape)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_value_spoils_its_row_only(layer, m, bad):
    x = rows(m)
    clean = layer.linear(x)
    assert clean.isfinite().all()
    x[1, 7] = bad
    y = layer.linear(x)
    others = [r for r in range(m) if r != 1]
    assert not y[1].isfinite().any()
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("m", ROWS)
def test_zeros_give_zeros(layer, m):
    x = rows(m)
    clean = layer.linear(x)
    x[1] = 0
    y = layer.linear(x)
    assert not y[1].any()
    assert torch.equal(y[2:], clean[2:])
    assert not layer.linear(torch.zeros(m, K)).any()


def test_no_rows_give_no_rows(layer):
    assert layer.linear(torch.empty(0, K)).shape == (0, sum(SIZES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_of_x_does_not_matter(layer, dtype):
    x = rows(5).to(dtype)
    y = layer.linear(x)
    for same in (x.T.contiguous().T, x.repeat_interleave(2, 1)[:, ::2], shifted(x), torch.cat([x, x], 1)[:, K:]):
        assert torch.equal(same, x)
        assert torch.equal(layer.linear(same), y)


def test_memory_of_the_weight_does_not_matter(layer):
    moved = {name: shifted(tensor) for name, tensor in layer.tensors.items()}
    assert all(tensor.is_contiguous() and tensor.storage_offset() == 1 for tensor in moved.values())
    assert torch.equal(layer.linear(rows(5), tensors=moved), layer.linear(rows(5)))


def test_an_address_between_items_is_refused(layer):
    with pytest.raises(RuntimeError, match="x lies at an address .* give a clone"):
        layer.linear(between_items(rows(5)))
    for name in ("packed", "su", "sv"):
        if layer.tensors[name].itemsize == 1:
            continue  # bytes lie anywhere
        with pytest.raises(RuntimeError, match=f"{name} lies at an address .* give a clone"):
            layer.linear(rows(5), tensors={**layer.tensors, name: between_items(layer.tensors[name])})


def test_truncated_tensors_are_refused(layer):
    unused = set() if int8_activations(layer.spec, torch.float32) else {"table_integers", "table_units"}
    for name in set(layer.tensors) - unused:
        cut = {**layer.tensors, name: layer.tensors[name].flatten()[:-1]}
        with pytest.raises((RuntimeError, IndexError), match=f"{name.rstrip('012')}|rotation|outputs"):
            layer.linear(rows(5), tensors=cut)


@pytest.mark.parametrize("m", [1, 21])
def test_threads_do_not_change_bits(layer, m):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = layer.linear(rows(m))
        torch.set_num_threads(2)
        assert torch.equal(layer.linear(rows(m)), one)
    finally:
        torch.set_num_threads(threads)


def digests():
    """A digest of the result of each format, for bfloat16 activations."""
    found = []
    for code in ("e8p", "1mad", "hyb"):
        spec = LinearSpec(code, 2, 576, (192, 64))
        assert CPU.refusal(spec) is None
        y = CPU.prepare(spec, random_layer(spec)).linear(rows(21, 576).bfloat16())
        found.append(hashlib.sha256(y.float().numpy().tobytes()).hexdigest())
    return found


def test_two_processes_at_once_give_the_same_bits(request):
    program = (
        "import sys; sys.path[:0] = ['tests', 'tests/ops']; from pathlib import Path; "
        "from quip_vllm.ops import extension; extension.CPU_LIBRARY = Path(sys.argv[1]); "
        "import test_cpu_robustness; print(test_cpu_robustness.digests())"
    )
    command = [sys.executable, "-c", program, str(extension.CPU_LIBRARY)]
    processes = [
        subprocess.Popen(command, cwd=request.config.rootpath, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    results = [process.communicate()[0].strip() for process in processes]
    assert results == [str(digests())] * 2


@pytest.mark.parametrize(("sizes", "order"), [([], 1), ([16], 0), ([1 << 62] * 4, 1)])
def test_absurd_sizes_are_refused(sizes, order):
    """No parts, a rotation of order 0, sizes whose sum overflows."""
    CPU.refusal(LinearSpec("e8p", 2, 16, (16,)))  # loads the library
    widths = [16] * (len(sizes) + 1)
    matrices = [torch.ones(order, order)] * len(widths)
    sv = torch.ones(16 if len(sizes) == 1 else 0)
    packed = torch.zeros(len(sv) * 2, dtype=torch.int16)
    with pytest.raises(RuntimeError, match="part|rotation"):
        torch.ops.quip_vllm.cpu_linear(
            torch.ones(1, 16),
            packed,
            *[None] * 3,
            torch.ones(16),
            sv,
            matrices,
            widths,
            sizes,
            "1mad",
            2,
            "int8",
            False,
        )
