# SPDX-License-Identifier: Apache-2.0
"""Adapters in vLLM on quantized models: the model dequantized in transformers, with B A added to its weights."""

import json

import engine as served
import pytest
import torch
from numerics import SERVED_LOG_PROBABILITY
from safetensors.torch import save_file

from quip_vllm.evaluation.loading import load_model

RANK, ALPHA = 4, 8
PROMPTS = [list(range(40, 72)), [7, 3, 250, 11, 90], list(range(200, 150, -1)), [5, 6, 7, 8, 9, 10]]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter(model, folder, targets, seed):
    """Writes an adapter as PEFT does, of random factors for the modules whose names end in one of `targets`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in targets:
            continue
        outputs, inputs = module.weight.shape
        of_tokens = isinstance(module, torch.nn.Embedding)
        a, b = (inputs, outputs) if not of_tokens else (outputs, inputs)
        one = torch.randn(RANK, a, generator=generator) * 0.1
        other = torch.randn(b, RANK, generator=generator) * 0.1
        leaves = ("lora_embedding_A", "lora_embedding_B") if of_tokens else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"base_model.model.{name}.{leaf}": x for leaf, x in zip(leaves, (one, other), strict=True)}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return tensors


def merged(model, tensors):
    """Adds an adapter to the weights of a float32 model whose head is not tied."""
    for key, one in tensors.items():
        name, _, leaf = key.removeprefix("base_model.model.").partition(".lora_")
        if leaf not in ("A.weight", "embedding_A"):
            continue
        change = tensors[key.replace("_A", "_B")] @ one * (ALPHA / RANK)
        weight = model.get_submodule(name).weight
        weight.data += change.T if leaf == "embedding_A" else change
    return model


def log_probabilities(model, prompt, answer):
    """Of the answer's tokens."""
    with torch.no_grad():
        rows = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 :].log_softmax(-1)
    return torch.stack([rows[i, token] for i, token in enumerate(answer)])


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_in_one_batch(quantized, tmp_path, engine, tied):
    """One for the linear layers, one for head and embedding, one for both; and a prompt without any.

    On a CPU vLLM 0.32 takes the last of its slots for such a prompt, quantized or not: one slot stays free.
    """
    model = {**served.HEADS, "tie_word_embeddings": tied}
    options = {} if tied else {"embedding": 3}
    folder = quantized("Qwen3" if tied else "Llama", model, lm_head=4, overrides=(("v_proj", 3),), **options)

    def base():
        model = load_model(str(folder))
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        return model

    kinds = {"linear": LINEAR, "tokens": ("embed_tokens", "lm_head"), "all": (*LINEAR, "embed_tokens", "lm_head")}
    made = {kind: adapter(base(), tmp_path / kind, names, seed) for seed, (kind, names) in enumerate(kinds.items())}
    engine(served.start, folder, enable_lora=True, max_loras=4, max_lora_rank=8)
    adapters = [*(str(tmp_path / kind) for kind in kinds), None]
    found = engine(served.generated, PROMPTS, adapters, max_tokens=12, logprobs=0)
    models = [*(merged(base(), made[kind]) for kind in kinds), base()]
    for one, prompt, model in zip(found, PROMPTS, models, strict=True):
        answer = torch.tensor(one["answer"])
        assert (answer - log_probabilities(model, prompt, one["tokens"])).abs().max() < SERVED_LOG_PROBABILITY
        changed = (answer - log_probabilities(base(), prompt, one["tokens"])).abs().max() > 0.1
        assert changed == (model is not models[-1])


def test_adapters_beside_quantized_experts(quantized, tmp_path, engine):
    """Of the attention, where the target modules are said; the experts themselves have none."""
    folder = quantized("Qwen3Moe", served.HEADS)
    targets = ["q_proj", "v_proj", "o_proj"]
    made = adapter(load_model(str(folder)), tmp_path / "one", targets, 0)
    engine(served.start, folder, enable_lora=True, max_loras=2, max_lora_rank=8, lora_target_modules=targets)
    found = engine(served.generated, PROMPTS, [str(tmp_path / "one"), None] * 2, max_tokens=12, logprobs=0)
    models = [merged(load_model(str(folder)), made), load_model(str(folder))] * 2
    for one, prompt, model in zip(found, PROMPTS, models, strict=True):
        answer = torch.tensor(one["answer"])
        assert (answer - log_probabilities(model, prompt, one["tokens"])).abs().max() < SERVED_LOG_PROBABILITY
