# SPDX-License-Identifier: Apache-2.0
"""Published QuIP# and QTIP layers: hashed vectors, and the specification in numpy (relaxml_layers)."""

import hashlib

import numpy
import pytest
import relaxml_layers
import torch
from exl3_layers import lcg
from numerics import FLOAT32_LINEAR, SAMPLE_MOMENT, relative

from quip_vllm.formats import e8p, relaxml
from quip_vllm.formats.e8p_residual import decode, e81b_table
from quip_vllm.formats.spec import FORMATS, LinearSpec, TileOrder
from quip_vllm.formats.trellis import unpack
from quip_vllm.ops import dequantize

N, K = 32, 128


def sha16(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def words(columns):
    """int64 [N, columns] of the bytes of lcg."""
    return torch.from_numpy(numpy.frombuffer(lcg(8 * N * columns), "<i8").copy()).view(N, columns)


def test_a_word_as_published():
    one = torch.zeros(16, 2, dtype=torch.int64)
    one[0, 0] = 0x0123456789ABCDEF
    found = e8p.decode(relaxml.lattice_codes(one))
    assert found[0, :8].tolist() == [-1.25, -1.25, 0.75, 1.75, -0.25, -1.25, 1.75, -0.25]
    assert found[1, :8].tolist() == [-1.25, -1.25, -0.25, -0.25, 1.75, 0.75, 1.75, 0.75]
    assert found[0, 8:16].tolist() == [-1.25, 0.75, -0.25, 1.75, -0.25, 1.75, -0.25, -0.25]
    assert found[1, 8:16].tolist() == [0.75, 1.75, 1.75, 1.75, 0.75, 0.75, 1.75, 0.75]


def test_two_bits_as_published():
    weight = e8p.decode(relaxml.lattice_codes(words(K // 32)))
    assert weight[0, :8].tolist() == [-0.75, 0.25, 1.25, 0.25, 0.25, 0.25, -1.75, -1.75]
    assert weight[17, 64:72].tolist() == [-0.75, 1.25, -0.75, -1.75, -0.75, -0.75, -1.75, 1.25]
    assert weight[31, 120:].tolist() == [0.25, 1.25, 0.25, 1.25, 0.25, 1.25, 0.25, -0.75]
    assert sha16(weight) == "9085eadb35c220ba"


def test_four_bits_as_published():
    first, second = (relaxml.lattice_codes(half.contiguous()) for half in words(K // 16).chunk(2, 1))
    assert sha16(e8p.decode(first)) == "e8a830271dbc2d03" and sha16(e8p.decode(second)) == "178040afbf7897aa"
    assert e8p.decode(second)[0, :8].tolist() == [-0.25, 0.75, -1.25, 1.75, 1.75, 1.75, -0.25, -0.25]
    weight = decode(first, second, 4)
    assert weight[0, :4].tolist() == pytest.approx([-0.822464, 0.467391, 0.887681, 0.757246], abs=1e-6)
    assert weight.double().norm().item() == pytest.approx(72.864626, abs=1e-5)


def test_three_bits_as_published():
    stored = words(3 * K // 64)
    first = relaxml.lattice_codes(stored[:, : K // 32].contiguous())
    second = relaxml.residual_bytes(stored[:, K // 32 :])
    table = e81b_table()[second.long()].reshape(N, K)
    assert sha16(e8p.decode(first)) == "76dccf12878f814c" and sha16(table) == "1b2a964a48ee41cf"
    assert table[0, :8].tolist() == [0, 0, 1, 0, 1, 0, 0, 0] and table[31, 120:].tolist() == [0, -1, 0, 0, 0, 0, 0, 1]
    assert decode(first, second, 3).double().norm().item() == pytest.approx(72.156818, abs=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_lattice_against_the_specification(bits):
    stored = torch.randint(-(2**63), 2**63 - 1, (48, 192 * bits // 64), generator=torch.Generator().manual_seed(bits))
    first = relaxml.lattice_codes(stored[:, :6].contiguous())
    rest = stored[:, 6:].contiguous()
    second = {2: lambda w: None, 3: relaxml.residual_bytes, 4: relaxml.lattice_codes}[bits](rest)
    wanted = torch.from_numpy(relaxml_layers.lattice(stored.numpy(), bits))
    assert relative(decode(first, second, bits), wanted) < FLOAT32_LINEAR


SIDE = 96
PUBLISHED = [  # bits; states of three tiles; first weights; hash; corners and norm of the effective weight
    (
        2,
        ["5e3c e3ca 3ca3 65e3", "b481 4816 816c bb48", "5e0c e0cd 0cd6 25e0"],
        [0.94140625, 0.58984375, 0.078125, -0.546875],
        "5d23a92830fd9389",
        [0.141886, 0.050408, -0.412143, 0.692184, 59.343766],
    ),
    (
        3,
        ["815e 578f e3c3 ae05", "5e0c 832d cb45 f978", "048e 23b1 ec63 1c12"],
        [0.49609375, -0.52734375, -0.0078125, -0.0546875],
        "a767dd4cdb8e835c",
        [0.338094, 0.068871, 0.108067, 1.194759, 59.198935],
    ),
    (
        4,
        ["b481 815e 5e3c d1b4", "8ec6 c65e 5e0c a08e", "6c40 40a3 a304 e46c"],
        [0.4609375, -0.7734375, -0.48046875, -0.63671875],
        "ef3c15ba83638a2e",
        [-0.147542, 0.065808, 0.087446, -0.386010, 59.499369],
    ),
]


def ramp_table():
    i = torch.arange(512)
    return torch.stack([i / 256 - 1, (7 * i % 512) / 256 - 1], 1).half()


def test_every_row_of_the_table_as_published():
    state = torch.arange(65536)
    identity = torch.stack([torch.arange(512) + 1.0, torch.zeros(512)], 1)
    found = FORMATS["hyb"]._function(state, identity, 2)[:, 0]
    index = (found.abs() - 1).to(torch.int32) | (found < 0).to(torch.int32) << 9
    assert sha16(index.to(torch.int16)) == "ea889859e26b58fb"


@pytest.mark.parametrize(("bits", "states", "first", "digest", "effective"), PUBLISHED)
def test_a_trellis_layer_as_published(bits, states, first, digest, effective):
    raw = numpy.frombuffer(lcg(SIDE * SIDE // 8 * bits), "<i2").copy()
    trellis = torch.from_numpy(raw).view(SIDE * SIDE // 256, 16 * bits)
    packed = relaxml.streams(trellis, SIDE, SIDE, kernel_order=True)
    tiles = packed.unflatten(1, (-1, 16 * bits))
    for (i, j), wanted in zip([(0, 0), (1, 0), (0, 1)], states, strict=True):
        found = unpack(tiles[i, j], bits, 2)
        assert " ".join(f"{int(found[s]):04x}" for s in (0, 1, 2, 127)) == wanted
    weight = FORMATS["hyb"].decode({"packed": packed, "table": ramp_table()}, bits, TileOrder.MMA)
    assert weight[0, :4].tolist() == first and sha16(weight.half()) == digest
    if bits == 2:
        assert weight[8, 0] == 0.015625 and weight[0, 8] == -0.80859375
    i = torch.arange(SIDE)
    vectors = {"su": (-1.0) ** i * (1 + i / 256), "sv": (-1.0) ** (i // 3) * (0.5 + i / 128)}
    layer = dequantize(LinearSpec("hyb", bits, SIDE, (SIDE,)), {"packed": packed, "table": ramp_table(), **vectors})
    *corners, norm = effective
    assert [layer[0, 0], layer[0, 1], layer[1, 0], layer[95, 95]] == pytest.approx(corners, abs=2e-6)
    assert layer.double().norm().item() == pytest.approx(norm, abs=1e-5)


@pytest.mark.parametrize(("mode", "code"), [("quantlut_sym", "hyb"), ("1mad", "1mad"), ("3inst", "3inst")])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_trellis_against_the_specification(mode, code, bits):
    n, k = 64, 96
    draw = numpy.random.default_rng(bits)
    trellis = draw.integers(-32768, 32768, (n * k // 256, 16 * bits)).astype(numpy.int16)
    table = draw.normal(size=(512, 2)).astype(numpy.float16)
    kernel_order = code == "hyb" and bits > 1
    packed = relaxml.streams(torch.from_numpy(trellis), n, k, kernel_order)
    order = TileOrder.MMA if kernel_order else TileOrder.ROW_MAJOR
    found = FORMATS[code].decode(
        {"packed": packed, "table": torch.from_numpy(table)} if code == "hyb" else {"packed": packed}, bits, order
    )
    wanted = relaxml_layers.trellis_weight(trellis, n, k, bits, mode, table if code == "hyb" else None)
    assert torch.equal(found, torch.from_numpy(wanted).float())


TABLED = [
    ("2mad", 0, 1),
    ("lut", 16, 1),
    ("lut", 16, 2),
    ("lut", 10, 1),
    ("lut", 10, 2),
    ("quantlut", 9, 1),
    ("quantlut", 9, 2),
]


@pytest.mark.parametrize(("mode", "table_bits", "dim"), TABLED)
@pytest.mark.parametrize("bits", [1, 3, 5])
def test_stored_tables_against_the_specification(mode, table_bits, dim, bits):
    n, k = 64, 96
    draw = numpy.random.default_rng(bits)
    trellis = draw.integers(-32768, 32768, (n * k // 256, 16 * bits)).astype(numpy.int16)
    tlut = draw.normal(size=(1 << table_bits, dim)).astype(numpy.float16) if table_bits else None
    table = relaxml.state_table(mode, None if tlut is None else torch.from_numpy(tlut))
    packed = relaxml.streams(torch.from_numpy(trellis), n, k, kernel_order=False)
    code = FORMATS[("table", "pairs")[dim - 1]]
    found = code.decode({"packed": packed, "table": table}, bits, TileOrder.ROW_MAJOR)
    if mode == "2mad":
        found = found / relaxml.TWO_MAD_SCALE
    wanted = relaxml_layers.trellis_weight(trellis, n, k, bits, mode, tlut)
    assert torch.equal(found, torch.from_numpy(wanted).float())


def test_2mad_has_about_unit_variance():
    values = relaxml.state_table("2mad", None).double() / relaxml.TWO_MAD_SCALE
    assert abs(values.std().item() - 1) < SAMPLE_MOMENT and abs(values.mean().item()) < SAMPLE_MOMENT
