# SPDX-License-Identifier: Apache-2.0
"""The CUDA searches, run by the emulator, against the CPU's: the same codes bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_layers import OPS
from torch.utils._python_dispatch import TorchDispatchMode

from quip_vllm.formats.spec import FORMATS
from quip_vllm.ops import encode_lattice, encode_trellis
from quip_vllm.ops.extension import require_cpu_library
from quip_vllm.quantizer.rounding.encoders import code_rms

SEARCHED = [("hyb", 1), ("hyb", 2), *[("1mad", bits) for bits in (1, 2, 3, 4, 8)]]


def searched(code, bits):
    """Arguments of a search of three sequences, more than the emulated GPU has thread blocks at up to 4 bits per step.

    With hyb all numbers are multiples of a half, so that many walks cost the same.
    """
    values = FORMATS[code].values(bits=bits).T.contiguous()
    targets = code_rms(FORMATS[code], values) * torch.randn(3, 256, generator=torch.Generator().manual_seed(bits))
    return (*((2 * one).round() / 2 if code == "hyb" else one for one in (targets, values)), bits)


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """What the CPU's search with float costs finds: up to 4 bits only the portable tier has no other."""
    file = tmp_path_factory.mktemp("walks") / "walks.pt"
    program = (
        "import sys, torch; from test_emulated_search import OPS, SEARCHED, searched\n"
        "from quip_vllm.ops import cpu_tier\nassert cpu_tier() == 'portable'\n"
        "torch.save({one: OPS.encode_trellis(*searched(*one)) for one in SEARCHED}, sys.argv[1])"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "QUIP_VLLM_CPU_TIER": "portable", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", program, str(file)], env=environment, check=True)
    return torch.load(file)


@pytest.mark.parametrize(("code", "bits"), SEARCHED)
def test_walks_are_those_of_float_costs(cuda, walks, code, bits):
    assert torch.equal(OPS.cuda_encode_trellis(*searched(code, bits)), walks[code, bits])


def test_float_costs_are_the_same_at_every_tier(walks):
    require_cpu_library()
    assert torch.equal(OPS.encode_trellis(*searched("1mad", 8)), walks["1mad", 8])


@pytest.mark.parametrize("order", ["depthfirst", "reverse", "random:1"])
def test_the_order_of_threads_does_not_show_in_a_walk(cuda, walks, monkeypatch, order):
    monkeypatch.setenv("QUIP_VLLM_EMULATOR", order)
    targets, *given = searched("hyb", 2)
    assert torch.equal(OPS.cuda_encode_trellis(targets[:1], *given), walks["hyb", 2][:1])


def test_nearest_points_are_the_cpus(cuda):
    """The second half has equally near points: multiples of a quarter."""
    require_cpu_library()
    x = torch.randn(2001, 8, generator=torch.Generator().manual_seed(0))
    x[1000:] = (4 * x[1000:]).round() / 4
    assert torch.equal(OPS.cuda_encode_lattice(x), OPS.encode_lattice(x))


def test_what_lies_on_a_gpu_is_searched_there(cuda):
    class OnGpu(torch.Tensor):
        is_cuda = True

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for kind, prefix in ((torch.Tensor, ""), (OnGpu, "cuda_")):
        seen = set()
        targets, values, bits = searched("1mad", 8)
        with Calls():
            encode_trellis(targets[:1].as_subclass(kind), values.T, bits)
            encode_lattice(torch.zeros(3, 8).as_subclass(kind))
        assert {name for name in seen if "encode" in name} == {f"{prefix}encode_trellis", f"{prefix}encode_lattice"}


def test_searches_of_nothing_and_of_what_is_refused(cuda):
    targets, values, _ = searched("1mad", 2)
    assert OPS.cuda_encode_trellis(targets[:0], values, 2).shape == (0, 256)
    assert OPS.cuda_encode_lattice(torch.zeros(0, 8)).shape == (0,)
    with pytest.raises(RuntimeError, match="components"):
        OPS.cuda_encode_trellis(targets, values, 9)
    with pytest.raises(RuntimeError, match="targets"):
        OPS.cuda_encode_trellis(targets[:, 1:].contiguous(), values, 2)
