# SPDX-License-Identifier: Apache-2.0
"""The KL divergence of a model whose weights have noise, as large as the rounding errors that a plan would leave.

It costs one pass forwards, and sees what a sum of losses cannot: how the errors of all layers act together.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from quip_vllm.quantizer.layer import generator_of
from quip_vllm.quantizer.source.backward import spans
from quip_vllm.quantizer.source.model import LayeredModel
from quip_vllm.quantizer.source.replay import run_layer


def noisy_divergences(
    source: LayeredModel, tokens: Tensor, batch: int, variances: Sequence[Mapping[str, float]], seed: int
) -> list[float]:
    """KL(original || noisy model), nats per token, for each mapping of linear layers to the variance of their noise.

    All get the same normal numbers, times their own deviations, so their differences are not those of two draws.

    Args:
        source: the model; one decoder layer is in memory.
        tokens: int64 [count, length].
        batch: sequences at a time.
        variances: linear layer -> variance of the noise of each weight.
        seed: of the noise.
    """
    first, calls = source.first_hidden_states(tokens, batch)
    states = [[x.clone() for x in first] for _ in range(1 + len(variances))]
    for index in tqdm(range(len(source.layers)), desc="noise", unit="layer"):
        with source.layer(index) as layer:
            linears = source.linears(index)
            originals = {name: module.weight.clone() for name, module in linears.items()}
            for hidden, of_layer in zip(states, [{}, *variances], strict=True):
                for name, variance in of_layer.items():
                    if name in linears:
                        noise = torch.randn(originals[name].shape, generator=generator_of(seed, "noise:" + name))
                        noise = noise.to(source.device)
                        linears[name].weight.copy_(originals[name].float() + variance**0.5 * noise)
                hidden[:] = [run_layer(layer, x, calls[index]) for x in hidden]
    return _divergences(source, states[0], states[1:]) if variances else []


def _divergences(source: LayeredModel, original: Sequence[Tensor], others: Sequence[Sequence[Tensor]]) -> list[float]:
    """From outputs of the last decoder layer, batch by batch."""
    totals, count = [0.0] * len(others), sum(x[..., 0].numel() for x in original)
    with source.output_head() as head:
        for i, x in enumerate(original):
            for span in spans(source, x):
                log_p = head(x[:, span]).float().log_softmax(-1)
                for j, other in enumerate(others):
                    log_q = head(other[i][:, span]).float().log_softmax(-1)
                    totals[j] += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    return [total / count for total in totals]
