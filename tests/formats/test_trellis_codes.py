# SPDX-License-Identifier: Apache-2.0
"""Every state of every trellis code against scalar arithmetic written from the papers' definitions."""

import statistics
import struct

import numpy
import pytest
import torch
from numerics import FORMULA_DIGITS, SAMPLE_MOMENT, TABLE_INTEGERS

from quip_vllm.formats.spec import FORMATS, methods
from quip_vllm.formats.tile import TILE_COL, TILE_ROW
from quip_vllm.formats.trellis import unpack
from quip_vllm.formats.trellis_codes import HYB, LUT, ONE_MAD, THREE_INST, TrellisCode

RATES = [(code.name, bits) for code in methods()["qtip"] if code.quantized for bits in code.bits]


def half(bits):
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def round_to_half(value):
    return struct.unpack("<e", struct.pack("<e", value))[0]


def one_mad(x):
    total = sum(struct.pack("<I", (34038481 * x + 76625530) % 2**32))
    return [float(numpy.float32(total - 510) / numpy.float32(147.800537109375))]


def three_inst(x):
    low, high = struct.unpack("<HH", struct.pack("<I", (89226354 * x + 64248484) % 2**32))
    return [round_to_half(half((low & 0x8FFF) ^ 0x3B60) + half((high & 0x8FFF) ^ 0x3B60))]


def mcg(x):
    low, high = struct.unpack("<HH", struct.pack("<I", 0xCBAC1FED * x % 2**32))
    return [round_to_half(half((low & 0x8FFF) ^ 0x3B60) + half((high & 0x8FFF) ^ 0x3B60))]


def mul1(x):
    total = sum(struct.pack("<I", 0x83DCD12D * x % 2**32))
    return [round_to_half((1024 + total) * half(0x1EEE) + half(0xC931))]


