# SPDX-License-Identifier: Apache-2.0
"""Experts that rows choose: each row's products are those of the experts' own layers, on every backend."""

import pytest
import torch
from numerics import FLOAT32_LINEAR, ROUNDED_ONCE, relative
from random_layers import EVERY_RATE, random_layer

from quip_vllm.formats.spec import LinearSpec
from quip_vllm.ops import dispatch, prepare, prepare_experts
from quip_vllm.ops.cpu import CpuBackend
from quip_vllm.ops.prepared import gpu_weight

OPS = torch.ops.quip_vllm


@pytest.fixture(params=["cpu", "cuda", "reference"])
def backend(request, monkeypatch):
    """The CUDA kernels are run by the emulator."""
    if request.param == "cuda":
        emulated = request.getfixturevalue("cuda")
        return monkeypatch.setattr(dispatch, "select_backend", lambda *_: emulated)
    if request.param == "cpu" and CpuBackend().refusal(LinearSpec("1mad", 2, 64, (32,))) is not None:
        pytest.skip("the compiled CPU library is not built: make build")
    monkeypatch.setenv("QUIP_VLLM_BACKEND", request.param)


def chosen(count, rows, each, seed=0):
    """int64 [rows, each], different experts in a row."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randperm(count, generator=generator)[:each] for _ in range(rows)]
    return torch.stack(found) if found else torch.zeros(0, each, dtype=torch.int64)


def compare(spec, count, x, ids):
    tensors = [random_layer(spec, seed) for seed in range(count)]
    found = prepare_experts(spec, tensors).linear(x, ids)
    layers = [prepare(spec, one) for one in tensors]
    assert found.dtype == x.dtype and found.shape == (*ids.shape, spec.out_features)
    for row, experts, own in zip(x, ids.tolist(), found, strict=True):
        wanted = torch.cat([layers[expert].linear(row[None]) for expert in experts])
        if layers[0].backend != "reference":
            assert torch.equal(own, wanted)
        else:  # torch sums in another order for another number of rows
            assert relative(own, wanted) < FLOAT32_LINEAR + ROUNDED_ONCE[str(x.dtype)]


@pytest.mark.parametrize(("code", "bits"), EVERY_RATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format(backend, code, bits, dtype):
    """Two parts; one expert is chosen by no row."""
    ids = chosen(4, 9, 2)
    compare(LinearSpec(code, bits, 96, (48, 32)), 5, torch.randn(9, 96).to(dtype), ids)


@pytest.mark.parametrize(("rows", "each"), [(1, 1), (1, 5), (70, 1), (33, 3), (0, 2)])
def test_rows_and_experts_of_a_row(backend, rows, each):
    compare(LinearSpec("1mad", 2, 64, (32,), 16), 6, torch.randn(rows, 64), chosen(6, rows, each))


def test_a_row_may_name_an_expert_twice(backend):
    compare(LinearSpec("hyb", 2, 64, (32,)), 3, torch.randn(4, 64), torch.tensor([[2, 2], [0, 1], [1, 1], [2, 0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "each"), [(1, 4), (7, 3), (2, 1), (0, 2)])
def test_sums_over_the_experts_of_a_token(backend, dtype, tokens, each):
    """The rows of one token lie in turn: a row per expert, as a mixture's second matrices have them."""
    spec = LinearSpec("e8p", 2, 64, (72,))
    experts = prepare_experts(spec, [random_layer(spec, seed) for seed in range(5)])
    x, ids = torch.randn(tokens * each, 64).to(dtype), chosen(5, tokens * each, 1)
    shares = torch.rand(tokens, each)
    wanted = (experts.linear(x, ids).view(tokens, each, 72).double() * shares[..., None]).sum(1)
    found = experts.linear(x, ids, shares)
    assert found.dtype == dtype and found.shape == (tokens, 72)
    assert not tokens or relative(found, wanted) < FLOAT32_LINEAR + 2 * ROUNDED_ONCE[str(dtype)]


