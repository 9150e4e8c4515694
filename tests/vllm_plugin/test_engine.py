# SPDX-License-Identifier: Apache-2.0
"""What vLLM does with a model besides answering, on quantized ones, against the model dequantized in transformers."""

import json
import shutil

import engine as served
import pytest
import tiny_models
import torch
from numerics import FLOAT32_LAYERS, SERVED_LOG_PROBABILITY
from safetensors.torch import load_file, save_file

from quip_vllm.evaluation.loading import dense_state, load_model

PROMPTS = [[i % 251 for i in range(3, 143)], [7, 3, 250, 11, 90], list(range(200, 150, -1))]
MIXED = {"lm_head": 4, "overrides": (("v_proj", 3), ("down_proj", 4)), "ignore": (r"1\.mlp\.(gate|up)",)}


def log_probabilities(folder, tokens):
    """Of each token from the second on, in transformers with the dequantized model."""
    with torch.no_grad():
        rows = load_model(str(folder))(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return [rows[i, token].item() for i, token in enumerate(tokens[1:])]


def assert_served(folder, found, prompts=PROMPTS):
    """Log probabilities of prompts and answers are the dequantized model's."""
    for one, prompt in zip(found, prompts, strict=True):
        expected = log_probabilities(folder, prompt + one["tokens"])
        difference = torch.tensor([*one["prompt"], *one["answer"]]) - torch.tensor(expected)
        assert difference.abs().max() < SERVED_LOG_PROBABILITY


def answers(engine, **options):
    return engine(served.generated, PROMPTS, **{"max_tokens": 16, "prompt_logprobs": 0, "logprobs": 0, **options})


def tokens(found):
    return [one["tokens"] for one in found]


def test_one_engine(quantized, engine):
    """Chunked prefill, log probabilities, prefix caching, structured output, sleep and reload."""
    first, second, other = (
        quantized(model=served.HEADS, **MIXED, **how) for how in ({}, {"sequences": 6}, {"bits": 3})
    )
    engine(
        served.start,
        first,
        quantization="quip_sharp",
        max_model_len=256,
        enable_prefix_caching=True,
        max_num_batched_tokens=48,
        load_format="safetensors",
    )
    found = answers(engine)
    assert_served(first, found)
    again = answers(engine, prompt_logprobs=None)
    assert again[0]["cached"] >= 128 and tokens(again) == tokens(found)
    chosen = engine(
        served.generated, [[40, 50, 60], [70, 71]], schema={"enum": ["yes", "no", "perhaps"]}, max_tokens=20
    )
    assert {json.loads(one["text"]) for one in chosen} <= {"yes", "no", "perhaps"}
    engine(served.called, "sleep")
    engine(served.called, "wake_up")
    assert tokens(answers(engine)) == tokens(found)
    with pytest.raises(RuntimeError, match="is refused, the engine goes on .*another bits"):
        engine(served.called, "collective_rpc", "reload_weights", kwargs={"weights_path": str(other)})
    assert tokens(answers(engine)) == tokens(found)
    engine(served.called, "collective_rpc", "reload_weights", kwargs={"weights_path": str(second)})
    engine(served.called, "reset_prefix_cache")
    reloaded = answers(engine)
    assert_served(second, reloaded)
    assert tokens(reloaded) != tokens(found)


def eagle(folder):
    """Writes a random EAGLE draft without embedding and head, which takes the model's; returns the folder."""
    tiny_models.save_model(folder, num_hidden_layers=1, **served.HEADS)
    whole = load_file(folder / "model.safetensors")
    own = {name.removeprefix("model."): one for name, one in whole.items() if name.startswith("model.layers")}
    width = served.HEADS["hidden_size"]
    del own["layers.0.input_layernorm.weight"]  # an EAGLE draft has none
    own["fc.weight"] = 0.1 * torch.randn(width, 2 * width, generator=torch.Generator().manual_seed(0))
    save_file(own, folder / "model.safetensors")
    return folder


@pytest.mark.long
def test_speculation_changes_no_answer(quantized, engine, tmp_path):
    """The draft model is the model itself, so that nearly every token that it proposes is taken."""
    folder = quantized(model=served.HEADS, **MIXED)
    engine(served.start, folder, max_model_len=256)
    expected = tokens(answers(engine, max_tokens=40))
    methods = {
        "draft_model": {"model": str(folder)},
        "eagle": {"model": str(eagle(tmp_path / "eagle"))},
        "ngram": {"prompt_lookup_max": 3, "prompt_lookup_min": 1},
    }
    for method, options in methods.items():
        speculation = {"method": method, "num_speculative_tokens": 3, **options}
        engine(served.start, folder, max_model_len=256, speculative_config=speculation, disable_log_stats=False)
        assert tokens(answers(engine, max_tokens=40, prompt_logprobs=None)) == expected, method
        counts = (engine(served.metric, f"vllm:spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted"))
        drafted, accepted = counts
        assert drafted and (method != "draft_model" or accepted > 0.9 * drafted)
    engine.close()  # vLLM's CPU backend does not start again where ngram has loaded numba


@pytest.mark.parametrize("head", [{"lm_head": 4}, {"lm_head": 4, "embedding": 3}])
def test_embeddings(quantized, engine, head):
    """Of a model with a tied head, and of one whose head has tensors of its own, which are left out."""
    folder = quantized("Mistral" if "embedding" in head else "Qwen3", served.HEADS, **head)
    engine(served.start, folder, runner="pooling")
    found = torch.tensor(engine(served.embedded, PROMPTS[1:]))
    model = load_model(str(folder)).model
    with torch.no_grad():
        last = torch.stack([model(torch.tensor([one])).last_hidden_state[0, -1] for one in PROMPTS[1:]])
    torch.testing.assert_close(found, torch.nn.functional.normalize(last), rtol=0, atol=FLOAT32_LAYERS)


@pytest.mark.parametrize("architecture", ["Helium", "Qwen3", pytest.param("Llama", marks=pytest.mark.exhaustive)])
def test_models_of_transformers_in_vllm(quantized, engine, architecture):
    """Of Helium vLLM 0.32 has no code of its own."""
    folder = quantized(architecture, served.HEADS, **MIXED)
    engine(served.start, folder, model_impl="transformers", max_model_len=256)
    assert_served(folder, answers(engine))


@pytest.mark.parametrize(
    "architecture",
    ["GptOss", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("GraniteMoe", "Llama4Text"))],
)
def test_experts_that_the_files_stack(quantized, engine, architecture):
    folder = quantized(architecture, served.HEADS, overrides=(("down_proj", 4),))
    engine(served.start, folder, max_model_len=256)
    assert_served(folder, answers(engine))


