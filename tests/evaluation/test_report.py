# SPDX-License-Identifier: Apache-2.0
"""The figures of ``quip-vllm evaluate``: stable keys, and sizes that are those of the files."""

import pytest
from safetensors.torch import load_file

from quip_vllm.checkpoint.inspection import inspect
from quip_vllm.evaluation.report import evaluate, format_report

KEYS = [
    "perplexity", "kl_divergence", "top1_agreement", "bits_per_weight", "bytes", "reference_perplexity",
    "model", "reference", "text", "windows", "sequence_length", "quip_vllm",
]  # fmt: skip


def stored_bytes(folder):
    tensors = [t for file in folder.glob("*.safetensors") for t in load_file(file).values()]
    return sum(t.numel() * t.element_size() for t in tensors)


def test_without_reference(tiny_model, tiny_text):
    found = evaluate(str(tiny_model()), str(tiny_text), None, 64, 2)
    assert list(found) == KEYS
    assert found["kl_divergence"] is found["top1_agreement"] is found["reference_perplexity"] is None
    assert found["bits_per_weight"] == 16.0
    assert found["bytes"] == stored_bytes(tiny_model())
    assert (found["windows"], found["sequence_length"]) == (2, 64)
    assert len(format_report(found).splitlines()) == 3


def test_with_reference(quantized, tiny_model, tiny_text):
    found = evaluate(str(quantized()), str(tiny_text), str(tiny_model()), 64, 2)
    assert list(found) == KEYS
    assert 0 < found["kl_divergence"] < 0.3 and 0.3 < found["top1_agreement"] < 1
    assert found["bytes"] == stored_bytes(quantized())
    totals = inspect(quantized())["totals"]
    assert found["bits_per_weight"] == totals["bits_per_weight"] > 2
    own = evaluate(str(tiny_model()), str(tiny_text), None, 64, 2)
    assert found["reference_perplexity"] == own["perplexity"]
    assert len(format_report(found).splitlines()) == 6


def test_other_vocabulary(tiny_model, tiny_text):
    with pytest.raises(ValueError, match="the reference has 280 tokens and the model 272: a divergence needs one voca"):
        evaluate(str(tiny_model()), str(tiny_text), str(tiny_model("Llama", vocab_size=280)), 64, 2)
