# SPDX-License-Identifier: Apache-2.0
"""Layers for the CUDA op: activations, and its arguments."""

import torch

OPS = torch.ops.quip_vllm


def rows(m, k):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m))


def arguments(cuda, spec, tensors, x, shape=None, code=None, bias=None, one_launch_rows=0):
    """Those of the op, with other thread blocks, another variant of the code, a bias, or few rows in one launch."""
    layer = cuda.prepare(spec, tensors)
    prepared, sizes = layer.tensors, list(spec.output_sizes)
    bases = [prepared[f"base{i}"] for i in range(len(sizes) + 1)]
    packed, table, signs = prepared["packed"], prepared.get("table"), (prepared["su"], prepared["sv"])
    chosen = (code or layer.kernels, spec.bits, shape or layer.thread_blocks, one_launch_rows, 0)
    return [x, packed, table, *signs, bases, layer.widths, sizes, bias, *chosen]
