# SPDX-License-Identifier: Apache-2.0
"""Schemas, fakes, opcheck, torch.compile, and what the ops say of bad arguments."""

import pytest
import torch
from random_layers import random_layer

from quip_vllm.formats.spec import FORMATS
from quip_vllm.ops import LinearSpec, extension
from quip_vllm.ops.cpu import CpuBackend

OPS = torch.ops.quip_vllm
CPU = CpuBackend()


def trellis_arguments():
    spec = LinearSpec("hyb", 2, 64, (32, 16))
    t = CPU.prepare(spec, random_layer(spec)).tensors
    bases = [t["base0"], t["base1"], t["base2"]]
    tables = [t["table"], t["table_integers"], t["table_units"]]
    rest = [t["su"], t["sv"], bases, [64, 32, 16], [32, 16], "hyb", 2, "", False]
    return [torch.randn(3, 64), t["packed"], *tables, *rest]


def lattice_arguments():
    spec = LinearSpec("e8p", 3, 64, (32,))
    t = CPU.prepare(spec, random_layer(spec)).tensors
    bases = [t["base0"], t["base1"]]
    rest = [t["su"], t["sv"], bases, [64, 32], [32], "e8p", 3, "", False]
    return [torch.randn(3, 64), t["packed"], None, None, None, *rest]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cpu_linear", trellis_arguments),
        ("cpu_linear", lattice_arguments),
        ("encode_trellis", lambda: [torch.randn(2, 256), FORMATS["1mad"].values().T.contiguous(), 2]),
        ("encode_lattice", lambda: [torch.randn(5, 8)]),
    ],
)
def test_opcheck(name, arguments):
    CPU.refusal(LinearSpec("e8p", 2, 64, (32,)))  # loads the library
    torch.library.opcheck(getattr(OPS, name).default, arguments())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("code", ["e8p", "hyb"])
def test_compiles_as_one_graph(code, dtype):
    spec = LinearSpec(code, 2, 64, (32, 16))
    prepared = CPU.prepare(spec, random_layer(spec))
    compiled = torch.compile(lambda x: prepared.linear(x * 2) + 1, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64).to(dtype)
    assert torch.equal(compiled(x), prepared.linear(x * 2) + 1)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.randn(3, 65), "contiguous"),
        (0, torch.randn(3, 64, dtype=torch.float64), "dtype"),
        (1, torch.zeros(7, dtype=torch.int16), "packed"),
        (5, torch.zeros(64, dtype=torch.float16), "su"),
        (2, None, "table"),
        (3, None, "table_integers"),
        (12, "int4", "int4"),
        (7, [torch.ones(1, 1)], "bases"),
        (8, [64, 32, 12], "rotation"),
        (8, [64, 64, 16], "rotation"),
        (9, [32, 8], "sv"),
        (10, "4mad", "4mad"),
        (11, 5, "bits"),
        (11, 0, "bits"),
    ],
)
def test_bad_arguments_are_refused_and_named(position, value, words):
    arguments = trellis_arguments()
    arguments[position] = value
    with pytest.raises(RuntimeError, match=words):
        OPS.cpu_linear(*arguments)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.zeros(48, 8), "int16"),
        (0, torch.zeros(47, 8, dtype=torch.int16), "47 rows"),
        (1, None, "second stage"),
        (1, torch.zeros(48, 8, dtype=torch.int16), "uint8"),
        (2, [48, 0], "0 outputs"),
        (3, 5, "bits"),
    ],
)
def test_codes_that_make_no_blocks_are_refused(position, value, words):
    codes, second = torch.zeros(48, 8, dtype=torch.int16), torch.zeros(48, 8, dtype=torch.uint8)
    arguments = [codes, second, [32, 16], 3]
    assert OPS.cpu_lattice_blocks(*arguments).dtype is torch.uint8
    arguments[position] = value
    with pytest.raises(RuntimeError, match=words):
        OPS.cpu_lattice_blocks(*arguments)


def test_blocks_of_the_wrong_size_are_refused():
    arguments = lattice_arguments()
    arguments[1] = arguments[1][:-1]
    with pytest.raises(RuntimeError, match="blocks"):
        OPS.cpu_linear(*arguments)


def test_a_gpu_without_its_library_is_named(monkeypatch):
    monkeypatch.setattr(extension, "cuda_library_problem", lambda: "the compiled library is not there")
    with pytest.raises(RuntimeError, match="the compiled library is not there"):
        extension.require_cuda_library()
