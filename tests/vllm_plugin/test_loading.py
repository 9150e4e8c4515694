# SPDX-License-Identifier: Apache-2.0
"""What a layer refuses to load, in words that name layer, tensor, shapes and a remedy."""

import pytest
import torch
from served_layers import build, finish, put, quant_config, random_tensors
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

K, N = 64, 128
pytestmark = pytest.mark.usefixtures("set_rank")


def build_qkv(config, *heads, **kwargs):
    return build(QKVParallelLinear, config, K, *(heads or (16, 4, 2)), prefix="qkv_proj", **kwargs)


def test_full_width_rotation_cannot_be_split(set_rank):
    set_rank(0, 2)
    remedy = "requantize with --split and the number of ranks, or with --hadamard-block {}, or serve"
    with pytest.raises(ValueError, match="m.layer: output of size 128 is rotated as a whole.*" + remedy.format(64)):
        build(ColumnParallelLinear, quant_config(), K, N)
    with pytest.raises(ValueError, match="m.layer: input of size 64 is rotated as a whole.*" + remedy.format(32)):
        build(RowParallelLinear, quant_config(), K, N)
    with pytest.raises(ValueError, match="q_proj: .*whole"):
        build_qkv(quant_config())


def test_blocks_must_fit_the_shares(set_rank):
    set_rank(0, 2)
    config = quant_config(hadamard_block=128)
    with pytest.raises(ValueError, match="input of size 64 is rotated in blocks of 64.*--hadamard-block 32"):
        build(RowParallelLinear, config, K, N)
    layer = build(ColumnParallelLinear, config, K, N)
    with pytest.raises(ValueError, match="output of size 128 is rotated in blocks of 128.*--hadamard-block 64"):
        put(layer, random_tensors("1mad", 2, N, K))
    # Fused on disk, each part alone has whole blocks of 64; all three together, 64 + 32 + 32, have not.
    layer = build_qkv(quant_config(hadamard_block=64), 32, 4, 2)
    with pytest.raises(ValueError, match=r"shares of 64 \+ 32 \+ 32: .*--hadamard-block 32"):
        put(layer, random_tensors("1mad", 2, 256, K), None)


def test_blocks_must_have_the_same_size_on_every_rank(set_rank):
    # On disk 32 + 16 + 32 = 80 outputs, in blocks of 16; a rank, with the one key head, holds 16 + 16 + 32 = 64.
    set_rank(0, 2)
    layer = build_qkv(quant_config(hadamard_block=64), 16, 2, 1, v_head_size=32)
    with pytest.raises(ValueError, match=r"blocks of 16, .* shares of 16 \+ 16 \+ 32: .*--hadamard-block 16"):
        put(layer, random_tensors("1mad", 2, 80, K), None)


def test_sizes_must_hold_whole_tiles():
    for sizes in ((K, 40), (40, K)):
        with pytest.raises(ValueError, match="m.layer.*multiples of 16"):
            build(ColumnParallelLinear, quant_config(), *sizes)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("packed", lambda t: t[:-1]),
        ("packed", lambda t: t[:, :-1]),
        ("packed", lambda t: t.int()),
        ("packed", lambda t: t[None]),
        ("sv", lambda t: t[:-1]),
        ("sv", lambda t: t.double()),
        ("su", lambda t: t[0]),
        ("table", lambda t: t[:-1]),
    ],
)
@pytest.mark.parametrize(("kind", "size"), [(ColumnParallelLinear, 1), (RowParallelLinear, 2), (ReplicatedLinear, 2)])
def test_damaged_tensor_is_named(set_rank, kind, size, name, change):
    set_rank(0, size)
    layer = build(kind, quant_config("hyb", 2, hadamard_block=16), K, N)
    tensor = random_tensors("hyb", 2, N, K)[name]
    with pytest.raises(ValueError) as error:
        put(layer, {name: change(tensor)})
    message = str(error.value)
    assert f"m.layer: tensor {name} is {change(tensor).dtype} {list(change(tensor).shape)}, expected " in message
    assert f"{list(tensor.shape)}: the checkpoint is damaged" in message


def test_unknown_shard_is_refused():
    layer = build(MergedColumnParallelLinear, quant_config(), K, [N, N], prefix="gate_up_proj")
    for shard in ("index_q", 2, -1, (), (0, 5)):
        with pytest.raises(ValueError, match="gate_up_proj: shard id"):
            put(layer, random_tensors("1mad", 2, N, K), shard)


def test_a_tensor_has_the_format_of_its_part():
    layer = build_qkv(quant_config(layers={"k_proj": ("1mad", 4), "v_proj": ("e8p", 3)}))
    with pytest.raises(ValueError, match="q_proj: tensor packed is .* expected"):
        put(layer, {"packed": random_tensors("1mad", 4, 64, K)["packed"]}, "q")
    with pytest.raises(ValueError, match="q_proj: tensor codes is .* expected none"):
        put(layer, {"codes": random_tensors("e8p", 3, 64, K)["codes"]}, "q")
    with pytest.raises(ValueError, match="said to be 1mad at 2 bits and 1mad at 4 bits and e8p at 3 bits: give it one"):
        put(layer, {"sv": torch.zeros(128).half()}, None)


def test_parts_without_a_name_of_their_own_need_one_format():
    config = quant_config(layers={"in_proj_z": ("e8p", 2)})
    config.packed_modules_mapping["in_proj_qkvz"] = ["in_proj_qkv", "in_proj_z"]
    with pytest.raises(ValueError, match="in_proj_qkvz has 4 parts made of in_proj_qkv, in_proj_z with 1mad at 2 bits"):
        build(MergedColumnParallelLinear, config, K, [32, 32, 64, 64], prefix="in_proj_qkvz")


@pytest.mark.parametrize("name", ["residual_codes", "codes", "su", "sv"])
def test_missing_tensor_is_named(name):
    layer = build(MergedColumnParallelLinear, quant_config("e8p", 3), K, [N, N], prefix="gate_up_proj")
    tensors = random_tensors("e8p", 3, N, K)
    put(layer, tensors, 0)
    put(layer, {other: tensor for other, tensor in tensors.items() if other != name}, 1)
    with pytest.raises(ValueError, match=f"gate_up_proj: tensor {name} of up_proj is not in the checkpoint"):
        finish(layer)


@pytest.mark.parametrize("twice", [["packed", "sv", "su"], ["packed"]])
def test_part_stored_twice_is_refused(twice):
    layer = build(MergedColumnParallelLinear, quant_config(), K, [N, N], prefix="gate_up_proj")
    put(layer, random_tensors("1mad", 2, 2 * N, K), None)
    tensors = random_tensors("1mad", 2, N, K)
    put(layer, {name: tensors[name] for name in twice}, 0)
    with pytest.raises(ValueError, match="both fused and by part"):
        finish(layer)