@pytest.mark.parametrize("architecture", ["NemotronH", pytest.param("FalconH1", marks=pytest.mark.exhaustive)])
def test_a_state_space_beside_attention(quantized, engine, architecture):
    """In Nemotron-H with experts that have no gate, and read fewer values than the hidden states have."""
    folder = quantized(architecture, served.HEADS, overrides=(("down_proj", 4),))
    engine(served.start, folder, max_model_len=256)
    assert_served(folder, answers(engine))


@pytest.mark.exhaustive
def test_two_ranks_with_experts_of_their_own(quantized, engine):
    folder = quantized("Qwen3Moe", served.HEADS, hadamard_block=32)
    ranks = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "distributed_executor_backend": "mp"}
    engine(served.start, folder, max_model_len=256, **ranks)
    found = answers(engine)
    engine.close()
    assert_served(folder, found)


@pytest.mark.exhaustive
def test_latent_attention(tiny_model, quantized, engine, tmp_path):
    """Against vLLM with the dequantized weights: its own numbers are not those of transformers."""
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64, "hidden_size": 128}
    folder = quantized("DeepseekV2", latent, ignore=("kv_b_proj",), overrides=(("down_proj", 4),))
    shutil.copytree(tiny_model("DeepseekV2", **latent), tmp_path / "dense")
    save_file(dense_state(folder), tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    both = []
    for one in (tmp_path / "dense", folder):  # with AMX vLLM would take a backend without float32
        engine(served.start, one, max_model_len=256, attention_backend="CPU_MLA")
        both.append(answers(engine))
    assert tokens(both[0]) == tokens(both[1])
    for one, other in zip(*both, strict=True):
        pair = (torch.tensor([*found["prompt"], *found["answer"]]) for found in (one, other))
        torch.testing.assert_close(*pair, rtol=0, atol=SERVED_LOG_PROBABILITY)


def test_dummy_weights_start(quantized, engine):
    engine(served.start, quantized(model=served.HEADS, **MIXED), load_format="dummy")
    assert len(tokens(engine(served.generated, PROMPTS[1:], max_tokens=2))) == 2


def test_a_state_that_was_prepared_elsewhere_and_pickles_are_refused(quantized, engine, tmp_path):
    folder = shutil.copytree(quantized(model=served.HEADS, **MIXED), tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match=r"pickled has no \*.safetensors file, and nothing else is read"):
        engine(served.start, folder)
    with pytest.raises(RuntimeError, match="--load-format pt reads pickles, which can run any code"):
        engine(served.start, quantized(model=served.HEADS, **MIXED), load_format="pt")
    with pytest.raises(RuntimeError, match="--load-format sharded_state is not served for quip_sharp"):
        engine(served.start, quantized(model=served.HEADS, **MIXED), load_format="sharded_state")
