# SPDX-License-Identifier: Apache-2.0
"""Quantized tensors follow the rows of the weight through whatever a model's code does with it, or are refused."""

import pytest
import torch
from served_layers import apply, assert_close, build, dense, finish, load, quant_config, random_tensors
from torch import nn
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from quip_vllm.vllm_plugin.arrival import carry_tensors

K, HEADS, SIZE = 64, 4, 16
N = 3 * HEADS * SIZE
pytestmark = pytest.mark.usefixtures("set_rank")


def gpt_neox(weight):
    """Rows stored as [head, (q, k, v), size]; vLLM wants [(q, k, v), head, size]."""
    return weight.view(HEADS, 3, SIZE, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)


def starcoder(weight):
    """Rows of one group as [queries, key, value], then cut apart and joined, as Falcon's."""
    grouped = weight.view(2, HEADS // 2 + 4, SIZE, *weight.shape[1:])
    q, k, v = grouped.split([HEADS // 2, 2, 2], dim=1)
    return torch.cat([piece.reshape(-1, *weight.shape[1:]) for piece in (q, k, v)])


def by_index(weight):
    """Any order."""
    return weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(3))]


def whole(model, param, loaded):
    param.weight_loader(param, loaded)


def by_shard(model, param, loaded):
    for shard, piece in zip("qkv", loaded.chunk(3), strict=True):
        param.weight_loader(param, piece, shard)


class Model(nn.Module):
    """As vLLM's are: it renames, rearranges the fused weight and bias, and gives them to the layer's loader."""

    rearrange = staticmethod(gpt_neox)
    give = whole

    def __init__(self, config=None):
        super().__init__()
        config = quant_config() if config is None else config
        self.attention = build(QKVParallelLinear, config, K, SIZE, HEADS, HEADS, prefix="attention", bias=True)
        self.norm = nn.Parameter(torch.zeros(3))

    def load_weights(self, weights):
        params, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            if name == "norm":
                self.norm.data.copy_(tensor)
                continue
            name = name.replace("h.query_key_value", "attention")
            param = params[name]  # never su, sv or packed
            assert not name.endswith("weight") or getattr(param, "output_dim", None) == 0
            self.give(param, self.rearrange(tensor))
            loaded.add(name)
        return loaded


def model_class(**members):
    kind = type("Kind", (Model,), members)
    carry_tensors(kind)
    carry_tensors(kind)  # the second time does nothing
    return kind


def checkpoint(seed=0):
    tensors = random_tensors("1mad", 2, N, K, seed)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(seed))
    files = [(f"h.query_key_value.{name}", tensor) for name, tensor in tensors.items()]
    return tensors, bias, [files[0], ("norm", torch.ones(3)), *files[1:], ("h.query_key_value.bias", bias)]


def expected(x, rearrange, tensors, bias):
    return x @ rearrange(dense(tensors, "1mad", 2)).T + rearrange(bias)


@pytest.mark.parametrize("give", [whole, by_shard])
@pytest.mark.parametrize("rearrange", [gpt_neox, starcoder, by_index, lambda weight: weight, torch.clone])
def test_outputs_come_in_the_order_of_the_rows(rearrange, give):
    tensors, bias, files = checkpoint()
    model = model_class(rearrange=staticmethod(rearrange), give=give)()
    assert model.load_weights(iter(files)) == {"attention.weight", "attention.bias"}
    finish(model.attention)
    x = torch.randn(5, K)
    assert_close(model.attention(x)[0], expected(x, rearrange, tensors, bias))
    assert_close(apply(model.attention, x), expected(x, rearrange, tensors, 0 * bias))
    assert torch.equal(model.norm, torch.ones(3))
    kept = dict(model.attention.named_parameters())
    assert not {"weight", "packed", "su", "sv"} & set(kept)
    assert ("quip_order" in kept) == (rearrange in (gpt_neox, starcoder, by_index))


@pytest.mark.parametrize(
    ("give", "meaning"),
    [
        (lambda model, param, w: param.weight_loader(param, w * 2), "changes the weight"),
        (lambda model, param, w: param.weight_loader(param, w.float()), "changes the weight"),
        (lambda model, param, w: param.weight_loader(param, w.flip(1)), "changes the weight"),
        (lambda model, param, w: param.weight_loader(param, w[:N].t().contiguous()), r"weight of \[64, 192\]"),
        (lambda model, param, w: param.weight_loader(param, w[: N - 16]), r"weight of \[176, 64\] in place of \[192"),
    ],
)
def test_what_is_not_a_move_of_rows_is_refused(give, meaning):
    model = model_class(rearrange=staticmethod(lambda weight: weight), give=give)()
    with pytest.raises(ValueError, match=f"attention: .*{meaning}.*requantize"):
        model.load_weights(iter([one for one in checkpoint()[2] if not one[0].endswith("bias")]))


