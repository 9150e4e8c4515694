# SPDX-License-Identifier: Apache-2.0
"""The memories of a launch: buffers at made-up 64-bit addresses, shared memory that knows what was written."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Where a generic address points to: global addresses stand for themselves, the others lie in windows.
GLOBAL_START = 0x7F00_0000_0000
WINDOWS = {"shared": 0x0100_0000_0000, "local": 0x0200_0000_0000, "param": 0x0300_0000_0000}
WINDOW_BYTES = 1 << 40
_GUARD = 4096
_ALIGN = 256


@dataclass
class Pointer:
    """A device pointer into a NumPy array, for structs and for pointers behind the start of a buffer.

    Attributes:
        array: The buffer.
        offset: Bytes from its first element.
    """

    array: np.ndarray
    offset: int = 0


class Struct:
    """A struct passed by value, laid out as C does.

    Args:
        *fields: NumPy scalars, `Pointer`s, nested `Struct`s, or NumPy arrays for arrays within the struct.
    """

    def __init__(self, *fields) -> None:
        self.fields = fields


class Buffers:
    """Global memory: one image of all buffers with gaps between them, copied back into the arrays afterwards."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray | bytes] = []
        self._offsets: list[int] = []
        self._ends: list[int] = []
        self._size = _GUARD

    def add(self, array: np.ndarray | bytes) -> int:
        """Gives a buffer its address; the same array gets the same one.

        Raises:
            ValueError: The array is not contiguous or shares memory with another.
        """
        for known, offset in zip(self._arrays, self._offsets, strict=True):
            if known is array:
                return GLOBAL_START + offset
            if isinstance(array, np.ndarray) and isinstance(known, np.ndarray) and np.may_share_memory(known, array):
                raise ValueError("two buffers share memory: pass one array, and Pointer(array, offset) into it")
        if isinstance(array, np.ndarray) and not array.flags.c_contiguous:
            raise ValueError("a buffer must be C-contiguous")
        size = array.nbytes if isinstance(array, np.ndarray) else len(array)
        offset = self._size
        self._arrays.append(array)
        self._offsets.append(offset)
        self._ends.append(offset + size)
        self._size = -(-(offset + size + _GUARD) // _ALIGN) * _ALIGN
        return GLOBAL_START + offset

    def load(self) -> None:
        """Makes the image; no buffer can be added after it."""
        image = np.full(self._size, 0xCB, np.uint8)
        for array, start, end in zip(self._arrays, self._offsets, self._ends, strict=True):
            image[start:end] = np.frombuffer(array, np.uint8) if end > start else 0
        self.views = {size: image.view(f"u{size}") for size in (1, 2, 4, 8)}
        self._starts = np.array(self._offsets, np.int64)
        self._limits = np.array(self._ends, np.int64)
        self._writable = np.array([isinstance(a, np.ndarray) and a.flags.writeable for a in self._arrays], bool)

    def store(self) -> None:
        """Copies the image back into the arrays."""
        for array, start, end in zip(self._arrays, self._offsets, self._ends, strict=True):
            if isinstance(array, np.ndarray) and array.flags.writeable and end > start:
                array.reshape(-1).view(np.uint8)[:] = self.views[1][start:end]

    def check(self, offsets: np.ndarray, width: int, write: bool) -> tuple[str, int] | None:
        """What is wrong with an access of `width` bytes at these offsets of the image and at which of them, or None."""
        low, high = int(offsets.min()), int(offsets.max())
        # Most often all lanes are in one buffer.
        buffer = bisect.bisect_right(self._offsets, low) - 1
        if buffer >= 0 and high + width <= self._ends[buffer]:
            return ("global store into a read-only buffer", 0) if write and not self._writable[buffer] else None
        which = np.searchsorted(self._starts, offsets, side="right") - 1
        inside = (which >= 0) & (offsets + width <= self._limits[which])
        if not inside.all():
            return "global access out of bounds", int(np.argmin(inside))
        if write and not self._writable[which].all():
            return "global store into a read-only buffer", int(np.argmin(self._writable[which]))
        return None


class Scratch:
    """Shared memory of some blocks, or local memory of some threads: `owners` parts of `size` bytes each."""

    def __init__(self, owners: int, size: int) -> None:
        self.size = size
        self.stride = -(-size // 16) * 16
        bytes_ = np.full(owners * self.stride, 0xCB, np.uint8)
        written = np.zeros(owners * self.stride, np.uint8)
        self.views = {width: bytes_.view(f"u{width}") for width in (1, 2, 4, 8)}
        self.written = {width: written.view(f"u{width}") for width in (1, 2, 4, 8)}

    def known(self, index: np.ndarray, width: int) -> np.ndarray:
        """Whether all bytes of the elements at these indices were written."""
        return self.written[width][index] == int.from_bytes(b"\1" * width, "little")


def pack(value, size: int, buffers: Buffers) -> bytes:
    """The bytes of one kernel argument of `size` bytes; an int takes the size of its parameter."""
    if isinstance(value, np.ndarray):
        return buffers.add(value).to_bytes(8, "little")
    if isinstance(value, int) and not isinstance(value, bool):
        return (value % (1 << (8 * size))).to_bytes(size, "little")
    return _field(value, buffers)[0]


def _field(value, buffers: Buffers) -> tuple[bytes, int]:
    """The bytes and the alignment of a field."""
    if value is None:
        return bytes(8), 8
    if isinstance(value, Pointer):
        return (buffers.add(value.array) + value.offset).to_bytes(8, "little"), 8
    if isinstance(value, Struct):
        return _layout(value.fields, buffers)
    if isinstance(value, bytes):
        return value, 1
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tobytes(), value.dtype.itemsize
    raise TypeError(f"cannot pass {type(value).__name__} to a kernel: give NumPy arrays and scalars, Pointer or Struct")


def _layout(fields: Sequence, buffers: Buffers) -> tuple[bytes, int]:
    data, widest = b"", 1
    for each in fields:
        part, align = _field(each, buffers)
        data = data.ljust(-(-len(data) // align) * align, b"\0") + part
        widest = max(widest, align)
    return data.ljust(-(-len(data) // widest) * widest, b"\0"), widest
