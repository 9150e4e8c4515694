# SPDX-License-Identifier: Apache-2.0
"""The backward pass by layers against autograd of the whole model, and the score of sampled labels."""

import numerics
import pytest
import torch

from quip_vllm.quantizer.source import backward
from quip_vllm.quantizer.source.backward import Forward, sampled_score
from quip_vllm.quantizer.source.model import LayeredModel


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "Phi3"])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_the_whole_model(tiny_model, tmp_path, monkeypatch, architecture, tied):
    """Of every weight inside the layers, where the last batch is smaller and the logits come in pieces."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(backward, "LOGITS", 3 * 7 * 272)  # seven positions of three sequences
    monkeypatch.setattr(backward, "ROWS", 1)
    folder = tiny_model(architecture, dtype="float32", tie_word_embeddings=tied)
    source = LayeredModel(folder)
    tokens = torch.randint(0, 256, (5, 40), generator=torch.Generator().manual_seed(0))
    weights = torch.randn(5, 40, source.vocabulary)

    def score(logits, index, span, head):
        return 2 * weights.split(3)[index][:, span] * logits

    found = {}
    for index, layer, steps in Forward(source, tokens, 3, tmp_path / "inputs").backward(score):
        layer.requires_grad_()
        for _ in steps:
            pass
        found |= {f"model.layers.{index}.{name}": p.grad for name, p in layer.named_parameters()}
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.enable_grad():
        (weights * whole(tokens, use_cache=False).logits.square()).sum().backward()
    expected = {name: p.grad for name, p in whole.named_parameters() if ".layers." in name}
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in expected.items():
        assert numerics.relative(found[name], gradient) < numerics.FLOAT32_LAYERS, name
    assert not list((tmp_path / "inputs").iterdir())
    assert all(p.device.type == "meta" for p in source.layers.parameters())


def test_a_sampled_score_is_softmax_minus_a_label():
    logits = torch.randn(2, 3000, 5)
    drawn = logits.softmax(-1) - sampled_score(0)(logits, 0, slice(0, 3000), None)
    labels = drawn.round()
    torch.testing.assert_close(drawn, labels, rtol=0, atol=numerics.FLOAT32_SUMS)
    assert torch.equal(labels.sum(-1), torch.ones(2, 3000)) and labels.min() == 0
    assert (labels.mean((0, 1)) - logits.softmax(-1).mean((0, 1))).abs().max() < numerics.SAMPLE_MOMENT
    assert torch.equal(sampled_score(0)(logits, 0, slice(0, 3000), None), logits.softmax(-1) - drawn)
    assert not torch.equal(sampled_score(1)(logits, 0, slice(0, 3000), None), logits.softmax(-1) - drawn)
