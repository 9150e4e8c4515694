# SPDX-License-Identifier: Apache-2.0
"""The plan: what becomes of every linear layer, its description in config.json, its size, and what is refused."""

import pytest

from quip_vllm.checkpoint.config import CheckpointConfig, Head, LayerFormat
from quip_vllm.quantizer.plan import make_plan, with_split
from quip_vllm.quantizer.source.model import LayeredModel


@pytest.fixture
def plan(tiny_model, make_settings):
    """plan(architecture, settings..., config=...) -> (Plan, Settings, LayeredModel)."""

    def plan(architecture="Llama", config=None, **changes):
        model = tiny_model(architecture, **(config or {}))
        settings, source = make_settings(model, **changes), LayeredModel(model)
        return make_plan(settings, source), settings, source

    return plan


def test_every_layer_has_its_own_format(plan):
    found, settings, source = plan(
        code="hyb", hadamard_block=32, ignore=("layers.1", "o_proj"), overrides=(("down_proj", 4),), lm_head=3
    )
    attention = [f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv"]
    mlp = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert list(found.specs) == [*attention, *mlp, "model.embed_tokens"]
    assert [spec.bits for spec in found.specs.values()] == [2, 2, 2, 2, 2, 4, 3]
    assert all((spec.code, spec.hadamard_block) == ("hyb", 32) for spec in found.specs.values())
    assert [spec.rotate_output for spec in found.specs.values()] == [True] * 6 + [False]
    config = found.config(settings, source.tied)
    assert config.default == LayerFormat("hyb", 2) and config.layers == {mlp[2]: LayerFormat("hyb", 4)}
    assert config.head.module == "model.embed_tokens" and config.head.stored.bits == 3 and config.head.tied
    assert config.modules_to_not_convert[:2] == ("lm_head", "model.layers.0.self_attn.o_proj")
    assert len(config.modules_to_not_convert) == 2 + 7


def test_a_part_of_what_vllm_fuses_keeps_its_weight(plan):
    kept = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.gate_proj"]
    found, settings, source = plan(ignore=("0.self_attn.k", "1.mlp.gate"))
    assert len(found.specs) == 14 - 2 and not found.specs.keys() & set(kept)
    assert found.config(settings, source.tied).modules_to_not_convert == ("lm_head", *kept)


def test_rotations_that_can_be_split(plan):
    """Outputs of what is column-parallel, inputs of the others; a head is looked up by rows."""
    found, settings, source = plan(split=2, overrides=(("v_proj", 3),), lm_head=3)
    chunks = {name.rpartition(".")[2]: spec.chunks for name, spec in found.specs.items()}
    across = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), (2, 1))
    assert chunks == {**across, "o_proj": (1, 2), "down_proj": (1, 2), "embed_tokens": (1, 1)}
    config = found.config(settings, source.tied)
    assert CheckpointConfig.from_dict(config.to_dict()) == config and config.hadamard_block is None
    assert all(
        config.layer_format(name).spec(64, (64,), None).chunks == spec.chunks for name, spec in found.specs.items()
    )
    assert {name.rpartition(".")[2] for name in config.layers} == {"v_proj", "o_proj", "down_proj"}


