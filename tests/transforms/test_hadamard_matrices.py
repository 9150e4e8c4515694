# SPDX-License-Identifier: Apache-2.0
"""The generated Hadamard matrices against known digests and their defining property."""

import hashlib

import pytest
import torch

from quip_vllm.transforms.hadamard_matrices import EXTRA_ORDERS, PUBLISHED_ORDERS, _build, hadamard_matrix

# First 16 hex digits of the sha256 of the int8 row-major bytes. The published orders have to match the checkpoints of
# the papers; the extra ones have to stay what they were when the first checkpoint was written with them.
SHA256 = {
    12: "67507aecbe2abee5",
    20: "f54960fecf1ccf70",
    28: "a6cb994c78f9acd4",
    36: "d674d8240e6b622b",
    52: "9ee082772819b105",
    60: "091e76fba0aef583",
    108: "690a34c6c9ed2f0e",
    116: "e35aecfbc1d95799",
    124: "9b41cf5242a1dd12",
    140: "b9ff01506ffe4db5",
    156: "99a1b852ce559ffd",
    172: "378ef12c7cc31f3e",
    148: "7f4a5762e56c69f5",
    924: "fbd6a3e6e7a26c67",
    76: "60321a298d2526b7",
    68: "17f1a2273987f2f6",
    100: "8ca743cc7b58afb0",
    84: "151d1690fb00c484",
    684: "b51dda202220892c",
    44: "401df984756a7d75",
    180: "a5edeb82b8e088ed",
    284: "33e132093ea74016",
    540: "be4336d600ca6fe1",
}


def test_selection_order():
    assert PUBLISHED_ORDERS == (172, 156, 140, 124, 116, 108, 60, 52, 36, 28, 20, 12)
    assert set(PUBLISHED_ORDERS + EXTRA_ORDERS) == set(SHA256)


@pytest.mark.parametrize("order", PUBLISHED_ORDERS + EXTRA_ORDERS)
def test_matrix_bits_and_orthogonality(order):
    matrix = hadamard_matrix(order)
    assert matrix.dtype is torch.int8 and matrix.shape == (order, order)
    assert hashlib.sha256(matrix.numpy().tobytes()).hexdigest()[:16] == SHA256[order]
    assert set(matrix.unique().tolist()) == {-1, 1}
    product = matrix.double() @ matrix.double().T
    assert torch.equal(product, order * torch.eye(order, dtype=torch.float64))


def test_first_row_and_column_of_paley_one():
    matrix = hadamard_matrix(12)
    assert matrix[0].tolist() == [1] + [-1] * 11
    assert matrix[:, 0].tolist() == [1] * 12


def test_only_28_and_36_of_the_published_are_symmetric():
    symmetric = [order for order in PUBLISHED_ORDERS if torch.equal(hadamard_matrix(order), hadamard_matrix(order).T)]
    assert symmetric == [36, 28]


@pytest.mark.parametrize("order", [-4, 0, 1, 2, 16, 92, 173])
def test_unknown_order(order):
    with pytest.raises(ValueError, match=rf"order {order} .*--hadamard-block"):
        hadamard_matrix(order)


def test_cached_matrix_is_usable_in_autograd():
    _build.cache_clear()
    with torch.inference_mode():
        matrix = hadamard_matrix(20)
    assert not matrix.is_inference()
