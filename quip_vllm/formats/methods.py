# SPDX-License-Identifier: Apache-2.0
"""The quantization methods, the trellis codes, and which bit rates each allows."""

import enum


class Method(enum.Enum):
    """How a weight is quantized; the value is `quant_method` in config.json."""

    QTIP = "qtip"
    QUIP_SHARP = "quip_sharp"


class Code(enum.Enum):
    """How a trellis state becomes weights (QTIP, arXiv 2406.11235); the value is `code` in config.json."""

    ONE_MAD = "1mad"
    THREE_INST = "3inst"
    HYB = "hyb"
    LUT = "lut"


STATE_BITS = 16
"""Bits in a trellis state: the window of the bit stream that decides one step's weights."""


def vector_dim(code: Code) -> int:
    """Returns how many weights one trellis step of this code yields."""
    return 2 if code is Code.HYB else 1


def supported_bits(method: Method, code: Code | None = None) -> tuple[int, ...]:
    """Returns the allowed code bits per weight, ascending.

    HYB stops at 4: its 1024 distinct vectors of two weights carry at most 5 bits a weight.

    Args:
        method: the quantization method.
        code: the trellis code, required for QTIP and absent for QuIP#.

    Returns:
        Bits per weight.

    Raises:
        ValueError: if the code is missing for QTIP, or given for QuIP#.
    """
    if method is Method.QUIP_SHARP:
        if code is not None:
            raise ValueError(f"code {code.value!r} with method 'quip_sharp': only 'qtip' takes a code; leave it out")
        return (2, 3, 4)
    if code is None:
        raise ValueError(f"method 'qtip' without a code: it needs one of {[c.value for c in Code]}; add code")
    return (1, 2, 3, 4) if code is Code.HYB else (1, 2, 3, 4, 5, 6, 7, 8)
