# SPDX-License-Identifier: Apache-2.0
"""vLLM's embedding and head, loaded and repacked, look up and multiply by the weight that the checkpoint stands for."""

from types import SimpleNamespace

import pytest
import torch
import vllm.distributed
from served_layers import apply, assert_close, dense, finish, load, put, quant_config, random_tensors
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from quip_vllm.checkpoint.config import Embedding, Head, LayerFormat
from quip_vllm.formats.spec import LinearSpec
from quip_vllm.ops.cpu import CpuBackend
from quip_vllm.vllm_plugin.embedding_method import QuipEmbeddingMethod

FORMATS = [("e8p", 2), ("e8p", 3), ("e8p", 4), ("1mad", 4), ("hyb", 2), ("lut", 1), ("grid", 3)]
K = 64
NAME = "model.embed_tokens"


pytestmark = pytest.mark.usefixtures("set_rank")


def config_of(code, bits, tied=True, **kwargs):
    """A config whose linear layers have another code than its head."""
    head = Head(NAME if tied else "lm_head", LayerFormat(code, bits), tied)
    return quant_config("3inst", 2, head=head, **kwargs)


def stored(code, bits, rows, block=None):
    """A head's tensors in the checkpoint, and the weight that they stand for."""
    tensors = random_tensors(code, bits, rows, K)
    return tensors, dense(tensors, code, bits, block, rotate_output=False)


def build(kind, config, rows, prefix=NAME, dtype=torch.float32):
    return kind(rows, K, params_dtype=dtype, quant_config=config, prefix=prefix)


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("rows", [128, 83])
@pytest.mark.parametrize(("code", "bits"), FORMATS)
def test_every_format(code, bits, rows, block):
    tensors, weight = stored(code, bits, rows, block)
    layer = build(VocabParallelEmbedding, config_of(code, bits, hadamard_block=block), rows, prefix="")
    load(layer, tensors)
    finish(layer)
    ids = torch.tensor([[0, rows - 1], [5, 17]])
    assert_close(layer(ids), weight[ids])
    x, padding = torch.randn(3, K), layer.num_embeddings_padded - rows
    logits = apply(layer, x, torch.full((layer.num_embeddings_padded,), 0.5))
    assert_close(logits, torch.nn.functional.pad(x @ weight.T, (0, padding)) + 0.5)
    assert not any(name in dict(layer.named_parameters()) for name in tensors)
    finish(layer)


@pytest.mark.parametrize(("code", "rows"), [("e8p", 201), ("hyb", 201), ("1mad", 256), ("e8p", 130)])
def test_ranks_make_the_whole(set_rank, code, rows):
    tensors, weight = stored(code, 4, rows)
    ids, x = torch.tensor([0, 31, 64, 100, rows - 1]), torch.randn(3, K)
    embedded, logits = 0, []
    for rank in range(4):
        set_rank(rank, 4)
        layer = build(VocabParallelEmbedding, config_of(code, 4), rows)
        load(layer, tensors)
        embedded = embedded + finish(layer)(ids)
        logits.append(apply(layer, x))
    assert_close(embedded, weight[ids])
    assert_close(torch.cat(logits, 1)[:, :rows], x @ weight.T)


