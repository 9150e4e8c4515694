# SPDX-License-Identifier: Apache-2.0
"""Second stages of QuIP#: the E81B table and the sums at 3 and 4 bits."""

import itertools

import pytest
import torch

from quip_vllm.formats import e8p
from quip_vllm.formats.e8p_residual import RESIDUAL_SCALE, decode, e81b_table


def random_codes(*shape, dtype=torch.int16, seed=0):
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_constants():
    assert RESIDUAL_SCALE == {3: 2.04, 4: 3.45}


def test_table_by_enumeration():
    integers = [[0.0] * 8]
    for i, j in itertools.combinations(range(8), 2):
        for a, b in itertools.product((-1.0, 1.0), repeat=2):
            vector = [0.0] * 8
            vector[i], vector[j] = a, b
            integers.append(vector)
    halves = []
    for negative in range(256):
        if bin(negative).count("1") % 2 == 0:
            halves.append([-0.5 if negative >> i & 1 else 0.5 for i in range(8)])
    unit = torch.eye(8).tolist()
    axes = [[2 * v for v in row] for row in unit] + [[-2 * v for v in row] for row in unit[:7]]
    assert len(integers) == 113 and len(halves) == 128
    table = e81b_table()
    assert table.dtype is torch.float32
    assert table.tolist() == sorted(integers) + sorted(halves) + axes
    assert table[56].tolist() == [0.0] * 8


def test_table_rows_are_distinct_and_in_e8():
    table = e81b_table()
    assert table.shape == (256, 8) and len(table.unique(dim=0)) == 256
    assert (table.sum(dim=1) % 2 == 0).all()
    fraction = table % 1
    assert (fraction == fraction[:, :1]).all()


def test_two_bits():
    codes = random_codes(3, 4)
    assert torch.equal(decode(codes, None, 2), e8p.decode(codes))


def test_three_bits():
    codes, residual = random_codes(3, 4), random_codes(3, 4, dtype=torch.uint8, seed=1)
    residual[0, 0] = 255
    found = decode(codes, residual, 3)
    assert found.dtype is torch.float32 and found.shape == (3, 32)
    for row, group in itertools.product(range(3), range(4)):
        first = e8p.codebook()[codes[row, group].item() & 0xFFFF]
        second = e81b_table()[residual[row, group].item()]
        assert torch.equal(found[row, 8 * group : 8 * group + 8], first + second / 2.04)


def test_four_bits():
    codes, residual = random_codes(3, 4), random_codes(3, 4, seed=1)
    found = decode(codes, residual, 4)
    for row, group in itertools.product(range(3), range(4)):
        first = e8p.codebook()[codes[row, group].item() & 0xFFFF]
        second = e8p.codebook()[residual[row, group].item() & 0xFFFF]
        assert torch.equal(found[row, 8 * group : 8 * group + 8], first + second / 3.45)


@pytest.mark.parametrize(
    ("residual", "bits", "message"),
    [
        (None, 3, "None with bits=3.*uint8"),
        (None, 4, "None with bits=4.*int16"),
        (torch.zeros(2, 2, dtype=torch.int16), 2, "int16 with bits=2"),
        (torch.zeros(2, 2, dtype=torch.int16), 3, "int16 with bits=3"),
        (torch.zeros(2, 2, dtype=torch.uint8), 4, "uint8 with bits=4"),
        (torch.zeros(2, 1, dtype=torch.int16), 4, r"\[2, 1\] beside codes \[2, 2\]"),
        (None, 5, "bits=5: QuIP# has 2, 3 and 4"),
    ],
)
def test_errors(residual, bits, message):
    with pytest.raises(ValueError, match=message):
        decode(torch.zeros(2, 2, dtype=torch.int16), residual, bits)
