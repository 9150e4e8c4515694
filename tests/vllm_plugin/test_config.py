# SPDX-License-Identifier: Apache-2.0
"""Which layers are ours, with how many bits, under vLLM's names."""

import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from served_layers import quant_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from quip_vllm.checkpoint.config import Head, LayerFormat
from quip_vllm.checkpoint.store import read_json, write_json
from quip_vllm.vllm_plugin import config as config_module
from quip_vllm.vllm_plugin.config import QuipConfig
from quip_vllm.vllm_plugin.linear_method import QuipLinearMethod

RAW = {"quant_method": "qtip", "format_version": 1, "bits": 2, "code": "1mad", "modules_to_not_convert": ["lm_head"]}


def blank(kind):
    """A layer of a class, not constructed: the config only looks at its type."""
    return kind.__new__(kind)


def test_from_config():
    config = QuipConfig.from_config(RAW)
    assert config.get_name() == "qtip" and config.get_min_capability() == 80 and config.get_config_filenames() == []
    assert config.checkpoint.default == LayerFormat("1mad", 2)
    assert set(config.get_supported_act_dtypes()) == {torch.float16, torch.bfloat16, torch.float32}
    raw = {"quant_method": "quip_sharp", "format_version": 1, "code": "e8p", "bits": 3}
    assert QuipConfig.from_config(raw).checkpoint.default == LayerFormat("e8p", 3)


def test_checkpoints_of_others_are_left_alone():
    for raw in ({"quant_method": "gptq", "bits": 4}, {}):
        assert QuipConfig.override_quantization_method(raw, None) is None


def test_linear_layers():
    config = quant_config(modules_to_not_convert=("lm_head", "visual"))
    assert isinstance(config.get_quant_method(blank(ReplicatedLinear), "model.layers.0.o_proj"), QuipLinearMethod)
    for name in ("visual", "visual.blocks.0.mlp", "lm_head"):
        assert isinstance(config.get_quant_method(blank(ReplicatedLinear), name), UnquantizedLinearMethod)


def test_embeddings_and_head_keep_their_weight():
    config = quant_config()
    for kind in (VocabParallelEmbedding, ParallelLMHead, torch.nn.Identity):
        assert config.get_quant_method(blank(kind), "lm_head") is None


def test_bits_of_each_fused_projection():
    config = quant_config("1mad", 2, layers={"qkv_proj.0.k_proj": ("1mad", 3), "qkv_proj.0.v_proj": ("e8p", 4)})
    method = config.get_quant_method(blank(ReplicatedLinear), "qkv_proj.0.qkv_proj")
    assert method.names == ("qkv_proj.0.q_proj", "qkv_proj.0.k_proj", "qkv_proj.0.v_proj")
    assert method.formats == (LayerFormat("1mad", 2), LayerFormat("1mad", 3), LayerFormat("e8p", 4))


def test_a_fused_layer_is_skipped_as_a_whole_or_in_part():
    config = quant_config(modules_to_not_convert=("a.q_proj", "a.k_proj", "a.v_proj", "b.up_proj"))
    assert isinstance(config.get_quant_method(blank(ReplicatedLinear), "a.qkv_proj"), UnquantizedLinearMethod)
    method = config.get_quant_method(blank(ReplicatedLinear), "b.gate_up_proj")
    assert method.formats == (LayerFormat("1mad", 2), None)


def test_names_are_mapped_to_vllms():
    config = quant_config(
        modules_to_not_convert=("model.visual", "lm_head"), layers={"model.text.layers.0.up": ("1mad", 4)}
    )
    mapper = WeightsMapper(
        orig_to_new_prefix={"model.visual.": "visual.", "model.text.": "language_model."},
        orig_to_new_substr={".up": ".up_proj"},
    )
    config.apply_vllm_mapper(mapper)
    assert config.checkpoint.modules_to_not_convert == ("visual", "lm_head")
    assert dict(config.checkpoint.layers) == {"language_model.layers.0.up_proj": LayerFormat("1mad", 4)}
    assert config.checkpoint.default == LayerFormat("1mad", 2)


def test_config_travels_to_the_engine_process():
    config = quant_config("hyb", 2, hadamard_block=64, modules_to_not_convert=("a",), layers={"b": ("e8p", 4)})
    copy = pickle.loads(pickle.dumps(config))
    assert type(copy) is type(config) and copy.checkpoint == config.checkpoint
    assert copy.packed_modules_mapping == config.packed_modules_mapping


def bits_3(folder):
    config = read_json(folder / "config.json")
    config["quantization_config"]["bits"] = 3
    write_json(folder / "config.json", config)


