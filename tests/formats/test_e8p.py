# SPDX-License-Identifier: Apache-2.0
"""The E8P codebook: known digests and vectors, and all 65,536 codes against scalar arithmetic."""

import hashlib

import pytest
import torch

from quip_vllm.formats import e8p

SIGN_BITS = [0, 4, 1, 5, 2, 6, 3, 7]
VECTORS = {
    0x0000: [0.75] * 8,
    0x0001: [0.25] * 8,
    0x1597: [0.25, -0.75, -0.75, 0.25, -1.75, 0.25, 1.25, 1.25],
    0xFFFF: [-1.25, -1.25, -0.25, -0.25, -1.25, -1.25, -1.25, 0.75],
}
# One 64-bit word of a published checkpoint's layout, 0x0123456789ABCDEF: low byte i is the table row of vector i, high
# bit 4 j + i its sign bit j.
WORD = 0x0123456789ABCDEF
WORD_VECTORS = [
    [-1.25, -1.25, 0.75, 1.75, -0.25, -1.25, 1.75, -0.25],
    [-1.25, -1.25, -0.25, -0.25, 1.75, 0.75, 1.75, 0.75],
    [-1.25, 0.75, -0.25, 1.75, -0.25, 1.75, -0.25, -0.25],
    [0.75, 1.75, 1.75, 1.75, 0.75, 0.75, 1.75, 0.75],
]


def as_int16(codes):
    return torch.tensor([code - 65536 if code > 32767 else code for code in codes], dtype=torch.int16)


def test_packed_table_digest():
    words = e8p.packed_abs_table()
    assert words.dtype is torch.int32 and words.shape == (256,)
    unsigned = [word & 0xFFFFFFFF for word in words.tolist()]
    assert unsigned[:4] == [0x99999999, 0x59999999, 0xD9999999, 0x7999B999]
    assert unsigned[-1] == 0x7B9BBB9B
    digest = hashlib.sha256(b"".join(word.to_bytes(4, "little") for word in unsigned)).hexdigest()
    assert digest == "efc2c03c60acd955dc812ff2bade9ec6cc31259807e48473506161f3a9a230ce"


def test_table_rows():
    table = e8p.abs_table()
    assert table.dtype is torch.float32 and table.shape == (256, 8)
    assert set(table[:, :7].unique().tolist()) == {0.5, 1.5, 2.5}
    assert (table.sum(dim=1) % 2 == 0).all()
    norms = table.square().sum(dim=1)
    assert (norms[:227] <= 10).all() and (norms[227:] == 12).all()
    absolute = table.abs().tolist()
    assert absolute[:227] == sorted(absolute[:227])
    assert len({tuple(row) for row in absolute}) == 256


def test_all_codes():
    rows = e8p.abs_table().tolist()
    expected = []
    for code in range(65536):
        signs = code % 256
        parity = bin(signs).count("1") % 2
        signs ^= parity
        shift = -0.25 if parity else 0.25
        row = rows[code // 256]
        expected.append([(-v if signs >> j & 1 else v) + shift for v, j in zip(row, SIGN_BITS, strict=True)])
    assert e8p.codebook().tolist() == expected


def test_codebook_figures():
    book = e8p.codebook()
    assert book.dtype is torch.float32 and len(book.unique(dim=0)) == 65536
    assert book.double().square().mean().sqrt().item() == 1.09375
    assert book.abs().max().item() == 2.75


def test_known_vectors():
    decoded = e8p.decode(as_int16(VECTORS))
    assert decoded.tolist() == [v for vector in VECTORS.values() for v in vector]


def test_known_word():
    codes = []
    for i in range(4):
        signs = sum((WORD >> (32 + 4 * j + i) & 1) << j for j in range(8))
        codes.append((WORD >> 8 * i & 0xFF) << 8 | signs)
    assert e8p.decode(as_int16(codes)).reshape(4, 8).tolist() == WORD_VECTORS


def test_kernel_nibble_arithmetic():
    # What a kernel does: XOR 14 negates a nibble, (nibble - 8) / 2 is the value, nibble j takes sign bit j.
    for code in range(0, 65536, 97):
        signs = code & 0xFF
        parity = bin(signs).count("1") & 1
        word = e8p.packed_abs_table()[code >> 8].item() & 0xFFFFFFFF
        vector = [0.0] * 8
        for j, component in enumerate(e8p.NIBBLE_COMPONENT):
            nibble = word >> 4 * j & 15
            if (signs ^ parity) >> j & 1:
                nibble ^= 14
            vector[component] = (nibble - 8) / 2 + (-0.25 if parity else 0.25)
        assert e8p.codebook()[code].tolist() == vector


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 4), (0, 4), (4, 0)])
def test_decode_shapes(shape):
    codes = torch.randint(-32768, 32768, shape, generator=torch.Generator().manual_seed(0)).to(torch.int16)
    decoded = e8p.decode(codes)
    assert decoded.shape == (*shape[:-1], 8 * shape[-1])
    expected = e8p.codebook()[codes.flatten().long() & 0xFFFF]
    assert torch.equal(decoded.reshape(-1, 8), expected)


def test_decode_dtype():
    with pytest.raises(ValueError, match=r"torch.int32.*int16"):
        e8p.decode(torch.zeros(4, dtype=torch.int32))


def test_nearest_of_entries_is_themselves():
    codes = torch.arange(0, 65536, 331)
    found = e8p.nearest(e8p.codebook()[codes])
    assert found.dtype is torch.int16
    assert torch.equal(found.long() & 0xFFFF, codes)


def test_nearest_minimises_the_distance():
    x = torch.randn(150, 8, generator=torch.Generator().manual_seed(0))
    chosen = e8p.decode(e8p.nearest(x, chunk=64)).reshape(-1, 8)
    squares = torch.stack([(row.double() - e8p.codebook()).square().sum(dim=1).amin() for row in x])
    assert torch.equal((x.double() - chosen).square().sum(dim=1), squares)


def test_nearest_breaks_ties_downwards():
    a, b = e8p.codebook()[40000], e8p.codebook()[40003]  # the midpoint of two codes that differ in two signs
    book = e8p.codebook().double()
    middle = ((a + b) / 2)[None]
    distance = (book - middle.double()).square().sum(dim=1)
    smallest = int((distance == distance.min()).nonzero()[0])
    assert (distance == distance.min()).sum() > 1
    assert e8p.nearest(middle).item() & 0xFFFF == smallest


def test_nearest_shapes():
    assert e8p.nearest(torch.zeros(0, 8)).shape == (0,)
    for shape in ((8,), (2, 7)):
        with pytest.raises(ValueError, match=r"not \[N, 8\]"):
            e8p.nearest(torch.zeros(shape))
