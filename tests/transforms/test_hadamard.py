# SPDX-License-Identifier: Apache-2.0
"""The fast transform against a dense matrix built from its definition."""

import pytest
import torch
from numerics import FLOAT32_TRANSFORM, FLOAT64_TRANSFORM, relative

from quip_vllm.transforms.hadamard import _matrix, block_size, factor, filled, hadamard
from quip_vllm.transforms.hadamard_matrices import EXTRA_ORDERS, PUBLISHED_ORDERS, hadamard_matrix


def sylvester(size):
    """Entry (i, j) is -1 to the number of ones in i AND j."""
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64)


def dense(q, p):
    base = torch.ones(1, 1, dtype=torch.float64) if q == 1 else hadamard_matrix(q).double()
    return torch.kron(base, sylvester(p)) / (q * p) ** 0.5


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, (1, 1)),
        (2, (1, 2)),
        (4096, (1, 4096)),
        (11008, (172, 64)),
        (22016, (172, 128)),
        (13824, (108, 128)),
        (27648, (108, 256)),
        (15360, (60, 256)),
        (5120, (20, 256)),
        (10240, (20, 512)),
        (12288, (12, 1024)),
        (28672, (28, 1024)),
        (14336, (28, 512)),
        (57344, (28, 2048)),
        (53248, (52, 1024)),
        (3072, (12, 256)),
        (6656, (52, 128)),
        (19968, (156, 128)),
        (17920, (140, 128)),
        (18944, (148, 128)),
        (29568, (924, 32)),
        (4864, (76, 64)),
        (9728, (76, 128)),
        (17408, (68, 256)),
        (25600, (100, 256)),
        (5376, (84, 64)),
        (21504, (84, 256)),
        (10944, (684, 16)),
        (5632, (44, 128)),
        (4544, (284, 16)),
        (18176, (284, 64)),
        (5760, (180, 32)),
        (23040, (180, 128)),
        (8640, (540, 16)),
    ],
)
def test_factor_of_model_sizes(n, expected):
    assert factor(n) == expected


def test_factor_names_the_remedy():
    with pytest.raises(ValueError, match=r"size 5888 .*--hadamard-block 256"):  # 23 * 256
        factor(5888)
    with pytest.raises(ValueError, match=r"size 46 .*--hadamard-block 2\b"):
        factor(46)
    with pytest.raises(ValueError, match=r"size 45 .*unquantized"):
        factor(45)
    for n in (0, -8):
        with pytest.raises(ValueError, match=rf"size {n} is not positive"):
            factor(n)


@pytest.mark.parametrize(
    ("n", "block", "expected"),
    [
        (4096, None, 4096),
        (45, None, 45),
        (4096, 128, 128),
        (4096, 8192, 4096),
        (11008, 512, 256),
        (10, 128, 2),
        (8, 2, 2),
    ],
)
def test_block_size(n, block, expected):
    assert block_size(n, block) == expected


@pytest.mark.parametrize("block", [-2, 0, 1, 3, 96])
def test_block_has_to_be_a_power_of_two(block):
    with pytest.raises(ValueError, match=rf"block {block} is not a power of two"):
        block_size(4096, block)


def test_odd_size_has_no_blocks():
    with pytest.raises(ValueError, match=r"size 11 .*full-width.*unquantized"):
        hadamard(torch.zeros(2, 11), block=128)


@pytest.mark.parametrize("q", (1, *PUBLISHED_ORDERS, *EXTRA_ORDERS))
def test_full_width_equals_the_dense_matrix(q):
    p = 16 if q == 1 else 4
    x = random(3, q * p)
    u = dense(q, p)
    assert relative(hadamard(x), x @ u.T) < FLOAT64_TRANSFORM
    assert relative(hadamard(x, transpose=True), x @ u) < FLOAT64_TRANSFORM


@pytest.mark.parametrize("n", [1, 2, 12, 172, 4096, 11008, 29568])
def test_transpose_is_the_inverse_and_keeps_length(n):
    x = random(2, n)
    assert relative(hadamard(hadamard(x), transpose=True), x) < FLOAT64_TRANSFORM
    assert relative(hadamard(hadamard(x, transpose=True)), x) < FLOAT64_TRANSFORM
    assert relative(hadamard(x).norm(dim=1), x.norm(dim=1)) < FLOAT64_TRANSFORM


def test_transpose_matters():
    x = random(1, 80)
    assert relative(hadamard(x), hadamard(x, transpose=True)) > 0.1


@pytest.mark.parametrize(("n", "block", "size"), [(96, 16, 16), (96, 128, 32), (6, 2, 2), (64, 64, 64)])
@pytest.mark.parametrize("transpose", [False, True])
def test_blockwise_equals_the_block_diagonal_matrix(n, block, size, transpose):
    x = random(2, 3, n)
    u = torch.block_diag(*[sylvester(size) / size**0.5] * (n // size))
    assert relative(hadamard(x, block, transpose), x @ u.T) < FLOAT64_TRANSFORM


def test_blocks_do_not_see_each_other():
    x = torch.zeros(1, 64)
    x[0, 20] = 1
    y = hadamard(x, block=16)
    assert torch.equal(y[0].nonzero().flatten(), torch.arange(16, 32))


@pytest.mark.parametrize("n", [4096, 11008, 29568])
def test_float32(n):
    x = random(4, n)
    y = hadamard(x.float())
    assert y.dtype is torch.float32
    assert relative(y, hadamard(x)) < FLOAT32_TRANSFORM


def test_leading_dimensions_and_strides():
    x = random(40, 5, 2).permute(1, 2, 0)
    y = hadamard(x)
    assert y.shape == (5, 2, 40)
    assert relative(y[3, 1], hadamard(x[3, 1].contiguous())) < FLOAT64_TRANSFORM
    assert hadamard(torch.zeros(0, 40)).shape == (0, 40)


def test_input_is_left_alone():
    x = random(2, 48)
    before = x.clone()
    hadamard(x)
    assert torch.equal(x, before)


def test_gradient_is_the_transpose():
    _matrix.cache_clear()
    with torch.inference_mode():
        hadamard(torch.zeros(1, 40, dtype=torch.float64))  # a matrix first cached here has to serve autograd too
    x, weight = random(2, 40).requires_grad_(), random(2, 40, seed=1)
    (hadamard(x) * weight).sum().backward()
    assert relative(x.grad, hadamard(weight, transpose=True)) < FLOAT64_TRANSFORM


@pytest.mark.parametrize(
    ("n", "wanted"), [(584, 592), (528, 544), (18560, 18944), (3608, 3712), (576, 576), (4, 4), (41, 48)]
)
def test_sizes_are_filled_up_to_the_next_that_has_a_transform(n, wanted):
    assert filled(n) == wanted
    factor(wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"{dtype}.*\.float\(\)"):
        hadamard(torch.zeros(2, 16, dtype=dtype))
