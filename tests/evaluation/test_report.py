# SPDX-License-Identifier: Apache-2.0
"""The figures of ``quip-vllm evaluate``: stable keys, and sizes that are those of the files."""

import shutil

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


@pytest.mark.parametrize("architecture", ["OPT", "Llama"])  # learned positions, and rotations
def test_windows_longer_than_the_positions(tiny_model, tiny_text, architecture):
    short, long = (str(tiny_model(architecture, max_position_embeddings=count)) for count in (64, 80))
    for model, reference in ((short, None), (long, short)):
        with pytest.raises(ValueError, match=r"--sequence-length is 70, but .* has 64 positions: give 64 or less"):
            evaluate(model, str(tiny_text), reference, 70, 2)
    evaluate(short, str(tiny_text), None, 64, 1)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{}", "the tokenizer in .*model cannot be used: KeyError: 'added_tokens'"),
        ("config.json", "[]", "config.json cannot be used: "),
        (
            "config.json",
            '{"model_type": "llama", "dtype": "bf16"}',
            "config.json cannot be used: .* no attribute 'bf16'",
        ),
        ("config.json", None, "model has no config.json: give a folder"),
    ],
)
def test_damaged_files_beside_the_weights(tiny_model, tiny_text, tmp_path, file, content, message):
    shutil.copytree(tiny_model(), tmp_path / "model")
    path = tmp_path / "model" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        evaluate(str(tmp_path / "model"), str(tiny_text), None, 64, 2)
    assert "\n" not in str(raised.value)
