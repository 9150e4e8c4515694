# SPDX-License-Identifier: Apache-2.0
"""Perplexity and divergence against computations of their own on tiny models."""

import math
import statistics

import numerics
import pytest
import tiny_models
import torch
from transformers import AutoTokenizer

from quip_vllm.evaluation import windows
from quip_vllm.evaluation.loading import load_model
from quip_vllm.evaluation.windows import documents_of, score, windows_of


@pytest.fixture
def cut(tiny_model, tiny_text):
    """cut(length, count): windows of the tiny text."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    return lambda length, count=None, text=tiny_text, **more: windows_of(str(text), tokenizer, length, count, **more)


def test_windows(cut, tiny_text, tiny_model):
    found = cut(70)
    assert found.shape == (85, 70)
    assert AutoTokenizer.from_pretrained(tiny_model()).decode(found.flatten()) == tiny_text.read_text()[: 85 * 70]
    assert torch.equal(cut(70, 3), found[:3])
    assert cut(6000).shape == (1, 6000)


def test_windows_with_a_start_token(cut, tiny_model, tiny_text):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    found = cut(71, 3, start_token=True)
    assert (found[:, 0] == tokenizer.bos_token_id).all() and torch.equal(found[:, 1:], cut(70, 3))
    assert cut(1001, start_token=True).shape == (6, 1001)  # of 6000 tokens
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="no start token: leave --start-token away"):
        windows_of(str(tiny_text), tokenizer, 71, 3, start_token=True)


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
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 5), rel=numerics.PERPLEXITY)
    # Windows are as long as one another, so the error is that of a mean of five draws.
    error = found["perplexity"] * statistics.stdev(losses) / math.sqrt(5)
    assert found["perplexity_error"] == pytest.approx(error, rel=1e-3)
    assert set(found) == {"perplexity", "perplexity_error"}


@torch.inference_mode()
def test_divergence(tiny_model, cut):
    reference, model, tokens = load_model(str(tiny_model())), load_model(str(tiny_model(seed=1))), cut(64, 3)
    itself, other = score([reference, model], tokens, reference)
    assert itself["kl_divergence"] == 0.0 and itself["top1_agreement"] == 1.0
    assert itself["perplexity"] == itself["reference_perplexity"] == other["reference_perplexity"]
    p, q = (m(tokens).logits[:, :-1].double().log_softmax(-1) for m in (reference, model))
    each = (p.exp() * (p - q)).sum(-1)
    divergence = float(each.mean())
    assert divergence > 0.1
    ranked = sorted(each.flatten().tolist())
    for key, share in (("kl_median", 0.5), ("kl_p90", 0.9), ("kl_p99", 0.99), ("kl_p99.9", 0.999)):
        below, part = divmod(share * (len(ranked) - 1), 1)
        between = ranked[int(below)] + part * (ranked[int(below) + 1] - ranked[int(below)])
        assert other[key] == pytest.approx(between, abs=numerics.DIVERGENCE)
    assert other["kl_error"] == pytest.approx(float(each.mean(-1).std()) / math.sqrt(3), rel=1e-3)
    assert other["kl_divergence"] == pytest.approx(divergence, abs=numerics.DIVERGENCE)
    assert other["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


@torch.inference_mode()
def test_standard_errors_by_document(tiny_model, tmp_path):
    """A document's error counts once, however long it is; a token belongs to the document in which it begins."""
    text = tmp_path / "text"
    text.write_text("xx\n# one\n" + "é" * 25 + "\n## not\n# two\n" + "b" * 60)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    tokens = windows_of(str(text), tokenizer, 32, 3)
    documents = documents_of(str(text), tokenizer, "# ", tokens)
    assert documents.flatten().tolist() == [0] * 3 + [1] * (6 + 2 * 25 + 1 + 7) + [2] * (96 - 67)
    started = windows_of(str(text), tokenizer, 33, 3, start_token=True)
    assert torch.equal(documents_of(str(text), tokenizer, "# ", started, start_token=True)[:, 1:], documents)
    reference, model = (load_model(str(tiny_model(seed=seed))) for seed in (0, 1))
    (found,) = score([model], tokens, reference, documents)
    p, q = (m(tokens).logits[:, :-1].double().log_softmax(-1) for m in (reference, model))
    off = (p.exp() * (p - q)).sum(-1) - found["kl_divergence"]
    squares = sum(float(off[documents[:, 1:] == number].sum()) ** 2 for number in range(3))
    assert found["kl_error"] == pytest.approx(math.sqrt(squares * 3 / 2) / off.numel(), rel=1e-3)
    (found,) = score([model], tokens, reference, torch.zeros_like(tokens))
    assert found["kl_error"] is found["perplexity_error"] is None


@pytest.mark.parametrize(
    ("start", "message"), [("(", "'\\(' is not a regular"), ("% ", "'% ' matches nothing in .*text")]
)
def test_refused_documents(tiny_model, tiny_text, start, message):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    with pytest.raises(ValueError, match=f"--document-start {message}.*: mend it"):
        documents_of(str(tiny_text), tokenizer, start, windows_of(str(tiny_text), tokenizer, 32, 1))


def test_nan_model(tiny_model, cut):
    model = load_model(str(tiny_model()))
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="logits hold a NaN or an infinity"):
        score([model], cut(64, 1))


@pytest.mark.parametrize("kind", [Exception, type("PanicException", (BaseException,), {})])
def test_a_tokenizer_that_fails_is_named(tmp_path, kind):
    class Broken:
        name_or_path = "somewhere"
        bos_token_id = None

        def __call__(self, *_, **__):
            raise kind("no such token")

    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(
        ValueError, match="the tokenizer in somewhere cannot be used: no such token; put the model's own"
    ):
        windows_of(str(tmp_path / "a.txt"), Broken(), 2, None)