def hyb(x, rows):
    h = (x * x + x) % 2**32
    first, second = rows[h // 64 % 512]
    return [-first if h // 32768 % 2 else first, second]


def lut(x):
    x ^= x >> 8
    x = x * 42969 % 65536
    x ^= x >> 8
    x = x * 22117 % 65536
    x ^= x >> 8
    return [round_to_half(float(numpy.float32(statistics.NormalDist().inv_cdf((x + 0.5) / 65536))))]


@pytest.mark.parametrize("code", ["1mad", "3inst", "hyb", "lut", "mcg", "mul1"])
def test_all_states(code):
    rows = HYB.table(2).tolist()
    scalar = {"1mad": one_mad, "3inst": three_inst, "hyb": lambda x: hyb(x, rows), "lut": lut, "mcg": mcg, "mul1": mul1}
    scalar = scalar[code]
    values = FORMATS[code].values()
    assert values.dtype is torch.float32 and values.shape == (65536, FORMATS[code].vector_dim)
    assert values.tolist() == [scalar(x) for x in range(65536)]


@pytest.mark.parametrize(
    ("code", "first"),
    [
        ("1mad", [-1.25169, -0.83897, -0.42625, -0.01353]),
        ("3inst", [0.76807, -0.91943, 0.93164, 0.29443]),
    ],
)
def test_first_states_as_published(code, first):
    found = FORMATS[code].values()[:4, 0].tolist()
    assert all(abs(a - b) <= FORMULA_DIGITS for a, b in zip(found, first, strict=True))


def test_moments_as_published():
    mad, inst = ONE_MAD.values(), THREE_INST.values()
    assert len(mad.unique()) == 908
    assert abs(mad.mean().item() + 0.00039) < FORMULA_DIGITS
    assert abs(mad.std(correction=0).item() - 1.00009) < FORMULA_DIGITS
    assert abs(inst.std(correction=0).item() - 1.243711) < FORMULA_DIGITS


def test_hyb_reaches_every_row_and_sign_equally_often():
    rows = torch.stack([torch.arange(512.0) + 1, torch.zeros(512)], dim=1)
    values, counts = HYB.values(rows)[:, 0].unique(return_counts=True)
    assert torch.equal(values, torch.cat([-torch.arange(512.0, 0, -1), torch.arange(512.0) + 1]))
    assert counts.tolist() == [64] * 1024
    assert HYB.values(rows)[0x1234, 0] == 436  # row 435, not negated


def test_hyb_negates_component_0_only():
    values = HYB.values(torch.ones(512, 2))
    assert set(values[:, 0].tolist()) == {-1.0, 1.0} and set(values[:, 1].tolist()) == {1.0}


@pytest.mark.parametrize("lut_bits", [1, 8, 11])
def test_hyb_tables_of_other_sizes(lut_bits):
    rows = torch.stack([torch.arange(2.0**lut_bits), torch.arange(2.0**lut_bits)], dim=1)
    values = HYB.values(rows)
    for x in (0, 1, 0x1234, 0xFFFF):
        h = x * x + x
        assert values[x, 1] == h // 2 ** (15 - lut_bits) % 2**lut_bits


@pytest.mark.parametrize("bits", HYB.bits)
def test_default_hyb_table_is_a_grid(bits):
    table = HYB.table(bits)
    assert table.dtype is torch.float16 and table.shape == (512, 2)
    for row in range(512):  # what kernels look for
        j, i = row // 16 % 16, row % 16
        assert table[row, 0] == table[j // 8 * 128 + i, 0] >= 0
        assert table[row, 1] == table[j * 16, 1] * (1 if row < 256 else -1) and table[j * 16, 1] >= 0
    numbers = table.double() * 63 / table.max().double()
    assert (numbers - numbers.round()).abs().max() < TABLE_INTEGERS


def test_lut_is_a_permutation_of_gaussian_quantiles():
    values = LUT.values()[:, 0].double()
    expected = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536).float().half()
    assert torch.equal(values.sort().values, expected.double())


@pytest.mark.parametrize("shift", range(1, 9))
def test_lut_of_successive_states_is_uncorrelated(shift):
    values = LUT.values()[:, 0].double()
    state = torch.arange(65536)
    successors = values.reshape(-1, 1 << shift).mean(dim=1)  # mean over the new bits, by the bits that stay
    assert abs((values * successors[state & (0xFFFF >> shift)]).mean().item()) < SAMPLE_MOMENT


@pytest.mark.parametrize(("code", "bits"), RATES)
def test_decode_weight_places_every_state(code, bits):
    n, k = 32, 48
    packed = torch.randint(-32768, 32768, (n // 16, k * bits), generator=torch.Generator().manual_seed(bits))
    packed = packed.to(torch.int16)
    w = FORMATS[code].decode_weight(packed, bits)
    assert w.dtype is torch.float32 and w.shape == (n, k)
    i, j = 1, 2
    words = packed[i, j * 16 * bits : (j + 1) * 16 * bits]
    dim, values = FORMATS[code].vector_dim, FORMATS[code].values(bits=bits)
    states = unpack(words, bits, dim).tolist()
    sequence = FORMATS[code].decode_sequences(words, bits)
    assert sequence.shape == (256,)
    for t in range(256):
        expected = values[states[t // dim], t % dim]
        assert sequence[t] == expected
        assert w[16 * i + TILE_ROW[t], 16 * j + TILE_COL[t]] == expected


def test_trained_table_is_used():
    packed = torch.randint(-32768, 32768, (1, 32), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    doubled = HYB.table(2) * 2
    assert torch.equal(HYB.decode_weight(packed, 2, doubled), 2 * HYB.decode_weight(packed, 2))


def test_tables_only_for_hyb():
    for code in (ONE_MAD, THREE_INST, LUT):
        assert code.table(2) is None
        with pytest.raises(ValueError, match=f"code {code.name} with a table.*leave the table out"):
            code.values(torch.zeros(512, 2))


@pytest.mark.parametrize("shape", [(512,), (500, 2), (512, 1), (1, 2), (65536, 2)])
def test_table_of_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"table \[.*needs \[2\^b, 2\]"):
        HYB.values(torch.zeros(shape))


def test_not_whole_tiles():
    with pytest.raises(ValueError, match=r"\[2, 40\] with bits=2.*32\], 16 \* bits words"):
        ONE_MAD.decode_weight(torch.zeros(2, 40, dtype=torch.int16), 2)
    with pytest.raises(ValueError, match="bits=0"):
        ONE_MAD.decode_weight(torch.zeros(2, 40, dtype=torch.int16), 0)


def test_cached_values_are_usable_in_autograd():
    TrellisCode._default_values.cache_clear()
    with torch.inference_mode():
        values = ONE_MAD.values()
    assert not values.is_inference()
