# SPDX-License-Identifier: Apache-2.0
"""Names, shapes and dtypes of a fused linear layer's tensors, checked in one place for every backend; its rotations."""

from functools import cache

import torch
from torch import Tensor

from quip_vllm.formats.methods import Code, Method
from quip_vllm.formats.tile import TILE
from quip_vllm.formats.trellis_codes import HYB_LUT_BITS
from quip_vllm.ops.spec import LinearSpec
from quip_vllm.transforms.hadamard import block_size, factor
from quip_vllm.transforms.hadamard_matrices import hadamard_matrix

Layout = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def layout(spec: LinearSpec) -> Layout:
    """Tensor name -> (shape, allowed dtypes) of a layer in the order of the checkpoint.

    Raises:
        ValueError: the sizes do not fit the format; the remedy is to leave the layer unquantized.
    """
    n, k = spec.out_features, spec.in_features
    signs: Layout = {"su": ((k,), FLOATS), "sv": ((n,), FLOATS)}
    unit_out, unit_in = (TILE, TILE) if spec.method is Method.QTIP else (1, 8)
    if not spec.rotate_output:
        if len(spec.output_sizes) > 1:
            raise ValueError(f"outputs {spec.output_sizes} without a rotation are not fused: give one size a layer")
        unit_out = 1
    if k % unit_in or any(size % unit_out for size in spec.output_sizes):
        raise ValueError(
            f"a layer of {k} inputs and {spec.output_sizes} outputs: {spec.method.value} needs multiples of {unit_in} "
            f"and {unit_out}; leave it unquantized (--ignore)"
        )
    if spec.method is Method.QTIP:
        packed: Layout = {"packed": ((-(-n // TILE), k * spec.bits), (torch.int16,)), **signs}
        if spec.code is Code.HYB:
            packed["lut"] = ((len(spec.output_sizes), 1 << HYB_LUT_BITS, 2), FLOATS)
        return packed
    codes: Layout = {"codes": ((n, k // 8), (torch.int16,)), **signs}
    if spec.bits > 2:
        codes["residual_codes"] = ((n, k // 8), (torch.uint8 if spec.bits == 3 else torch.int16,))
    return codes


def check(spec: LinearSpec, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError unless ``tensors`` is what ``layout`` says, with finite ``su`` and ``sv``."""
    wanted = layout(spec)
    if set(tensors) != set(wanted):
        raise ValueError(f"a {spec.method.value} layer has tensors {sorted(tensors)}: {sorted(wanted)} are wanted")
    for name, (shape, dtypes) in wanted.items():
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype not in dtypes:
            kinds = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(
                f"{name} is {found.dtype} {tuple(found.shape)}: {kinds} {shape} is wanted; the file is damaged or its "
                "config.json belongs to another checkpoint"
            )
        if found.is_floating_point() and not torch.isfinite(found).all():
            raise ValueError(
                f"{name} holds a NaN or an infinity: the checkpoint is damaged; fetch or quantize it again"
            )


def rotations(spec: LinearSpec) -> list[tuple[int, int]]:
    """(q, p) of the input and of each output. Raises ValueError for a size that has none."""
    outputs = [_rotation(n, spec.hadamard_block) if spec.rotate_output else (1, 1) for n in spec.output_sizes]
    return [_rotation(spec.in_features, spec.hadamard_block), *outputs]


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
        layout(spec)
        rotations(spec)
    except ValueError as error:
        return str(error)
    return None


@cache
@torch.inference_mode(False)
def rotation_base(order: int, transpose: bool, device: torch.device | None = None) -> Tensor:
    """H_q or its transpose, float32 [q, q] on a device, or the CPU; one copy for all layers: do not write to it."""
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")  # vLLM has other defaults while it loads a model
    matrix = one if order == 1 else hadamard_matrix(order).float()
    return (matrix.T if transpose else matrix).contiguous().to(device or "cpu")