def test_tiles_cannot_be_split(set_rank):
    set_rank(0, 8)
    with pytest.raises(ValueError, match="64 rows in tensor-parallel shares of 8: code 1mad needs multiples of 16"):
        build(VocabParallelEmbedding, config_of("1mad", 2), 64)
    build(VocabParallelEmbedding, config_of("e8p", 2), 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_embeddings_have_the_dtype_of_the_model(set_rank, dtype):
    tensors, weight = stored("e8p", 4, 64)
    layer = build(VocabParallelEmbedding, config_of("e8p", 4), 64, dtype=dtype)
    load(layer, tensors)
    assert torch.equal(finish(layer)(torch.arange(64)), weight.to(dtype))


def test_a_tied_head_takes_the_tensors_of_the_embedding(set_rank):
    config = config_of("e8p", 4)
    tensors, weight = stored("e8p", 4, 64)
    embedding = build(VocabParallelEmbedding, config, 64, prefix="")
    head = ParallelLMHead(64, K, bias=True, params_dtype=torch.float32, quant_config=config, prefix="lm_head")
    assert head.tie_weights(embedding) is head
    assert [name for name, _ in head.named_parameters()] == ["bias"] and not list(head.children())
    load(embedding, tensors)
    head.bias.data.fill_(0.5)
    x = torch.randn(3, K)
    finish(embedding)
    assert_close(apply(finish(head), x, head.bias), x @ weight.T + 0.5)
    head = build(ParallelLMHead, config, 64, prefix="lm_head")
    plain = build(VocabParallelEmbedding, None, 64)
    with pytest.raises(ValueError, match=r"model.embed_tokens is quantized, but vLLM.*requantize without --lm-head"):
        head.tie_weights(plain)


def test_who_is_ours(set_rank):
    def is_ours(config, kind, prefix):
        return isinstance(config.get_quant_method(kind.__new__(kind), prefix), QuipEmbeddingMethod)

    tied, untied = config_of("e8p", 4), config_of("e8p", 4, tied=False)
    assert is_ours(tied, ParallelLMHead, "lm_head") and is_ours(untied, ParallelLMHead, "lm_head")
    for prefix, ours in (("", True), (NAME, True), ("vision.embed_tokens", False)):
        assert is_ours(tied, VocabParallelEmbedding, prefix) == ours
        assert not is_ours(untied, VocabParallelEmbedding, prefix)
        assert not is_ours(quant_config(), VocabParallelEmbedding, prefix)
    assert not is_ours(quant_config(), ParallelLMHead, "lm_head")


def test_an_embedding_of_its_own(set_rank):
    """Beside a head of other bits, or beside one that keeps its weight."""
    (tensors, weight), (head_tensors, head_weight) = stored("e8p", 3, 83), stored("hyb", 4, 83)
    both = quant_config(
        head=Head("lm_head", LayerFormat("hyb", 4), False), embedding=Embedding(NAME, LayerFormat("e8p", 3))
    )
    embedding, head = build(VocabParallelEmbedding, both, 83, ""), build(ParallelLMHead, both, 83, "lm_head")
    load(embedding, tensors)
    load(head, head_tensors)
    ids, x = torch.tensor([0, 82, 7]), torch.randn(3, K)
    assert_close(finish(embedding)(ids), weight[ids])
    assert_close(apply(finish(head), x)[:, :83], x @ head_weight.T)
    both.get_checkpoint_weight_mapper()
    alone = quant_config(embedding=Embedding(NAME, LayerFormat("e8p", 3)))
    assert isinstance(build(VocabParallelEmbedding, alone, 83, "").quant_method, QuipEmbeddingMethod)
    for kind, prefix in ((ParallelLMHead, "lm_head"), (VocabParallelEmbedding, "vision.embed_tokens")):
        assert alone.get_quant_method(kind.__new__(kind), prefix) is None
    alone.get_checkpoint_weight_mapper()


@pytest.mark.parametrize("served", ["embedding", "head"])
def test_of_two_the_one_that_the_model_does_not_ask_for_is_named(monkeypatch, served):
    group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(vllm.distributed, "get_pp_group", lambda: group)
    config = quant_config(
        head=Head("lm_head", LayerFormat("e8p", 4), False), embedding=Embedding(NAME, LayerFormat("e8p", 3))
    )
    kind, name = {"embedding": (VocabParallelEmbedding, NAME), "head": (ParallelLMHead, "lm_head")}[served]
    config.get_quant_method(kind.__new__(kind), name)
    missing, option = {"embedding": ("lm_head", "--lm-head"), "head": (NAME, "--embedding")}[served]
    with pytest.raises(ValueError, match=f"{missing} is quantized, but vLLM's code .* requantize without {option}"):
        config.get_checkpoint_weight_mapper()
    group.is_first_rank, group.is_last_rank = missing != NAME, missing == NAME
    config.get_checkpoint_weight_mapper()


@pytest.mark.parametrize(("tied", "kind"), [(True, VocabParallelEmbedding), (False, ParallelLMHead)])
def test_a_model_that_does_not_ask_is_told(monkeypatch, tied, kind):
    group = SimpleNamespace(is_first_rank=tied, is_last_rank=not tied)
    monkeypatch.setattr(vllm.distributed, "get_pp_group", lambda: group)
    config = config_of("e8p", 4, tied)
    with pytest.raises(ValueError, match="vLLM's code of this model does not ask"):
        config.get_checkpoint_weight_mapper()
    config.get_quant_method(kind.__new__(kind), config.checkpoint.head.module)
    config.get_checkpoint_weight_mapper()
    group.is_first_rank = group.is_last_rank = False  # a pipeline stage in the middle has neither
    config_of("e8p", 4, tied).get_checkpoint_weight_mapper()


def test_renamed_head():
    from vllm.model_executor.models.utils import WeightsMapper

    config = config_of("e8p", 4)
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.checkpoint.head == Head("language_model.model.embed_tokens", LayerFormat("e8p", 4), True)
    config = quant_config(embedding=Embedding(NAME, LayerFormat("e8p", 3)))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.checkpoint.embedding == Embedding("language_model.model.embed_tokens", LayerFormat("e8p", 3))


@pytest.mark.parametrize("name", ["codes", "residual_codes", "su", "sv"])
def test_missing_and_damaged_tensors_are_named(set_rank, name):
    tensors, _ = stored("e8p", 4, 64)
    layer = build(VocabParallelEmbedding, config_of("e8p", 4), 64)
    with pytest.raises(ValueError, match=f"{NAME}: tensor {name} is .* expected .*requantize"):
        put(layer, {name: tensors[name][:-1]})
    put(layer, {other: tensor for other, tensor in tensors.items() if other != name})
    with pytest.raises(ValueError, match=f"{NAME}: tensor {name} of {NAME} is not in the checkpoint"):
        finish(layer)


def test_what_stands_for_the_weight_equals_no_other(set_rank):
    """vLLM takes an EAGLE draft's head or embedding for the target's where their weights are equal."""
    layers = []
    for kind, name in ((VocabParallelEmbedding, NAME), (ParallelLMHead, "lm_head")):
        layer = build(kind, config_of("e8p", 4), 64, prefix=name, dtype=torch.bfloat16)
        load(layer, stored("e8p", 4, 64)[0])
        layers.append(finish(layer))
    assert all(one.weight.dtype == torch.bfloat16 and one.weight.shape[-1] == K for one in layers)
    assert not torch.equal(layers[0].weight, layers[1].weight)
    assert not any("weight" in {**one.state_dict(), **dict(one.named_parameters())} for one in layers)


def test_dummy_weights_need_no_checkpoint(set_rank):
    with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format="dummy"))):
        layer = build(VocabParallelEmbedding, config_of("1mad", 4), 64)
    assert not finish(layer)(torch.arange(64)).any()


@pytest.mark.parametrize(("code", "bits"), [("e8p", 4), ("hyb", 3), ("lut", 2)])
def test_cpu_backend_compiles_to_one_graph(set_rank, monkeypatch, code, bits):
    if CpuBackend().refusal(LinearSpec("e8p", 2, K, (16,))) is not None:
        pytest.skip("the compiled CPU library is not built: make build")
    monkeypatch.setenv("QUIP_VLLM_BACKEND", "cpu")
    tensors, weight = stored(code, bits, 100)
    layer = build(VocabParallelEmbedding, config_of(code, bits), 100)
    load(layer, tensors)
    finish(layer)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(ids):
        return apply(layer, layer(ids))[:, :100]

    ids = torch.tensor([3, 99, 50])
    with torch.inference_mode():
        assert_close(both(ids), weight[ids] @ weight.T)
