# SPDX-License-Identifier: Apache-2.0
"""A tiny random model of any causal architecture of transformers."""

import sys
from pathlib import Path

SMALL = {
    "vocab_size": 272,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "initializer_range": 0.08,
    "init_std": 0.08,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "sliding_window": 64,
    "ffn_dim": 192,
    "d_ff": 192,
    "ffn_hidden_size": 192,
    "word_embed_proj_dim": 128,
    "query_pre_attn_scalar": 32,
    "rotary_dim": 16,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 192,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 272,
    "hidden_size_per_layer_input": 32,
    "laurel_rank": 16,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 64,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 128,
    "linear_num_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_ssm": 256,
    "mamba_d_state": 32,
    "mamba_head_dim": 32,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "ssm_state_size": 32,
    "swa_head_dim": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "ngram_vocab_size_base": 1000,
}
"""Set where an architecture's config, or one inside it, has the key."""
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
BLOCK = {"conv_dim": 128, "block_dim": 128, "block_ff_dim": 192, "block_auto_adjust_ff_dim": False}
OWN = {
    "falcon": {
        "num_kv_heads": 2,
        "ffn_hidden_size": 512,
        "new_decoder_architecture": True,
        "alibi": False,
        "bias": False,
    },
    "gpt_neox": {"intermediate_size": 512},
    "gpt2": {"n_inner": 512},
    "gpt_bigcode": {"num_key_value_heads": 1},
    "mpt": {"no_bias": True},
    "phi": {"num_key_value_heads": 4},
    **{kind: LATENT for kind in ("axk1", "deepseek_v2", "deepseek_v32")},
    "deepseek_v3": {**LATENT, "topk_method": "noaux_tc"},
    "glm4_moe": {"head_dim": 32},
    "glm4_moe_lite": {**LATENT, "first_k_dense_replace": 1},
    "hy_v3": {"first_k_dense_replace": 1},
    "qwen3_next": {**HYBRID, "num_experts_per_tok": 4},  # all, so that bf16 does not change the choice
    **{kind: HYBRID for kind in ("qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "kimi_linear")},
    "granitemoehybrid": HYBRID,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2}, "d_model": 128},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "llama4": {"text_config": {**SMALL, "num_experts_per_tok": 1}},
    "llama4_text": {"num_experts_per_tok": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], **BLOCK},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, **BLOCK},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"n_groups": 1, "moe_latent_size": 64},
    "minicpm3": {"num_key_value_heads": 4},
    "mixtral": {"sliding_window": None},
    "zamba2": {"num_hidden_layers": 54},
}
"""What an architecture needs besides."""
IGNORE = {kind: ("kv_b_proj",) for kind in OWN if OWN[kind].items() >= LATENT.items()}
IGNORE |= {"hy_v4": ("kv_b_proj",)} | {kind: ("dt_proj",) for kind in ("falcon_mamba", "jamba", "mamba")}
"""Layers that keep their weight, because vLLM does not multiply with them as with a linear layer."""


def small_config(model_type):
    """The config of a tiny model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **small_values(AutoConfig.for_model(model_type)) | OWN.get(model_type, {}))


def small_values(default):
    """Those of SMALL that a config has, and the same for the configs inside it."""
    computed = {key for key in SMALL if isinstance(getattr(type(default), key, None), property)}
    keys = {key: value for key, value in SMALL.items() if has(default, key) and key not in computed}
    parts = {name: getattr(default, name, None) for name in getattr(default, "sub_configs", {})}
    return keys | {name: small_values(part) for name, part in parts.items() if part is not None}


def has(config, key):
    """Whether a config has a key that is the same for all layers."""
    try:
        return hasattr(config, key)
    except RuntimeError:  # it differs by layer
        return False


def save(folder, model_type):
    """Writes a tiny random model of an architecture with a byte tokenizer, and text to calibrate on."""
    import torch
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    from tiny_models import save_tokenizer, text

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(model_type), dtype=torch.float32)
    for parameter in model.parameters():  # biases and norms start as constants: make them matter
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "text.txt").write_text(text(20000))
