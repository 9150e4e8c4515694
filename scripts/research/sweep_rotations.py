# SPDX-License-Identifier: Apache-2.0
"""What rotations that can be split cost two decoder layers: proxy loss, and what their outputs lose on other texts.

Usage: python scripts/research/sweep_rotations.py LLAMA CALIBRATION.txt TEXT.txt [TEXT.txt ...]
"""

import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quip_vllm.checkpoint.config import LayerFormat
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
    hessians: dict[tuple[str, str], torch.Tensor] = {}
    for text in texts:
        handles = [
            network.get_submodule(names[0]).register_forward_pre_hook(
                lambda _, args, key=(text, names[0]): hessians.__setitem__(key, hessians.get(key, 0) + square(args[0]))
            )
            for names in groups
        ]
        for window in windows(model, Path(text).read_text(encoding="utf-8"), WINDOWS[text == texts[0]]):
            network(window)
        for handle in handles:
            handle.remove()
    for rotation, changes in ROTATIONS.items():
        lost = defaultdict(list)
        for seed in SEEDS:
            settings = Settings(model, "e8p", 2, seed=seed, two_sided=False, tune="none", **changes)
            for names in groups:
                weights = {name: network.get_submodule(name).weight.data for name in names}
                try:
                    specs = {name: settings.spec(name, LayerFormat("e8p", 2), *w.shape) for name, w in weights.items()}
                except ValueError as error:
                    print(f"{rotation}: {error}", file=sys.stderr)
                    break
                inputs = Inputs(names, hessians[texts[0], names[0]], WINDOWS[True] * LENGTH)
                for name, found in quantize_group(inputs, weights, specs, settings).items():
                    lost["proxy"].append(found.entry["proxy_loss"])
                    error = weights[name] - dequantize(specs[name], found.tensors)
                    for text in texts[1:]:
                        hessian = hessians[text, names[0]]
                        lost[text].append(energy(error, hessian) / energy(weights[name], hessian))
        if len(lost["proxy"]) == len(SEEDS) * sum(map(len, groups)):
            print(rotation, *(f"{mean(of):.5f}" for of in lost.values()), flush=True)
    return 0


def windows(model: str, text: str, count: int) -> torch.Tensor:
    """Token ids [count, 1, LENGTH]; where the tokenizer sets a token before a text, each begins with it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    start = tokenizer("")["input_ids"]
    own = LENGTH - len(start)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: count * own]
    return torch.cat([torch.tensor([[start]] * count, dtype=torch.long), torch.tensor(ids).view(count, 1, own)], dim=-1)


def square(x: torch.Tensor) -> torch.Tensor:
    """float64 [k, k], the sum of x x^T over the rows of x."""
    rows = x.flatten(0, -2).double()
    return rows.T @ rows


def energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(W H W^T)."""
    return float((weight.double() @ hessian * weight.double()).sum())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 3 else print(__doc__) or 2)
