# SPDX-License-Identifier: Apache-2.0
"""Schemas and fake implementations of the ``quip_vllm::`` ops. Backends register the implementations."""

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("quip_vllm", "DEF")

_SCHEMAS = (
    "cpu_linear(Tensor x, Tensor packed, Tensor? table, Tensor? table_integers, Tensor? table_units, Tensor su, "
    "Tensor sv, Tensor[] bases, int[] widths, int[] output_sizes, str code, int bits, str activations, bool grid) "
    "-> Tensor",
    "cpu_experts(Tensor x, Tensor ids, Tensor? shares, Tensor packed, Tensor? table, Tensor? table_integers, "
    "Tensor? table_units, Tensor su, Tensor sv, Tensor[] bases, int[] widths, int[] output_sizes, str code, int bits, "
    "str activations, bool grid) -> Tensor",
    "cpu_fastest(Tensor packed, Tensor? table, Tensor? table_integers, Tensor? table_units, int[] output_sizes, int k, "
    "str code, int bits, bool grid) -> str",
    "cpu_lattice_blocks(Tensor codes, Tensor? residual_codes, int[] output_sizes, int bits) -> Tensor",
    "cpu_embedding(Tensor ids, Tensor packed, Tensor? table, Tensor su, Tensor sv, Tensor base, int width, str code, "
    "int bits, ScalarType dtype) -> Tensor",
    "cuda_linear(Tensor x, Tensor packed, Tensor? table, Tensor su, Tensor sv, Tensor[] bases, int[] widths, "
    "int[] output_sizes, Tensor? bias, str code, int bits, int[] thread_blocks, "
    "int one_launch_rows, int dense_rows, int[] wide=[]) -> Tensor",
    "cuda_experts(Tensor x, Tensor ids, Tensor packed, Tensor? table, Tensor su, Tensor sv, Tensor[] bases, "
    "int[] widths, int[] output_sizes, str code, int bits, int[] thread_blocks) -> Tensor",
    "cuda_embedding(Tensor ids, Tensor packed, Tensor? table, Tensor su, Tensor sv, Tensor base, int width, str code, "
    "int bits, ScalarType dtype) -> Tensor",
    "cuda_shared_bytes(str code, int bits, int rows, int warps_n, int depth, int chunks) -> int",
    "cuda_wide_bytes(str code, int bits, int rows, bool columns) -> int",
    "triton_linear(Tensor x, Tensor packed, Tensor? table, Tensor su, Tensor sv, Tensor[] bases, int[] widths, "
    "int[] output_sizes, str code, int bits, int split_chunks, int[] shapes) -> Tensor",
    "triton_experts(Tensor x, Tensor ids, Tensor packed, Tensor? table, Tensor su, Tensor sv, Tensor[] bases, "
    "int[] widths, int[] output_sizes, str code, int bits, int split_chunks, int[] shapes) -> Tensor",
    "triton_embedding(Tensor ids, Tensor packed, Tensor? table, Tensor su, Tensor sv, Tensor base, int width, "
    "str code, int bits, ScalarType dtype) -> Tensor",
    "encode_trellis(Tensor targets, Tensor values, int bits) -> Tensor",
    "encode_lattice(Tensor x) -> Tensor",
    "cuda_encode_trellis(Tensor targets, Tensor values, int bits) -> Tensor",
    "cuda_encode_lattice(Tensor x) -> Tensor",
    "cpu_tier() -> str",
    "cpu_tiers() -> str",
    "cpu_takes_int8(str code, int bits) -> bool",
)
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema)


@torch.library.register_fake("quip_vllm::cpu_linear")
def _(x, packed, table, table_integers, table_units, su, sv, bases, widths, output_sizes, *constants):
    return x.new_empty(x.shape[0], sum(output_sizes))


@torch.library.register_fake("quip_vllm::cpu_experts")
def _(x, ids, shares, packed, table, table_integers, table_units, su, sv, bases, widths, output_sizes, *constants):
    return x.new_empty(ids.shape[0] * ids.shape[1] if shares is None else shares.shape[0], sum(output_sizes))


@torch.library.register_fake("quip_vllm::cuda_linear")
def _(x, packed, table, su, sv, bases, widths, output_sizes, *constants):
    return x.new_empty(x.shape[0], sum(output_sizes))


@torch.library.register_fake("quip_vllm::triton_experts")
@torch.library.register_fake("quip_vllm::cuda_experts")
def _(x, ids, packed, table, su, sv, bases, widths, output_sizes, *constants):
    return x.new_empty(ids.shape[0] * ids.shape[1], sum(output_sizes))


@torch.library.register_fake("quip_vllm::cuda_embedding")
def _(ids, packed, table, su, sv, base, width, code, bits, dtype):
    return su.new_empty(ids.shape[0], su.shape[0], dtype=dtype)


@torch.library.register_fake("quip_vllm::triton_linear")
def _(x, packed, table, su, sv, bases, widths, output_sizes, code, bits, split_chunks, shapes):
    return x.new_empty(x.shape[0], sum(output_sizes))


@torch.library.register_fake("quip_vllm::triton_embedding")
def _(ids, packed, table, su, sv, base, width, code, bits, dtype):
    return su.new_empty(ids.shape[0], su.shape[0], dtype=dtype)


@torch.library.register_fake("quip_vllm::cpu_embedding")
def _(ids, packed, table, su, sv, base, width, code, bits, dtype):
    return su.new_empty(ids.shape[0], su.shape[0], dtype=dtype)


@torch.library.register_fake("quip_vllm::cuda_encode_trellis")
@torch.library.register_fake("quip_vllm::encode_trellis")
def _(targets: Tensor, values: Tensor, bits: int) -> Tensor:
    return targets.new_empty(targets.shape[0], 256 // values.shape[0], dtype=torch.int32)


@torch.library.register_fake("quip_vllm::cuda_encode_lattice")
@torch.library.register_fake("quip_vllm::encode_lattice")
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() // 8, dtype=torch.int16)
