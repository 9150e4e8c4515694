# SPDX-License-Identifier: Apache-2.0
"""Two-sided randomised Hadamard rotation of a linear layer (incoherence processing, QuIP#, arXiv 2402.04396).

With y = W x, W [n, k], and sign vectors su [k], sv [n]:

    rotated   Wr = U_n^T diag(sv) W diag(su) U_k          (quantized)
    restored  W  = diag(sv) U_n Wr U_k^T diag(su)
    served    y  = sv * U_n(What(U_k^T(su * x)))

Serving allows any real su, sv: scales and learned magnitudes are folded in them. `block` is that of
`hadamard.hadamard`, the same on both sides; `chunks` are those of the outputs and of the inputs.

Rows that are looked up one by one (an embedding, a tied output head) cannot be mixed: with `rotate_output=False` U_n is
the identity, and only the input side is rotated.
"""

import torch

from quip_vllm.transforms.hadamard import hadamard


def rotate_weight(
    w: torch.Tensor,
    su: torch.Tensor,
    sv: torch.Tensor,
    block: int | None = None,
    rotate_output: bool = True,
    chunks: tuple[int, int] = (1, 1),
) -> torch.Tensor:
    """Rotates a weight: U_n^T diag(sv) W diag(su) U_k.

    Args:
        w: float32 or float64 [n, k].
        su: input-side signs +-1, [k].
        sv: output-side signs +-1, [n].
        block: see `hadamard.block_size`.
        rotate_output: False leaves U_n^T out.
        chunks: of the outputs and of the inputs, see `hadamard.hadamard`.

    Returns:
        [n, k] in w's dtype.

    Raises:
        ValueError: if su or sv does not fit w.
    """
    _check_vectors(w, su, sv)
    signed = sv.to(w)[:, None] * w * su.to(w)
    if rotate_output:
        return _both_sides(signed, block, True, chunks)
    return hadamard(signed, block, True, chunks[1])


def unrotate_weight(
    wr: torch.Tensor,
    su: torch.Tensor,
    sv: torch.Tensor,
    block: int | None = None,
    rotate_output: bool = True,
    chunks: tuple[int, int] = (1, 1),
) -> torch.Tensor:
    """Restores a dense weight: diag(sv) U_n Wr U_k^T diag(su), the dequantization formula.

    The inverse of `rotate_weight` where su and sv are signs.

    Args:
        wr: rotated (decoded) weight, float32 or float64 [n, k].
        su: input-side vector, any real values, [k].
        sv: output-side vector, any real values, [n].
        block: see `hadamard.block_size`.
        rotate_output: False leaves U_n out.
        chunks: of the outputs and of the inputs, see `hadamard.hadamard`.

    Returns:
        [n, k] in wr's dtype.

    Raises:
        ValueError: if su or sv does not fit wr.
    """
    _check_vectors(wr, su, sv)
    turned = _both_sides(wr, block, False, chunks) if rotate_output else hadamard(wr, block, chunks=chunks[1])
    return sv.to(wr)[:, None] * turned * su.to(wr)


def rotate_hessian(h: torch.Tensor, su: torch.Tensor, block: int | None = None, chunks: int = 1) -> torch.Tensor:
    """Rotates the Hessian of the layer's input: U_k^T diag(su) H diag(su) U_k.

    Args:
        h: E[x x^T], float32 or float64 [k, k].
        su: input-side signs +-1, [k].
        block: see `hadamard.block_size`.
        chunks: see `hadamard.hadamard`.

    Returns:
        [k, k] in h's dtype.

    Raises:
        ValueError: if h is not square or su does not fit it.
    """
    _check_vectors(h, su, su)
    signs = su.to(h)
    return _both_sides(signs[:, None] * h * signs, block, True, (chunks, chunks))


def random_signs(size: int, generator: torch.Generator) -> torch.Tensor:
    """Draws float32 [size] of fair signs +-1, on the generator's device."""
    bits = torch.randint(0, 2, (size,), generator=generator, device=generator.device)
    return bits.to(torch.float32) * 2 - 1


def _both_sides(matrix: torch.Tensor, block: int | None, transpose: bool, chunks: tuple[int, int]) -> torch.Tensor:
    """U^T M U (transpose) or U M U^T, each U of the size of its side: [n, k] -> [n, k]."""
    rows = hadamard(matrix, block, transpose, chunks[1])
    return hadamard(rows.T, block, transpose, chunks[0]).T.contiguous()


def _check_vectors(matrix: torch.Tensor, su: torch.Tensor, sv: torch.Tensor) -> None:
    if matrix.ndim != 2 or (sv.numel(), su.numel()) != tuple(matrix.shape) or su.ndim != 1 or sv.ndim != 1:
        raise ValueError(
            f"matrix {list(matrix.shape)} with su {list(su.shape)} and sv {list(sv.shape)}: the matrix has to be "
            "[n, k] with su [k] and sv [n] (a Hessian [k, k] with su [k]); check which side each vector belongs to"
        )
