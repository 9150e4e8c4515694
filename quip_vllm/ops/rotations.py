# SPDX-License-Identifier: Apache-2.0
"""The rotations of a layer as kernels want them: sizes (q, p) and the matrices H_q."""

from functools import cache

import torch
from torch import Tensor

from quip_vllm.formats.e8p_residual import Lattice
from quip_vllm.formats.spec import LinearSpec, TileOrder
from quip_vllm.formats.trellis_codes import TrellisCode
from quip_vllm.transforms.hadamard import block_size, factor
from quip_vllm.transforms.hadamard_matrices import hadamard_matrix


def rotations(spec: LinearSpec) -> list[tuple[int, int]]:
    """(q, p) of the input and of each output. Raises ValueError for a size that has none."""
    turned = [
        _rotation(n // spec.output_chunks, spec.hadamard_block) if spec.rotate_output else (1, 1)
        for n in spec.stored_outputs
    ]
    return [_rotation(spec.stored_in // spec.input_chunks, spec.hadamard_block), *turned]


def _rotation(n: int, block: int | None) -> tuple[int, int]:
    """(q, p): the row is rotated in runs of q*p."""
    return factor(n) if block is None else (1, block_size(n, block))


def bases(spec: LinearSpec) -> list[tuple[str, int, int, bool]]:
    """(name, q, p, whether H_q is transposed) of each rotation's matrix among the tensors of ``prepare``."""
    first, *others = rotations(spec)
    found = [("base0", *first, True), *((f"base{i}", *one, False) for i, one in enumerate(others, 1))]
    return found if spec.rotate_output else [*found, ("inverse_base", *first, False)]


def sizes_problem(spec: LinearSpec) -> str | None:
    """Why the format or the rotations have no such sizes, or None."""
    try:
        spec.check_sizes()
        rotations(spec)
    except ValueError as error:
        return str(error)
    return None


def kernels_problem(spec: LinearSpec, orders: tuple[TileOrder, ...] = ()) -> str | None:
    """`sizes_problem`, or the property that kernels do not have, in one sentence; None where they take the layer.

    Args:
        spec: the layer.
        orders: orders of a tile that this backend's kernels decode besides those of all.
    """
    if not isinstance(spec.format, (Lattice, TrellisCode)):
        return f"code {spec.code} has no kernels: only the reference backend runs it"
    beyond = spec.beyond_kernels(orders)
    return sizes_problem(spec) or (f"a layer with {beyond}, which these kernels do not have" if beyond else None)


def kernels_code(spec: LinearSpec) -> str:
    """The ops' name of a layer's code: with the order of its tiles where that is not ours."""
    return spec.code + {TileOrder.MMA: "", TileOrder.MMA_SWAPPED: "_swapped"}.get(spec.tile_order, "_by_rows")


@cache
@torch.inference_mode(False)
def rotation_base(order: int, transpose: bool, device: torch.device | None = None) -> Tensor:
    """H_q or its transpose, float32 [q, q] on a device, or the CPU; one copy for all layers: do not write to it."""
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")  # vLLM has other defaults while it loads a model
    matrix = one if order == 1 else hadamard_matrix(order).float()
    return (matrix.T if transpose else matrix).contiguous().to(device or "cpu")
