# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint of random weights to measure speed: Llama or Qwen3-MoE, bf16, GPTQ-int4, or a format of ours.

Usage: python scripts/bench/make_synthetic_checkpoint.py OUT --format bf16|gptq-int4|quip_sharp|qtip|quip [--bits B]
           [--code C] [--hidden 2048 --mlp 8192 --layers 16 --heads 32 --kv-heads 8 --vocab 49152] [--lm-head BITS]
           [--experts N --top-k 4]

The default shape has 1.07e9 weights; embeddings are tied to the output head. With --experts, each decoder layer has N
of --mlp width, of which a token gets --top-k. Weights are so scaled that every logit stays finite. There is no
tokenizer: give the engine token ids. One decoder layer is in memory at a time.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarking import random_layer, random_signs
from torch import Tensor

from quip_vllm.checkpoint.config import CheckpointConfig, Head, LayerFormat
from quip_vllm.checkpoint.shards import shard_name, write_index, write_shard
from quip_vllm.checkpoint.store import write_json
from quip_vllm.formats.spec import LinearSpec, methods

Shape = tuple[int, int]
Linear = Callable[[Shape, Tensor], dict[str, Tensor]]
"""(n, k) and su [k] -> the tensors of one linear layer; su is shared by those of a decoder layer that have equal k."""

EMBEDDING = "model.embed_tokens"
MAX_GROUP = 128
INT4_MULTIPLE = 32
INT4_RMS = 4.6
"""Root mean square of a uniform integer from -8 to 7."""


def main(arguments: list[str] | None = None) -> int:
    """Writes OUT; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        if args.out.exists() and any(args.out.iterdir()):
            raise ValueError(f"{args.out} is not empty: give a new folder")
        write_checkpoint(args)
    except (ValueError, OSError) as error:
        print(f"make_synthetic_checkpoint: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--format", required=True, choices=["bf16", "gptq-int4", *methods()])
    parser.add_argument("--bits", type=int, default=2, help="of our formats (default 2)")
    trellis = [format.name for format in methods()["qtip"] if format.quantized]
    parser.add_argument("--code", choices=trellis, default="1mad", help="of qtip (default 1mad)")
    add_shape(parser)
    parser.add_argument("--experts", type=int, default=0, help="of each decoder layer (default none)")
    parser.add_argument("--top-k", type=int, default=4, help="experts that a token has (default 4)")
    parser.add_argument("--lm-head", type=int, metavar="BITS", help="quantize the tied embedding too")
    parser.add_argument("--hadamard-block", default="full", metavar="N|full", help="rotation (default full)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the model's shape; the default has 1.07e9 weights."""
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=49152)


def write_checkpoint(args: argparse.Namespace) -> None:
    """Writes the shards, then the index, then config.json, so that an unfinished folder is never served.

    Raises:
        ValueError: the shape does not fit the format.
    """
    if args.hidden % args.heads or args.heads % args.kv_heads:
        raise ValueError(
            f"--hidden {args.hidden}, --heads {args.heads}, --kv-heads {args.kv_heads}: each must divide the one before"
        )
    if args.experts and (args.format == "gptq-int4" or not 0 < args.top_k <= args.experts):
        raise ValueError(
            f"--experts is {args.experts}, --top-k {args.top_k}, --format {args.format}: give at least --top-k "
            "experts, and not gptq-int4"
        )
    generator = torch.Generator().manual_seed(args.seed)
    described, linear = _format(args, generator)
    args.out.mkdir(parents=True, exist_ok=True)
    norm = torch.ones(args.hidden, dtype=torch.bfloat16)
    rest = {"model.norm.weight": norm, **_embedding(args, generator)}
    write_shard(args.out / shard_name(args.layers, args.layers + 1), rest)
    for index in range(args.layers):
        tensors = _decoder_layer(args, index, linear, generator)
        write_shard(args.out / shard_name(index, args.layers + 1), tensors)
    write_index(args.out, args.layers + 1)
    write_json(args.out / "config.json", _model_config(args) | described)


