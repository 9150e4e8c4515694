# SPDX-License-Identifier: Apache-2.0
"""Whether decoder layers that run alone compute what they compute inside their model."""

from collections.abc import Iterable

import torch

from quip_vllm.checkpoint.hub import brief
from quip_vllm.quantizer.source.architecture import out_of_memory
from quip_vllm.quantizer.source.model import LayeredModel
from quip_vllm.quantizer.source.replay import kinds, run_layer, same

REPLAY_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""A layer alone may differ so much, in relative norm, from the same layer inside its model: by rounding."""


@torch.no_grad()
def check_replay(source: LayeredModel, batches: Iterable[tuple[int, int]]) -> None:
    """Compares layers that run alone with what the same layers give inside the model, on random tokens.

    Args:
        source: the model, of which the first layer of each kind is run.
        batches: (sequences, tokens in each) of every size that will be used.

    Raises:
        ValueError: they differ by more than rounding, cannot run alone, or read later tokens.
    """
    try:
        found = (_problem(source, index, size) for size in set(batches) for index in kinds(source.layers))
        problem = next((one for one in found if one), None)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {brief(error)}"
    if problem:
        raise ValueError(
            f"{source.folder} is a {source.config.model_type}, whose decoder layers cannot be run one at a time "
            f"({problem}): models of this architecture cannot be quantized"
        )


def _problem(source: LayeredModel, index: int, size: tuple[int, int]) -> str | None:
    """How a layer alone differs from the same layer inside the model, or None."""
    vocabulary = source.vocabulary
    draw = torch.Generator().manual_seed(0)
    # Special tokens (images, padding), which models treat in other ways, are first or last in vocabularies.
    low, high = vocabulary // 4, max(vocabulary // 2, vocabulary // 4 + 1)
    one, other = (torch.randint(low, high, size, generator=draw) for _ in range(2))
    with source.layer(index) as layer:
        real = source.run_others(one, index)
        alone, again = source.run_others(one), source.run_others(other)
        calls, hidden = {size[0]: again[index].call}, alone[index].hidden
        ours = run_layer(layer, hidden, calls)
        later = run_layer(layer, torch.cat([hidden[:, :-1], hidden[:, -1:] + 1], 1), calls)
    for i, stub in enumerate(alone):
        if i > index and not same(stub.call, real[i].call):
            return f"layer {i} reads more of layer {index} than its output"
        if not same(stub.call, again[i].call):
            return f"layer {i} reads more of the text than its hidden states"
    theirs = real[index + 1].hidden if index + 1 < len(source.layers) else real[index].hidden
    if not torch.isfinite(theirs).all():
        return None  # of the weights; the run says it, and where
    tolerance = REPLAY_ERROR[source.compute_dtype]
    if (later - ours)[:, :-1].norm() > tolerance * ours.norm():
        return f"layer {index} reads later tokens, too"
    error = float((ours - theirs).norm() / theirs.norm())
    return None if error <= tolerance else f"layer {index} alone is off by {error:.2g}"
