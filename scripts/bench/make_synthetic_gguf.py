# SPDX-License-Identifier: Apache-2.0
"""Writes a GGUF file of random weights for llama.cpp, of the shape of make_synthetic_checkpoint.py, to measure speed.

Usage: python scripts/bench/make_synthetic_gguf.py OUT.gguf --type Q2_K [--head Q4_K] [--hidden 2048 --mlp 8192
           --layers 16 --heads 32 --kv-heads 8 --vocab 49152]

All linear layers have --type; the tied embedding, which is the output head too, has --head. The mixes that llama.cpp
calls Q2_K or Q4_K_M give some layers more bits, so they are slower than this. There is no tokenizer.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from make_synthetic_checkpoint import add_shape

SCALES = {
    "BF16": (), "Q4_0": (0,), "Q4_K": (0, 2), "Q2_K": (80, 82), "Q6_K": (208,), "IQ2_XXS": (0,), "IQ2_XS": (0,),
    "IQ3_XXS": (0,), "IQ4_XS": (0,),
}  # fmt: skip
"""Type -> where a block's fp16 scales lie, in bytes (ggml-common.h of llama.cpp). All else in a block may be random."""

SCALE = 2e-4
"""So that every activation stays finite."""


def main(arguments: list[str] | None = None) -> int:
    """Writes OUT; returns the exit code."""
    args = _parser().parse_args(arguments)
    if args.out.exists():
        print(f"make_synthetic_gguf: {args.out} exists: give a new file", file=sys.stderr)
        return 2
    write(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="new file")
    parser.add_argument("--type", required=True, choices=list(SCALES), help="of the linear layers")
    parser.add_argument("--head", choices=list(SCALES), help="of the tied embedding (default Q4_K, or BF16 with BF16)")
    add_shape(parser)
    return parser


def write(args: argparse.Namespace) -> None:
    """Writes the whole file; the random weights are drawn with a fixed seed."""
    draw = np.random.default_rng(0)
    writer = GGUFWriter(args.out, "llama")
    writer.add_block_count(args.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(args.hidden)
    writer.add_feed_forward_length(args.mlp)
    writer.add_head_count(args.heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(args.hidden // args.heads)
    writer.add_vocab_size(args.vocab)
    writer.add_tokenizer_model("none")

    def matrix(name: str, n: int, k: int, kind: str) -> None:
        values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        if kind == "BF16":
            data = (draw.standard_normal((n, k), dtype=np.float32) / k**0.5).view(np.uint32) >> 16
            data = data.astype(np.uint16).view(np.uint8)
        else:
            blocks = draw.integers(0, 256, (n * k // values, size), dtype=np.uint8)
            for place in SCALES[kind]:
                blocks[:, place : place + 2] = np.array([SCALE], np.float16).view(np.uint8)
            data = blocks.reshape(n, -1)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=GGMLQuantizationType[kind])

    matrix("token_embd", args.vocab, args.hidden, args.head or ("BF16" if args.type == "BF16" else "Q4_K"))
    ones = np.ones(args.hidden, np.float32)
    writer.add_tensor("output_norm.weight", ones)
    kv = args.hidden // args.heads * args.kv_heads
    for layer in range(args.layers):
        for name, n, k in (
            ("attn_q", args.hidden, args.hidden), ("attn_k", kv, args.hidden), ("attn_v", kv, args.hidden),
            ("attn_output", args.hidden, args.hidden), ("ffn_gate", args.mlp, args.hidden),
            ("ffn_up", args.mlp, args.hidden), ("ffn_down", args.hidden, args.mlp),
        ):  # fmt: skip
            matrix(f"blk.{layer}.{name}", n, k, args.type)
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    sys.exit(main())
