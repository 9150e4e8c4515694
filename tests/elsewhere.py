# SPDX-License-Identifier: Apache-2.0
"""A device that is not there: its tensors lie in the CPU's memory, and an op that mixes them with the CPU's fails.

Inside ``with Elsewhere():`` what is made on DEVICE, or moved there, is such a tensor. So code that makes a tensor on
the wrong device fails as it would on a GPU.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("elsewhere")
DEVICE = torch.device("elsewhere", 0)
MOVES = {"_to_copy", "to", "copy_"}
"""Ops that may have tensors of both."""


class There(torch.Tensor):
    """A tensor of the device; `inner` is the CPU's that holds its values."""

    @staticmethod
    def __new__(cls, inner):
        """See the class."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self, *, tensor_contents=None):
        """Of the values."""
        return f"There({self.inner})"

    def tolist(self):
        """What torch has for no class of ours."""
        return self.inner.tolist()

    def __tensor_flatten__(self):
        """For aliases."""
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, _, size, stride):
        """For aliases."""
        return There(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """See `Elsewhere`."""
        return _run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """See the module.

    Attributes:
        seen: names of the ops that ran on the device.
    """

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """One op."""
        if any(isinstance(one, There) for one in tree_leaves(args)):
            self.seen.add(func.overloadpacket.__name__)
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    leaves = tree_leaves((args, kwargs))
    tensors = [one for one in leaves if isinstance(one, torch.Tensor)]
    device = next((one for one in leaves if isinstance(one, torch.device)), None)
    there = any(isinstance(one, There) for one in tensors)
    if there and func.overloadpacket.__name__ not in MOVES:
        here = [one for one in tensors if not isinstance(one, There) and one.dim()]
        assert not here, f"{func} mixes {DEVICE} with the CPU: {[tuple(one.shape) for one in tensors]}"
    made_there = there if device is None else device.type == DEVICE.type
    if made_there:
        args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
    inner_args, inner_kwargs = tree_map_only(There, lambda one: one.inner, (args, kwargs))
    with _disable_current_modes():
        out = func(*inner_args, **inner_kwargs)
    if not made_there:
        return out
    out = tree_map_only(torch.Tensor, There, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out
