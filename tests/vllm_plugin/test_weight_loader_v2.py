# SPDX-License-Identifier: Apache-2.0
"""vLLM's own layers load this rank's rows and columns: the ranks' parts together are the checkpoint's tensors."""

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

FORMATS = [("e8p", 2), ("e8p", 3), ("e8p", 4), ("1mad", 3), ("hyb", 2)]
K, N = 64, 128


def build(kind, config, *sizes, prefix="m.layer", **kwargs):
    """A layer filled with NaN or minus one, so that what the loader misses shows."""
    layer = kind(*sizes, quant_config=config, prefix=prefix, params_dtype=torch.float32, **{"bias": False, **kwargs})
    for param in layer.parameters():
        param.data.fill_(float("nan") if param.is_floating_point() else 7)
    return layer


def rows(tensor, start, size, n):
    """Rows of a tensor that belong to outputs start .. start + size of n."""
    return tensor[start * tensor.shape[0] // n :][: size * tensor.shape[0] // n]


def columns(tensor, rank, size):
    return tensor.chunk(size, dim=-1)[rank]


@pytest.mark.parametrize("through", ["weight_loader", "weight_loader_v2"])
@pytest.mark.parametrize(("code", "bits"), FORMATS)
def test_column_parallel_ranks_make_the_whole(set_rank, quant_config, random_tensors, load, code, bits, through):
    tensors, parts = random_tensors(code, bits, N, K), []
    for rank in range(4):
        set_rank(rank, 4)
        layer = build(ColumnParallelLinear, quant_config(code, bits, hadamard_block=16), K, N)
        if through == "weight_loader":
            load(layer, tensors)
        else:
            for name, tensor in tensors.items():
                layer.weight_loader_v2(getattr(layer, name), tensor)
        parts.append(dict(layer.named_parameters()))
        assert set(parts[-1]) == set(tensors)
    for name, tensor in tensors.items():
        found = [part[name].data for part in parts]
        assert all(part.dtype == tensor.dtype for part in found)
        if name in ("su", "table"):
            assert all(torch.equal(part, tensor) for part in found)
        else:
            assert torch.equal(torch.cat(found), tensor)


@pytest.mark.parametrize(("code", "bits"), FORMATS)
def test_row_parallel_ranks_make_the_whole(set_rank, quant_config, random_tensors, load, code, bits):
    tensors, parts = random_tensors(code, bits, N, K), []
    for rank in range(2):
        set_rank(rank, 2)
        layer = build(RowParallelLinear, quant_config(code, bits, hadamard_block=32), K, N)
        load(layer, tensors)
        parts.append(dict(layer.named_parameters()))
    for name, tensor in tensors.items():
        found = [part[name].data for part in parts]
        if name in ("sv", "table"):
            assert all(torch.equal(part, tensor) for part in found)
        else:
            assert torch.equal(torch.cat(found, dim=-1), tensor)


def test_replicated_layer_is_whole_on_every_rank(set_rank, quant_config, random_tensors, load):
    tensors = random_tensors("1mad", 2, N, K)
    for rank in range(2):
        set_rank(rank, 2)
        layer = build(ReplicatedLinear, quant_config(), K, N)
        load(layer, tensors)
        assert all(torch.equal(param, tensors[name]) for name, param in layer.named_parameters())


def test_layer_without_tensor_parallelism_is_whole_on_every_rank(set_rank, quant_config, random_tensors, load):
    set_rank(1, 2)
    layer = build(MergedColumnParallelLinear, quant_config(), K, [N, N], prefix="gate_up_proj", disable_tp=True)
    for shard in range(2):
        tensors = random_tensors("1mad", 2, N, K, seed=shard)
        load(layer, tensors, shard)
        assert torch.equal(layer.sv[shard * N :][:N], tensors["sv"])


@pytest.mark.parametrize("through", ["weight_loader", "weight_loader_v2"])
def test_merged_column_loads_each_projection(set_rank, quant_config, random_tensors, load, through):
    sizes = [64, 128]
    disk = [random_tensors("e8p", 3, n, K, seed=i) for i, n in enumerate(sizes)]
    for rank in range(2):
        set_rank(rank, 2)
        config = quant_config("e8p", 3, hadamard_block=32)
        layer = build(MergedColumnParallelLinear, config, K, sizes, prefix="gate_up_proj")
        for shard in (1, 0):
            if through == "weight_loader":
                load(layer, disk[shard], shard)
            else:
                for name, tensor in disk[shard].items():
                    layer.weight_loader_v2(getattr(layer, name), tensor, shard)
        for name in ("codes", "residual_codes", "sv"):
            expected = [rows(part[name], rank * n // 2, n // 2, n) for part, n in zip(disk, sizes, strict=True)]
            assert torch.equal(getattr(layer, name).data, torch.cat(expected))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_qkv_replicates_key_value_heads(set_rank, quant_config, random_tensors, load, size):
    heads, kv_heads, head = 8, 2, 16
    disk = {s: random_tensors("hyb", 2, h * head, K, seed=ord(s)) for s, h in (("q", 8), ("k", 2), ("v", 2))}
    for rank in range(size):
        set_rank(rank, size)
        config = quant_config("hyb", 2, hadamard_block=16)
        layer = build(QKVParallelLinear, config, K, head, heads, kv_heads, prefix="qkv_proj")
        for shard, tensors in disk.items():
            load(layer, tensors, shard)
        local = {"q": heads // size, "k": max(kv_heads // size, 1), "v": max(kv_heads // size, 1)}
        first = {"q": rank * local["q"], "k": rank * kv_heads // size, "v": rank * kv_heads // size}
        for name in ("packed", "sv"):
            expected = [
                rows(tensors[name], first[s] * head, local[s] * head, len(tensors["sv"])) for s, tensors in disk.items()
            ]
            assert torch.equal(getattr(layer, name).data, torch.cat(expected))
        assert torch.equal(layer.table, torch.cat([tensors["table"] for tensors in disk.values()]))


def test_biases_keep_vllms_own_loader(set_rank, quant_config):
    bias = {"q": torch.randn(64), "k": torch.randn(32), "v": torch.randn(32)}
    for rank in range(2):
        set_rank(rank, 2)
        config = quant_config(hadamard_block=16)
        layer = build(QKVParallelLinear, config, K, 16, 4, 2, bias=True, prefix="qkv_proj")
        for shard, tensor in bias.items():
            layer.bias.weight_loader(layer.bias, tensor, shard)
        assert torch.equal(layer.bias, torch.cat([tensor.chunk(2)[rank] for tensor in bias.values()]))


@pytest.mark.parametrize("size", [1, 2])
def test_projection_fused_on_disk(set_rank, quant_config, random_tensors, load, size):
    tensors = random_tensors("1mad", 2, 128, K)  # q 64, k 32, v 32
    for rank in range(size):
        set_rank(rank, size)
        layer = build(QKVParallelLinear, quant_config(hadamard_block=16), K, 16, 4, 2, prefix="qkv_proj")
        load(layer, tensors, None)
        shards = ((0, 64), (64, 32), (96, 32))
        for name in ("packed", "sv"):
            expected = [rows(tensors[name], start, n, 128).chunk(size)[rank] for start, n in shards]
            assert torch.equal(getattr(layer, name).data, torch.cat(expected))


def test_several_shards_in_one_tensor(set_rank, quant_config, random_tensors, load):
    config = quant_config()
    config.packed_modules_mapping["in_proj_qkvz"] = ["in_proj_qkv", "in_proj_z"]
    layer = build(MergedColumnParallelLinear, config, K, [32, 32, 64, 64], prefix="in_proj_qkvz")
    qkv, z = random_tensors("1mad", 2, 128, K, seed=1), random_tensors("1mad", 2, 64, K, seed=2)
    load(layer, qkv, (0, 1, 2))
    load(layer, z, 3)
    assert torch.equal(layer.packed, torch.cat([qkv["packed"], z["packed"]]))
    assert layer.sv.loaded == {(0, 1, 2), (3,)}


def test_full_width_rotation_cannot_be_split(set_rank, quant_config):
    set_rank(0, 2)
    remedy = "requantize with --hadamard-block {}, or serve with --tensor-parallel-size 1"
    with pytest.raises(ValueError, match="m.layer: output of size 128 is rotated as a whole.*" + remedy.format(64)):
        build(ColumnParallelLinear, quant_config(), K, N)
    with pytest.raises(ValueError, match="m.layer: input of size 64 is rotated as a whole.*" + remedy.format(32)):
        build(RowParallelLinear, quant_config(), K, N)
    with pytest.raises(ValueError, match="k_proj: .*whole|q_proj: .*whole"):
        build(QKVParallelLinear, quant_config(), K, 16, 4, 2, prefix="qkv_proj")


def test_blocks_must_fit_the_shards(set_rank, quant_config, random_tensors, load):
    set_rank(0, 2)
    config = quant_config(hadamard_block=128)
    with pytest.raises(ValueError, match="input of size 64 is rotated in blocks of 64.*--hadamard-block 32"):
        build(RowParallelLinear, config, K, N)
    layer = build(ColumnParallelLinear, config, K, N)
    with pytest.raises(ValueError, match="output of size 128 is rotated in blocks of 128.*--hadamard-block 64"):
        load(layer, random_tensors("1mad", 2, N, K))
    # Fused on disk, each part alone has whole blocks of 64; all three together, 64 + 32 + 32, have not.
    set_rank(0, 1)
    layer = build(QKVParallelLinear, quant_config(hadamard_block=64), K, 32, 4, 2, prefix="qkv_proj")
    load(layer, random_tensors("1mad", 2, 256, K), None)
    set_rank(0, 2)
    layer = build(QKVParallelLinear, quant_config(hadamard_block=64), K, 32, 4, 2, prefix="qkv_proj")
    with pytest.raises(ValueError, match=r"shards of 64 \+ 32 \+ 32: .*--hadamard-block 32"):
        load(layer, random_tensors("1mad", 2, 256, K), None)


@pytest.mark.parametrize("size", [40, 120])
def test_sizes_must_hold_whole_tiles(set_rank, quant_config, size):
    with pytest.raises(ValueError, match="m.layer.*multiples of 16"):
        build(ColumnParallelLinear, quant_config(), K, size)
    with pytest.raises(ValueError, match="m.layer.*multiples of 16"):
        build(ColumnParallelLinear, quant_config(), size, K)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("packed", lambda t: t[:-1]),
        ("packed", lambda t: t[:, :-1]),
        ("packed", lambda t: t.int()),
        ("packed", lambda t: t[None]),
        ("sv", lambda t: t[:-1]),
        ("sv", lambda t: t.float()),
        ("su", lambda t: t[:-1]),
        ("su", lambda t: t[0]),
        ("table", lambda t: t[:-1]),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear, ReplicatedLinear])
def test_damaged_tensor_is_named(set_rank, quant_config, random_tensors, load, kind, size, name, change):
    set_rank(0, size)
    layer = build(kind, quant_config("hyb", 2, hadamard_block=16), K, N)
    tensors = random_tensors("hyb", 2, N, K)
    wanted = list(tensors[name].shape)
    with pytest.raises(ValueError) as error:
        load(layer, {name: change(tensors[name])})
    message = str(error.value)
    assert f"m.layer: tensor {name} is " in message and f"{wanted}: the checkpoint is damaged" in message
    assert str(list(change(tensors[name]).shape)) in message


def test_unknown_shard_is_refused(set_rank, quant_config, random_tensors, load):
    layer = build(MergedColumnParallelLinear, quant_config(), K, [N, N], prefix="gate_up_proj")
    for shard in ("index_q", 2, -1, (), (0, 5)):
        with pytest.raises(ValueError, match="gate_up_proj: shard id"):
            load(layer, random_tensors("1mad", 2, N, K), shard)


def test_projections_must_share_su(set_rank, quant_config, random_tensors, load):
    layer = build(MergedColumnParallelLinear, quant_config(), K, [N, N], prefix="gate_up_proj")
    tensors = random_tensors("1mad", 2, N, K)
    load(layer, tensors, 0)
    with pytest.raises(ValueError, match="up_proj: su differs .* gate_up_proj"):
        load(layer, {"su": -tensors["su"]}, 1)


def test_widest_rate_is_allocated_and_narrower_shards_fit(set_rank, quant_config, random_tensors, load):
    config = quant_config("1mad", 2, layers={"k_proj": ("1mad", 4), "v_proj": ("1mad", 3)})
    layer = build(QKVParallelLinear, config, K, 16, 4, 2, prefix="qkv_proj")
    disk = {s: random_tensors("1mad", b, n, K) for s, b, n in (("q", 2, 64), ("k", 4, 32), ("v", 3, 32))}
    for shard, tensors in disk.items():
        load(layer, tensors, shard)
    assert layer.packed.shape == (8, K * 4)
    assert torch.equal(layer.packed[:4, : K * 2], disk["q"]["packed"])
    assert torch.equal(layer.packed[4:6], disk["k"]["packed"])
    assert torch.equal(layer.packed[6:, : K * 3], disk["v"]["packed"])
    with pytest.raises(ValueError, match="q_proj: tensor packed is .* expected"):
        load(layer, {"packed": random_tensors("1mad", 4, 64, K)["packed"]}, "q")
    with pytest.raises(ValueError, match=r"one tensor in the checkpoint but has \[2, 3, 4\] bits"):
        load(layer, {"sv": torch.zeros(128).half()}, None)


def test_shards_without_a_name_of_their_own_need_one_rate(set_rank, quant_config):
    config = quant_config("1mad", 2, layers={"in_proj_z": ("1mad", 4)})
    config.packed_modules_mapping["in_proj_qkvz"] = ["in_proj_qkv", "in_proj_z"]
    with pytest.raises(ValueError, match="in_proj_qkvz has 4 shards made of in_proj_qkv, in_proj_z"):
        build(MergedColumnParallelLinear, config, K, [32, 32, 64, 64], prefix="in_proj_qkvz")


def test_blocks_must_have_the_same_size_on_every_rank(set_rank, quant_config, random_tensors, load):
    # On disk 32 + 16 + 32 = 80 outputs, in blocks of 16; a rank, with the one key head, holds 16 + 16 + 32 = 64.
    set_rank(0, 2)
    config = quant_config(hadamard_block=64)
    layer = build(QKVParallelLinear, config, K, 16, 2, 1, prefix="qkv_proj", v_head_size=32)
    with pytest.raises(ValueError, match=r"blocks of 16, .* shards of 16 \+ 16 \+ 32: .*--hadamard-block 16"):
        load(layer, random_tensors("1mad", 2, 80, K), None)
