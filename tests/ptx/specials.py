# SPDX-License-Identifier: Apache-2.0
"""The read-only registers of the machine, such as %tid.x."""

import numpy as np


def special_value(machine, name: str):
    """The value of a special register, for each lane or for all; None where it is not known."""
    base, _, axis = name.partition(".")
    if axis in ("x", "y", "z") and base in ("tid", "ntid", "ctaid", "nctaid"):
        return _position(machine, base, "xyz".index(axis))
    lane, one = machine.thread_of % 32, np.int64(1)
    return {
        "laneid": lane,
        "warpid": machine.warp_of,
        "lanemask_eq": one << lane,
        "lanemask_lt": (one << lane) - 1,
        "lanemask_le": (one << (lane + 1)) - 1,
        "lanemask_gt": 0xFFFFFFFF ^ ((one << (lane + 1)) - 1),
        "lanemask_ge": 0xFFFFFFFF ^ ((one << lane) - 1),
    }.get(name)


def _position(machine, base: str, axis: int):
    """Threads and blocks are numbered with x running fastest."""
    size = machine.launch.block if base in ("tid", "ntid") else machine.launch.grid
    if base.startswith("n"):
        return size[axis]
    index = machine.thread_of if base == "tid" else machine.first + machine.block_of
    return (index % size[0], index // size[0] % size[1], index // (size[0] * size[1]))[axis]