@pytest.mark.parametrize(
    ("architecture", "config", "changes", "split"),
    [
        ("Llama", {}, {}, 4),
        ("Llama", {}, {"split": 1}, 1),
        ("Llama", {}, {"hadamard_block": 64}, 1),
        ("Llama", {"num_key_value_heads": 4}, {}, 2),  # 512 outputs
        ("Llama", {"num_key_value_heads": 1}, {}, 1),
        ("Llama", {"num_key_value_heads": 1}, {"ignore": ("[kv]_proj",)}, 4),
        ("Llama", {"hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 6}, {}, 2),
        ("Phi3", {}, {}, 1),
        ("Qwen3Moe", {"moe_intermediate_size": 512}, {}, 1),
    ],
)
def test_the_chunks_of_a_model_that_nobody_names(plan, architecture, config, changes, split):
    """The most that leave each 256 numbers, if the heads are a multiple; a mixture of experts has none."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "num_attention_heads": 8}
    _, settings, source = plan(architecture, {**sizes, "num_key_value_heads": 8, **config}, **changes)
    assert with_split(settings, source).split == split


@pytest.mark.parametrize(
    ("architecture", "config", "changes", "message"),
    [
        (
            "Llama",
            {},
            {"split": 3},
            "q_proj cannot be split for 3 ranks: its outputs of size 64 have no 3 equal chunks",
        ),
        ("Llama", {}, {"split": 16}, "o_proj cannot be split for 16 ranks: .*multiples of 8"),
        ("Llama", {"intermediate_size": 368}, {"split": 8}, "gate_proj cannot be split .*size 46 has no full-width"),
        (
            "Phi3",
            {},
            {"split": 2},
            "qkv_proj cannot be split .*outputs of several layers as vLLM does; give --hadamard-",
        ),
        ("GPTNeoX", {}, {"split": 2}, "query_key_value cannot be split for 2 ranks: .* rearranged outputs"),
        ("Llama", {}, {"split": 4, "code": "hyb"}, "k_proj cannot be split for 4 ranks: .*multiples of 16 and 16"),
    ],
)
def test_what_cannot_be_split_is_refused(plan, architecture, config, changes, message):
    with pytest.raises(ValueError, match=message):
        plan(architecture, config, **changes)


def test_a_head_has_its_name_in_the_files(plan):
    found, _, source = plan("GPTNeoX", {"tie_word_embeddings": False}, lm_head=4)  # transformers calls it lm_head
    assert found.head == "embed_out" and not source.tied
    found, settings, source = plan("GPTNeoX", {"tie_word_embeddings": False})
    assert found.config(settings, source.tied).modules_to_not_convert == ("embed_out",)


@pytest.mark.parametrize("bits", [{"embedding": 3}, {"lm_head": 3}, {"embedding": 3, "lm_head": 3}])
def test_a_tied_embedding_is_the_head(plan, bits):
    found, settings, source = plan(**bits)
    assert (found.head, found.embedding) == ("model.embed_tokens", None)
    assert found.config(settings, source.tied).token_rows == (Head("model.embed_tokens", LayerFormat("e8p", 3), True),)


@pytest.mark.parametrize(
    ("bits", "ends"),
    [
        ({"embedding": 3}, {0: "model.embed_tokens", -1: "model.layers.1.mlp.down_proj"}),
        ({"lm_head": 4}, {0: "model.layers.0.self_attn.q_proj", -1: "lm_head"}),
        ({"embedding": 3, "lm_head": 4}, {0: "model.embed_tokens", -1: "lm_head"}),
    ],
)
def test_untied_embedding_and_head_have_bits_of_their_own(plan, bits, ends):
    found, settings, source = plan("Mistral", {"vocab_size": 301}, **bits)
    assert {end: list(found.specs)[end] for end in ends} == ends
    stored = {"embedding": "model.embed_tokens", "lm_head": "lm_head"}
    config = found.config(settings, source.tied)
    assert {rows.module: rows.stored.bits for rows in config.token_rows} == {stored[key]: bits[key] for key in bits}
    assert ("lm_head" in config.modules_to_not_convert) == ("lm_head" not in bits)


def test_whole_groups_may_be_ignored(plan):
    found, *_ = plan(ignore=("layers.0.self_attn.[qkv]_proj", "1.mlp.(gate|up)_proj"), overrides=(("k_proj", 4),))
    assert len(found.specs) == 14 - 3 - 2


def test_what_is_kept_anyway_may_be_ignored(plan):
    found, settings, source = plan(ignore=("lm_head",))
    assert found.config(settings, source.tied).modules_to_not_convert == ("lm_head",)


def test_stored_bytes(plan):
    found, *_ = plan(overrides=(("down_proj", 4),), ignore=("self_attn", "layers.1"))
    n, k = 128, 64
    assert found.stored_bytes() == 2 * (n * k * 2 // 8 + 2 * (n + k)) + (n * k * 4 // 8 + 2 * (n + k))


@pytest.mark.parametrize(
    ("architecture", "refused"), [("DeepseekV3", True), ("MiniCPM3", False)]
)  # the second multiplies with it as with a linear layer, in vLLM
def test_the_projection_whose_weight_latent_attention_needs(plan, architecture, refused):
    sizes = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    sizes |= {"num_key_value_heads": 4, "head_dim": 16, "first_k_dense_replace": 2}
    if refused:
        with pytest.raises(ValueError, match="0.self_attn.kv_b_proj cannot be quantized: .*; give --ignore kv_b_proj"):
            plan(architecture, sizes)
        found, *_ = plan(architecture, sizes, ignore=("kv_b_proj",))
    else:
        found, *_ = plan(architecture, sizes)
    assert ("model.layers.1.self_attn.kv_b_proj" in found.kept) == refused


ODD = {"hidden_size": 8 * 47 * 3, "num_attention_heads": 3, "num_key_value_heads": 3}


@pytest.mark.parametrize(
    ("architecture", "config", "changes", "message"),
    [
        ("Llama", {}, {"ignore": (".",)}, "no linear layer of .* is left to quantize: give a narrower --ignore"),
        ("Llama", ODD, {}, "layers.0.self_attn.q_proj cannot be quantized: .*--hadamard-block"),
        ("Llama", {"intermediate_size": 136}, {"code": "1mad"}, "gate_proj cannot be quantized: .*--ignore"),
        ("Llama", ODD, {"lm_head": 4, "ignore": (".",)}, "embed_tokens cannot be quantized: .*--hadamard-block"),
        ("Mistral", ODD, {"embedding": 4, "ignore": (".",)}, "embed_tokens cannot be quantized: .*--hadamard-block"),
        (
            "Llama",
            {},
            {"embedding": 4, "lm_head": 3},
            "--embedding is 4 and --lm-head is 3, but .* ties the two to one",
        ),
        (
            "Llama",
            {},
            {"ignore": ("o_proj", "q_porj")},
            "--ignore q_porj matches no linear layer: their names are like m",
        ),
        (
            "Phi3",
            {},
            {"overrides": (("up_proj$", 4), ("gate_proj", 3))},
            "--override gate_proj matches no linear layer",
        ),
    ],
)
def test_refused(plan, architecture, config, changes, message):
    with pytest.raises(ValueError, match=message):
        plan(architecture, config, **changes)
