# SPDX-License-Identifier: Apache-2.0
"""How well mixtures of the bundle's kinds of text serve other texts, without quantizing: from Hessians alone.

LDLQ with the Hessian H = (L + I) D (L + I)^T leaves an error N (L + I)^-1, in which the entries of N are alike. On a
text whose Hessian is T its loss is the trace of (L + I)^-1 T (L + I)^-T, and smallest if H is T. Printed is the mean,
over some layers, of the logarithm of that loss by the smallest, for each held-out text: for the shares in
build_calibration.py, for each kind alone, and for the shares with a seventh given to one kind.
"""

import argparse
import sys
from pathlib import Path
from random import Random
from typing import Any

import torch
from build_calibration import SHARES, fetch, sources
from calibration_chat import dialogues
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from quip_vllm.quantizer.source.documents import document_ids

LENGTH, SEQUENCES, LAYERS = 256, 32, 5
DAMPING = 0.01
Hessians = dict[str, Tensor]


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path, help="that of build_calibration.py")
    parser.add_argument("held_out", nargs="+", type=Path, help="texts of other kinds than those that are reported on")
    args = parser.parse_args()
    fetch(args.work)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    random, rotations, kinds, weight = Random(0), {}, {}, {}
    documents: dict[str, list[Any]] = {kind: sum(lists, []) for kind, lists in sources(args.work).items()}
    documents["chat"] = dialogues(random, 120_000)
    for kind, found in documents.items():
        tokens, size = [], 0
        for document in random.sample(found, len(found)):
            if len(tokens) < SEQUENCES:
                ids = document_ids(tokenizer, document)
                text = document if isinstance(document, str) else "".join(message["content"] for message in document)
                size += len(text.encode())
                tokens += [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]
        kinds[kind] = hessians(model, torch.tensor(tokens[:SEQUENCES]), rotations)
        weight[kind] = SHARES[kind] * LENGTH * len(tokens) / size  # a share of the bytes as one of the tokens
    others = {}
    for file in args.held_out:
        ids = torch.tensor(tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
        rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:SEQUENCES]
        others[file.name] = hessians(model, rows[chosen], rotations)
    total = sum(weight.values())
    usual = {kind: value / total for kind, value in weight.items()}
    print(f"{'':40} {'mean':>8}", *(f"{name[:16]:>16}" for name in others))
    rows_of = {"the bundle": usual} | {f"only {kind}": {kind: 1.0} for kind in kinds}
    rows_of |= {
        f"a seventh more {kind}": {k: (6 * share + (k == kind)) / 7 for k, share in usual.items()} for kind in kinds
    }
    for name, shares in rows_of.items():
        losses = [excess(kinds, shares, other) for other in others.values()]
        print(f"{name:40} {sum(losses) / len(losses):8.4f}", *(f"{loss:16.4f}" for loss in losses), flush=True)
    return 0


@torch.inference_mode()
def hessians(model: Any, tokens: Tensor, rotations: Hessians) -> Hessians:
    """Of the inputs of some layers, in random bases that `rotations` keeps."""
    found: Hessians = {}
    layers = model.model.layers
    hooks = []
    for index in range(len(layers) // (2 * LAYERS), len(layers), len(layers) // LAYERS):
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"):
            name = f"{index}.{part}"

            def add(module: Any, inputs: Any, name: str = name) -> None:
                x = inputs[0].flatten(0, -2).float()
                if name not in rotations:
                    rotations[name] = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1]))[0]
                found[name] = found.get(name, 0) + (x @ rotations[name]).T @ (x @ rotations[name])

            hooks.append(layers[index].get_submodule(part).register_forward_pre_hook(add))
    for batch in tokens.split(8):
        model.model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: value / value.diagonal().mean() for name, value in found.items()}


def excess(kinds: dict[str, Hessians], shares: dict[str, float], other: Hessians) -> float:
    """The mean logarithm of the loss on a text with a mixture's feedback, by that with the text's own."""
    logs = []
    for name, value in other.items():
        target = value + DAMPING * torch.eye(len(value))
        mixture = sum(share * kinds[kind][name] for kind, share in shares.items()) + DAMPING * torch.eye(len(value))
        logs.append(float((loss(mixture, target) / loss(target, target)).log()))
    return sum(logs) / len(logs)


def loss(hessian: Tensor, target: Tensor) -> Tensor:
    """The trace in the module's docstring."""
    factor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)  # upper: the last column is rounded first
    unit = factor / factor.diagonal()
    half = torch.linalg.solve_triangular(unit, target, upper=True)
    return torch.linalg.solve_triangular(unit, half.T, upper=True).trace()


if __name__ == "__main__":
    sys.exit(main())
