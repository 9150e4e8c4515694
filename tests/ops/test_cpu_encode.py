# SPDX-License-Identifier: Apache-2.0
"""The native searches: exact where they must be, and as good as the papers say."""

import pytest
import torch
from numerics import DISTORTION, FLOAT32_DISTANCE

from quip_vllm.formats import e8p
from quip_vllm.formats.spec import FORMATS, methods
from quip_vllm.formats.trellis import pack, unpack
from quip_vllm.ops import encode_lattice, encode_trellis
from quip_vllm.quantizer.rounding.encoders import code_rms

TRELLIS = [(code.name, bits) for code in methods()["qtip"] if code.quantized for bits in code.bits]


def squared_error(states, values, targets):
    return (values[states.long()].flatten(1) - targets).square().sum(1)


@pytest.mark.parametrize(("code", "bits"), TRELLIS, ids=str)
def test_a_decodable_sequence_encodes_with_zero_loss(code, bits):
    packed = torch.randint(-32768, 32768, (2, 16 * bits), dtype=torch.int16)
    targets = FORMATS[code].decode_sequences(packed, bits)
    values = FORMATS[code].values(bits=bits)
    states = encode_trellis(targets, values, bits)
    assert squared_error(states, values, targets).max() == 0
    assert torch.equal(unpack(pack(states, bits, FORMATS[code].vector_dim), bits, FORMATS[code].vector_dim), states)


@pytest.mark.parametrize(("code", "published"), [("1mad", 0.069), ("3inst", 0.069), ("hyb", 0.071)])
def test_gaussian_distortion_at_two_bits(code, published):
    values = FORMATS[code].values()
    rms = code_rms(FORMATS[code], values)
    targets = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))
    states = encode_trellis(targets * rms, values, 2)
    distortion = float(squared_error(states, values / rms, targets).mean()) / 256
    assert abs(distortion / published - 1) < DISTORTION


def test_lattice_distortion_at_its_scale():
    targets = torch.randn(1 << 16, 8, generator=torch.Generator().manual_seed(0))
    decoded = e8p.decode(encode_lattice(targets * 1.03)[:, None]) / 1.03
    assert abs(float((decoded - targets).square().mean()) / 0.0918 - 1) < DISTORTION


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_nearest_lattice_point_is_the_nearest(spread):
    x = spread * torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))

    def distance(codes):
        return (e8p.decode(codes[:, None]).double() - x.double()).square().sum(1)

    torch.testing.assert_close(
        distance(encode_lattice(x)), distance(e8p.nearest(x)), rtol=FLOAT32_DISTANCE, atol=FLOAT32_DISTANCE
    )


def test_every_lattice_code_is_its_own_nearest():
    codes = torch.arange(65536).to(torch.int16)
    assert torch.equal(encode_lattice(e8p.decode(codes[:, None])), codes)


@pytest.mark.parametrize(("code", "bits"), [("1mad", 2), ("hyb", 3)], ids=str)
def test_search_beats_any_small_change(code, bits):
    """No other bit stream one bit away is closer: a local minimum at least, for a target inside the code's range."""
    values, dim = FORMATS[code].values(), FORMATS[code].vector_dim
    targets = torch.randn(1, 256, generator=torch.Generator().manual_seed(3))
    states = encode_trellis(targets, values, bits)
    best = squared_error(states, values, targets)
    packed = pack(states, bits, dim)
    for bit in range(0, 256 * bits, 7):
        other = packed.clone()
        other[0, bit // 16] ^= torch.tensor(1 << (bit % 16)).to(torch.int16)
        assert squared_error(unpack(other, bits, dim), values, targets) >= best * (1 - FLOAT32_DISTANCE)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e4, 1e4])
@pytest.mark.parametrize(("code", "bits"), [("1mad", 1), ("3inst", 4), ("hyb", 4)], ids=str)
def test_targets_outside_the_range_still_give_a_walk(code, bits, value):
    states = encode_trellis(torch.full((1, 256), value), FORMATS[code].values(), bits)
    assert pack(states, bits, FORMATS[code].vector_dim).shape == (1, 16 * bits)


def test_bad_arguments_are_refused():
    with pytest.raises(RuntimeError, match="components"):
        encode_trellis(torch.zeros(1, 256), torch.zeros(65536, 2), 5)
    with pytest.raises(RuntimeError, match="targets"):
        encode_trellis(torch.zeros(1, 255), torch.zeros(65536, 1), 2)
