# SPDX-License-Identifier: Apache-2.0
"""Training one quantized decoder layer to give, on what the layers before it give, what the original model gives."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from quip_vllm.quantizer.source.replay import Calls, run_layer
from quip_vllm.quantizer.tuning.block import Block
from quip_vllm.quantizer.tuning.optimizer import Optimizer

EPOCHS = 1
RATE = 2e-3
"""See Optimizer."""
HELD_OUT = 8
"""One of so many batches is not trained on: its loss, the validation loss, decides what is kept."""


def split(count: int) -> tuple[range, range]:
    """(batches that are trained on, batches that are held out) of so many; a single one is both."""
    held = max(1, count // HELD_OUT)
    return range(count - held) or range(count), range(count - held, count)


def tune_block(
    block: Block, inputs: Sequence[Tensor], targets: Sequence[Tensor], calls: Calls, seed: int
) -> dict[str, Any]:
    """Trains the vectors of a block; they end as the best that the validation loss has met, or as they were.

    The loss is the mean over tokens of |out - target|^2 / |target|^2: the norms behind the block divide by |target|.

    Args:
        block: changed.
        inputs: batches of hidden states [sequences, tokens, hidden] behind the quantized layers.
        targets: what the block should make of them, of the same shapes.
        calls: of the layer.
        seed: of the order of the batches.

    Returns:
        For the report: validation loss before and after, and how many epochs were trained.
    """
    train, validation = split(len(inputs))
    order = torch.Generator().manual_seed(seed)
    optimizer = Optimizer(block.vectors.values(), RATE, EPOCHS * len(train))
    with block.layer() as layer, tqdm(total=EPOCHS * len(train), desc="tuning", leave=False) as progress:

        def loss(i: int) -> Tensor:
            out, wanted = run_layer(layer, inputs[i], calls).float(), targets[i].float()
            return ((out - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()

        def validate() -> float:
            return sum(float(loss(i)) for i in validation) / len(validation)

        first = best = validate()
        epochs = 0
        while epochs < EPOCHS:
            for i in torch.randperm(len(train), generator=order).tolist():
                with torch.enable_grad():
                    loss(train[i]).backward()
                optimizer.step()
                progress.update()
            epochs += 1
            now = validate()
            progress.set_postfix_str(f"validation loss {first:.4g} -> {now:.4g}")
            if not now < best:
                break
            best = now
            optimizer.keep()
    optimizer.restore()
    return {"before": first, "after": best, "epochs": epochs}
