# SPDX-License-Identifier: Apache-2.0
"""The command verify: whether vLLM serves what a checkpoint holds."""

import argparse
import sys
import tempfile
from pathlib import Path

from quip_vllm.cli.options import add_trust, check_writable


def add_verify(verify: argparse.ArgumentParser) -> None:
    """Its options."""
    verify.add_argument("checkpoint", type=Path)
    verify.add_argument(
        "--memory", type=float, default=0.2, help="share of the memory that vLLM may take (default %(default)s)"
    )
    verify.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of vLLM's activations (default %(default)s); bfloat16 rounds too much for a verdict",
    )
    verify.add_argument("--compile", action="store_true", help="with torch.compile, as vllm serve runs by default")
    verify.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    add_trust(verify)
    verify.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> int:
    from quip_vllm.checkpoint.layers import read_config
    from quip_vllm.checkpoint.store import write_json
    from quip_vllm.evaluation.verification import TOLERANCE, differences, expected_log_probabilities, save_dense
    from quip_vllm.vllm_plugin.serving import prompt_log_probabilities

    if args.json:
        check_writable(args.json, "--json")
    read_config(args.checkpoint)  # any other model is refused
    trust = args.trust_remote_code
    tokens, expected = expected_log_probabilities(args.checkpoint, trust)

    def served(folder: Path) -> list[dict[int, float]]:
        return prompt_log_probabilities(folder, tokens, args.memory, trust, args.dtype, args.compile)

    found = served(args.checkpoint)
    apart = differences(expected, found)
    figures = {"checkpoint": str(args.checkpoint), "dtype": args.dtype, "positions": len(found)}
    figures |= {"max_difference": float(apart.max()), "mean_difference": float(apart.mean())}
    said = f"log probabilities of {len(tokens)} tokens in vLLM and in transformers differ by up to {apart.max():.2g}"
    judged, same = args.dtype == "float32", figures["max_difference"] <= TOLERANCE
    if judged and not same:  # perhaps vLLM computes this architecture in a way of its own
        with tempfile.TemporaryDirectory() as folder:
            save_dense(args.checkpoint, Path(folder) / "dense")
            between = float(differences(served(Path(folder) / "dense"), found).max())
        figures["max_difference_in_vllm"], same = between, between <= TOLERANCE
        said += f", and in vLLM alone, quantized and dequantized, by up to {between:.2g}"
    if args.json:
        write_json(args.json, figures)
    if not judged:
        print(f"{args.checkpoint}: {said}, {apart.mean():.2g} on average; only float32 tells rounding from a fault")
    elif same:
        print(f"{args.checkpoint} is served as it is stored: {said}")
    else:
        print(
            f"quip-vllm verify: {args.checkpoint} is not served as it is stored: {said}, {TOLERANCE:g} is rounding; "
            "do not serve this model",
            file=sys.stderr,
        )
    return 0 if same or not judged else 1
