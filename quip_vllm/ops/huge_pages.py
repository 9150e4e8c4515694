# SPDX-License-Identifier: Apache-2.0
"""Huge pages of Linux for packed weights: a CPU that reads all of them for each token finds the pages sooner."""

import ctypes
import sys

from torch import Tensor

SIZE = 2 << 20
"""Of a huge page of x86-64 and, with pages of 4 KiB, of arm64."""
MADV_COLLAPSE = 25
"""Of madvise(2), from Linux 6.1 on. Unlike MADV_HUGEPAGE it moves memory that is in use, at once."""


def collapse(tensor: Tensor) -> int:
    """Asks Linux to keep the memory of a tensor in huge pages; its address and contents stay.

    Only a tensor on a CPU of at least one huge page is looked at. The first and the last page may hold other data of
    the process as well. It is advice: where there is no such call, or no such page is free, nothing changes.

    Returns:
        The number of huge pages, 0 if there is none.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < SIZE or sys.platform != "linux":
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    pages = range(tensor.data_ptr() // SIZE * SIZE, tensor.data_ptr() + tensor.nbytes, SIZE)
    return sum(madvise(page, SIZE, MADV_COLLAPSE) == 0 for page in pages)