@pytest.mark.parametrize("repeated", [lambda w: torch.cat([w[:-1], w[:1]]), lambda w: w[:1].expand(N, K).contiguous()])
def test_repeated_rows_are_refused(repeated):
    model = model_class(rearrange=staticmethod(repeated))()
    model.load_weights(iter([one for one in checkpoint()[2] if not one[0].endswith("bias")]))
    with pytest.raises(ValueError, match="h.query_key_value into several layers or repeats them"):
        finish(model.attention)


def test_moved_rows_cannot_be_split_over_ranks(set_rank):
    set_rank(0, 2)
    # bias: vLLM's own loader of a fused bias cuts it by itself
    model = model_class()(quant_config(hadamard_block=16))
    model.load_weights(iter([one for one in checkpoint()[2] if not one[0].endswith("bias")]))
    with pytest.raises(ValueError, match="rearranges the rows of h.query_key_value.*--tensor-parallel-size 1"):
        finish(model.attention)


def test_a_layer_that_the_model_joins_of_several_on_disk():
    disk = [random_tensors("1mad", 2, n, K, seed) for seed, n in enumerate((64, 32))]

    class Joining(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = build(MergedColumnParallelLinear, quant_config(), K, [64, 32], prefix="gate_up_proj")

        def load_weights(self, weights):
            joined = torch.cat([tensor for _, tensor in sorted(weights)])
            self.layer.weight.weight_loader(self.layer.weight, joined)

    carry_tensors(Joining)
    model = Joining()
    model.load_weights((f"{name}.{leaf}", t) for name, own in zip("ab", disk, strict=True) for leaf, t in own.items())
    x = torch.randn(3, K)
    assert_close(apply(finish(model.layer), x), x @ torch.cat([dense(own, "1mad", 2) for own in disk]).T)


def test_a_part_that_comes_twice_is_refused():
    layer = build(MergedColumnParallelLinear, quant_config(), K, [64, 32], prefix="gate_up_proj")
    load(layer, random_tensors("1mad", 2, 64, K), 0)
    with pytest.raises(ValueError, match="gate_proj is in the checkpoint twice"):
        load(layer, random_tensors("1mad", 2, 64, K, seed=1), 0)


def test_a_tensor_in_two_files_is_refused():
    files = checkpoint()[2]
    with pytest.raises(ValueError, match="is in two files of the checkpoint: remove the one"):
        model_class()().load_weights(iter([*files, *files]))


@pytest.mark.parametrize("vector", ["su", "sv"])
def test_a_missing_vector_is_named(vector):
    files = [one for one in checkpoint()[2] if not one[0].endswith(vector)]
    with pytest.raises(ValueError, match=f"h.query_key_value has no vector {vector}"):
        model_class()().load_weights(iter(files))


def test_other_models_load_as_before():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.su = nn.Parameter(torch.zeros(2))

        def load_weights(self, weights):
            return list(weights)

    carry_tensors(Plain)
    assert [name for name, _ in Plain().load_weights(iter([("su", torch.ones(2)), ("sv", torch.ones(2))]))] == [
        "su",
        "sv",
    ]


@pytest.mark.parametrize("give", [whole, by_shard])
def test_reloaded_weights_follow_as_well(give):
    model = model_class(rearrange=staticmethod(starcoder), give=give)()
    record_metadata_for_reloading(model)
    model.load_weights(iter(checkpoint()[2]))
    finish(model.attention)
    addresses = {name: param.data_ptr() for name, param in model.named_parameters()}
    x = torch.randn(4, K)
    for seed in (0, 1):
        tensors, bias, files = checkpoint(seed)
        initialize_layerwise_reload(model)
        model.load_weights(iter(files))
        finalize_layerwise_reload(model, None)
        assert_close(model.attention(x)[0], expected(x, starcoder, tensors, bias))
        assert {name: param.data_ptr() for name, param in model.named_parameters()} == addresses
