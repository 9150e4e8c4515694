# SPDX-License-Identifier: Apache-2.0
"""Packing of tail-biting walks against a bit string kept as Python text."""

import pytest
import torch

from quip_vllm.formats.spec import methods
from quip_vllm.formats.trellis import pack, unpack

CODES = methods()["qtip"]
RATES = sorted({(bits, code.vector_dim) for code in CODES for bits in code.bits} | {(8, 2)})


def random_words(*shape, seed=0):
    return torch.randint(-32768, 32768, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int16)


def states_of_stream(words, bits, dim):
    """The definition: windows of a circular text of zeros and ones."""
    stream = "".join(format(word & 0xFFFF, "016b") for word in words)
    assert len(stream) == 256 * bits
    twice = stream + stream
    return [int(twice[step * bits * dim :][:16], 2) for step in range(256 // dim)]


@pytest.mark.parametrize(("bits", "dim"), RATES)
def test_unpack_by_definition_and_round_trip(bits, dim):
    packed = random_words(3, 2, 16 * bits)
    states = unpack(packed, bits, dim)
    assert states.dtype is torch.int32 and states.shape == (3, 2, 256 // dim)
    assert states[2, 1].tolist() == states_of_stream(packed[2, 1].tolist(), bits, dim)
    again = pack(states, bits, dim)
    assert again.dtype is torch.int16 and torch.equal(again, packed)
    assert torch.equal(pack(states.to(torch.int64), bits, dim), packed)


@pytest.mark.parametrize(("bits", "dim"), RATES)
def test_first_bits_and_wrap(bits, dim):
    step_bits = bits * dim
    words = torch.zeros(16 * bits, dtype=torch.int16)
    words[0] = -32768  # only bit 0 of the stream
    states = unpack(words, bits, dim)
    expected = [0] * (256 // dim)
    expected[0] = 0x8000
    for back in range(1, 16):  # windows that begin `back` bits earlier, some of them at the end of the stream
        if back % step_bits == 0:
            expected[-(back // step_bits)] = 0x8000 >> back
    assert states.tolist() == expected


@pytest.mark.parametrize(("bits", "dim"), [(bits, dim) for bits, dim in RATES if bits * dim < 16])
def test_broken_walks_are_refused(bits, dim):
    states = unpack(random_words(2, 16 * bits), bits, dim)
    for step in (0, 100, 256 // dim - 1):
        broken = states.clone()
        broken[1, step] ^= 1  # the lowest bit belongs to the next state as well
        with pytest.raises(ValueError, match=rf"tail-biting walk: at step {step} .*bits={bits}"):
            pack(broken, bits, dim)


def test_open_ended_walk_is_refused():
    bits, state, states = 2, 0x1234, []
    for step in range(256):
        states.append(state)
        state = (state << bits | step % 3) & 0xFFFF
    with pytest.raises(ValueError, match="at step 255 .*tail-biting|tail-biting.*at step 255 "):
        pack(torch.tensor(states), bits, 1)


def test_unrelated_states_at_16_bits_a_step():
    states = torch.randint(0, 65536, (4, 128), generator=torch.Generator().manual_seed(0))
    packed = pack(states, 8, 2)
    assert torch.equal(packed.to(torch.int64) & 0xFFFF, states)


@pytest.mark.parametrize("bad", [-1, 65536])
def test_states_out_of_range(bad):
    states = torch.zeros(256, dtype=torch.int64)
    states[9] = bad
    with pytest.raises(ValueError, match="outside 0..65535"):
        pack(states, 2, 1)


def test_wrong_shapes_and_dtypes():
    with pytest.raises(ValueError, match=r"\[255\].*256 steps"):
        pack(torch.zeros(255, dtype=torch.int32), 2, 1)
    with pytest.raises(ValueError, match="float32"):
        pack(torch.zeros(256), 2, 1)
    with pytest.raises(ValueError, match=r"\[33\].*32 words"):
        unpack(torch.zeros(33, dtype=torch.int16), 2, 1)
    with pytest.raises(ValueError, match="int32.*need int16"):
        unpack(torch.zeros(32, dtype=torch.int32), 2, 1)
    for bits, dim in ((0, 1), (17, 1), (9, 2), (2, 3)):
        with pytest.raises(ValueError, match=f"bits={bits} with vector_dim={dim}"):
            unpack(torch.zeros(32, dtype=torch.int16), bits, dim)
