# SPDX-License-Identifier: Apache-2.0
"""Perplexity and divergence against computations of their own on tiny models."""

import math

import numerics
import pytest
import tiny_models
import torch
from transformers import AutoTokenizer

from quip_vllm.evaluation import windows
from quip_vllm.evaluation.loading import load_model
from quip_vllm.evaluation.windows import score, windows_of


@pytest.fixture
def cut(tiny_model, tiny_text):
    """cut(length, count): windows of the tiny text."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    return lambda length, count=None, text=tiny_text: windows_of(str(text), tokenizer, length, count)


def test_windows(cut, tiny_text, tiny_model):
    found = cut(70)
    assert found.shape == (85, 70)
    assert AutoTokenizer.from_pretrained(tiny_model()).decode(found.flatten()) == tiny_text.read_text()[: 85 * 70]
    assert torch.equal(cut(70, 3), found[:3])
    assert cut(6000).shape == (1, 6000)


@pytest.mark.parametrize(
    ("length", "count", "message"),
    [
        (1, None, "--sequence-length is 1: .*; give at least 2"),
        (6001, None, "has 0 windows of 6001 tokens: 1 are asked for"),
        (70, 86, "has 85 windows of 70 tokens: 86 are asked for"),
        (70, 0, "--windows is 0: give at least 1"),
        (70, -1, "--windows is -1: give at least 1"),
    ],
)
def test_refused_windows(cut, length, count, message):
    with pytest.raises(ValueError, match=message):
        cut(length, count)


def test_text_that_cannot_be_read(cut, tmp_path):
    (tmp_path / "latin").write_bytes(b"\xe9")
    (tmp_path / "empty").touch()
    for name, message in (("latin", "give a UTF-8 file"), ("gone", "give a UTF-8 file"), ("empty", "has 0 windows")):
        with pytest.raises(ValueError, match=message):
            cut(8, text=tmp_path / name)


@torch.inference_mode()
@pytest.mark.parametrize("architecture", [*tiny_models.ARCHITECTURES, "Cohere"])  # Cohere scales its logits
def test_perplexity_is_transformers_loss(architecture, tiny_model, cut, monkeypatch):
    monkeypatch.setattr(windows, "CHUNK", 10)
    model, tokens = load_model(str(tiny_model(architecture))), cut(64, 5)
    losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in tokens]
    (found,) = score([model], tokens)
    assert found == {"perplexity": pytest.approx(math.exp(sum(losses) / 5), rel=numerics.PERPLEXITY)}


@torch.inference_mode()
def test_divergence(tiny_model, cut):
    reference, model, tokens = load_model(str(tiny_model())), load_model(str(tiny_model(seed=1))), cut(64, 3)
    itself, other = score([reference, model], tokens, reference)
    assert itself["kl_divergence"] == 0.0 and itself["top1_agreement"] == 1.0
    assert itself["perplexity"] == itself["reference_perplexity"] == other["reference_perplexity"]
    p, q = (m(tokens).logits[:, :-1].double().log_softmax(-1) for m in (reference, model))
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    assert divergence > 0.1
    assert other["kl_divergence"] == pytest.approx(divergence, abs=numerics.DIVERGENCE)
    assert other["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_nan_model(tiny_model, cut):
    model = load_model(str(tiny_model()))
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="logits hold a NaN or an infinity"):
        score([model], cut(64, 1))
