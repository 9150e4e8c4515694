# SPDX-License-Identifier: Apache-2.0
"""The figures of ``quip-vllm evaluate``: stable keys, and sizes that are those of the files."""

import shutil

import pytest
from safetensors.torch import load_file

from quip_vllm.checkpoint.inspection import inspect
from quip_vllm.evaluation.report import evaluate, format_report

KEYS = [
    "model", "text", "dtype", "windows", "perplexity", "perplexity_error", "kl_divergence", "kl_error", "kl_median",
    "kl_p90", "kl_p99", "kl_p99.9", "top1_agreement", "reference_perplexity", "bits_per_weight", "bytes", "file_bytes",
]  # fmt: skip


def stored_bytes(folder):
    tensors = [t for file in folder.glob("*.safetensors") for t in load_file(file).values()]
    return sum(t.numel() * t.element_size() for t in tensors)


def test_without_reference(tiny_model, tiny_text):
    found = evaluate([str(tiny_model())], [str(tiny_text)], None, 64, 2)
    assert list(found) == ["results", "reference", "sequence_length", "start_token", "document_start", "quip_vllm"]
    (row,) = found["results"]
    assert list(row) == KEYS
    of_a_reference = {key for key in KEYS if key.startswith("kl_")} | {"top1_agreement", "reference_perplexity"}
    assert {key for key, value in row.items() if value is None} == of_a_reference
    assert row["bits_per_weight"] == 16.0
    assert row["bytes"] == stored_bytes(tiny_model())
    assert row["file_bytes"] == sum(file.stat().st_size for file in tiny_model().glob("*.safetensors")) > row["bytes"]
    assert (row["windows"], found["sequence_length"], row["dtype"]) == (2, 64, "float32")
    assert format_report([row]).splitlines()[1].count(" - ") == 8


def test_with_reference(quantized, tiny_model, tiny_text):
    out = quantized(bits=4)
    (row,) = evaluate([str(out)], [str(tiny_text)], str(tiny_model()), 64, 2)["results"]
    assert list(row) == KEYS and None not in row.values()
    assert 0 < row["kl_median"] < row["kl_p90"] < row["kl_p99"] < row["kl_p99.9"]
    assert 0 < row["kl_divergence"] < 0.05 and 0.5 < row["top1_agreement"] < 1
    assert row["bytes"] == stored_bytes(out)
    totals = inspect(out)["totals"]
    assert row["bits_per_weight"] == totals["bits_per_weight"] > 4
    (own,) = evaluate([str(tiny_model())], [str(tiny_text)], None, 64, 2)["results"]
    assert row["reference_perplexity"] == own["perplexity"]


def test_several_models_and_texts_and_the_noise_floor(quantized, tiny_model, tiny_text, tmp_path):
    (tmp_path / "other.txt").write_text(tiny_text.read_text()[3000:4000].upper())
    model, out, texts = (
        str(tiny_model(dtype="float32")),
        str(quantized()),
        [str(tiny_text), str(tmp_path / "other.txt")],
    )
    rows = evaluate([out, model], texts, model, 64, 2, noise_floor=True)["results"]
    assert [(row["model"], row["text"], row["dtype"]) for row in rows] == [
        (name, text, dtype)
        for text in texts
        for name, dtype in ((out, "float32"), (model, "float32"), (model, "bfloat16"))
    ]
    for ours, itself, floor in (rows[:3], rows[3:]):
        assert itself["kl_divergence"] == 0.0 < floor["kl_divergence"] < 0.1 * ours["kl_divergence"]
        assert floor["perplexity"] != itself["perplexity"] == floor["reference_perplexity"]
    (single,) = evaluate([out], texts[1:], model, 64, 2)["results"]
    assert single == rows[3]
    table = format_report(rows).splitlines()
    assert len({len(line) for line in table}) == 1 and f"{model} in bf16" in table[3]
    with pytest.raises(ValueError, match="--noise-floor compares the original .* name it with --reference"):
        evaluate([out], texts, None, 64, 2, noise_floor=True)


def test_other_vocabulary(tiny_model, tiny_text):
    models = [str(tiny_model()), str(tiny_model("Llama", vocab_size=280))]
    with pytest.raises(ValueError, match="has 280 tokens and .* 272: models can be compared over one vocabulary"):
        evaluate(models[:1], [str(tiny_text)], models[1], 64, 2)
    with pytest.raises(ValueError, match="has 272 tokens and .* 280: models can be compared over one vocabulary"):
        evaluate(models, [str(tiny_text)], None, 64, 2)


@pytest.mark.parametrize("architecture", ["OPT", "Llama"])  # learned positions, and rotations
def test_windows_longer_than_the_positions(tiny_model, tiny_text, architecture):
    short, long = (str(tiny_model(architecture, max_position_embeddings=count)) for count in (64, 80))
    for model, reference in ((short, None), (long, short)):
        with pytest.raises(ValueError, match=r"--sequence-length is 70, but .* has 64 positions: give 64 or less"):
            evaluate([model], [str(tiny_text)], reference, 70, 2)
    evaluate([short], [str(tiny_text)], None, 64, 1)


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
        evaluate([str(tmp_path / "model")], [str(tiny_text)], None, 64, 2)
    assert "\n" not in str(raised.value)
