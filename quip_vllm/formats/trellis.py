# SPDX-License-Identifier: Apache-2.0
"""The bitshift trellis (QTIP, arXiv 2406.11235): states of a tail-biting walk <-> packed words.

A tile is one circular stream of 256 * bits bits. Step s reads the 16-bit window, its state, that begins at bit
s * step_bits with step_bits = bits * vector_dim; a step yields vector_dim weights. Here bits = 3, vector_dim = 1:

    stream   b0 b1 b2 b3 b4 b5 ...          b15 b16 b17 b18 ...        b767 | b0 b1 ...   (circular)
    state 0  [b0 ........................... b15]
    state 1           [b3 ............................. b18]
    word  0  [b0 ........................... b15][b16 ...  word 1

The first bit of a window is the most significant of the state, and likewise of the word. So consecutive states share
16 - step_bits bits, none if step_bits is 16, and exactly `bits` bits per weight are stored: 16 * bits words per tile.

At a half rate, bits - 1/2 per weight, the steps take bits - 1 and bits in turn: step s begins at bit bits * s - s // 2,
and a tile has 16 * bits - 8 words. Here bits = 3:

    state 0  [b0 ........................... b15]
    state 1        [b2 .......................... b17]
    state 2                 [b5 .......................... b20]
"""

import torch

from quip_vllm.formats.tile import TILE

STATE_BITS = 16
"""Bits in a trellis state: the window of the bit stream that decides one step's weights."""

SEQUENCE = TILE * TILE
"""Weights in one sequence, that is in one tile."""

_STATE_MASK = (1 << STATE_BITS) - 1


def pack(states: torch.Tensor, bits: int, vector_dim: int) -> torch.Tensor:
    """Packs tail-biting walks losslessly.

    Args:
        states: integer [..., 256/vector_dim], each 0..65535; the low 16 - step_bits bits of a state are the high
            ones of the next, and those of the last are the first's.
        bits: stored bits per weight.
        vector_dim: weights per step, 1 or 2.

    Returns:
        int16 [..., 16*bits], the words of each stream (a word above 32767 reads as negative).

    Raises:
        ValueError: if the states are not such walks, or bits and vector_dim do not fit a 16-bit state.
    """
    step_bits = _step_bits(bits, vector_dim)
    steps = SEQUENCE // vector_dim
    if states.is_floating_point() or states.ndim < 1 or states.shape[-1] != steps:
        raise ValueError(
            f"states {states.dtype} {list(states.shape)}: need integers with {steps} steps ({SEQUENCE} weights, "
            f"{vector_dim} a step) in the last dimension; encode whole tiles"
        )
    states = states.to(torch.int32)
    if bool(((states < 0) | (states > _STATE_MASK)).any()):
        raise ValueError(
            f"states outside 0..{_STATE_MASK}: a state has {STATE_BITS} bits; mask them with {_STATE_MASK:#x}"
        )
    following = states.roll(-1, dims=-1)
    broken = (states & (_STATE_MASK >> step_bits)) != (following >> step_bits)
    if bool(broken.any()):
        step = int(broken.reshape(-1, steps).any(dim=0).nonzero()[0])
        raise ValueError(
            f"states are not a tail-biting walk: at step {step} the low {STATE_BITS - step_bits} bits differ from the "
            f"high bits of the next state (the last step is followed by the first); check bits={bits}, "
            f"vector_dim={vector_dim} and the encoder"
        )
    # Word w begins in step s = 16w // step_bits, `offset` bits after its start: state s, extended by the step_bits new
    # bits of state s + 1, contains it.
    start = torch.arange(STATE_BITS * bits, dtype=torch.int64, device=states.device) * STATE_BITS
    step_of_word, offset = start // step_bits, (start % step_bits).to(torch.int32)
    fresh = following[..., step_of_word] & ((1 << step_bits) - 1)
    return to_int16(states[..., step_of_word] << offset | fresh >> (step_bits - offset))


def words_per_tile(bits: int, half: bool = False) -> int:
    """Words of 16 bits in a tile; `half` is that of `unpack`."""
    return STATE_BITS * bits - (STATE_BITS // 2 if half else 0)


def unpack(packed: torch.Tensor, bits: int, vector_dim: int, half: bool = False) -> torch.Tensor:
    """Inverse of `pack`, which has no half rates.

    Args:
        packed: int16 [..., words_per_tile].
        bits: stored bits per weight.
        vector_dim: weights per step, 1 or 2.
        half: whether half a bit less is stored, and steps take bits - 1 and bits in turn.

    Returns:
        int32 [..., 256/vector_dim], states 0..65535.

    Raises:
        ValueError: if packed is not int16 with that many words, or bits and vector_dim do not fit a 16-bit state.
    """
    step_bits, count = _step_bits(bits, vector_dim), words_per_tile(bits, half)
    if packed.dtype is not torch.int16 or packed.ndim < 1 or packed.shape[-1] != count:
        raise ValueError(
            f"packed {packed.dtype} {list(packed.shape)}: need int16 with {count} words "
            f"(16 * bits{' - 8' if half else ''}) in the last dimension; check bits, and split a weight's columns into "
            "tiles first"
        )
    words = packed.to(torch.int32) & _STATE_MASK
    step = torch.arange(SEQUENCE // vector_dim, dtype=torch.int64, device=packed.device)
    start = step * step_bits - (step // 2 if half else 0)
    word, offset = start // STATE_BITS, (start % STATE_BITS).to(torch.int32)
    following = words[..., (word + 1) % count]
    return (words[..., word] << offset | following >> (STATE_BITS - offset)) & _STATE_MASK


def runs_of_half_rate(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The runs of 32 steps of tiles at a half rate, each with the word that follows it, as kernels read them.

    Args:
        words: integers [..., words_per_tile].
        bits: see `unpack`.

    Returns:
        [..., 8, 2*bits].
    """
    runs = words.unflatten(-1, (-1, 2 * bits - 1))
    return torch.cat([runs, runs.roll(-1, -2)[..., :1]], dim=-1)


def _step_bits(bits: int, vector_dim: int) -> int:
    if vector_dim not in (1, 2) or not 1 <= bits * vector_dim <= STATE_BITS:
        raise ValueError(
            f"bits={bits} with vector_dim={vector_dim}: vector_dim has to be 1 or 2 and bits * vector_dim in "
            f"1..{STATE_BITS}, the bits of a state; choose fewer bits"
        )
    return bits * vector_dim


def to_int16(words: torch.Tensor) -> torch.Tensor:
    """The int16 with the low 16 bits of each integer: no conversion out of range."""
    sign = 1 << (STATE_BITS - 1)
    return (((words & _STATE_MASK) ^ sign) - sign).to(torch.int16)
