# SPDX-License-Identifier: Apache-2.0
"""The layered model: what it holds in memory, what it replays, what it refuses."""

import json
import shutil

import numerics
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_model

from quip_vllm.quantizer.model import LayeredModel, run_layer
from quip_vllm.quantizer.pipeline import kwargs_for


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ["Mistral", "Gemma2", "Qwen3"])
def test_layer_by_layer_is_the_whole_model(tiny_model, architecture):
    """Also where the last batch is smaller, and where layers have masks of their own."""
    from transformers import AutoModelForCausalLM

    folder = tiny_model(architecture, dtype="float32")
    source = LayeredModel(folder)
    assert source.compute_dtype == torch.float32 and source.prefix == "model.layers"
    assert source.other_linears == ["lm_head"]
    tokens = torch.randint(0, 256, (5, 40), generator=torch.Generator().manual_seed(0))
    hidden, kwargs = source.first_hidden_states(tokens, 3)
    assert [x.shape[0] for x in hidden] == [3, 2]
    for index in range(len(source.layers)):
        layer = source.fill(index)
        hidden = [run_layer(layer, x, kwargs_for(kwargs[index], x)) for x in hidden]
        source.empty(index)
        assert all(p.device.type == "meta" for p in source.layers.parameters())
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = whole.base_model(tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(
        source.model.base_model.norm(torch.cat(hidden)),
        expected,
        rtol=numerics.FLOAT32_LAYERS,
        atol=numerics.FLOAT32_LAYERS,
    )


def copied(folder, tmp_path, **changes):
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **changes}))
    return tmp_path / "model"


def test_quantized_already(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="is quantized already: give the original"):
        LayeredModel(copied(tiny_model(), tmp_path, quantization_config={"quant_method": "gptq", "bits": 4}))


@pytest.mark.parametrize("changes", [{"hidden_size": "big"}, {"quantization_config": "x"}, {"model_type": "nonsense"}])
def test_unusable_config(tiny_model, tmp_path, changes):
    with pytest.raises(ValueError, match=r"config.json cannot be used: "):
        LayeredModel(copied(tiny_model(), tmp_path, **changes))


def test_stacked_experts(tmp_path):
    save_model(tmp_path, "Mixtral", num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="3 dimensions .stacked experts.: only models whose decoder layers hold plain"):
        LayeredModel(tmp_path)


def test_weights_of_another_config(tiny_model, tmp_path):
    folder = copied(tiny_model(), tmp_path, intermediate_size=96)
    source = LayeredModel(folder)
    with pytest.raises(ValueError, match=r"gate_proj.weight is \(128, 64\): config.json makes it \(96, 64\)"):
        source.fill(0)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="has no tensor model.layers.1.mlp.up_proj.weight"):
        LayeredModel(folder).layer_tensors(1)
