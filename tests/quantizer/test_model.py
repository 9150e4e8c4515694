# SPDX-License-Identifier: Apache-2.0
"""The layered model: what it holds in memory, what it replays, what it refuses."""

import json
import shutil
from pathlib import Path

import numerics
import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file

from quip_vllm.quantizer.source.architecture import decoder_layers
from quip_vllm.quantizer.source.model import LayeredModel
from quip_vllm.quantizer.source.replay import run_layer


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["Mistral", "Gemma2", "GPTNeoX", *tiny_models.EXPERTS])
def test_layer_by_layer_is_the_whole_model(tiny_model, architecture):
    """Up to what the head reads; also where the last batch is smaller, and where layers have masks of their own."""
    from transformers import AutoModelForCausalLM

    folder = tiny_model(architecture, dtype="float32")
    source = LayeredModel(folder)
    assert source.compute_dtype == torch.float32 and source.stored_dtype() == "float32"
    prefix = {"GPTNeoX": "gpt_neox", "NemotronH": "backbone"}.get(architecture, "model")
    assert source.prefix == f"{prefix}.layers"
    assert source.other_linears == ["lm_head"]
    tokens = torch.randint(0, 256, (5, 40), generator=torch.Generator().manual_seed(0))
    hidden, kwargs = source.first_hidden_states(tokens, 3)
    for index in range(len(source.layers)):
        with source.layer(index) as layer:
            hidden = [run_layer(layer, x, kwargs[index]) for x in hidden]
        assert all(p.device.type == "meta" for p in source.layers.parameters())
    found = list(source.head_inputs(tokens, hidden))
    assert [x.shape[0] for x in found] == [3, 2]
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = whole.get_submodule("gpt_neox" if prefix == "gpt_neox" else "model")(
        tokens, use_cache=False
    ).last_hidden_state
    tolerance = {"rtol": numerics.FLOAT32_LAYERS, "atol": numerics.FLOAT32_LAYERS}
    torch.testing.assert_close(torch.cat(found), expected, **tolerance)


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


def test_experts_that_are_matrices():
    """DBRX's are parameters of two dimensions; older models and code of a model's own have a list of nn.Linear."""
    layer = torch.nn.ModuleDict({"attention": torch.nn.Linear(4, 4), "router": torch.nn.Linear(4, 2)})
    layer["experts"] = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([layer])})
    with pytest.raises(ValueError, match=r"^blocks.0.experts.0.weight belongs to a mixture of experts, of which only"):
        decoder_layers(Path("folder"), model)
    with torch.device("meta"):
        dbrx = transformers.DbrxForCausalLM(transformers.DbrxConfig(attn_config={"rope_theta": 1e4}, n_layers=2))
    with pytest.raises(ValueError, match=r"blocks.0.ffn.experts.mlp.w1 belongs to a mixture of experts"):
        decoder_layers(Path("folder"), dbrx)


def test_weights_of_another_config(tiny_model, tmp_path):
    folder = copied(tiny_model(), tmp_path, intermediate_size=96)
    with pytest.raises(ValueError, match=r"gate_proj.weight is \(128, 64\): config.json makes it \(96, 64\)"):
        LayeredModel(folder)
    folder = copied(tiny_model(), tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="has no tensor model.layers.1.mlp.up_proj.weight"):
        LayeredModel(folder)