def test_padded_sizes(backend):
    spec = LinearSpec("mul1", 3, 100, (72,), 128, padded_to=128)
    compare(spec, 3, torch.randn(5, 100), chosen(3, 5, 2))


def test_more_rows_than_are_computed_at_once(monkeypatch):
    """2200 rows of products of 2048 floats are more than 16 MiB, in pieces or not."""
    monkeypatch.setenv("QUIP_VLLM_BACKEND", "cpu")
    compare(LinearSpec("1mad", 2, 16, (2048,)), 3, torch.randn(1100, 16), chosen(3, 1100, 2))


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("order", ["deferred", "eager,reverse", "eager,random:2"])
def test_rows_that_the_cuda_kernels_route(cuda, monkeypatch, order, block, each):
    """Blocks of 8, 16 and 64 rows of an expert, and more rows than a call takes."""
    monkeypatch.setattr(dispatch, "select_backend", lambda *_: cuda)
    monkeypatch.setenv("QUIP_VLLM_EMULATOR", order)
    for rows in (3, 20, 70, 130):
        compare(LinearSpec("1mad", 2, 64, (48, 32), block), 2, torch.randn(rows, 64), chosen(2, rows, each))


@pytest.mark.parametrize("sizes", [(32,), (32, 320)])  # which the CUDA kernels rotate in decode_gemm, and behind it
@pytest.mark.parametrize("rows", [3, 70])
def test_a_result_of_no_expert_is_zero_and_no_other_changes(backend, sizes, rows):
    spec = LinearSpec("1mad", 2, 64, sizes)
    experts = prepare_experts(spec, [random_layer(spec, seed) for seed in range(3)])
    x, ids = torch.randn(rows, 64), chosen(3, rows, 2)
    x[0] = float("inf")  # of a row that is not computed
    wanted, shares = experts.linear(x, ids), torch.rand(rows, 2)
    none = torch.rand(rows, 2, generator=torch.Generator().manual_seed(1)) < 0.5
    none[0] = True
    wanted[none], ids[none] = 0, -1
    found = experts.linear(x, ids)
    same = FLOAT32_LINEAR if experts.layer.backend == "reference" else 0  # torch: in another order for other rows
    assert relative(found, wanted) <= same
    assert not found[none].count_nonzero() and found[~none].count_nonzero()
    sums = (wanted.double() * shares[..., None]).sum(1)
    assert relative(experts.linear(x, ids, shares), sums) < 1e-6
    assert not experts.linear(x, torch.full_like(ids, -1)).count_nonzero()


def test_an_expert_that_there_is_not_makes_its_row_nan(cuda, monkeypatch):
    monkeypatch.setattr(dispatch, "select_backend", lambda *_: cuda)
    spec = LinearSpec("hyb", 2, 64, (32, 16))
    experts = prepare_experts(spec, [random_layer(spec, seed) for seed in range(3)])
    x, ids = torch.randn(4, 64), chosen(3, 4, 2)
    wanted = experts.linear(x, ids)
    ids[1, 0], ids[2, 1] = 3, 7
    wanted[1, 0] = wanted[2, 1] = float("nan")
    assert torch.equal(experts.linear(x, ids).nan_to_num(0.5), wanted.nan_to_num(0.5))


def test_an_outputs_digits_do_not_depend_on_the_other_rows_or_threads(monkeypatch):
    monkeypatch.setenv("QUIP_VLLM_BACKEND", "cpu")
    spec = LinearSpec("e8p", 2, 128, (64, 64))
    experts = prepare_experts(spec, [random_layer(spec, seed) for seed in range(8)])
    x, ids = torch.randn(40, 128).bfloat16(), chosen(8, 40, 3)
    whole = experts.linear(x, ids)
    for i in (0, 17, 39):
        assert torch.equal(experts.linear(x[i : i + 1], ids[i : i + 1])[0], whole[i])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(experts.linear(x, ids), whole)
    finally:
        torch.set_num_threads(threads)


