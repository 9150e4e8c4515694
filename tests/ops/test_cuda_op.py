# SPDX-License-Identifier: Apache-2.0
"""The CUDA ops' contracts: what they refuse, opcheck, fake tensors, tracing, and compiling."""

import pytest
import torch
from cuda_layers import OPS, arguments
from random_layers import random_layer

from quip_vllm.ops import LinearSpec


def hyb_arguments(cuda):
    spec = LinearSpec("hyb", 2, 64, (32, 16))
    return arguments(cuda, spec, random_layer(spec), torch.randn(3, 64))


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.randn(3, 65), "contiguous"),
        (0, torch.randn(3, 64, dtype=torch.float64), "dtype"),
        (1, torch.zeros(7, dtype=torch.int32), "packed"),
        (2, None, "table"),
        (2, torch.zeros(3, dtype=torch.int32), "table"),
        (3, torch.zeros(64, dtype=torch.float16), "su"),
        (4, torch.zeros(47), "sv"),
        (5, [torch.ones(1, 1)], "bases"),
        (6, [64, 32, 12], "rotation"),
        (6, [64, 64, 16], "rotation"),
        (7, [32, 8], "multiple of 16"),
        (8, torch.zeros(47), "bias"),
        (8, torch.zeros(96)[::2], "bias"),
        (8, torch.zeros(48, dtype=torch.float64), "dtype"),
        (9, "4mad", "4mad"),
        (10, 5, "bits"),
        (10, 0, "bits"),
        (11, [8, 3, 2, 3, 2, 3, 2, 1], "warps"),
        (11, [8, 1, 1, 1, 1, 1, 1, 1], "depth"),
        (11, [8], "thread_blocks"),
        (14, [1, 256], "wide has 2 entries"),
        (14, [1, 257, 8, 0], "choose_wide"),
    ],
)
def test_bad_arguments_are_refused_and_named(cuda, position, value, words):
    given = [*hyb_arguments(cuda), []]
    given[position] = value
    with pytest.raises(RuntimeError, match=words):
        OPS.cuda_linear(*given)


def test_opcheck(cuda):
    torch.library.opcheck(OPS.cuda_linear.default, hyb_arguments(cuda))
    spec = LinearSpec("e8p", 2, 64, (40,), rotate_output=False)
    t = cuda.prepare(spec, random_layer(spec)).tensors
    signs = (t["su"], t["sv"], t["inverse_base"])
    given = (torch.tensor([3, 39]), t["packed"], t["table"], *signs, 64, "e8p", 2, torch.bfloat16)
    torch.library.opcheck(OPS.cuda_embedding.default, given)
    search = (torch.zeros(1, 256), torch.zeros(1, 1 << 16), 4)
    forwards = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.cuda_encode_trellis.default, search, test_utils=forwards)
    torch.library.opcheck(OPS.cuda_encode_lattice.default, (torch.zeros(3, 8),), test_utils=forwards)


def test_fake_cuda_tensors_and_tracing(cuda):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    given = hyb_arguments(cuda)
    with FakeTensorMode(allow_non_fake_inputs=True):

        def on_gpu(t):
            return torch.empty(t.shape, dtype=t.dtype, device="cuda")

        fake = [on_gpu(a) if isinstance(a, torch.Tensor) else a for a in given]
        fake[5] = [on_gpu(t) for t in given[5]]
        fake[0] = fake[0].to(torch.bfloat16)
        y = OPS.cuda_linear(*fake)
    assert y.device.type == "cuda" and y.dtype is torch.bfloat16 and y.shape == (3, 48)
    graph = make_fx(lambda x: OPS.cuda_linear(x, *given[1:]) + 1, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        given[0]
    )
    assert "cuda_linear" in graph.code


@pytest.mark.parametrize("code", ["e8p", "hyb"])
def test_compiles_as_one_graph(cuda, code):
    spec = LinearSpec(code, 2, 64, (32, 16))
    prepared = cuda.prepare(spec, random_layer(spec))
    compiled = torch.compile(lambda x: prepared.linear(x * 2) + 1, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    assert torch.equal(compiled(x), prepared.linear(x * 2) + 1)