def _format(args: argparse.Namespace, generator: torch.Generator) -> tuple[dict[str, Any], Linear]:
    """What config.json adds for the format, and what makes the tensors of a linear layer."""
    if args.format == "bf16":
        return {}, lambda shape, su: {"weight": _dense(shape, generator)}
    if args.format == "gptq-int4":
        for option in ("hidden", "mlp"):
            if getattr(args, option) % INT4_MULTIPLE:
                raise ValueError(
                    f"--{option} is {getattr(args, option)}: vLLM's int4 kernel needs multiples of {INT4_MULTIPLE}"
                )
        group = math.gcd(MAX_GROUP, args.hidden, args.mlp)
        described = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": True}
        return {"quantization_config": described | {"lm_head": False}}, lambda shape, su: _int4(shape, group, generator)
    code, block = _own_format(args)
    head = None if args.lm_head is None else Head(EMBEDDING, LayerFormat(code, args.lm_head), tied=True)
    kept = ("lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(args.layers) if args.experts))
    config = CheckpointConfig(LayerFormat(code, args.bits), block, modules_to_not_convert=kept, head=head)

    def ours(shape: Shape, su: Tensor) -> dict[str, Tensor]:
        return random_layer(LinearSpec(code, args.bits, shape[1], shape[:1], block), su, generator)

    return {"quantization_config": config.to_dict()}, ours


def _decoder_layer(
    args: argparse.Namespace, index: int, linear: Linear, generator: torch.Generator
) -> dict[str, Tensor]:
    hidden, mlp, kv = args.hidden, args.mlp, args.hidden // args.heads * args.kv_heads
    attention = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    shapes = {f"self_attn.{name}": shape for name, shape in attention.items()}
    for parent in [f"mlp.experts.{i}" for i in range(args.experts)] or ["mlp"]:
        shapes |= {f"{parent}.gate_proj": (mlp, hidden), f"{parent}.up_proj": (mlp, hidden)}
        shapes[f"{parent}.down_proj"] = (hidden, mlp)
    signs = {k: random_signs(k, generator) for k in (hidden, mlp)}
    prefix = f"model.layers.{index}"
    tensors = {
        f"{prefix}.{norm}.weight": torch.ones(hidden, dtype=torch.bfloat16)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    if args.experts:
        tensors[f"{prefix}.mlp.gate.weight"] = _dense((args.experts, hidden), generator)
        for norm in ("q_norm", "k_norm"):
            tensors[f"{prefix}.self_attn.{norm}.weight"] = torch.ones(hidden // args.heads, dtype=torch.bfloat16)
    for name, shape in shapes.items():
        for key, tensor in linear(shape, signs[shape[1]]).items():
            tensors[f"{prefix}.{name}.{key}"] = tensor
    return tensors


def _embedding(args: argparse.Namespace, generator: torch.Generator) -> dict[str, Tensor]:
    """The tied embedding: bf16, or in the format of the layers at --lm-head bits."""
    if args.lm_head is None:
        return {f"{EMBEDDING}.weight": _dense((args.vocab, args.hidden), generator)}
    code, block = _own_format(args)
    spec = LinearSpec(code, args.lm_head, args.hidden, (args.vocab,), block, rotate_output=False)
    tensors = random_layer(spec, random_signs(args.hidden, generator), generator)
    return {f"{EMBEDDING}.{name}": tensor for name, tensor in tensors.items()}


def _own_format(args: argparse.Namespace) -> tuple[str, int | None]:
    """Code and rotation of a checkpoint of ours. Raises ValueError for a flag that does not fit."""
    if args.format not in methods():
        raise ValueError(
            f"--lm-head is {args.lm_head} for {args.format}: only {', '.join(methods())} have a quantized head"
        )
    if args.hadamard_block != "full" and not args.hadamard_block.isdecimal():
        raise ValueError(f"--hadamard-block is {args.hadamard_block}: give a power of two of at least 2, or full")
    block = None if args.hadamard_block == "full" else int(args.hadamard_block)
    return args.code if args.format == "qtip" else methods()[args.format][0].name, block


def _dense(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[1] ** -0.5, generator=generator)


def _int4(shape: Shape, group: int, generator: torch.Generator) -> dict[str, Tensor]:
    """GPTQ's tensors: eight 4-bit integers a word along k (``qweight``) or n (``qzeros``, 8 stored as 7)."""
    n, k = shape
    whole = torch.iinfo(torch.int32)
    return {
        "qweight": torch.randint(whole.min, whole.max + 1, (k // 8, n), dtype=torch.int32, generator=generator),
        "qzeros": torch.full((k // group, n // 8), 0x77777777, dtype=torch.int32),
        "scales": torch.full((k // group, n), k**-0.5 / INT4_RMS, dtype=torch.float16),
        "g_idx": torch.arange(k, dtype=torch.int32) // group,
    }


def _model_config(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import LlamaConfig, Qwen3MoeConfig

    shape = {
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.mlp,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    if not args.experts:
        return LlamaConfig(architectures=["LlamaForCausalLM"], **shape).to_dict()
    experts = {"num_experts": args.experts, "num_experts_per_tok": args.top_k, "moe_intermediate_size": args.mlp}
    head = {"head_dim": args.hidden // args.heads}
    return Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"], **shape, **experts, **head).to_dict()


if __name__ == "__main__":
    sys.exit(main())