def test_a_table_that_is_no_grid_among_grids(monkeypatch):
    """The kernels' shortcut for grids is taken only where all experts have one."""
    monkeypatch.setenv("QUIP_VLLM_BACKEND", "cpu")
    spec = LinearSpec("hyb", 2, 64, (32,))
    grid = spec.format.table(2).half()
    first = random_layer(spec, 0) | {"table": grid}
    assert prepare_experts(spec, [first, first]).layer.grid
    second = random_layer(spec, 1)
    experts = prepare_experts(spec, [first, second])
    assert not experts.layer.grid
    x = torch.randn(2, 64).bfloat16()
    found = experts.linear(x, torch.tensor([[0], [1]]))[:, 0]
    assert torch.equal(found, torch.cat([prepare(spec, one).linear(x[[i]]) for i, one in enumerate((first, second))]))


def arguments():
    spec = LinearSpec("hyb", 2, 64, (32, 16))
    experts = prepare_experts(spec, [random_layer(spec, seed) for seed in range(3)])
    return [torch.randn(2, 64), chosen(3, 2, 2), torch.rand(2, 2), *experts.layer._weight(experts.tensors)]


def test_opcheck_and_one_graph(monkeypatch):
    monkeypatch.setenv("QUIP_VLLM_BACKEND", "cpu")
    torch.library.opcheck(OPS.cpu_experts.default, arguments())
    spec = LinearSpec("1mad", 2, 64, (32, 16))
    experts = prepare_experts(spec, [random_layer(spec, seed) for seed in range(3)])
    compiled = torch.compile(lambda x, ids: experts.linear(x * 2, ids) + 1, fullgraph=True, backend="aot_eager")
    x, ids = torch.randn(5, 64), chosen(3, 5, 2)
    assert torch.equal(compiled(x, ids), experts.linear(x * 2, ids) + 1)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.randn(2, 65), "contiguous"),
        (1, torch.tensor([[0, 1]]), "ids"),
        (1, torch.zeros(2, 2, dtype=torch.int32), "ids"),
        (2, torch.zeros(7, dtype=torch.int32), "packed"),
        (4, torch.zeros(64), "su has 1 dimensions"),
        (5, torch.zeros(3, 40), "sv"),
    ],
)
def test_the_cuda_op_refuses_and_names_bad_arguments(cuda, monkeypatch, position, value, words):
    monkeypatch.setattr(dispatch, "select_backend", lambda *_: cuda)
    spec = LinearSpec("hyb", 2, 64, (32, 16))
    layer, tensors, _ = vars(prepare_experts(spec, [random_layer(spec, seed) for seed in range(3)])).values()
    rest = layer.output_sizes, layer.kernels, 2, layer.thread_blocks
    own = [torch.randn(2, 64), chosen(3, 2, 2), *gpu_weight(tensors, layer.widths), *rest]
    torch.library.opcheck(OPS.cuda_experts.default, own)
    own[position] = value
    with pytest.raises(RuntimeError, match=words):
        OPS.cuda_experts(*own)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (1, torch.tensor([[0, 3], [0, 1]]), "id 3 is not among the 3 layers"),
        (1, torch.tensor([[0, 1]]), "ids"),
        (1, torch.zeros(2, 2, dtype=torch.int32), "ids"),
        (2, torch.rand(2, 1), "shares has 2 elements"),
        (2, torch.rand(4), "shares has 1 dimensions"),
        (3, torch.zeros(7, dtype=torch.int16), "packed"),
        (7, torch.zeros(64), "su has 1 dimensions"),
        (8, torch.zeros(3, 40), "sv"),
    ],
)
def test_bad_arguments_are_refused_and_named(monkeypatch, position, value, words):
    monkeypatch.setenv("QUIP_VLLM_BACKEND", "cpu")
    own = arguments()
    own[position] = value
    with pytest.raises(RuntimeError, match=words):
        OPS.cpu_experts(*own)
