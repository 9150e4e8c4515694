# SPDX-License-Identifier: Apache-2.0
"""What rotations that can be split cost two decoder layers: proxy loss, and what their outputs lose on other texts.

Usage: python scripts/research/sweep_rotations.py LLAMA CALIBRATION.txt TEXT.txt [TEXT.txt ...]
"""

import sys
from collections import defaultdict
from dataclasses import replace
from statistics import mean

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quip_vllm.checkpoint.config import LayerFormat
from quip_vllm.evaluation.windows import windows_of
from quip_vllm.ops.reference import dequantize
from quip_vllm.quantizer.curvature.inputs import Inputs
from quip_vllm.quantizer.layer import quantize_group
from quip_vllm.quantizer.settings import Settings

LAYERS, LENGTH, SEEDS = (1, 3), 512, range(3)
WINDOWS = {True: 8, False: 4}
"""Of the calibration text, and of others."""
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
ROTATIONS = {"full": {}} | {f"split {count}": {"split": count} for count in (2, 3, 4, 8)}
ROTATIONS |= {f"blocks of {size}": {"hadamard_block": size} for size in (128, 64)}
"""Those that the model's sizes do not allow are left out."""


@torch.no_grad()
def main(model: str, *texts: str) -> int:
    """Prints rotation, proxy loss and the loss on each text: means of the linear layers and the seeds."""
    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = LAYERS[-1] + 1
    network = AutoModelForCausalLM.from_pretrained(model, config=config, dtype=torch.float32).eval().model
    groups = [[f"layers.{layer}.{name}" for name in group] for layer in LAYERS for group in GROUPS]
    tokenizer = AutoTokenizer.from_pretrained(model)
    starts = bool(tokenizer("")["input_ids"])  # the tokenizer sets a token before a text
    hessians: dict[tuple[str, str], torch.Tensor] = {}
    for text in texts:
        handles = [
            network.get_submodule(names[0]).register_forward_pre_hook(
                lambda _, args, key=(text, names[0]): hessians.__setitem__(key, hessians.get(key, 0) + square(args[0]))
            )
            for names in groups
        ]
        for window in windows_of(text, tokenizer, LENGTH, WINDOWS[text == texts[0]], starts):
            network(window[None])
        for handle in handles:
            handle.remove()
    weights = {name: network.get_submodule(name).weight.data for names in groups for name in names}
    for rotation, changes in ROTATIONS.items():
        usual = Settings(model, "e8p", 2, two_sided=False, tune="none", **changes)
        try:
            specs = {name: usual.spec(name, LayerFormat("e8p", 2), *weight.shape) for name, weight in weights.items()}
        except ValueError as error:
            print(f"{rotation}: {error}", file=sys.stderr)
            continue
        lost = defaultdict(list)
        for seed in SEEDS:
            settings = replace(usual, seed=seed)
            for names in groups:
                inputs = Inputs(names, hessians[texts[0], names[0]], WINDOWS[True] * LENGTH)
                own, of_group = ({name: all_[name] for name in names} for all_ in (weights, specs))
                for name, found in quantize_group(inputs, own, of_group, settings).items():
                    lost["proxy"].append(found.entry["proxy_loss"])
                    error = weights[name] - dequantize(specs[name], found.tensors)
                    for text in texts[1:]:
                        hessian = hessians[text, names[0]]
                        lost[text].append(energy(error, hessian) / energy(weights[name], hessian))
        print(rotation, *(f"{mean(of):.5f}" for of in lost.values()), flush=True)
    return 0


def square(x: torch.Tensor) -> torch.Tensor:
    """float64 [k, k], the sum of x x^T over the rows of x."""
    rows = x.flatten(0, -2).double()
    return rows.T @ rows


def energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(W H W^T)."""
    return float((weight.double() @ hessian * weight.double()).sum())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 3 else print(__doc__) or 2)
