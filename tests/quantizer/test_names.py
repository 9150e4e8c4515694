# SPDX-License-Identifier: Apache-2.0
"""Names of tensors that transformers maps while it loads a model: the same tensors are found and written."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import COMMON, save_tokenizer

from quip_vllm.checkpoint.config import CheckpointConfig
from quip_vllm.checkpoint.store import CheckpointReader, read_json
from quip_vllm.evaluation.loading import load_model
from quip_vllm.quantizer.run import quantize
from quip_vllm.quantizer.source.model import LayeredModel


@pytest.fixture
def renamed(tiny_model, tmp_path):
    """renamed(folder, rename): a copy whose tensors have other names."""

    def renamed(folder, rename):
        shutil.copytree(folder, tmp_path / "renamed")
        file = tmp_path / "renamed" / "model.safetensors"
        tensors = load_file(file)
        save_file({rename(name): tensor for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
        return tmp_path / "renamed"

    return renamed


@pytest.mark.parametrize(("architecture", "prefix"), [("Mistral", "model."), ("GPTNeoX", "gpt_neox.")])
def test_names_without_the_prefix_get_it(tiny_model, renamed, make_settings, tmp_path, architecture, prefix):
    model = tiny_model(architecture, tie_word_embeddings=True)
    bare = renamed(model, lambda name: name.removeprefix(prefix))
    assert LayeredModel(bare).prefix == LayeredModel(model).prefix == prefix + "layers"
    quantize(make_settings(bare), tmp_path / "bare")
    quantize(make_settings(model), tmp_path / "whole")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("bare", "whole"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    load_model(str(tmp_path / "bare"))


def test_a_tied_weight_under_its_other_name_gets_the_one_that_vllm_reads(tiny_model, renamed, make_settings, tmp_path):
    names = {"gpt_neox.embed_in.weight": "embed_out.weight"}
    model = tiny_model("GPTNeoX", tie_word_embeddings=True)
    quantize(make_settings(renamed(model, lambda name: names.get(name, name))), tmp_path / "out")
    quantize(make_settings(model), tmp_path / "usual")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "usual"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_two_tied_weights_that_differ(damaged):
    def train_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    with pytest.raises(ValueError, match="ties lm_head.weight to model.embed_tokens.weight, but the files hold two"):
        LayeredModel(damaged(train_head))


@pytest.fixture
def with_vision(tmp_path):
    """Gemma 3 with a vision tower of more layers than its text, whose files say language_model.model.layers."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    words = {**COMMON, "head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}
    eyes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    eyes |= {"image_size": 16, "patch_size": 8}
    tokens = {"mm_tokens_per_image": 4, "image_token_id": 271, "boi_token_id": 270, "eoi_token_id": 269}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=words, vision_config=eyes, **tokens)
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "vision")
    save_tokenizer(tmp_path / "vision")
    return tmp_path / "vision"


def test_a_model_inside_another_keeps_its_names(with_vision, make_settings, tmp_path):
    report = quantize(make_settings(with_vision), tmp_path / "out")
    names = [layer["name"] for layer in report["layers"]]
    assert len(names) == 14 and all(name.startswith("language_model.model.layers.") for name in names)
    original, written = CheckpointReader(with_vision), CheckpointReader(tmp_path / "out")
    kept = [name for name in original.names() if name.removesuffix(".weight") not in names]
    assert any(name.startswith("vision_tower.") for name in kept)
    for name in kept:
        assert torch.equal(written.read([name])[name], original.read([name])[name])
    assert {name.rpartition(".")[0] for name in set(written.names()) - set(kept)} == set(names)
    config = CheckpointConfig.from_dict(read_json(tmp_path / "out" / "config.json")["quantization_config"])
    assert all(config.layer_format(name) for name in names)
    linears = ("fc1.weight", "fc2.weight", "q_proj.weight", "out_proj.weight")
    matrices = [name for name in kept if "vision" in name and name.endswith(linears)]
    assert matrices and not [name for name in matrices if config.layer_format(name.removesuffix(".weight"))]


def test_tensors_that_transformers_rearranges(tiny_model, renamed, monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import Concatenate, WeightConverter

    parts = ["mlp.left.weight", "mlp.right.weight"]
    rule = WeightConverter(parts, "mlp.gate_up_proj.weight", operations=[Concatenate(dim=0)])
    folder = renamed(tiny_model("Phi3"), lambda name: name.replace("gate_up_proj", "left"))
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [rule])
    with pytest.raises(
        ValueError, match="mlp.left.weight, which transformers rearranges into model.layers.0.mlp.gate_up"
    ):
        LayeredModel(folder)


def test_a_tensor_that_is_not_there(tiny_model, renamed):
    folder = renamed(tiny_model(), lambda name: name.replace("1.mlp.up_proj", "1.mlp.upper"))
    with pytest.raises(
        ValueError, match="has no tensor model.layers.1.mlp.up_proj.weight: its files and its config.json"
    ):
        LayeredModel(folder)


def test_stored_buffers_are_read(tiny_model):
    """Stored buffers of layers are part of what they compute: Gemma 4 scales by one."""
    layers = {"num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2, "hidden_size_per_layer_input": 0}
    folder = tiny_model("Gemma4Text", head_dim=16, global_head_dim=16, vocab_size_per_layer_input=272, **layers)
    source = LayeredModel(folder)
    value = torch.full((1,), 0.5)
    tensors = source.reader.read(source.layer_names(0))
    assert "model.layers.0.layer_scalar" in tensors
    with source.layer(0, {**tensors, "model.layers.0.layer_scalar": value}) as layer:
        assert layer.layer_scalar == 0.5