def overwrite(change):
    """A change of the bytes of the one shard."""

    def changed(folder):
        shard = folder / "model.safetensors"
        shard.write_bytes(change(shard.read_bytes()))

    return changed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (overwrite(lambda whole: whole[:-100]), "{folder}/model.safetensors cannot be read .*truncated or damaged; "),
        (overwrite(lambda whole: whole[:3]), "{folder}/model.safetensors cannot be read "),
        (overwrite(lambda whole: whole[:8] + b"\xff" * 9 + whole[17:]), "{folder}/model.safetensors cannot be read "),
        (
            lambda one: shutil.copy(one / "model.safetensors", one / "consolidated.safetensors"),
            "would be read in place of",
        ),
        (bits_3, "down_proj, said to be e8p at 3 bits, has tensors .*: the files are damaged"),
    ],
)
def test_damaged_files_are_refused_while_vllm_is_configured(quantized, tmp_path, change, sentence):
    folder = tmp_path / "copy"
    shutil.copytree(quantized(), folder)
    change(folder)
    with pytest.raises(ValueError, match=sentence.format(folder=folder)):
        EngineArgs(model=str(folder)).create_engine_config()


def test_whole_files_and_none_at_all_are_accepted(quantized, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(quantized(), folder)
    EngineArgs(model=str(folder)).create_engine_config()
    (folder / "model.safetensors").unlink()
    EngineArgs(model=str(folder), load_format="dummy").create_engine_config()


def test_the_method_given_by_hand(quantized, tiny_model):
    made = EngineArgs(model=str(quantized()), quantization="quip_sharp").create_engine_config()
    assert made.quant_config.get_name() == "quip_sharp"
    with pytest.raises(ValueError, match=r"\(quip_sharp\) does not match .*\(qtip\)"):
        EngineArgs(model=str(quantized()), quantization="qtip").create_engine_config()
    for method in ("quip", "exl3"):
        with pytest.raises(ValueError, match="config.json has no quantization_config: quantize it first"):
            EngineArgs(model=str(tiny_model()), quantization=method).create_engine_config()


def test_a_reranker_that_needs_dense_rows_of_the_head_is_refused(monkeypatch):
    model = SimpleNamespace(classifier_from_token=["no", "yes"])
    engine = SimpleNamespace(model_config=SimpleNamespace(hf_config=model))
    monkeypatch.setattr(config_module, "get_current_vllm_config_or_none", lambda: engine)
    made = quant_config(head=Head("model.embed_tokens", LayerFormat("e8p", 4), tied=True))
    with pytest.raises(ValueError, match="embed_tokens is quantized, but vLLM makes this .*without --lm-head"):
        made.get_checkpoint_weight_mapper()
    quant_config().get_checkpoint_weight_mapper()


def test_the_names_of_a_draft_are_those_of_its_files():
    config = quant_config(modules_to_not_convert=("model.a",), layers={"model.b": ("e8p", 4)})
    assert isinstance(config.get_quant_method(blank(ReplicatedLinear), "draft_model.model.a"), UnquantizedLinearMethod)
    assert config.get_quant_method(blank(ReplicatedLinear), "draft_model.model.b").formats == (LayerFormat("e8p", 4),)


def test_the_headers_of_a_hub_name_are_checked_in_its_cache(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--someone--tiny" / "snapshots" / "c0ffee"
    shutil.copytree(quantized(), folder)
    config = QuipConfig.from_config(read_json(folder / "config.json")["quantization_config"])
    overwrite(lambda whole: whole[:-9])(folder)
    with pytest.raises(ValueError, match=r"c0ffee/model.safetensors cannot be read .*truncated"):
        config.maybe_update_config("someone/tiny", revision="c0ffee")
    config.maybe_update_config("someone/tiny")  # another revision, which vLLM has yet to fetch


@pytest.mark.parametrize("latent", [True, False])
def test_the_projection_of_latent_attention_is_refused_where_vllm_needs_its_weight(monkeypatch, latent):
    engine = SimpleNamespace(model_config=SimpleNamespace(use_mla=latent))
    made = quant_config()
    made._carries = True  # there is no model class
    monkeypatch.setattr(config_module, "get_current_vllm_config_or_none", lambda: engine)
    layer = blank(ReplicatedLinear)
    if latent:
        with pytest.raises(ValueError, match=r"attn\.kv_b_proj is quantized.*--ignore kv_b_proj"):
            made.get_quant_method(layer, "attn.kv_b_proj")
    else:
        assert isinstance(made.get_quant_method(layer, "attn.kv_b_proj"), QuipLinearMethod)
    assert isinstance(made.get_quant_method(layer, "attn.q_b_proj"), QuipLinearMethod)
