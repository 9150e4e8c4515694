# SPDX-License-Identifier: Apache-2.0
"""From a folder to its layers: every format, mixed in one checkpoint; headers that do not fit are named."""

import json

import pytest
import torch
from random_layers import random_layer
from safetensors.torch import save_file

from quip_vllm.checkpoint.config import CheckpointConfig, Head, LayerFormat
from quip_vllm.checkpoint.layers import read_config, read_layers
from quip_vllm.checkpoint.published import natural
from quip_vllm.checkpoint.store import CheckpointReader, read_json, write_json
from quip_vllm.formats.spec import LinearSpec

SPECS = {
    "layers.2.q": LinearSpec("hyb", 2, 64, (32,)),
    "layers.2.k": LinearSpec("e8p", 3, 64, (32,), vector_dtype=torch.float32),
    "layers.10.q": LinearSpec("1mad", 4, 96, (16,)),
    "head": LinearSpec("e8p", 4, 64, (37,), rotate_output=False),
}
CONFIG = CheckpointConfig(
    LayerFormat("hyb", 2),
    modules_to_not_convert=("layers.1",),
    layers={"layers.2.k": LayerFormat("e8p", 3), "layers.10.q": LayerFormat("1mad", 4)},
    head=Head("head", LayerFormat("e8p", 4), False),
)


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(change, **config): a folder with SPECS and an ordinary weight, its tensors changed."""

    def checkpoint(change=lambda tensors: None, **config):
        tensors = {f"{name}.{leaf}": t for name, spec in SPECS.items() for leaf, t in random_layer(spec).items()}
        tensors |= {"layers.1.weight": torch.zeros(4, 4), "layers.2.q.bias": torch.zeros(32)}
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        write_json(tmp_path / "config.json", {"quantization_config": CONFIG.to_dict() | config})
        return tmp_path

    return checkpoint


def test_layers_in_order(checkpoint):
    found = list(read_layers(checkpoint()))
    assert [name for name, *_ in found] == ["head", "layers.2.k", "layers.2.q", "layers.10.q"]
    for name, spec, tensors in found:
        assert spec == SPECS[name]
        expected = random_layer(spec)
        assert set(tensors) == set(expected)
        assert all(torch.equal(tensors[leaf], expected[leaf]) for leaf in expected)


def test_one_layer_is_read_at_a_time(checkpoint, monkeypatch):
    read, names = CheckpointReader.read, []
    monkeypatch.setattr(CheckpointReader, "read", lambda self, asked: read(self, names.append(asked) or asked))
    next(read_layers(checkpoint()))
    assert names and all(name.startswith("head.") for asked in names for name in asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.2.q.su"), "layers.2.q has no vector su: "),
        (lambda t: t.update({"layers.2.q.sv": torch.ones(4, 8)}), "layers.2.q has no vector sv: "),
        (lambda t: t.pop("layers.2.q.table"), r"layers.2.q, said to be hyb at 2 bits, has tensors \['packed', 'su', "),
        (lambda t: t.update({"layers.2.q.weight": torch.ones(32, 64)}), r"layers.2.q, .*'weight'\] in place of"),
        (lambda t: t.update({"layers.2.q.su": torch.ones(64, dtype=torch.int16)}), "layers.2.q, .*has su torch.int16"),
        (lambda t: t.update({"layers.2.q.su": torch.ones(72)}), "layers.2.q: a layer of 72 inputs .* multiples of 16"),
        (
            lambda t: t.update({"layers.2.q.sv": torch.ones(64)}),
            r"has packed torch.int16 \(2, 128\) in place of .*\(4, ",
        ),
        (
            lambda t: t.update({"layers.2.q.bias": torch.ones(1)}),
            r"layers.2.q has a bias torch.float32 \(1,\) in place",
        ),
        (
            lambda t: t.update({"layers.2.q.bias": torch.ones(32).int()}),
            r"layers.2.q has a bias torch.int32 \(32,\) in",
        ),
        (lambda t: t.update({"layers.1.packed": torch.zeros(2)}), "layers.1 holds quantized tensors, but config.json"),
        (lambda t: [t.pop(f"layers.2.k.{leaf}") for leaf in random_layer(SPECS["layers.2.k"])], "layers.2.k is quanti"),
    ],
)
def test_headers_that_do_not_fit(checkpoint, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        next(read_layers(checkpoint(change)))
    assert str(caught.value).endswith("fetch or quantize it again") or "--ignore" in str(caught.value)


def test_other_bits_than_the_tensors(checkpoint):
    found = (
        r"layers.2.q, said to be hyb at 3 bits, has packed torch.int16 \(2, 128\) in place of torch.int16 \(2, 192\)"
    )
    with pytest.raises(ValueError, match=found):
        next(read_layers(checkpoint(bits=3)))


@pytest.mark.parametrize("config", [{}, {"quantization_config": "qtip"}, {"quantization_config": None}])
def test_not_a_quantized_checkpoint(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no quantization_config: this is not a quantized checkpoint"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"shape": [10**12 + 1, 64]}, "layers.2.q is 1000000000001 x 64 in config.json, but 32 x 64 in the files: "),
        ({"input_chunks": 60}, "layers.2.q: size 64 cannot be rotated in 60 equal chunks"),
        ({"output_chunks": 65536}, "layers.2.q: size 32 cannot be rotated in 65536 equal chunks"),
    ],
)
def test_sizes_of_config_json_that_the_files_do_not_have(checkpoint, described, message):
    folder = checkpoint()
    config = read_json(folder / "config.json")
    layers = config["quantization_config"]["layers"]
    layers["layers.2.q"] = {"code": "hyb", "bits": 2, **layers.get("layers.2.q", {}), **described}
    write_json(folder / "config.json", config)
    with pytest.raises(ValueError, match=message):
        next(read_layers(folder))


def test_names_of_any_letters_are_sorted():
    long = "a." + "9" * 5000
    assert sorted(["a.10", "a.²", "a.9", long], key=natural) == [long, "a.²", "a.9", "a.10"]
