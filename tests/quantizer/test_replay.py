# SPDX-License-Identifier: Apache-2.0
"""Layers that run alone: they compute what the model computes, for every size of batch, or the model is refused."""

import numerics
import pytest
import torch
from tiny_models import save_model

from quip_vllm.quantizer.source import replay_check
from quip_vllm.quantizer.source.model import LayeredModel
from quip_vllm.quantizer.source.replay import Returned, Stub, kinds, run_layer
from quip_vllm.quantizer.source.replay_check import check_replay

BATCHES = [(3, 40), (2, 40)]
PER_LAYER = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 24,
    "head_dim": 16,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 272,
}
GEMMA4 = {**PER_LAYER, "global_head_dim": 32, "hidden_size_per_layer_input": 0}
CONFIGS = {
    "Bloom": {"n_layer": 3},  # a bias of [batch * heads, 1, length]
    "Falcon": {"alibi": True, "num_kv_heads": 4, "new_decoder_architecture": False},
    "CodeGen": {"n_layer": 3, "n_embd": 64, "n_head": 4, "n_positions": 256, "rotary_dim": 8},  # layers return tuples
    "GPTNeo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "OPT": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "Gemma4Text": GEMMA4,  # positional arguments, and a dictionary for all layers
    "Cohere2": {"num_hidden_layers": 4, "sliding_window": 24},
}


@torch.no_grad()
@pytest.mark.parametrize("architecture", CONFIGS)
def test_layers_alone_are_the_whole_model(tiny_model, architecture):
    from transformers import AutoModelForCausalLM

    folder = tiny_model(architecture, dtype="float32", tie_word_embeddings=False, **CONFIGS[architecture])
    source = LayeredModel(folder)
    check_replay(source, BATCHES)
    tokens = torch.randint(0, 256, (5, 40), generator=torch.Generator().manual_seed(0))
    hidden, calls = source.first_hidden_states(tokens, 3)
    for index in range(len(source.layers)):
        with source.layer(index) as layer:
            hidden = [run_layer(layer, x, calls[index]) for x in hidden]
    found = torch.cat(list(source.head_inputs(tokens, hidden)))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = whole.base_model(tokens, use_cache=False).last_hidden_state
    assert numerics.relative(found, expected) < numerics.FLOAT32_LAYERS


def test_layers_of_one_kind(tiny_model):
    assert kinds(LayeredModel(tiny_model("Llama", num_hidden_layers=4)).layers) == [0]
    assert kinds(LayeredModel(tiny_model("Gemma2", num_hidden_layers=4)).layers) == [0, 1]
    assert kinds(LayeredModel(tiny_model("Cohere2", num_hidden_layers=4, sliding_window=24)).layers) == [0, 3]


SHARED = {**PER_LAYER, "num_kv_shared_layers": 1, "global_head_dim": 16, "hidden_size_per_layer_input": 0}


@pytest.mark.parametrize(
    ("architecture", "config", "problem"),
    [
        ("Gemma4Text", SHARED, "KeyError: 'full_attention'"),  # it shares another layer's keys and values
        ("Gemma4Text", {**GEMMA4, "hidden_size_per_layer_input": 16}, "reads more of the text than its hidden states"),
        ("Electra", {"embedding_size": 64}, "layer 0 reads later tokens, too"),
    ],
)
def test_refused(tiny_model, architecture, config, problem):
    source = LayeredModel(tiny_model(architecture, **config))
    with pytest.raises(ValueError, match="whose decoder layers cannot be run one at a time .*quantized") as raised:
        check_replay(source, BATCHES)
    assert problem in str(raised.value)


def test_a_shared_dictionary_may_be_written_not_read():
    class Layer(torch.nn.Module):
        def forward(self, hidden, shared):
            shared["left"] = hidden
            return hidden, None

    class Reader(torch.nn.Module):
        def forward(self, hidden, shared):
            return shared.get("left", hidden)

    stub, x = Stub(Layer(), Returned()), torch.ones(2, 3, 4)
    stub(x, {})
    calls = {2: stub.call}
    assert torch.equal(run_layer(Layer(), x, calls), x) and run_layer(Layer(), x, calls) is x
    with pytest.raises(LookupError, match="it reads what another layer left"):
        run_layer(Reader(), x, calls)


@pytest.mark.parametrize("rows", [3, 2])
def test_a_difference_is_found_in_every_size_of_batch(tiny_model, monkeypatch, rows):
    def wrong(layer, hidden, calls):
        return run_layer(layer, hidden, calls) * (1.001 if len(hidden) == rows else 1.0)

    source = LayeredModel(tiny_model(dtype="float32"))
    check_replay(source, BATCHES)
    monkeypatch.setattr(replay_check, "run_layer", wrong)
    with pytest.raises(ValueError, match=r"layer 0 alone is off by 0.001\): models of this architecture"):
        check_replay(source, BATCHES)


def test_a_stack_of_experts_of_an_unknown_kind_is_named(tmp_path):
    save_model(tmp_path, "JetMoe")
    what = "input_linear.weight is a stack of experts of 3"
    with pytest.raises(ValueError, match=f"{what}.*: only models whose decoder layers hold plain nn.Linear, and"):
        LayeredModel(tmp_path)
