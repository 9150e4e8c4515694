# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of several architectures and a byte tokenizer, made on the spot: no network, no files in git."""

import json
import random

import torch

VOCABULARY = 272
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "initializer_range": 0.08,
}
ARCHITECTURES = {
    "Llama": {},
    "Mistral": {"sliding_window": 24, "tie_word_embeddings": False},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
    "Phi3": {},
    "Olmo2": {},
}
_FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "tie_word_embeddings": False}
_LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
_DEEPSEEK = {**_FEW, **_LATENT, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_DEEPSEEK |= {"num_key_value_heads": 4, "n_group": 2, "topk_group": 1}
EXPERTS = {  # mixtures of experts
    "Qwen3Moe": {**_FEW, "head_dim": 16},
    "Qwen2Moe": {**_FEW, "shared_expert_intermediate_size": 64},
    "Olmoe": {**_FEW, "intermediate_size": 32},
    "Mixtral": {**_FEW, "num_local_experts": 4},
    "DeepseekV2": {**_DEEPSEEK, "topk_method": "group_limited_greedy"},
    "DeepseekV3": _DEEPSEEK,
    "GraniteMoe": {**_FEW, "intermediate_size": 32, "num_local_experts": 4},
    "Llama4Text": {**_FEW, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16, "intermediate_size": 32},
    "NemotronH": {  # without a gate, behind a state space
        **_FEW,
        **{"n_routed_experts": 4, "moe_shared_expert_intermediate_size": 64, "moe_latent_size": 32, "head_dim": 16},
        **{"mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 32, "n_groups": 1},
        "layers_block_type": ["linear_attention", "full_attention", "moe"],
    },
    "GptOss": {
        **_FEW,
        "head_dim": 16,
        "intermediate_size": 32,
        "num_local_experts": 4,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
MIXERS = {  # a state space beside the attention, whose in_proj has 584 outputs: there is no such transform
    "FalconH1": {
        **{"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 32},
        "tie_word_embeddings": False,
    },
}


def save_model(folder, architecture="Llama", dtype="bfloat16", seed=0, **changes):
    """Writes a model with its tokenizer; returns the folder."""
    import transformers

    config_class = getattr(transformers, architecture + "Config")
    name = architecture.removesuffix("Text") + "ForCausalLM"
    config = config_class(**{**COMMON, **(ARCHITECTURES | EXPERTS | MIXERS).get(architecture, {}), **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config)
    for key, parameter in model.named_parameters():  # biases and norms start as constants: make them matter
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        assert parameter.isfinite().all(), key
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder):
    """One token a byte, and <s> 256, </s> 257."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def text(letters=6000, seed=0):
    """Words of random letters."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 7))) for _ in range(200)]
    return " ".join(draw.choices(words, k=letters // 4))[:letters]
